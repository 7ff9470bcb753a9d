"""A device that is not the CPU, played by the CPU: what would mix tensors of two devices on a GPU fails here too.

Tensors that are `There` say that they lie on the device `meta`, the one that every build of torch knows; their values
are those of a CPU tensor inside. Inside `Elsewhere()` an operator that is given a tensor from there and one from here
(other than a single number, or an index) raises, as CUDA does, and what is made on the device is made there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
MOVES = ("_to_copy", "copy_")
BY_INDEX = ("index", "index_put", "index_put_")  # CUDA takes indices that lie on the CPU


class There(Tensor):
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> There:
        return Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner: Tensor):
        self.inner = inner

    def __repr__(self, **options: Any) -> str:
        return f"There({self.inner})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, **options: Any) -> Any:
        raise TypeError("a tensor of another device cannot be converted to numpy: use Tensor.cpu() first.")

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})

    def __enter__(self) -> Elsewhere:
        self.tensor, torch.tensor = torch.tensor, made
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        torch.tensor = self.tensor
        super().__exit__(*exception)


TENSOR = torch.tensor


def made(values: Any, **options: Any) -> Tensor:
    """`torch.tensor`, which is no operator and asks nobody."""
    device = torch.device(options.pop("device", None) or "cpu")
    tensor = TENSOR(tree_map(inner, values), **options)
    return There(tensor) if device.type == DEVICE.type else tensor


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`func` on the CPU, and its result where it belongs."""
    name = func.overloadpacket.__name__
    if name in ("is_pinned", "_pin_memory"):
        return args[0] if name == "_pin_memory" else True
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = any(isinstance(x, There) for x in tensors)
    if there and name not in MOVES:
        by_index = name in BY_INDEX and isinstance(args[0], There)
        placed = [args[0], *args[2:3]] if by_index else tensors
        if any(not isinstance(x, There) and x.dim() and x.numel() for x in placed):
            places = ", ".join(f"{tuple(x.shape)} {type(x).__name__}" for x in tensors)
            raise RuntimeError(f"{name} mixes tensors of two devices: {places}.")
    if (device := kwargs.get("device")) is not None:
        there = device.type == DEVICE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if name == "copy_":
        there = isinstance(args[0], There)
    result = func(*tree_map(inner, args), **tree_map(inner, kwargs))
    if not there or not any(isinstance(x, Tensor) for x in tree_leaves(result)):
        return result
    if func._schema.is_mutable:
        return args[0]
    return tree_map(lambda x: There(x) if isinstance(x, Tensor) else x, result)


def inner(x: Any) -> Any:
    return x.inner if isinstance(x, There) else x


def moved(x: Any) -> Any:
    """What holds tensors, with all of them there."""
    if isinstance(x, Tensor):
        return There(x.detach())
    if isinstance(x, dict):
        return type(x)(**{name: moved(value) for name, value in x.items()})
    return type(x)(map(moved, x)) if isinstance(x, list | tuple) else x


def move(model: nn.Module) -> nn.Module:
    """Weights and buffers in place."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(
                    There(weight.detach()), requires_grad=weight.requires_grad
                )
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = There(buffer)
    return model
