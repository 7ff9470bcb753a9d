"""Load a trained late-fusion model: from a whole checkpoint, or from adapters and their base."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latefusion.models.attach import attach
from latefusion.models.base_model import compute_dtype
from latefusion.models.locate import ADAPTER_CONFIG, found_student
from latefusion.models.student.whole import load_whole

if TYPE_CHECKING:
    import torch
    from transformers import ProcessorMixin

LOST = 0.5  # of the adapters' change of the weights; `load` warns if merging rounds away more


def load(
    path: str | Path, *, dtype: torch.dtype | None = None, merge: bool = True
) -> tuple[Any, ProcessorMixin]:
    """Load a trained late-fusion model with its schedule attached, and its processor.

    Args:
        path: a folder that `training/train.py` or `training/export.py` wrote, or the hub id it was published under.
        dtype: of the weights; None: bfloat16 where the hardware has it, else float32.
        merge: add LoRA to the weights, so that the model is as fast as its base. Exact to float error in float32; in
            bfloat16 the sums are rounded (docs/models.md). False: keep the adapters apart, with gradients, to go on
            training or to switch them off.

    Raises:
        FileNotFoundError: the folder holds no student, or its base is not there.
        ValueError: `merge` is no boolean; its files contradict each other; it holds adapters and PEFT is not installed,
            or none to keep apart.
    """
    if not isinstance(merge, bool):
        raise ValueError(
            f"merge={merge!r} must be True or False; latefusion.merge(..., plain=True) writes a plain checkpoint."
        )
    folder = found_student(path)
    if (folder / ADAPTER_CONFIG).is_file():
        return _load_adapters(folder, path, dtype, merge)
    if not merge:
        raise ValueError(f"{path} is whole, without adapters to keep apart; load it without merge=False.")
    return load_whole(folder, dtype=dtype or compute_dtype())


def _load_adapters(
    folder: Path, path: str | Path, dtype: torch.dtype | None, merge: bool
) -> tuple[Any, ProcessorMixin]:
    try:
        from latefusion.models.student.save import load_student, merge_adapters  # lazy: needs PEFT
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path} holds adapters, and {error.name} is not installed: pip install 'latefusion[train]', or export the "
            "student with merge=true."
        ) from None
    student = load_student(folder, dtype=dtype, trainable=not merge)
    if not merge:
        return student.model, student.processor
    done = merge_adapters(student)
    if done.lost > LOST:
        name = str(done.model.dtype).removeprefix("torch.")
        warnings.warn(
            f"merging the adapters of {path} into {name} rounds away {done.lost:.0%} of what they changed; load it "
            "with dtype=torch.float32 or merge=False.",
            stacklevel=3,
        )
    attach(done.model, student.schedule)
    return done.model, student.processor
