"""Answers of an evaluation that has not finished, on disk, so that it goes on where it stopped.

A process appends what it was answered to a file of its own; every process reads them all. A finished evaluation
leaves none behind, so only an interrupted one is ever resumed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latefusion.eval.comparison.answers import Answer

FOLDER = "unfinished"


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Who else evaluates: this process's number, how many there are, and how to wait for all of them."""

    rank: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None

    @property
    def main(self) -> bool:
        return self.rank == 0


class Ledger:
    """Answers so far.

    Args:
        folder: of the report.
        identity: everything that an answer depends on; answers of another identity are thrown away.
    """

    def __init__(self, folder: Path, identity: Any, processes: Processes):
        self.folder, self.processes = folder / FOLDER, processes
        name = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
        stamp = self.folder / "identity"
        if processes.main and (not stamp.is_file() or stamp.read_text() != name):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            stamp.write_text(name)
        processes.wait()
        self.answers: dict[tuple[str, str, str], Answer] = {}
        self.read()
        self.resumed = len(self.answers)

    def read(self) -> None:
        """Take in what all processes have written; a line cut off by an interruption does not count."""
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_text().splitlines():
                try:
                    answer = Answer.from_dict(json.loads(line))
                except json.JSONDecodeError:
                    continue
                self.answers[answer.system, answer.task, answer.id] = answer

    def add(self, answers: Iterable[Answer]) -> None:
        with (self.folder / f"{self.processes.rank}.jsonl").open("a") as lines:
            lines.write("\n")  # what stands before may have been cut off
            for answer in answers:
                self.answers[answer.system, answer.task, answer.id] = answer
                lines.write(json.dumps(answer.to_dict()) + "\n")

    def together(self) -> None:
        """Wait for all processes and read what they wrote."""
        self.processes.wait()
        if self.processes.count > 1:
            self.read()

    def close(self) -> None:
        """The evaluation is finished."""
        if self.processes.main:
            shutil.rmtree(self.folder)
