"""What the answer loses when vision reaches text in fewer layers, and when vision tokens are computed in fewer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from latefusion.eval.profiling.knockout import KnockOut, frozen, same_cache, without_vision
from latefusion.eval.profiling.samples import Batch
from latefusion.models.attach import Attachment
from latefusion.models.cache import Track
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


@dataclass(frozen=True)
class Effect:
    """What one change did to each sample of a batch.

    Attributes:
        kl: nats, KL(dense || changed) of the next-token distributions, mean over the sample's answer tokens.
        right: whether the likeliest token is the label at every answer token (what greedy decoding would write).
    """

    kl: list[float]
    right: list[bool]


@dataclass(frozen=True)
class Answers:
    """Log-probabilities at a batch's answer tokens, float32 `[N, V]`, and the labels `[N]` they are judged by."""

    log_probs: Tensor
    targets: Tensor
    sample: Tensor  # int64 [N]

    @classmethod
    def of(cls, batch: Batch, logits: Tensor, columns: Tensor) -> Answers:
        """Args: logits `[B, R, V]` of the positions `columns` `[R]`."""
        targets = batch.labels[:, columns + 1]  # [B, R]
        learnt = targets != -100
        sample = torch.arange(len(targets), device=targets.device)[:, None].expand_as(targets)
        return cls(F.log_softmax(logits[learnt].float(), -1), targets[learnt], sample[learnt])

    def effect(self, changed: Answers) -> Effect:
        """What turned these answers into `changed`."""
        kl = F.kl_div(changed.log_probs, self.log_probs, log_target=True, reduction="none").sum(-1)  # [N]
        wrong = changed.log_probs.argmax(-1) != self.targets
        n = int(self.sample.max()) + 1
        zero = torch.zeros(n, dtype=torch.float64, device=kl.device)
        count = zero.index_add(0, self.sample, torch.ones_like(kl, dtype=torch.float64))
        mean = zero.index_add(0, self.sample, kl.clamp(min=0).double()) / count
        errors = zero.index_add(0, self.sample, wrong.double())
        return Effect(mean.tolist(), (errors == 0).tolist())


@dataclass
class Runner:
    """Answers of one model to one batch under policies and knock-outs.

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
        """The answers of a whole forward under `policy`."""
        batch = self.batch
        columns = batch.columns
        with (
            torch.no_grad(),
            self.attachment.using(policy),
            self.attachment.queries(batch.queries, answers=batch.labels != -100),
        ):
            logits = self.model(**batch.fresh(), use_cache=False, logits_to_keep=columns).logits
        return Answers.of(batch, logits, columns)

    def effects(
        self, wanted: Sequence[tuple[str, int]], done: Callable[[], None] = lambda: None
    ) -> tuple[Effect, dict[tuple[str, int], Effect]]:
        """The dense model's own answers (`kl` 0) and the effect of each knock-out, none of which copies the model."""
        with positions_of(self.model.get_decoder()) as positions:
            dense = self.answers(VisionSchedule())
        if not bool(dense.log_probs.isfinite().all()):
            raise ValueError(
                f"the model's logits are not finite on sample {self.batch.names[0]} or one beside it; load it with "
                "dtype=float32."
            )
        found = {}
        split = Continued.of(self, positions)
        base = None if split is None else split.dense()
        if split is not None and base is not None and self.agree(dense, base):
            for key, answers in split.run(wanted):
                found[key] = base.effect(answers)
                done()
        else:
            for kind, layer in wanted:
                found[kind, layer] = dense.effect(self.whole(kind, layer))
                done()
        return dense.effect(dense), found

    def agree(self, whole: Answers, parts: Answers) -> bool:
        """Whether the prompt, computed in two parts, is answered as it is in one."""
        return max(whole.effect(parts).kl) <= SPLIT_TOLERANCE.get(self.model.dtype, HALF_TOLERANCE)

    def whole(self, kind: str, layer: int) -> Answers:
        """One knock-out by a forward over the whole prompt: any model, any prompt."""
        if kind == "late":
            return self.answers(VisionSchedule(enter=layer))
        if kind == "suffix" and layer > 0:
            return self.answers(VisionSchedule(exit=layer))  # what no text sees need not be computed
        if kind == "frozen":
            with frozen(self.layers, self.batch.vision, layer):
                return self.answers(VisionSchedule())
        return self.answers(KnockOut(hidden_layers(kind, layer, len(self.layers))))


def hidden_layers(kind: str, layer: int, layers: int) -> range:
    """Where text does not see vision under a knock-out."""
    spans = {
        "prefix": (0, layer),
        "late": (0, layer),
        "suffix": (layer, layers),
        "single": (layer, layer + 1),
    }
    return range(*spans.get(kind, (0, 0)))


class Continued:
    """Knock-outs of prompts whose images all come before the text that asks, at the cost of that text.

    Such a prompt's head, up to its last vision token, is the same under every prefix, suffix and single knock-out: it
    runs once, and the rest follows on its KV cache, less the vision entries of the layers knocked out. `late a` needs
    a head of its own from layer a on, which `frozen a` shares: before a, frozen vision tokens are what they were, and
    their entries come from one head that is frozen throughout.

    Together for L layers at most `2 + L / 2` heads and 5 L rests. At any time one head's cache is held.
    """

    def __init__(self, runner: Runner, cut: int):
        self.runner, self.cut, self.batch = runner, cut, runner.batch
        text = (~self.batch.vision[0, :cut]).nonzero().flatten()  # [P], the same in every sample
        self.track = Track(head=text.expand(self.batch.size, -1), tail=0, length=cut)
        self.positions: Tensor | None = (
            None  # [..., B, T] where the model makes them from the whole prompt (M-RoPE)
        )

    @classmethod
    def of(cls, runner: Runner, positions: Sequence[Tensor] = ()) -> Continued | None:
        """None where heads differ between samples or text stands between images.

        Args:
            positions: what `positions_of` saw of the batch's whole forward.
        """
        vision, real = runner.batch.vision, runner.batch.real
        cut = int(vision[0].nonzero().amax()) + 1
        first = int(vision[0].int().argmax())
        alike = bool((vision == vision[:1]).all()) and bool(real[:, :cut].all())
        if not (alike and bool(vision[0, first:cut].all())):
            return None
        found = cls(runner, cut)
        found.positions = positions[0] if positions else None
        return found

    def dense(self) -> Answers | None:
        """The dense answers, in two parts; None if a cache layer keeps less than it is given (local attention)."""
        self.head = self._run_head(VisionSchedule())
        plain = all(type(layer) is DynamicLayer for layer in self.head)
        return self.rest(self.head) if plain else None

    def run(self, wanted: Sequence[tuple[str, int]]) -> Iterator[tuple[tuple[str, int], Answers]]:
        """The answers under each knock-out, in an order that holds as few entries as can be."""
        n = len(self.runner.layers)
        for kind, layer in wanted:
            if kind in ("prefix", "suffix", "single"):
                yield (kind, layer), self.blind(hidden_layers(kind, layer, n))
        del self.head
        late = sorted({layer for kind, layer in wanted if kind in ("late", "frozen")}, reverse=True)
        if any(kind == "frozen" for kind, _ in wanted):
            with frozen(self.runner.layers, self.batch.vision[:, : self.cut], n):
                still = self._run_head(VisionSchedule())
        for layer in late:
            moving = self._run_head(VisionSchedule(enter=layer))
            if ("late", layer) in wanted:
                yield ("late", layer), self.rest(moving)
            if ("frozen", layer) in wanted:
                del still[layer:]
                yield ("frozen", layer), self.rest([*still, *moving[layer:]])
            del moving

    def blind(self, hidden: Collection[int]) -> Answers:
        """Text does not see vision in the layers `hidden`; after `dense`."""
        return self.rest(
            [without_vision(layer, self.track) if i in hidden else layer for i, layer in enumerate(self.head)]
        )

    def _run_head(self, policy: Policy) -> list[DynamicLayer]:
        attachment, model = self.runner.attachment, self.runner.model
        inputs = self.batch.head(self.cut)
        if self.positions is not None:
            inputs["position_ids"] = self.positions[..., : self.cut]
        with torch.no_grad(), attachment.using(policy):
            out = model(**inputs, use_cache=True, logits_to_keep=1)
        return list(out.past_key_values.layers)

    def rest(self, layers: Sequence[DynamicLayer]) -> Answers:
        inputs = self.batch.rest(self.cut)
        if self.positions is not None:
            inputs["position_ids"] = self.positions[..., self.cut :]
        with torch.no_grad():
            out = self.runner.model(**inputs, past_key_values=same_cache(layers), use_cache=True)
        columns = self.batch.columns
        return Answers.of(self.batch, out.logits[:, columns - self.cut], columns)


@contextmanager
def positions_of(decoder: Any) -> Iterator[list[Tensor]]:
    """Position ids that the model makes for its decoder in the forwards inside, if it makes any."""
    found: list[Tensor] = []

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("position_ids") is not None:
            found.append(kwargs["position_ids"])

    handle = decoder.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()
