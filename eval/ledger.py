"""Results of interrupted work on disk, so that a second start goes on where the first one stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Who shares the work: this process's number, how many there are, and how to wait for all of them."""

    rank: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None

    @property
    def main(self) -> bool:
        return self.rank == 0


class Ledger:
    """Results by key, written to disk as soon as they are made.

    A process writes to a file of its own (`NAME.jsonl` the main one, `NAME.1.jsonl` the second, ...) and reads all of
    them. The first line of a file names what its results belong to: a file of another identity is not read, and is
    overwritten by the process that owns it. A line that an interruption cut off is dropped.

    Args:
        path: JSON lines of the main process.
        identity: everything that a result depends on, as JSON can hold it.
        processes: those that share the work; None: this one alone.

    Attributes:
        values: results by key, as JSON gives them back.
        resumed: how many of them an earlier start has left.
    """

    def __init__(self, path: Path, identity: Any, processes: Processes | None = None):
        self.path, self.processes = path, processes or Processes()
        described = json.dumps(identity, sort_keys=True, default=str)
        self.identity = hashlib.sha256(described.encode()).hexdigest()[:16]
        rank = self.processes.rank
        self.file = path if rank == 0 else path.with_suffix(f".{rank}{path.suffix}")
        self.values: dict[str, Any] = {}
        self.read()
        self.resumed = len(self.values)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")  # an interruption here loses nothing
        lines = [{"identity": self.identity}, *_results(self.file, self.identity)]
        part.write_text("".join(json.dumps(line) + "\n" for line in lines))
        part.replace(self.file)

    def read(self) -> None:
        """Take in what all processes have written."""
        for file in self.files():
            self.values |= {line["key"]: line["value"] for line in _results(file, self.identity)}

    def files(self) -> list[Path]:
        """The files of all processes."""
        return sorted(self.path.parent.glob(f"{self.path.stem}.*{self.path.suffix[1:]}"))

    def add(self, results: Mapping[str, Any]) -> None:
        """Add results and write them down."""
        with self.file.open("a") as file:
            for key, value in results.items():
                line = json.dumps({"key": key, "value": value})
                self.values[key] = json.loads(line)["value"]
                file.write(line + "\n")

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """The result kept under `key`, computed now if it is missing."""
        if key not in self.values:
            self.add({key: compute()})
        return self.values[key]

    def together(self) -> None:
        """Wait for all processes and read what they wrote."""
        self.processes.wait()
        if self.processes.count > 1:
            self.read()

    def close(self) -> None:
        """Delete the files: the work is finished."""
        if self.processes.main:
            for file in self.files():
                file.unlink()


def _results(file: Path, identity: str) -> list[dict[str, Any]]:
    """The results in a file; none if it belongs to other work."""
    lines = file.read_text().splitlines() if file.exists() else []
    whole = [line for line in map(_parsed, lines) if line is not None]
    return whole[1:] if whole and whole[0] == {"identity": identity} else []


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
