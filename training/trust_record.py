"""What a run decided about its teacher, as its folder keeps it; without what trains."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "trust.json"  # in the run's folder


@dataclass(frozen=True)
class Decision:
    """How the KL counts in a run, and why.

    Attributes:
        trust: `all` or `labels`.
        right, answers: how many of how many answers the teacher knew; None: it was not asked.
        surer: chance that it is surer of an answer that it knows than of one where the label differs; None: there are
            not both, or it was not asked.
    """

    trust: str
    right: int | None = None
    answers: int | None = None
    surer: float | None = None

    def __str__(self) -> str:
        how = {
            "all": "the KL of every token counts fully",
            "labels": "the KL of a token counts by the teacher's probability of its label",
        }[self.trust]
        if self.right is None or self.answers is None:
            return f"The teacher was not asked before training; {how} (kl.trust={self.trust})"
        sure = ""
        if self.surer is not None:
            sure = f", and is surer of one it knows than of one where the label differs in {self.surer:.0%} of pairs"
        return f"The teacher knows {self.right / self.answers:.0%} of {self.answers} training answers{sure}, so {how}"

    def write(self, folder: str | Path) -> None:
        (Path(folder) / FILE).write_text(json.dumps(asdict(self)) + "\n")


def read(folder: str | Path) -> Decision | None:
    """The decision of the run in a folder; None: it made none."""
    file = Path(folder) / FILE
    return Decision(**json.loads(file.read_text())) if file.is_file() else None
