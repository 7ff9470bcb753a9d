"""What a policy is: it answers, for one prefill, which vision tokens each decoder layer sees.

All indices are *logical*: positions in the tokens of this forward as the stock model sees them, `[B, T]`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """What a policy may know of one prefill before its first layer.

    Attributes:
        vision: bool `[B, T]`, the vision tokens.
        real: bool `[B, T]`, false for padding.
        queries: int64 `[B, Q]`, the last prompt token, or in training the tokens that an answer follows
            (repeated to fill the row).
        text: bool `[B, T]`, the prompt's text that can see vision tokens: after the first of them, up to the
            last query, in training without the answers.
        n_vision, n_real, n_text: the same masks counted per sample, on the host.
        n_answer: real tokens after the first vision token that are neither: in training, the answers'.
        tail: the number of columns at the end that are `text` in every sample; 0 if padding stands behind the first
            vision token of any.
        num_layers: decoder layers.
        asks: per sample, whether an answer follows some query; in training a sample may have none. Empty: all do.
        past: tokens that the cache has seen before this forward.
        piece: it begins or ends inside an image, so there is more of it than is seen here (chunked prefill).
        packed: a row holds several samples, each with positions of its own.
        late: vision tokens come after the last query, so no text of the prompt has seen them.
        attention: per layer, whether it attends with a softmax: others run a recurrence (linear attention, a
            convolution), where no policy can look at attention. Empty: all do.
    """

    vision: Tensor
    real: Tensor
    queries: Tensor
    text: Tensor
    n_vision: tuple[int, ...]
    n_real: tuple[int, ...]
    n_text: tuple[int, ...]
    n_answer: tuple[int, ...]
    tail: int
    num_layers: int
    piece: bool = False
    packed: bool = False
    asks: tuple[bool, ...] = ()
    past: int = 0
    late: bool = False
    attention: tuple[bool, ...] = ()

    def attending(self, layers: Iterable[int]) -> list[int]:
        """Those of the layers that attend with a softmax."""
        return [layer for layer in layers if not self.attention or self.attention[layer]]


@dataclass(frozen=True)
class Selection:
    """The vision tokens that take part from a layer on: a bool mask `[B, T]` and its count per sample.

    Attributes:
        counts: None means that only the device knows them; the executor then asks once (a host sync).
        frozen: they are only read: their keys and values are computed, their states stay as they are. A token that
            has only ever been frozen may leave and come back.
        silent: bool `[B, T]`, text rows whose attention output is zero, in layers with frozen tokens; None: no rows.
    """

    vision: Tensor
    counts: tuple[int, ...] | None = None
    frozen: bool = False
    silent: Tensor | None = None


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention, after RoPE and q/k norm, in the layer's compact coordinates.

    Attributes:
        query: `[B, H, N, D]`; key, value: `[B, Hkv, K, D]`, with what the cache held before.
        query_index: int64 `[B, N]`, logical position of each query row in this forward, -1 for padding.
        key_index: int64 `[B, K]`, the same for keys; -1 for padding and for keys of earlier forwards.
        scaling: multiplies q·k.
        run: `(value, rows) -> [B, R, H, D]`, the layer's kernel on these values `[B, Hkv, K, D]` for the query
            rows `rows`: int64 `[B, R]` (compact), or a number: the first ones, or None: all.
        weights: `rows int64 [B, R] (compact) -> float32 [B, H, R, K]`, attention probabilities of these rows.
        scores: `(rows, keys int64 [B, n] (compact)) -> float32 [B, H, R, n]`, what their softmax is made of, at these
            keys: scaled, capped, and the lowest number or -inf where a row does not see a key.
        plain: `scores` are nothing but scaled products: the last rows see all that stands before them, and no cap.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    query_index: Tensor
    key_index: Tensor
    scaling: float
    run: Callable[[Tensor, Tensor | int | None], Tensor]
    weights: Callable[[Tensor], Tensor]
    scores: Callable[[Tensor, Tensor], Tensor]
    plain: bool = False

    @cached_property
    def output(self) -> Tensor:
        """`[B, N, H, D]`, what the layer's own attention gives; computed when first asked for."""
        return self.run(self.value, None)

    def compact_rows(self, logical: Tensor) -> Tensor:
        """Where the logical query rows `[B, R]` stand in this layer's compact order, int64 `[B, R]`."""
        return (self.query_index[:, None, :] == logical[:, :, None]).int().argmax(-1)

    def to_logical(self, scores: Tensor, length: int, fill: float = 0.0) -> Tensor:
        """Scatter per-key scores `[B, ..., K]` to logical positions `[B, ..., length]`; absent keys get `fill`."""
        index = self.key_index.clamp(min=-1) + 1  # 0 collects padding and earlier forwards
        index = index.view(index.shape[0], *[1] * (scores.dim() - 2), -1).expand(scores.shape)
        full = scores.new_full((*scores.shape[:-1], length + 1), fill)
        return full.scatter(-1, index, scores)[..., 1:]


class Decision(Protocol):
    """A policy's answer for one prefill; made by `Policy.begin`, dropped when the forward ends."""

    watch: Collection[int]
    """Layers whose attention the decision wants to see (`attended` is called there, and only there)."""

    fusion_layer: list[int | None] | None
    """Per sample, the layer where fusion was found (VisiPruner); None for policies that do not look for it."""

    def select(self, layer: int) -> Selection | None:
        """The vision tokens seen from `layer` on, asked before each layer; None: as in the layer before.

        Before layer 0 all vision tokens take part. A selection may only bring back tokens that never took
        part (late entry) or were frozen; a token that was computed and left does not return. One that does is an
        error: always on a CPU, elsewhere where the counts show it.
        """

    def attended(self, layer: int, call: AttentionCall) -> Tensor | None:
        """Look at a watched layer's attention; return `[B, N, H, D]` to replace its output (before o_proj).

        Score under `torch.no_grad()`: gradient checkpointing computes the layer a second time, unwatched (and
        therefore refuses to have its output replaced).
        """


@runtime_checkable
class SeesEmbeddings(Protocol):
    """A decision that also looks at what enters layer 0."""

    def embedded(self, hidden_states: Tensor) -> None:
        """Called once, before `select(0)`, with the hidden states `[B, T, D]` of all tokens; do not keep them."""


@runtime_checkable
class LooksAhead(Protocol):
    """A decision that looks at a layer's attention before it says which tokens that layer sees."""

    ahead: Collection[int]
    """Layers that are looked at so: their norm and projections run once more, on the tokens of the layer before."""

    def looked(self, layer: int, call: AttentionCall) -> None:
        """Called before `select(layer)`, under `torch.no_grad()`; `call` has no output to replace."""


class Policy(Protocol):
    """Decides which vision tokens each layer sees. One object serves many forwards and keeps no state.

    It may also have two attributes. `enter`: the first layer with vision tokens, where the entry adapter runs in
    forwards without any. `freezes`: its vision tokens may be frozen, so a model that cannot do so is refused early.
    And a method `check_attention(attention)`: raise ValueError if it looks at the attention of a layer that runs a
    recurrence instead (`Prompt.attention`); asked for decoders that have such layers.
    """

    def validate(self, num_layers: int) -> None:
        """Raise ValueError, in one sentence that names value and fix, if it does not fit such a decoder."""

    def begin(self, prompt: Prompt) -> Decision | None:
        """Called once a forward that brings vision tokens, before layer 0; None: all take part in every layer."""
