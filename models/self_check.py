"""A decoder that docs/families.md does not know is tried on its own weights before it gets a policy.

`exact_decoders.json` names the classes that the page shows exact; they pay nothing. Any other decoder runs two rows of
a dozen random tokens. Some are taken for vision and leave in the middle. The text's last states must then be those of
the stock decoder at full length, whose masks hide the same tokens (`hidden_by_masks`, which shares no code with the
executor).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache

from latefusion.models.executor.attention import in_float32
from latefusion.models.executor.frozen_rows import check_parts
from latefusion.models.executor.hooks import Hooks
from latefusion.models.executor.prompt import PromptEnd
from latefusion.models.executor.recurrence import recurrence_of
from latefusion.models.executor.shared_keys import is_reusing, kind_of
from latefusion.models.executor.traits import in_shards
from latefusion.models.policies.base import AttentionCall, Prompt, Selection

SHOWN = Path(__file__).with_name("exact_decoders.json")
IMPLEMENTATIONS = {"eager", "sdpa", "flex_attention"}  # of attention, as they come with transformers
ROWS = ("ttvvtvvvtttt", "  ttvvvtvttt")  # text, vision, padding
PREFILL = 9  # of these tokens, in the check that uses a cache; the others come one by one
HALVES = (torch.bfloat16, torch.float16)
FULL = 1e-3  # largest relative error of a row
HALF = 0.05  # largest relative error of the median row in 16 bits
TIMES = 5  # in 16 bits: an error at most of the rounding that the machine shows itself
SHARE = 0.01  # of what the tokens that left did to the text, an error at most; in 16 bits, beside rounding


class Inexact(ValueError):
    """The decoder does not carry a policy out exactly, or cannot be tried."""


def class_names(decoder: Any) -> set[str]:
    """The classes that decide what a decoder computes: its own, its layers', and those of their parts."""
    parts = [part for layer in decoder.layers for part in layer.children()]
    parts = [part for part in parts if not isinstance(part, (nn.Linear, nn.Dropout, nn.Identity))]
    return {name_of(module) for module in (decoder, *decoder.layers, *parts)}


def name_of(module: nn.Module) -> str:
    """Module and name of a class; the class inside PEFT's or FSDP2's."""
    base = getattr(module, "get_base_layer", None)
    kind = type(module if base is None else base())  # type: ignore[operator]
    if issubclass(kind, FSDPModule):  # made on the fly of it and the class
        kind = kind.__bases__[-1]
    return f"{kind.__module__}.{kind.__qualname__}"


def is_shown(decoder: Any) -> bool:
    """Whether docs/families.md shows a decoder of these classes exact."""
    attention = str(decoder.config._attn_implementation)
    stock = attention in IMPLEMENTATIONS or attention.startswith("flash_attention")
    return stock and class_names(decoder) <= shown().get(name_of(decoder), set())


@cache
def isolating() -> set[str]:
    """The types of models in which `data.isolate` was shown exact."""
    return set(json.loads(SHOWN.read_text())["turns"])


@cache
def shown() -> dict[str, set[str]]:
    """The class of each decoder that was shown exact, with those of its parts."""
    return {name: set(parts) for name, parts in json.loads(SHOWN.read_text())["decoders"].items()}


def check_decoder(decoder: Any) -> dict[str, str]:
    """Try a decoder; what it cannot do besides computing some tokens alone.

    Returns:
        Why not, by what a policy may ask for: `ranking` (its attention is what text pays to vision tokens) and
        `freezing` (vision tokens that are only read).

    Raises:
        Inexact: it cannot be tried, or computes something else once tokens are gone.
    """
    reason = _cannot_be_tried(decoder)
    if reason is not None:
        raise Inexact(_refusal(decoder, f"cannot be tried on its weights, {reason}"))
    try:
        with _undisturbed(decoder):
            return _Trial(decoder).run()
    except Inexact:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise Inexact(
            _refusal(decoder, f"a try on a dozen tokens ended in {type(error).__name__}: {reason}")
        ) from error


def _refusal(decoder: Any, finding: str) -> str:
    return (
        f"{type(decoder).__name__} is not among the decoders that docs/families.md shows exact, and {finding}; run it "
        "without a policy, or pass check=False to attach one all the same."
    )


def _cannot_be_tried(decoder: Any) -> str | None:
    if in_shards(decoder):
        return "which are spread over processes (ZeRO-3, FSDP): attach before, or use ZeRO-2 or DDP"
    offloaded = any(hasattr(module, "_hf_hook") for module in decoder.modules())
    if not offloaded and any(weight.is_meta for weight in decoder.parameters()):
        return "which are on the meta device"
    return None


@contextmanager
def _undisturbed(decoder: Any) -> Iterator[None]:
    """Context that leaves a decoder and the random numbers as they were, and computes without dropout or gradients."""
    training = {module: module.training for module in decoder.modules()}
    device, config = _device(decoder), decoder.config
    attention = config._attn_implementation
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(in_float32(device.type))
        try:
            decoder.eval()
            if attention == "flex_attention" or attention.startswith(
                "flash"
            ):  # a mask hides tokens of each row
                config._attn_implementation = "sdpa" if getattr(decoder, "_supports_sdpa", True) else "eager"
            yield
        finally:
            if config._attn_implementation != attention:
                config._attn_implementation = attention
            for module, mode in training.items():
                module.training = mode


def _device(decoder: Any) -> torch.device:
    embedding = decoder.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return torch.device(device) if device is not None else next(embedding.parameters()).device


class _Trial:
    """A decoder and the tokens that it is tried on.

    Attributes:
        ids: int64 `[B, T]`.
        vision, real, text: bool `[B, T]`.
        seen: per layer, the vision tokens that take part, bool `[B, T]`: none in the first and the last layer, and
            fewer of them in the second half.
    """

    def __init__(self, decoder: Any):
        self.decoder, device, layers = decoder, _device(decoder), len(decoder.layers)
        numbers = torch.Generator().manual_seed(0)
        ids = torch.randint(decoder.config.vocab_size, (len(ROWS), len(ROWS[0])), generator=numbers)
        self.ids = ids.to(device)
        self.vision, self.text = (
            torch.tensor([[token == kind for token in row] for row in ROWS], device=device) for kind in "vt"
        )
        self.real = self.vision | self.text
        place = self.vision.cumsum(1)
        some, fewer = self.vision & (place != 2), self.vision & (place % 3 == 1)
        self.seen = [some if i < layers // 2 else fewer for i in range(layers)]
        none = torch.zeros_like(self.vision)
        if layers > 2:
            self.seen[0] = none
        if layers > 3:
            self.seen[-1] = none
        self.halved = False  # it computes in 16 bits
        self.rounding = 0.0  # relative difference of text when fewer tokens follow, which should make none
        self.limit = FULL
        self.attends = [recurrence_of(layer) is None for layer in decoder.layers]

    def run(self) -> dict[str, str]:
        stock = self.states()
        self.halved = stock.dtype in HALVES
        with self.under(_Plan()):
            if not torch.equal(self.states(), stock):
                raise Inexact(_refusal(self.decoder, "a policy that keeps every token changes its states"))
        with hidden_by_masks(self.decoder, self.vision, self.real, self.seen):
            expected = self.states()
        last = expected[:, PREFILL - 1 :]
        self.rounding = self.distance(self.states(PREFILL), stock[:, :PREFILL], end=PREFILL)
        self.limit = self._limit(stock, expected)
        with self.under(_Plan(self.seen)):
            self.check("without some of a dozen tokens", self.states(), expected)
            self.check("on a cache that lacks some tokens", self.states_on_cache(), last)
        reasons = {"ranking": self._ranking(), "freezing": self._freezing(stock)}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def _ranking(self) -> str | None:
        """Why text's attention cannot rank: weights times values are not what the attention of some layer gives."""
        plan = _Plan(watch=[i for i, attends in enumerate(self.attends) if attends])
        try:
            with self.under(plan):
                self.states()
        except ValueError as error:
            return str(error)
        layer, difference = max(plan.errors.items(), key=lambda item: item[1], default=(0, 0.0))
        if difference <= (HALF if self.halved else FULL):
            return None
        return _refusal(
            self.decoder,
            f"the attention weights of layer {layer} that would rank vision tokens are not those that its output comes "
            f"from (they differ by {difference:.1%})",
        )

    def _freezing(self, stock: Tensor) -> str | None:
        """Why vision tokens cannot be frozen; None where `prepare_reading` will say so itself, or they can."""
        readers = [i for i, attends in enumerate(self.attends) if attends]
        try:
            for i in readers:
                check_parts(self.decoder.layers[i])
        except ValueError:
            return None
        none = torch.zeros_like(self.vision)
        seen = [self.vision if i in readers[::2] else none for i in range(len(self.attends))]
        with hidden_by_masks(self.decoder, self.vision, self.real, seen, frozen=True):
            expected = self.states()
        self.limit = self._limit(stock, expected)
        try:
            with self.under(_Plan(seen, frozen=True)):
                self.check("with frozen vision tokens", self.states(), expected)
        except Inexact as error:
            return str(error)
        return None

    @contextmanager
    def under(self, plan: _Plan) -> Iterator[None]:
        hooks = _PlanHooks(self.decoder, plan, self.vision)
        try:
            yield
        finally:
            hooks.detach()

    def states(self, end: int | None = None) -> Tensor:
        """The last hidden states `[B, T, D]` of one forward; `end`: of the first tokens alone."""
        ids, real = self.ids[:, :end], self.real[:, :end].long()
        out = self.decoder(input_ids=ids, attention_mask=real, use_cache=False)
        states: Tensor = out.last_hidden_state
        return states

    def states_on_cache(self) -> Tensor:
        """Those of the last tokens of a prefill and of steps behind it, `[B, T - PREFILL + 1, D]`."""
        store, length = DynamicCache(config=self.decoder.config), self.ids.shape[1]
        states = []
        for start, end in [(0, PREFILL), *((t, t + 1) for t in range(PREFILL, length))]:
            out = self.decoder(
                input_ids=self.ids[:, start:end],
                attention_mask=self.real[:, :end].long(),
                past_key_values=store,
                use_cache=True,
            )
            states.append(out.last_hidden_state[:, -1:])
        return torch.cat(states, dim=1)

    def distance(self, states: Tensor, expected: Tensor, end: int | None = None) -> float:
        """Relative difference of the text's rows up to `end`: the largest; the median in 16 bits, where a router may
        send a row or two to other experts."""
        text = self.text[:, :end][:, -states.shape[1] :]
        errors = (states - expected)[text].float().norm(dim=-1) / expected[text].float().norm(dim=-1)
        return float(errors.median() if self.halved else errors.max())

    def _limit(self, stock: Tensor, expected: Tensor) -> float:
        """The largest distance that rounding explains, well below what the tokens that left did to the text."""
        share = SHARE * self.distance(stock, expected)
        if self.halved:
            return min(HALF, max(share, TIMES * self.rounding))
        return min(FULL, share)

    def check(self, where: str, states: Tensor, expected: Tensor) -> None:
        """Raise Inexact unless the text's states are equal to rounding."""
        error = self.distance(states, expected)
        if not error <= self.limit:
            raise Inexact(
                _refusal(
                    self.decoder,
                    f"{where} its text's states differ by {error:.1%} from those of full length and masks",
                )
            )


class _Plan:
    """A policy, and its decision, with the answer written down.

    Args:
        seen: per layer, the vision tokens that take part, bool `[B, T]`; None: all.
        frozen: they are only read.
        watch: layers whose attention weights are compared with its output.
    """

    fusion_layer = None

    def __init__(
        self, seen: list[Tensor] | None = None, frozen: bool = False, watch: list[int] | None = None
    ):
        self.seen, self.freezes, self.watch = seen or [], frozen, watch or []
        self.errors: dict[int, float] = {}
        self.length = 0  # of the running forward

    def validate(self, num_layers: int) -> None: ...

    def begin(self, prompt: Prompt) -> _Plan:
        self.length = prompt.vision.shape[1]
        return self

    def select(self, layer: int) -> Selection | None:
        if not self.seen or (layer and self.seen[layer] is self.seen[layer - 1]):
            return None
        return Selection(self.seen[layer][:, : self.length], frozen=self.freezes)

    def attended(self, layer: int, call: AttentionCall) -> None:
        rows = torch.arange(call.query.shape[2], device=call.query.device).expand(len(call.query), -1)
        value = call.value.repeat_interleave(call.query.shape[1] // call.value.shape[1], dim=1)
        weighted = (call.weights(rows) @ value.float()).transpose(1, 2)  # [B, N, H, D]
        real = call.query_index >= 0
        error = (weighted - call.output)[real].norm() / call.output[real].float().norm()
        self.errors[layer] = float(error)


class _PlanHooks(Hooks):
    """A plan on a decoder alone."""

    def __init__(self, decoder: Any, plan: _Plan, vision: Tensor):
        self._plan = plan
        super().__init__(
            model=decoder,
            decoder=decoder,
            multimodal=decoder,
            vision_mask=lambda **inputs: _first_columns(vision, inputs),
        )

    @property
    def policy(self) -> Any:
        return self._plan

    @property
    def prompt_end(self) -> PromptEnd:
        return PromptEnd()


def _first_columns(vision: Tensor, inputs: dict[str, Any]) -> Tensor | None:
    """The vision tokens of a prefill; None for what comes behind it."""
    length = inputs["input_ids"].shape[1]
    return vision[:, :length] if length > 1 else None


@contextmanager
def hidden_by_masks(
    decoder: Any, vision: Tensor, real: Tensor, seen: list[Tensor], frozen: bool = False
) -> Iterator[None]:
    """The decoder at full length, each layer's mask hiding the vision tokens that do not take part in it.

    A layer that runs a recurrence, where no mask can hide a token, is computed on the tokens that take part alone.

    Args:
        vision, real: bool `[B, T]`.
        seen: per layer, bool `[B, T]`.
        frozen: each layer gives vision tokens back as they came.
    """
    inputs: list[Tensor] = []

    def before(i: int, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        states = args[0]
        if i == 0:
            inputs[:] = [states]
        earlier = torch.stack(seen[:i]).any(0) if i else torch.zeros_like(vision)
        states = torch.where((seen[i] & ~earlier)[..., None], inputs[0], states)
        layer = decoder.layers[i]
        if recurrence_of(layer) is None:
            kwargs["attention_mask"] = hidden(kwargs.get("attention_mask"), layer, seen[source(i)])
        return (states, *args[1:]), kwargs

    def source(i: int) -> int:
        """The layer whose keys layer i attends to."""
        if not is_reusing(decoder.layers[i].self_attn):
            return i
        kind = kind_of(decoder.layers[i])
        sources = [j for j in range(i) if not is_reusing(decoder.layers[j]._modules.get("self_attn"))]
        return max(j for j in sources if kind_of(decoder.layers[j]) == kind)

    def hidden(mask: Any, layer: Any, present: Tensor) -> Tensor:
        length = vision.shape[1]
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool, device=vision.device)
            mask = mask.tril() if getattr(layer.self_attn, "is_causal", True) else mask
            mask = mask[None, None] & real[:, None, None]
        elif not isinstance(mask, Tensor) or mask.dim() != 4:
            raise Inexact(
                _refusal(decoder, f"its masks ({type(mask).__name__}) cannot hide tokens of a layer")
            )
        diagonal = torch.eye(length, dtype=torch.bool, device=vision.device)
        gone = (vision & ~present)[:, None, None] & ~diagonal
        if mask.dtype == torch.bool:
            return mask & ~gone
        return mask.masked_fill(gone, torch.finfo(mask.dtype).min)

    def after(i: int, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        states, layer = output[0] if isinstance(output, tuple) else output, decoder.layers[i]
        if recurrence_of(layer) is not None:
            states = states.clone()
            for b, taking_part in enumerate(real & (~vision | seen[i])):
                index = taking_part.nonzero()[:, 0]
                few = {name: value for name, value in kwargs.items() if name != "position_embeddings"}
                angles = kwargs.get("position_embeddings")
                if angles is not None:
                    angles = tuple(part[min(b, len(part) - 1)][None, index] for part in angles)
                few |= {"attention_mask": None, "position_ids": None, "position_embeddings": angles}
                row = layer.forward(args[0][b : b + 1, index], *args[1:], **few)
                states[b, index] = (row[0] if isinstance(row, tuple) else row)[0]
        if frozen:
            states = torch.where(vision[..., None], args[0], states)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    with ExitStack() as stack:
        for i, layer in enumerate(decoder.layers):
            handles = (
                layer.register_forward_pre_hook(
                    lambda module, args, kwargs, i=i: before(i, args, kwargs), with_kwargs=True
                ),
                layer.register_forward_hook(
                    lambda module, args, kwargs, output, i=i: after(i, args, kwargs, output), with_kwargs=True
                ),
            )
            for handle in handles:
                stack.callback(handle.remove)
        yield
