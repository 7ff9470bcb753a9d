"""The entry adapter: shapes projected vision features to what a layer `enter > 0` expects of its input."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from latefusion.models.inputs import unwrapped
from latefusion.models.locate import ENTRY as ENTRY


class CalibratedEntry(nn.Module):
    """A fixed affine map with a bias per place in the image: `x @ weight + bias[order % places]`.

    It is created as the identity; `entry_fit.py` fits it in closed form to the states with which the dense vision
    tokens reach layer `enter`. Frozen tokens stay as they enter, while the dense model's change from layer to layer:
    `later` has a map for each of the layers that read them after the first, from the state before it.

    Args:
        hidden_size: of the decoder.
        places: number of tokens of an image; 1: one bias for all (images differ in size).
        later: the layers that have a map of their own.
        later_rank: of the maps in `later`, which are `LowRankMap`; None: they are whole matrices.
    """

    weight: Tensor  # [D, D]
    bias: Tensor  # [places, D]

    def __init__(
        self, *, hidden_size: int, places: int, later: Sequence[int] = (), later_rank: int | None = None
    ):
        super().__init__()
        self.register_buffer("weight", torch.eye(hidden_size))
        self.register_buffer("bias", torch.zeros(places, hidden_size))
        self.later = nn.ModuleDict(
            {
                str(layer): CalibratedEntry(hidden_size=hidden_size, places=places)
                if later_rank is None
                else LowRankMap(hidden_size=hidden_size, places=places, rank=later_rank)
                for layer in later
            }
        )

    @property
    def places(self) -> int:
        """Places in an image that have a bias of their own; 1: all share one."""
        return len(self.bias)

    @property
    def later_rank(self) -> int | None:
        """Of the maps to later layers; None: they are whole matrices, or there are none."""
        return self.sizes().get("later_rank")

    def forward(self, hidden_states: Tensor, order: Tensor, layer: int | None = None) -> Tensor:
        """Map vision rows to the states of a dense model at layer `enter`, in the same shape and dtype.

        Args:
            hidden_states: `[..., D]`.
            order: int64 `[...]`, the number of each row among its sample's vision tokens.
            layer: one of `later`: map frozen rows on to the states at that layer.
        """
        if layer is not None:
            return self.later[str(layer)](hidden_states, order)
        x = hidden_states.to(self.weight.dtype)
        return (x @ self.weight + self.bias[order % len(self.bias)]).to(hidden_states.dtype)

    def sizes(self) -> dict[str, Any]:
        """`places`, and `later` and `later_rank` where they are set: what makes another of these sizes."""
        return start_sizes({name: weight.shape for name, weight in self.state_dict().items()})

    def numbers(self) -> int:
        """How many numbers the maps to later layers hold."""
        return sum(weight.numel() for weight in self.later.state_dict().values())

    def macs(self) -> int:
        """Multiply-adds of a vision token in all its maps."""
        return sum(weight.numel() for name, weight in self.state_dict().items() if not name.endswith("bias"))


class LowRankMap(nn.Module):
    """A fixed map from one layer's states to a later one's: `x + x @ down @ up + bias[order % places]`.

    Most of a state stays as it is from layer to layer, so the change takes a small rank. It is created as the identity.

    Args:
        hidden_size, places: as of `CalibratedEntry`.
        rank: of the change.
    """

    down: Tensor  # [D, rank]
    up: Tensor  # [rank, D]
    bias: Tensor  # [places, D]

    def __init__(self, *, hidden_size: int, places: int, rank: int):
        super().__init__()
        self.register_buffer("down", torch.zeros(hidden_size, rank))
        self.register_buffer("up", torch.zeros(rank, hidden_size))
        self.register_buffer("bias", torch.zeros(places, hidden_size))

    def forward(self, hidden_states: Tensor, order: Tensor) -> Tensor:
        """Move rows `[..., D]` on, in their shape and dtype; `order` as of `CalibratedEntry`."""
        x = hidden_states.to(self.down.dtype)
        moved = x + x @ self.down @ self.up + self.bias[order % len(self.bias)]
        return moved.to(hidden_states.dtype)


class EntryAdapter(nn.Module):
    """Residual low-rank map with a scale per channel: `x + x * scale + up(down(x))`. It is created as the identity.

    The vision rows that reach layer `enter` are the projector's output, while the layer was trained on states that all
    layers before it had refined. With `places`, x is first calibrated (`start`, which does not train).

    Args:
        hidden_size: of the decoder.
        rank: of the low-rank part; 0: no such part, only the scale.
        places, later, later_rank: of the `CalibratedEntry` to start from; 0 places: no such start.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        rank: int,
        places: int = 0,
        later: Sequence[int] = (),
        later_rank: int | None = None,
    ):
        super().__init__()
        self.start = None
        if places:
            self.start = CalibratedEntry(
                hidden_size=hidden_size, places=places, later=later, later_rank=later_rank
            )
        self.scale = nn.Parameter(torch.zeros(hidden_size))
        self.down = nn.Linear(hidden_size, rank, bias=False) if rank else None
        self.up = nn.Linear(rank, hidden_size, bias=False) if rank else None
        if self.up is not None:
            nn.init.zeros_(self.up.weight)

    @property
    def places(self) -> int:
        """Of its start; 0: it has none."""
        return 0 if self.start is None else self.start.places

    @property
    def later(self) -> Mapping[str, nn.Module]:
        """The layers, as text, that frozen rows are mapped on to after they entered."""
        return {} if self.start is None else self.start.later  # type: ignore[return-value]

    def forward(self, hidden_states: Tensor, order: Tensor | None = None, layer: int | None = None) -> Tensor:
        """Adapt vision rows `[..., D]` to layer `enter`; same shape and dtype, computed in the dtype of the weights.

        Args:
            order: int64 `[...]`, the number of each row among its sample's vision tokens; a calibrated start needs it.
            layer: one of `later`: map frozen rows on to that layer's states, which nothing here learns.
        """
        if layer is not None:
            assert self.start is not None
            return self.start(hidden_states, order, layer)
        x = hidden_states.to(self.scale.dtype)
        if self.start is not None:
            assert order is not None
            x = self.start(x, order)
        mapped = x + x * self.scale
        if self.down is not None and self.up is not None:
            mapped = mapped + self.up(self.down(x))
        return mapped.to(hidden_states.dtype)

    def sizes(self) -> dict[str, Any]:
        """Its sizes, as a checkpoint's config.json holds them."""
        return entry_sizes({name: weight.shape for name, weight in self.state_dict().items()})

    def flops(self, tokens: float) -> float:
        """FLOPs of its matrix products for this many vision tokens, as if none of them left in a later layer."""
        width, rank = len(self.scale), 0 if self.down is None else self.down.out_features
        return 2 * tokens * (2 * rank * width + (0 if self.start is None else self.start.macs()))


def entry_sizes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The arguments of the entry adapter whose weights have these shapes, but for the decoder's width."""
    start = {
        name.removeprefix("start."): shape for name, shape in shapes.items() if name.startswith("start.")
    }
    return {"rank": shapes.get("down.weight", (0,))[0], **start_sizes(start)}


def start_sizes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The arguments of the `CalibratedEntry` whose weights have these shapes, but for the decoder's width.

    Raises:
        ValueError: its maps to later layers have several ranks.
    """
    sizes: dict[str, Any] = {"places": shapes.get("bias", (0,))[0]}
    layers = sorted(int(match[1]) for name in shapes if (match := re.fullmatch(r"later\.(\d+)\.bias", name)))
    if layers:
        sizes["later"] = layers
    ranks = {shape[1] for name, shape in shapes.items() if re.fullmatch(r"later\.\d+\.down", name)}
    if len(ranks) > 1:
        raise ValueError(
            f"the entry's maps to later layers have ranks {sorted(ranks)}; all have the same one."
        )
    return {**sizes, "later_rank": ranks.pop()} if ranks else sizes


def install_entry(
    model: PreTrainedModel,
    rank: int,
    places: int = 0,
    later: Sequence[int] = (),
    later_rank: int | None = None,
) -> EntryAdapter:
    """Add a new entry adapter to the Hugging Face model as its submodule `vision_entry`, in float32.

    Raises:
        ValueError: the rank is negative, or the model has an entry adapter, or several states for it to map.
    """
    if rank < 0:
        raise ValueError(f"entry rank {rank} must not be negative; 0 means a scale per channel only.")
    if entry_of(model) is not None:
        raise ValueError("the model already has an entry adapter; load a fresh base model.")
    text = model.config.get_text_config()
    if getattr(text, "altup_num_inputs", 1) > 1:
        raise ValueError(
            f"{type(model).__name__} carries {text.altup_num_inputs} states of every token (AltUp), and an entry "
            "adapter maps one: use schedule.enter=0."
        )
    hidden_size = text.hidden_size
    with model.device:
        entry = EntryAdapter(
            hidden_size=hidden_size, rank=rank, places=places, later=later, later_rank=later_rank
        )
    model.add_module(ENTRY, entry)
    return entry


def entry_of(model: nn.Module) -> nn.Module | None:
    """The entry adapter of a model, or None; inside PEFT it is PEFT's wrapper of the adapter."""
    return unwrapped(model)._modules.get(ENTRY)


def check_entry(model: PreTrainedModel) -> None:
    """Raise ValueError if the model was saved with an entry adapter, as its configuration says, and lacks it now."""
    if getattr(model.config, ENTRY, None) is not None and entry_of(model) is None:
        raise ValueError(
            "this student was saved with an entry adapter, which transformers alone leaves out as it loads: load the "
            "folder with latefusion.load."
        )
