"""What a profile has measured so far, one line each, so that a second run goes on where the first one stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Ledger:
    """Measurements by key, written to `path` as soon as they are made.

    A file that belongs to another profile (other model, data, samples) is begun anew; a last line that was cut off
    is dropped.

    Args:
        path: JSON lines; the first names what the others belong to.
        about: what the measurements depend on.
    """

    def __init__(self, path: Path, about: dict[str, Any]):
        self.path = path
        self.about = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        self.found: dict[str, Any] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in map(_parsed, lines) if line is not None]
        if kept and kept[0] == {"about": self.about}:
            self.found = {line["key"]: line["value"] for line in kept[1:]}
        self.resumed = len(self.found)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")  # nothing is lost where this is interrupted
        with part.open("w") as file:
            file.write(json.dumps({"about": self.about}) + "\n")
            file.writelines(
                json.dumps({"key": key, "value": value}) + "\n" for key, value in self.found.items()
            )
        part.replace(path)

    def get(self, key: str, measure: Callable[[], Any]) -> Any:
        """What was measured under `key`, now if it never was. Values are what JSON gives back, in both cases."""
        if key not in self.found:
            value = json.loads(json.dumps(measure()))
            with self.path.open("a") as file:
                file.write(json.dumps({"key": key, "value": value}) + "\n")
            self.found[key] = value
        return self.found[key]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
