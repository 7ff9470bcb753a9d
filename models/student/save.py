"""What is written of a student, and how it comes back: adapter folders, plain checkpoints, the merge of the two."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin

from latefusion.models.attach import attach
from latefusion.models.base_model import compute_dtype, load_base
from latefusion.models.locate import ADAPTER_CONFIG, check_base_of
from latefusion.models.schedule import SCHEDULE_FILE, VisionSchedule
from latefusion.models.student.build import Student
from latefusion.models.student.entry import ENTRY, entry_of, entry_shape, install_entry

ADAPTER_WEIGHTS = "adapter_model.safetensors"

ENTRY_WEIGHTS = f"{ENTRY}.safetensors"


def save_student(student: Student, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """A PEFT adapter folder with `vision_schedule.json` and the processor beside it; `load` reads it.

    Of a student without adapters, what `merge` would write.

    Args:
        state_dict: the model's, where an engine has gathered it from shards.
    """
    if isinstance(student.model, PeftModel):
        student.model.save_pretrained(str(folder), state_dict=state_dict, save_embedding_layers=False)
    else:
        _save_whole(student.model, student.schedule, folder, state_dict)
    student.processor.save_pretrained(folder)
    student.schedule.save(folder)


def _save_whole(
    model: Any, schedule: VisionSchedule, folder: str | Path, state_dict: dict[str, Tensor] | None = None
) -> None:
    """A plain checkpoint whose configuration carries the schedule, the entry adapter's weights beside it."""
    weights = state_dict if state_dict is not None else model.state_dict()
    entry = {name.partition(f"{ENTRY}.")[2]: w for name, w in weights.items() if name.startswith(f"{ENTRY}.")}
    plain = {name: w for name, w in weights.items() if not name.startswith(f"{ENTRY}.")}
    model.config.vision_schedule = schedule.to_dict()
    spare_deepspeed_the_guess()
    model.save_pretrained(folder, state_dict=plain)
    if entry:
        save_file({name: w.contiguous().cpu() for name, w in entry.items()}, Path(folder) / ENTRY_WEIGHTS)


def spare_deepspeed_the_guess() -> None:
    """Saving with transformers, and its `Trainer`, import DeepSpeed if it is installed, which guesses, and warns."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def load_student(
    path: str | Path, *, dtype: torch.dtype | None = None, base: PreTrainedModel | None = None
) -> Student:
    """A student from the adapter folder that `save_student` wrote, for inference.

    Args:
        dtype: of the base's weights; None: bfloat16 where the hardware has it, else float32.
        base: the model to put the adapters on, used by nobody else (`twin`); None: loaded as they name it.

    Raises:
        FileNotFoundError: the folder holds no student, or its base is not there.
        ValueError: its adapters are damaged, or of another base.
    """
    folder = Path(path)
    for name in (ADAPTER_CONFIG, SCHEDULE_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"no student at {path}: it has no {name}; name a folder that training wrote."
            )
    model = base
    if model is None:
        model, _ = load_base(check_base_of(folder), dtype=dtype or compute_dtype())
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as weights:
            shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{folder / ADAPTER_WEIGHTS} is damaged ({error}); name another checkpoint."
        ) from None
    entries = {name.partition(f"{ENTRY}.")[2]: shape for name, shape in shapes.items() if f"{ENTRY}." in name}
    if entries:
        install_entry(model, *entry_shape(entries))
    other = f"the student at {path} is of another base than {model.name_or_path}"
    fix = f"name the one it was trained on as base_model_name_or_path in {folder / ADAPTER_CONFIG}."
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # PEFT's
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # told below
        try:
            student = PeftModel.from_pretrained(model, str(folder)).eval()
        except (RuntimeError, ValueError) as error:  # shapes, names of modules
            raise ValueError(f"{other}: {str(error).splitlines()[-1].strip().rstrip('.')}; {fix}") from None
    apart = shapes.keys() ^ get_peft_model_state_dict(student, save_embedding_layers=False).keys()
    if apart:
        raise ValueError(f"{other}: {min(apart)} is in one of them alone; {fix}")
    schedule = VisionSchedule.load(folder)
    return Student(
        model=student,
        processor=AutoProcessor.from_pretrained(folder),
        attachment=attach(student, schedule),
        schedule=schedule,
    )


def start_from(student: Student, folder: str | Path) -> None:
    """Give a new student the weights that an earlier one trained (`recipe=align`, say), its teacher left as it is.

    Raises:
        FileNotFoundError: the folder holds no student.
        ValueError: the new student has no place for some of them.
    """
    path = Path(folder)
    if not (path / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(
            f"no student at {folder}: it has no {ADAPTER_CONFIG}; name a folder with init=FOLDER."
        )
    if not isinstance(student.model, PeftModel):
        raise ValueError("init=FOLDER needs adapters to put the weights in; use tune=lora or tune=align.")
    trained: Any = student.model.peft_config["default"]
    mine = set(trained.modules_to_save or ())
    earlier = vars(PeftConfig.from_pretrained(str(path)))
    for name in earlier["modules_to_save"] or ():
        if name not in mine:
            raise ValueError(
                f"the student at {folder} trained {name}, which this one does not; set "
                f"{'entry.kind and schedule.enter' if name == ENTRY else 'lora.train_projector=true'} as there."
            )
    try:
        found: Any = set_peft_model_state_dict(student.model, load_file(path / ADAPTER_WEIGHTS))
        unknown = found.unexpected_keys
    except RuntimeError as error:
        raise ValueError(
            f"the student at {folder} has weights of other shapes: {str(error).splitlines()[-1]}"
        ) from None
    if unknown:
        raise ValueError(f"the student at {folder} trained {unknown[0]}, which this one does not have.")


def _entry_weights(folder: Path) -> dict[str, Tensor]:
    """Beside the checkpoint, or in it: stock `save_pretrained` of a loaded model writes them among the others."""
    if (folder / ENTRY_WEIGHTS).is_file():
        return load_file(folder / ENTRY_WEIGHTS)
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            names = [name for name in weights.keys() if name.startswith(f"{ENTRY}.")]  # noqa: SIM118
            found.update({name.removeprefix(f"{ENTRY}."): weights.get_tensor(name) for name in names})
    return found


def load_entry(model: PreTrainedModel, folder: str | Path) -> None:
    """The entry adapter of a plain checkpoint, if it has one, installed in its model."""
    weights = _entry_weights(Path(folder))
    if not weights:
        return
    entry = entry_of(model)
    if entry is None:
        shapes = {name: weight.shape for name, weight in weights.items()}
        entry = install_entry(model, *entry_shape(shapes))
    entry.load_state_dict(weights)


def merge(source: str | Path, target: str | Path, *, dtype: torch.dtype | None = None) -> tuple[int, int]:
    """Write the student at `source` as a plain Hugging Face checkpoint, LoRA merged, to `target`.

    Its `config.json` carries the schedule as `vision_schedule`; the entry adapter lies beside the weights,
    so any stock class loads the folder (and runs it dense). `load` restores both.

    Returns:
        How many of the base's tensors have changed, and how many it has.

    Raises:
        ValueError: none has: adapters that never trained, or changes too small for the dtype of the weights.
    """
    student = load_student(source, dtype=dtype)
    student.attachment.detach()
    before = fingerprints(student.model.get_base_model())
    model = student.model.merge_and_unload()
    after = fingerprints(model)
    changed = sum(after[name] != before[name] for name in before)
    if before.keys() != after.keys():
        raise ValueError(
            f"merging {source} left other weights than the base has; is its adapter of this model?"
        )
    if not changed:
        raise ValueError(
            f"merging {source} changed no weight of its base: its adapters never trained, or their changes are too "
            f"small for {str(model.dtype).removeprefix('torch.')}; merge in float32."
        )
    _save_whole(model, student.schedule, target)
    student.processor.save_pretrained(target)
    return changed, len(before)


def fingerprints(model: Any) -> dict[str, int]:
    """A checksum of every weight of the base inside `model`, adapters left out, by the base's own names."""
    found = {}
    for name, weight in model.state_dict().items():
        if ENTRY in name or "lora_" in name or ".modules_to_save." in name:
            continue
        plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        found[plain] = crc32(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found


def load(path: str | Path, *, dtype: torch.dtype | None = None) -> tuple[Any, ProcessorMixin]:
    """A trained late-fusion model, its schedule attached, and its processor.

    Args:
        path: a folder of `training/train.py` (PEFT adapter) or of `merge` (plain checkpoint).
        dtype: of the base's weights; None: bfloat16 where the hardware has it, else float32.

    Raises:
        FileNotFoundError: the folder holds neither.
    """
    folder = Path(path)
    if (folder / ADAPTER_CONFIG).is_file():
        student = load_student(folder, dtype=dtype)
        return student.model, student.processor
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no model at {path}: it has neither {ADAPTER_CONFIG} nor config.json; name a folder that "
            "training wrote."
        )
    model, processor = load_base(str(folder), dtype=dtype or compute_dtype())
    if not hasattr(model.config, "vision_schedule"):
        raise FileNotFoundError(
            f"the model at {path} carries no vision schedule; load it with transformers and attach one."
        )
    load_entry(model, folder)
    attach(model, VisionSchedule.from_dict(model.config.vision_schedule))
    return model, processor
