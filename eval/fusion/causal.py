"""What the answer loses when vision reaches text in fewer layers, and when vision tokens are computed in fewer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedModel

from latefusion.data.prompt_batches import Batch
from latefusion.eval.fusion.answers import Answers, Effect
from latefusion.eval.fusion.continued import Continued, positions_of
from latefusion.eval.fusion.paths import Key, Way, bands, blinded
from latefusion.eval.fusion.whole import Whole
from latefusion.models.attach import Attachment
from latefusion.models.policies.base import Policy
from latefusion.models.schedule import VisionSchedule

SPLIT_TOLERANCE = {torch.float32: 1e-6}  # nats; a prompt computed in two parts must answer as it does in one
HALF_TOLERANCE = 1e-2

KINDS = ("prefix", "suffix", "single", "frozen", "late")
"""The knock-outs, each by a layer (`[0, a)`, `[b, L)`: half-open, counted from 0):

- prefix a: text does not see vision in [0, a); vision tokens are computed as always.
- suffix b: text does not see vision in [b, L).
- single i: text does not see vision in layer i.
- frozen a: vision tokens skip attention and MLP in [0, a); text sees them, as the projector made them.
- late a: both: text sees no vision before a, where the projector's output enters (`VisionSchedule(enter=a)`).
"""


def knock_outs(layers: int) -> list[tuple[str, int]]:
    """All `(kind, layer)` of a decoder; those that would repeat another or the dense model are left out.

    `prefix L` (text never sees vision) is also `suffix 0`; `single 0` is `prefix 1`; `single L-1` is `suffix L-1`.
    """
    found = [("prefix", a) for a in range(1, layers + 1)]
    found += [("suffix", b) for b in range(1, layers)]
    found += [("single", i) for i in range(1, layers - 1)]
    return found + [(kind, a) for kind in ("frozen", "late") for a in range(1, layers)]


@dataclass
class Runner:
    """Answers of one model to one batch under policies and knock-outs, none of which copies the model.

    Args:
        model: the Hugging Face model; attachment: of it.
        batch: whose images are encoded.
    """

    model: PreTrainedModel
    attachment: Attachment
    batch: Batch
    layers: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.layers = list(self.model.get_decoder().layers)

    def answers(self, policy: Policy) -> Answers:
        """The answers of a forward over the whole prompt under `policy`."""
        batch = self.batch
        columns = batch.columns
        with (
            torch.no_grad(),
            self.attachment.using(policy),
            self.attachment.queries(batch.queries, answers=batch.labels != -100),
        ):
            logits = self.model(**batch.fresh(), use_cache=False, logits_to_keep=columns).logits
        return Answers.of(batch, logits, columns)

    def effects(self, wanted: Sequence[Key]) -> tuple[Effect, dict[Key, Effect]]:
        """The dense model's own answers (`kl` 0) and the effect of each knock-out."""
        dense, base, way = self.way()
        answers = chain(blinded(way, wanted), way.entering(wanted))
        return dense.effect(dense), {key: base.effect(changed) for key, changed in answers}

    def bands(self, pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], Effect]]:
        """The effect of text that sees vision in the layers [a, b) alone."""
        _, base, way = self.way()
        for pair, changed in bands(way, pairs):
            yield pair, base.effect(changed)

    def way(self) -> tuple[Answers, Answers, Way]:
        """The dense answers, the same by the cheapest way that gives them, and that way.

        Raises:
            ValueError: the model's logits are not finite.
        """
        with positions_of(self.model.get_decoder()) as positions:
            dense = self.answers(VisionSchedule())
        if not bool(dense.log_probs.isfinite().all()):
            raise ValueError(
                f"the model's logits are not finite on sample {self.batch.names[0]} or one beside it; load it with "
                "dtype=float32."
            )
        split = Continued.of(self, positions)
        base = None if split is None else split.dense()
        if split is not None and base is not None and self.agree(dense, base):
            return dense, base, split
        return dense, dense, Whole(self)

    def agree(self, whole: Answers, parts: Answers) -> bool:
        """Whether the prompt, computed in two parts, is answered as it is in one."""
        return max(whole.effect(parts).kl) <= SPLIT_TOLERANCE.get(self.model.dtype, HALF_TOLERANCE)
