"""What a run decides about its teacher and why, as its folder keeps it; without what trains.

`trust.py` measures. The bounds are between what eval/bench/distillation.py found (docs/distillation.md).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "trust.json"  # in the run's folder
KNOWS = (0.7, 0.95)  # shares of answers between which a teacher may know better than the labels
SURER = 2 / 3  # chance up to which it does; 0.5 if every label that differs is wrong


@dataclass(frozen=True)
class Decision:
    """Whether a run has a teacher, and why.

    Attributes:
        trust: `all`: it teaches every token. `none`: the run has no teacher.
        right, answers: how many of how many answers the teacher knew; None: it was not asked.
        surer: chance that it is surer of an answer that it knows than of one where the label differs; None: there are
            not both, or it was not asked.
    """

    trust: str
    right: int | None = None
    answers: int | None = None
    surer: float | None = None

    @classmethod
    def of(cls, right: int, answers: int, surer: float | None) -> Decision:
        """Decide: it teaches if it knows most answers, not all, and is as sure where the label differs."""
        better = KNOWS[0] * answers <= right <= KNOWS[1] * answers and (surer is None or surer <= SURER)
        return cls("all" if better else "none", right, answers, surer)

    def __str__(self) -> str:
        if self.right is None or self.answers is None:
            return (
                f"The teacher was not asked before training and teaches every token (kl.trust={self.trust})"
            )
        known = self.right / self.answers
        knows = f"The teacher knows {known:.0%} of {self.answers} training answers"
        if KNOWS[0] <= known <= KNOWS[1] and self.surer is not None:
            knows += f", and is surer of one it knows than of one where the label differs in {self.surer:.0%} of pairs"
        if self.trust == "all":
            return f"{knows}: the labels that differ may be wrong, so it teaches every token"
        if known < KNOWS[0]:
            why = "too few to teach them"
        elif known > KNOWS[1]:
            why = "the labels say the same"
        else:
            why = "where the label differs it does not know"
        return f"{knows}: {why}, so this run has no teacher (kl.trust=all has one all the same)"

    def write(self, folder: str | Path) -> None:
        (Path(folder) / FILE).write_text(json.dumps(asdict(self)) + "\n")


def read(folder: str | Path) -> Decision | None:
    """The decision of the run in a folder; None: it made none."""
    file = Path(folder) / FILE
    if not file.is_file():
        return None
    decision = Decision(**json.loads(file.read_text()))
    if decision.trust not in ("all", "none"):
        raise ValueError(
            f"{file} has trust={decision.trust}, which is of an earlier latefusion; train that run again."
        )
    return decision
