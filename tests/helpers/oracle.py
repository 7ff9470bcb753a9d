"""The judge of the executor: the full-length stock model, told by 4-D masks what each layer must not see.

Nothing is removed here and nothing is shared with the executor: hooks on an untouched model hide the columns
of vision tokens in each layer's mask, and put a late token's input back in place when it enters. A layer that runs a
recurrence has no mask to hide tokens by: it is computed token by token, by `recurrences`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from helpers.recurrences import scan
from torch import Tensor

from latefusion.models.policies.base import Selection


@contextmanager
def gone_afterwards(hooks: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def masked(
    model: Any,
    vision: Tensor,
    seen: Sequence[Tensor],
    *,
    padding: Tensor | None = None,
    entry: Callable[[Tensor], Tensor] | None = None,
    frozen: bool = False,
) -> Iterator[None]:
    """The model as it would be under a policy, for uncached forwards inside.

    Args:
        vision: bool `[B, T]`.
        seen: per layer, the vision tokens that take part, bool `[B, T]`.
        padding: the 2-D attention mask, for models whose stock mask is None.
        entry: maps the rows `[N, D]` of vision tokens that enter late.
        frozen: every layer's output at vision tokens is overwritten by its input.
    """
    decoder = model.get_decoder()
    state: dict[str, Any] = {}

    def after_layer(layer: Any, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.where(vision[..., None], args[0], output[0]), *output[1:])
        return torch.where(vision[..., None], args[0], output)

    def before_decoder(module: Any, args: tuple, kwargs: dict) -> None:
        after = dict(enumerate(kwargs.get("deepstack_visual_embeds") or [], start=1))
        state["deepstack"] = {
            **after,
            **(kwargs.get("deepstack_features") or {}),
        }  # added before these layers

    def before_layer(i: int, layer: Any, args: tuple, kwargs: dict) -> tuple:
        hidden = args[0]
        if i == 0:
            state["inputs"] = hidden  # what the decoder makes of its embeddings, which some scale
        before = torch.stack(list(seen[:i])).any(0) if i else torch.zeros_like(vision)
        entering = seen[i] & ~before
        if i > 0 and bool(entering.any()):
            rows = state["inputs"].clone()
            for layer_added, extra in state["deepstack"].items():
                if 0 < layer_added <= i:
                    rows[vision] = rows[vision] + extra
            if entry is not None:
                rows = torch.where(entering[..., None], entry(rows), rows)
            hidden = torch.where(entering[..., None], rows, hidden)
        if recurrence(layer) is not None:
            mask = kwargs.get("attention_mask")  # [B, T]
            state[i] = (torch.ones_like(vision) if mask is None else mask.bool()) & (~vision | seen[i])
            return (hidden, *args[1:]), kwargs
        stored = seen[source_of_keys(decoder.layers, i)]
        kwargs["attention_mask"] = hide(kwargs.get("attention_mask"), layer, vision & ~stored)
        return (hidden, *args[1:]), kwargs

    def hide(mask: Tensor | None, layer: Any, columns: Tensor) -> Tensor:
        batch, length = columns.shape
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool)
            mask = mask.tril() if layer.self_attn.is_causal else mask
            mask = mask[None, None].expand(batch, 1, -1, -1)
            if padding is not None:
                mask = mask & padding.bool()[:, None, None]
        if mask.dtype != torch.bool and layer.self_attn.config._attn_implementation != "eager":
            raise AssertionError("an additive mask outside eager attention")
        hidden_cells = columns[:, None, None, :] & ~torch.eye(length, dtype=torch.bool)
        if mask.dtype == torch.bool:
            return mask & ~hidden_cells
        return mask.masked_fill(hidden_cells, torch.finfo(mask.dtype).min)

    def by_hand(i: int, mixer: Any, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        return scan(mixer, kwargs["hidden_states"], state[i])

    handles = [decoder.register_forward_pre_hook(before_decoder, with_kwargs=True)]
    for i, layer in enumerate(decoder.layers):
        hook = lambda module, args, kwargs, i=i: before_layer(i, module, args, kwargs)  # noqa: E731
        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        mixer = recurrence(layer)
        if mixer is not None:
            after = lambda module, args, kwargs, out, i=i: by_hand(i, module, args, kwargs, out)  # noqa: E731
            handles.append(mixer.register_forward_hook(after, with_kwargs=True))
        if frozen:
            handles.append(layer.register_forward_hook(after_layer))
    with gone_afterwards(handles):
        yield


def source_of_keys(layers: Any, i: int) -> int:
    """The layer whose keys layer i attends to: itself, or in Gemma 4 the last of its kind that has its own."""
    attention = layers[i].self_attn
    if not getattr(attention, "is_kv_shared_layer", False):
        return i
    own = [j for j in range(i) if not layers[j].self_attn.is_kv_shared_layer]
    return max(j for j in own if layers[j].self_attn.layer_type == attention.layer_type)


@contextmanager
def blinded(
    model: Any,
    vision: Tensor,
    hidden: Sequence[int],
    *,
    padding: Tensor | None = None,
    still: int = 0,
) -> Iterator[None]:
    """The model whose text rows do not see vision columns in the layers `hidden`, for uncached forwards inside.

    Args:
        vision: bool `[B, T]`.
        padding: the 2-D attention mask, for models whose stock mask is None.
        still: before each layer up to this one, vision rows are put back to what the decoder was given (and, of
            deepstack, what the model has added since).
    """
    decoder = model.get_decoder()
    state: dict[Any, Any] = {}
    after = (vision.cumsum(1) > 0) & ~vision
    cells = after[:, None, :, None] & vision[:, None, None, :]  # [B, 1, T, T]

    def before_decoder(module: Any, args: tuple, kwargs: dict) -> None:
        state["deepstack"] = kwargs.get("deepstack_visual_embeds") or []

    def before_layer(i: int, layer: Any, args: tuple, kwargs: dict) -> tuple:
        rows = args[0]
        if i == 0:
            state["inputs"] = rows
        if i <= still:
            unmoved = state["inputs"].clone()
            for extra in state["deepstack"][:i]:
                unmoved[vision] = unmoved[vision] + extra
            rows = torch.where(vision[..., None], unmoved, rows)
        state[i] = kwargs.get("attention_mask")
        if i in hidden and recurrence(layer) is None:
            mask, length = kwargs.get("attention_mask"), rows.shape[1]
            if mask is None:
                mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
                mask = mask if padding is None else mask & padding.bool()[:, None, None]
            if mask.dtype == torch.bool:
                kwargs["attention_mask"] = mask & ~cells
            else:
                kwargs["attention_mask"] = torch.where(cells, torch.finfo(mask.dtype).min, mask)
        return (rows, *args[1:]), kwargs

    def by_hand(i: int, mixer: Any, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        real = torch.ones_like(vision) if state[i] is None else state[i].bool()
        every = scan(mixer, kwargs["hidden_states"], real)
        if i not in hidden:
            return every
        return torch.where(vision[..., None], every, scan(mixer, kwargs["hidden_states"], real & ~vision))

    handles = [decoder.register_forward_pre_hook(before_decoder, with_kwargs=True)]
    for i, layer in enumerate(decoder.layers):
        hook = lambda module, args, kwargs, i=i: before_layer(i, module, args, kwargs)  # noqa: E731
        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        mixer = recurrence(layer)
        if mixer is not None:
            after_mixer = lambda module, args, kwargs, out, i=i: by_hand(i, module, args, kwargs, out)  # noqa: E731
            handles.append(mixer.register_forward_hook(after_mixer, with_kwargs=True))
    with gone_afterwards(handles):
        yield


def recurrence(layer: Any) -> Any:
    """The module of a layer that has no softmax attention; None for others."""
    return next((part for name, part in layer.named_children() if name in ("conv", "linear_attn")), None)


def attending(model: Any) -> list[int]:
    """The layers that attend with a softmax."""
    return [i for i, layer in enumerate(model.get_decoder().layers) if recurrence(layer) is None]


def band(vision: Tensor, layers: int, enter: int = 0, exit: int | None = None) -> list[Tensor]:
    """`seen` of a plain band."""
    nothing = torch.zeros_like(vision)
    last = layers if exit is None else exit
    return [vision if enter <= i < last else nothing for i in range(layers)]


def ranked(
    eager: Any,
    inputs: dict[str, Any],
    vision: Tensor,
    *,
    enter: int,
    exit: int | None,
    keep: dict[int, int],
    queries: Sequence[Sequence[int]],
    entry: Callable[[Tensor], Tensor] | None = None,
) -> list[Tensor]:
    """`seen` of a band with keeps, ranked by the eager model's own attention maps, token by token in loops.

    Args:
        queries: per sample, the rows whose attention ranks.
    """
    layers = len(eager.get_decoder().layers)
    seen = band(vision, layers, enter, exit)
    last = layers if exit is None else exit
    for layer, k in sorted(keep.items()):
        score: list[dict[int, float]] = [{} for _ in queries]
        reports = attending(eager)  # layers with attention maps
        for watched in (i for i in range(enter, layer) if i in reports):
            values: dict[str, Tensor] = {}
            attention = eager.get_decoder().layers[watched].self_attn
            handle = attention.v_proj.register_forward_hook(
                lambda m, a, out, values=values: values.update(v=out)
            )
            with masked(eager, vision, seen, entry=entry), torch.no_grad():
                maps = eager(**inputs, use_cache=False, output_attentions=True).attentions[
                    reports.index(watched)
                ]
            handle.remove()
            heads, head_dim = maps.shape[1], attention.head_dim
            value = values["v"].unflatten(-1, (-1, head_dim))  # [B, T, Hkv, D]
            group = heads // value.shape[2]
            for b, rows in enumerate(queries):
                tokens = seen[watched][b].nonzero().flatten().tolist()
                for h in range(heads):
                    for q in rows:
                        read = {
                            t: (maps[b, h, q, t] * value[b, t, h // group]).norm().item() ** 2 for t in tokens
                        }
                        whole = sum(read.values())
                        for t in tokens:
                            share = read[t] / whole if whole > 0 else 0.0
                            score[b][t] = max(score[b].get(t, 0.0), share)
        chosen = torch.zeros_like(vision)
        for b in range(len(queries)):
            left = {t: score[b][t] for t in seen[layer - 1][b].nonzero().flatten().tolist()}
            for t in sorted(left, key=lambda t: (-left[t], t))[:k]:
                chosen[b, t] = True
        for i in range(layer, last):
            seen[i] = chosen
    return seen


class Fixed:
    """A policy with the answer written down, per layer; `counted`: whether the host knows the counts."""

    def __init__(self, seen: Sequence[Tensor], counted: bool = True):
        self.seen, self.counted = seen, counted

    def validate(self, num_layers: int) -> None:
        assert len(self.seen) == num_layers

    def begin(self, prompt: Any) -> Any:
        return _FixedDecision(self, prompt)


class _FixedDecision:
    watch: frozenset[int] = frozenset()
    fusion_layer = None

    def __init__(self, policy: Fixed, prompt: Any):
        self.policy, self.before = policy, prompt.vision

    def select(self, layer: int) -> Selection | None:
        seen = self.policy.seen[layer]
        seen = seen.repeat_interleave(len(self.before) // len(seen), dim=0)  # beams
        if torch.equal(seen, self.before):
            return None
        self.before = seen
        return Selection(seen, tuple(seen.sum(1).tolist()) if self.policy.counted else None)

    def attended(self, layer: int, call: Any) -> None:
        raise AssertionError("watches nothing")
