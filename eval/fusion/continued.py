"""Knock-outs of prompts whose images all come before the text that asks, at the cost of that text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from latefusion.eval.fusion.answers import Answers
from latefusion.eval.fusion.knockout import frozen, same_cache, without_vision
from latefusion.eval.fusion.paths import Key
from latefusion.models.executor.cache import SUPPORTED, Track
from latefusion.models.executor.partial import input_of_layer, starting_at
from latefusion.models.schedule import VisionSchedule

if TYPE_CHECKING:
    from latefusion.eval.fusion.causal import Runner


class Continued:
    """`paths.Way` of what follows the images, on their KV cache, less the vision entries of the layers knocked out.

    The head, up to the last vision token, is the same under every prefix, suffix and single knock-out: it runs once.
    `late a` and `frozen a` share a head that is computed from layer a on. At any time one head's cache is held.
    """

    def __init__(self, runner: Runner, cut: int):
        self.runner, self.cut, self.batch = runner, cut, runner.batch
        self.layers = len(runner.layers)
        text = (~self.batch.vision[0, :cut]).nonzero().flatten()  # [P], the same in every sample
        self.track = Track(head=text.expand(self.batch.size, -1), tail=0, length=cut)
        self.positions: Tensor | None = (
            None  # [..., B, T] where the model makes them from the whole prompt (M-RoPE)
        )
        self.head: list[DynamicLayer] = []
        self.text: list[DynamicLayer] = []  # the head's, less its vision entries

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
        """The dense answers, in two parts; None if the head is not `cacheable`."""
        if not cacheable(self.runner.model.config, self.cut):
            return None
        self.head = self._run_head()
        self.text = [without_vision(layer, self.track) for layer in self.head]
        return self.answers((), 0, None)

    def part(self, hidden: Collection[int], first: int, state: Tensor | None, last: int) -> Tensor:
        return self._part(self._seen(hidden), first, state, last)

    def answers(self, hidden: Collection[int], first: int, state: Tensor | None) -> Answers:
        return self._answers(self._seen(hidden), first, state)

    def entering(self, wanted: Sequence[Key]) -> Iterator[tuple[Key, Answers]]:
        """Ends what `answers` can be asked: the dense head is dropped."""
        self.head, text, layers = [], self.text, self.runner.layers
        blind: Tensor | None = None  # of what follows
        still: Tensor | None = None  # of what follows, seeing vision tokens as they came
        stills = any(kind == "frozen" for kind, _ in wanted)
        head: Tensor | None = None  # of the head, its vision tokens as they came
        for i in range(self.layers):
            if ("late", i) in wanted or ("frozen", i) in wanted:
                moving = self._run_head(i, head)
                for kind, state in (("late", blind), ("frozen", still)):
                    if (kind, i) in wanted:
                        yield (kind, i), self._answers([*text[:i], *moving[i:]], i, state)
                del moving
            if i < self.layers - 1:
                cache = self._cache()
                with (
                    frozen(layers[i : i + 1], self.batch.vision[:, : self.cut]),
                    starting_at(layers, i, head),
                ):
                    head = input_of_layer(layers, i + 1, lambda cache=cache: self._forward_head(cache))  # type: ignore[misc]
                if stills:
                    still = self._part([*text[:i], cache.layers[i], *text[i + 1 :]], i, still, i + 1)
                blind = self._part(text, i, blind, i + 1)

    def _seen(self, hidden: Collection[int]) -> list[DynamicLayer]:
        pairs = zip(self.head, self.text, strict=True)
        return [text if i in hidden else head for i, (head, text) in enumerate(pairs)]

    def _part(self, cache: Sequence[Any], first: int, state: Tensor | None, last: int) -> Tensor:
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
            return self.runner.model(**inputs, past_key_values=same_cache(cache), use_cache=True).logits

    def _run_head(self, first: int = 0, state: Tensor | None = None) -> list[Any]:
        """The cache of the head's layers from `first` on."""
        cache = self._cache()
        with starting_at(self.runner.layers, first, state):
            self._forward_head(cache)
        return cache.layers

    def _cache(self) -> DynamicCache:
        return _empty(self.runner.model.config)

    def _forward_head(self, cache: DynamicCache) -> None:
        inputs = self.batch.head(self.cut)
        if self.positions is not None:
            inputs["position_ids"] = self.positions[..., : self.cut]
        with torch.no_grad(), self.runner.attachment.using(VisionSchedule()):
            self.runner.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)


def cacheable(config: PretrainedConfig, length: int) -> bool:
    """Whether cache layers keep all of `length` tokens (local attention's keep a window), in a form that is known."""
    return all(
        type(layer) in SUPPORTED
        and not (isinstance(layer, DynamicSlidingWindowLayer) and length >= layer.sliding_window)
        for layer in _empty(config).layers
    )


def _empty(config: PretrainedConfig) -> DynamicCache:
    return DynamicCache(config=config.get_text_config())


@contextmanager
def positions_of(decoder: Any) -> Iterator[list[Tensor]]:
    """Position ids that the model makes for its decoder in the forwards inside, if it makes any."""
    found: list[Tensor] = []

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("position_ids") is not None:
            found.append(kwargs["position_ids"])

    with ExitStack() as held:
        held.callback(decoder.register_forward_pre_hook(look, with_kwargs=True).remove)
        yield found
