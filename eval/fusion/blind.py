"""Run a batch with text blind to vision in some layers, and share between such runs what they have in common.

`Runner` answers under a policy, whole prompt by whole prompt. `WholeRuns` and `CachedRuns` start where another run
parts: `WholeRuns` works for any model and prompt, `CachedRuns` continues the text behind the images on their KV cache.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from latefusion.data.collate import IGNORE
from latefusion.data.prompt_batches import Batch
from latefusion.eval.fusion.effects import Answers
from latefusion.models.attach import Attachment
from latefusion.models.executor.cache import SUPPORTED, ScheduledLayer, ScheduledSlidingLayer, Track
from latefusion.models.executor.layout import Layout
from latefusion.models.executor.partial import input_of_layer, starting_at
from latefusion.models.executor.recurrence import recurrence_of
from latefusion.models.policies.base import AttentionCall, Policy, Prompt
from latefusion.models.schedule import VisionSchedule

SPLIT_TOLERANCE = {torch.float32: 1e-6}  # nats between a prompt computed in two parts and in one
HALF_TOLERANCE = 1e-2

Key = tuple[str, int]  # kind and layer of a knock-out, see `knockouts.KINDS`

# ---------------------------------------------------------------- one forward


@dataclass(frozen=True)
class KnockOut:
    """A policy: in `layers`, no text token after the first vision token sees any vision token.

    Everything else is as in the dense model: vision tokens are computed in every layer, and attention of the text is
    renormalised over what is left ("attention knock-out", Geva et al., arXiv 2304.14767). Other policies apply to the
    prompt's text alone; this one applies to the answer as well. In a layer that runs a recurrence, text reads text
    alone; `without_vision` sees to that.
    """

    layers: Collection[int]

    def validate(self, num_layers: int) -> None:
        for layer in self.layers:
            if not 0 <= layer < num_layers:
                raise ValueError(
                    f"layers names layer {layer}, but the decoder has layers 0 to {num_layers - 1}; choose among them."
                )

    def begin(self, prompt: Prompt) -> _KnockOutDecision:
        return _KnockOutDecision(self, prompt)


class _KnockOutDecision:
    fusion_layer = None

    def __init__(self, policy: KnockOut, prompt: Prompt):
        self.prompt, self.watch = prompt, set(prompt.attending(policy.layers))
        blind = prompt.real & ~prompt.vision & (prompt.vision.cumsum(1) > 0)  # bool [B, T]
        most = int(blind.sum(1).amax())
        self.rows = blind.int().argsort(dim=1, descending=True, stable=True)[:, :most]  # int64 [B, R]
        self.valid = blind.gather(1, self.rows)  # bool [B, R], false where a sample has fewer rows

    def select(self, layer: int) -> None:
        return None

    @torch.no_grad()
    def attended(self, layer: int, call: AttentionCall) -> Tensor | None:
        if not self.rows.shape[1]:
            return None
        rows = call.compact_rows(self.rows)
        weights = call.weights(rows)  # [B, H, R, K]
        keys = call.key_index  # [B, K]
        hidden = self.prompt.vision.gather(1, keys.clamp(min=0)) & (keys >= 0)
        weights = weights.masked_fill(hidden[:, None, None, :], 0)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        grouped = weights.unflatten(1, (call.value.shape[1], -1))  # [B, Hkv, G, R, K]
        blind = (grouped @ call.value.float()[:, :, None]).flatten(1, 2).transpose(1, 2)  # [B, R, H, D]
        index = rows[:, :, None, None].expand(-1, -1, *call.output.shape[2:])
        blind = torch.where(
            self.valid[:, :, None, None], blind.to(call.output.dtype), call.output.gather(1, index)
        )
        return call.output.scatter(1, index, blind)


@contextmanager
def without_vision(layers: Sequence[Any], batch: Batch) -> Iterator[None]:
    """The recurrences of these layers run twice: over all tokens, and for the text over text alone."""
    text = batch.real & ~batch.vision
    layout = Layout.build(text, text.sum(1).tolist())

    def join(mixer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        rows = {"hidden_states": layout.take(kwargs["hidden_states"]), "attention_mask": layout.valid}
        return layout.put(output, mixer.forward(**{**kwargs, **rows}))

    mixers = [mixer for mixer in map(recurrence_of, layers) if mixer is not None]
    handles = [mixer.register_forward_hook(join, with_kwargs=True) for mixer in mixers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen(layers: Sequence[Any], vision: Tensor) -> Iterator[None]:
    """Vision tokens skip attention and MLP of these layers; text still sees them as they are.

    Args:
        layers: some of the decoder's, run over all tokens (under a policy that removes none).
        vision: bool `[B, T]`.
    """

    def keep(layer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return torch.where(vision[..., None], args[0], output)

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Runner:
    """Runs one model over one batch, whose images are encoded, without copying the model."""

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
        blind = [self.layers[i] for i in policy.layers] if isinstance(policy, KnockOut) else []
        with (
            torch.no_grad(),
            without_vision(blind, batch),
            self.attachment.using(policy),
            self.attachment.queries(batch.queries, answers=batch.labels != IGNORE),
        ):
            logits = self.model(**batch.fresh(), use_cache=False, logits_to_keep=columns).logits
        return Answers.of(batch, logits, columns)


# ---------------------------------------------------------------- runs that start where they part


class Runs(Protocol):
    """Runs the decoder from the input of layer `first`: `state` `[B, T, D]`, or None for layer 0's own input.

    Text does not see vision in the layers `hidden`.
    """

    layers: int

    def state(self, hidden: Collection[int], first: int, state: Tensor | None, last: int) -> Tensor:
        """The input of layer `last`, `[B, T, D]`."""

    def answers(self, hidden: Collection[int], first: int, state: Tensor | None) -> Answers:
        """The answers at the end of the decoder."""

    def late_and_frozen(self, keys: Collection[Key]) -> Iterator[tuple[Key, Answers]]:
        """The knock-outs `late` and `frozen` among `keys`; no other method may be called after it."""


class WholeRuns:
    """`Runs` over whole prompts: text may stand between images, images may see the text behind them (PaliGemma)."""

    def __init__(self, runner: Runner):
        self.runner, self.layers = runner, len(runner.layers)

    def state(self, hidden: Collection[int], first: int, state: Tensor | None, last: int) -> Tensor:
        return self._state(self._policy(hidden), first, state, last)

    def answers(self, hidden: Collection[int], first: int, state: Tensor | None) -> Answers:
        return self._answers(self._policy(hidden), first, state)

    def late_and_frozen(self, keys: Collection[Key]) -> Iterator[tuple[Key, Answers]]:
        runner, n = self.runner, self.layers
        text: Tensor | None = None  # text without vision, compact: the input of `late i`
        still: Tensor | None = None  # all tokens, vision as the projector made it: the input of `frozen i`
        text_alone = VisionSchedule(enter=n - 1)
        any_frozen = any(kind == "frozen" for kind, _ in keys)
        for i in range(n):
            if ("late", i) in keys:
                yield ("late", i), self._answers(VisionSchedule(enter=i), i, text)
            if ("frozen", i) in keys:
                yield ("frozen", i), self.answers((), i, still)
            if i < n - 1:
                text = self._state(text_alone, i, text, i + 1)
                if any_frozen:
                    with frozen(runner.layers[i : i + 1], runner.batch.vision):
                        still = self.state((), i, still, i + 1)

    def _policy(self, hidden: Collection[int]) -> Policy:
        if not hidden:
            return VisionSchedule()
        if min(hidden) > 0 and set(hidden) == set(range(min(hidden), self.layers)):
            return VisionSchedule(exit=min(hidden))  # vision that no text sees need not be computed
        return KnockOut(hidden)

    def _state(self, policy: Policy, first: int, state: Tensor | None, last: int) -> Tensor:
        layers = self.runner.layers
        with starting_at(layers, first, state):
            return input_of_layer(layers, last, lambda: self.runner.answers(policy))

    def _answers(self, policy: Policy, first: int, state: Tensor | None) -> Answers:
        with starting_at(self.runner.layers, first, state):
            return self.runner.answers(policy)


class CachedRuns:
    """`Runs` of the text behind the images on their KV cache, without the vision entries of the hidden layers.

    The head, everything up to the last vision token, is the same under every prefix, suffix and single knock-out, so
    it runs once. `late a` and `frozen a` share a head that is computed from layer a on. At any time the cache of one
    head is held.
    """

    def __init__(self, runner: Runner, cut: int):
        self.runner, self.cut, self.batch = runner, cut, runner.batch
        self.layers = len(runner.layers)
        text = (~self.batch.vision[0, :cut]).nonzero().flatten()  # [P], the same in every sample
        self.track = Track(head=text.expand(self.batch.size, -1), tail=0, length=cut)
        self.positions: Tensor | None = (
            None  # [..., B, T] where the model makes them of the whole prompt (M-RoPE)
        )
        self.head: list[DynamicLayer] = []
        self.text: list[DynamicLayer] = []  # the head's, without its vision entries

    @classmethod
    def of(cls, runner: Runner, positions: Sequence[Tensor] = ()) -> CachedRuns | None:
        """Prepare cached runs of a batch; None if the heads differ between samples or text stands between images.

        Args:
            positions: what `position_ids_of` recorded in a forward over the whole batch.
        """
        vision, real = runner.batch.vision, runner.batch.real
        cut = int(vision[0].nonzero().amax()) + 1
        first = int(vision[0].int().argmax())
        alike = bool((vision == vision[:1]).all()) and bool(real[:, :cut].all())
        if not (alike and bool(vision[0, first:cut].all())):
            return None
        runs = cls(runner, cut)
        runs.positions = positions[0] if positions else None
        return runs

    def dense(self) -> Answers | None:
        """The dense answers, computed in two parts; None if the head is not `cacheable`."""
        if not cacheable(self.runner.model.config, self.cut):
            return None
        self.head = self._run_head()
        self.text = [_without_vision(layer, self.track) for layer in self.head]
        return self.answers((), 0, None)

    def state(self, hidden: Collection[int], first: int, state: Tensor | None, last: int) -> Tensor:
        return self._state(self._cache_of(hidden), first, state, last)

    def answers(self, hidden: Collection[int], first: int, state: Tensor | None) -> Answers:
        return self._answers(self._cache_of(hidden), first, state)

    def late_and_frozen(self, keys: Collection[Key]) -> Iterator[tuple[Key, Answers]]:
        self.head, text, layers = [], self.text, self.runner.layers  # the dense head is dropped
        blind: Tensor | None = None  # of the rest, without vision
        still: Tensor | None = None  # of the rest, which sees vision as the projector made it
        head: Tensor | None = None  # of the head, its vision as the projector made it
        any_frozen = any(kind == "frozen" for kind, _ in keys)
        for i in range(self.layers):
            if ("late", i) in keys or ("frozen", i) in keys:
                moving = self._run_head(i, head)
                for kind, state in (("late", blind), ("frozen", still)):
                    if (kind, i) in keys:
                        yield (kind, i), self._answers([*text[:i], *moving[i:]], i, state)
                del moving
            if i < self.layers - 1:
                cache = _empty_cache(self.runner.model.config)
                with (
                    frozen(layers[i : i + 1], self.batch.vision[:, : self.cut]),
                    starting_at(layers, i, head),
                ):
                    head = input_of_layer(layers, i + 1, lambda cache=cache: self._forward_head(cache))  # type: ignore[misc]
                if any_frozen:
                    still = self._state([*text[:i], cache.layers[i], *text[i + 1 :]], i, still, i + 1)
                blind = self._state(text, i, blind, i + 1)

    def _cache_of(self, hidden: Collection[int]) -> list[DynamicLayer]:
        pairs = zip(self.head, self.text, strict=True)
        return [text if i in hidden else head for i, (head, text) in enumerate(pairs)]

    def _state(self, cache: Sequence[Any], first: int, state: Tensor | None, last: int) -> Tensor:
        layers = self.runner.layers
        with starting_at(layers, first, state):
            return input_of_layer(layers, last, lambda: self._forward_rest(cache))

    def _answers(self, cache: Sequence[Any], first: int, state: Tensor | None) -> Answers:
        with starting_at(self.runner.layers, first, state):
            logits = self._forward_rest(cache)
        columns = self.batch.columns
        return Answers.of(self.batch, logits[:, columns - self.cut], columns)

    def _forward_rest(self, cache: Sequence[Any]) -> Tensor:
        inputs = self.batch.rest(self.cut)
        if self.positions is not None:
            inputs["position_ids"] = self.positions[..., self.cut :]
        with torch.no_grad():
            return self.runner.model(**inputs, past_key_values=_fork(cache), use_cache=True).logits

    def _run_head(self, first: int = 0, state: Tensor | None = None) -> list[Any]:
        """The cache of the head's layers from `first` on."""
        cache = _empty_cache(self.runner.model.config)
        with starting_at(self.runner.layers, first, state):
            self._forward_head(cache)
        return cache.layers

    def _forward_head(self, cache: DynamicCache) -> None:
        inputs = self.batch.head(self.cut)
        if self.positions is not None:
            inputs["position_ids"] = self.positions[..., : self.cut]
        with torch.no_grad(), self.runner.attachment.using(VisionSchedule()):
            self.runner.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)


def cheapest_runs(runner: Runner) -> tuple[Answers, Answers, Runs]:
    """The dense answers, the same as computed by the cheapest `Runs` that reproduce them, and those runs.

    Raises:
        ValueError: the model's logits are not finite.
    """
    with position_ids_of(runner.model.get_decoder()) as positions:
        dense = runner.answers(VisionSchedule())
    if not bool(dense.log_probs.isfinite().all()):
        raise ValueError(
            f"the model's logits are not finite on sample {runner.batch.names[0]} or one beside it; load it with "
            "dtype=float32."
        )
    cached = CachedRuns.of(runner, positions)
    parts = None if cached is None else cached.dense()
    if cached is not None and parts is not None:
        tolerance = SPLIT_TOLERANCE.get(runner.model.dtype, HALF_TOLERANCE)
        if max(dense.effect(parts).kl) <= tolerance:
            return dense, parts, cached
    return dense, dense, WholeRuns(runner)


def cacheable(config: PretrainedConfig, length: int) -> bool:
    """Whether every cache layer keeps all of `length` tokens (local attention keeps a window) in a known form."""
    return all(
        type(layer) in SUPPORTED
        and not (isinstance(layer, DynamicSlidingWindowLayer) and length >= layer.sliding_window)
        for layer in _empty_cache(config).layers
    )


def _empty_cache(config: PretrainedConfig) -> DynamicCache:
    return DynamicCache(config=config.get_text_config())


def _without_vision(layer: DynamicLayer, track: Track) -> ScheduledLayer | ScheduledSlidingLayer:
    """A cache layer with only those entries of `layer`, a full one, that `track` names."""
    assert track.head is not None and layer.keys is not None and layer.values is not None
    kind = SUPPORTED[type(layer)]
    text = kind.__new__(kind)
    text.__dict__.update(layer.__dict__)
    text.keys, text.values = layer.keys[:, :, track.head[0]], layer.values[:, :, track.head[0]]
    text.track = track
    return text


def _fork(layers: Sequence[DynamicLayer]) -> DynamicCache:
    """A cache with these layers' entries that grows without touching them."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = None
    for layer in layers:
        copy = type(layer).__new__(type(layer))
        copy.__dict__.update(layer.__dict__)  # shared tensors are safe: a cache's `update` makes new ones
        cache.layers.append(copy)
    return cache


@contextmanager
def position_ids_of(decoder: Any) -> Iterator[list[Tensor]]:
    """Record the position ids that the model passes to its decoder in the forwards inside, if it passes any."""
    positions: list[Tensor] = []

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("position_ids") is not None:
            positions.append(kwargs["position_ids"])

    handle = decoder.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield positions
    finally:
        handle.remove()
