"""Save, load and merge students: PEFT adapter folders, and checkpoints with the adapters merged into the weights."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from latefusion.models.attach import attach
from latefusion.models.base_model import compute_dtype, load_base, load_processor
from latefusion.models.folder_contents import check_free
from latefusion.models.inputs import unwrapped
from latefusion.models.locate import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE,
    adapter_settings,
    check_base_of,
    check_not_whole,
    entry_shapes,
    saved_shapes,
)
from latefusion.models.schedule import SCHEDULE_FILE, VisionSchedule
from latefusion.models.student.build import Student, hold_frozen
from latefusion.models.student.entry import ENTRY, CalibratedEntry, entry_sizes, install_entry
from latefusion.models.student.whole import forget, record

PEFT_TYPE = (
    "LATEFUSION (a student: load its folder with latefusion.load, from pip install 'latefusion[train]')"
)
WRITTEN = {  # settings of LoRA that `build_student` writes or PEFT adds; all others must be PEFT's defaults
    *("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora", "use_dora"),
    *("task_type", "peft_type", "peft_version", "inference_mode", "revision", BASE),
}


@dataclass(frozen=True)
class Merge:
    """What merging adapters into the weights did.

    Attributes:
        model: the Hugging Face model, its adapters merged and gone.
        changed: tensors of the base that are different now; total: all that it has.
        lost: share of the adapters' change of the adapted weights that rounding to the weights' dtype took away
            (a ratio of Frobenius norms).
    """

    model: PreTrainedModel
    changed: int
    total: int
    lost: float


# ---------------------------------------------------------------- save


def save_student(student: Student, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write the student for `load`: an adapter folder, or a whole checkpoint if it has no adapters.

    Args:
        state_dict: the model's, where an engine has gathered it from shards.
    """
    if isinstance(student.model, PeftModel):
        student.model.save_pretrained(str(folder), state_dict=state_dict, save_embedding_layers=False)
        _refuse_stock_peft(Path(folder))
    else:
        record(student.model, student.schedule)
        spare_deepspeed_the_guess()
        student.model.save_pretrained(folder, state_dict=state_dict)
    student.processor.save_pretrained(folder)
    student.schedule.save(folder)


def _refuse_stock_peft(folder: Path) -> None:
    """Name a type of adapters that PEFT does not know: alone it would drop the entry adapter and the schedule.

    PEFT's error names the type, which is therefore a sentence.
    """
    file = folder / ADAPTER_CONFIG
    if file.is_file():  # one process writes it
        file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": PEFT_TYPE}, indent=2) + "\n")


def copy_adapters(source: str | Path, target: str | Path) -> None:
    """Write the adapter folder `source` again: its weights byte for byte, without what its run left beside them.

    Raises:
        FileNotFoundError: `source` holds no student.
        ValueError: its files are damaged.
    """
    folder, copy = _adapter_folder(source), Path(target)
    lora_config(folder)
    saved_shapes(folder)
    schedule = VisionSchedule.load(folder)
    copy.mkdir(parents=True, exist_ok=True)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copyfile(folder / name, copy / name)
    _refuse_stock_peft(copy)
    load_processor(str(folder)).save_pretrained(copy)
    schedule.save(copy)


def spare_deepspeed_the_guess() -> None:
    """Say that there is no GPU: transformers imports DeepSpeed to save, which would guess the device and warn."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


# ---------------------------------------------------------------- load


def load_student(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    base: PreTrainedModel | None = None,
    trainable: bool = False,
) -> Student:
    """Load a student from its adapter folder, in eval mode, its adapters apart from the base's weights.

    Args:
        dtype: of the base's weights; None: bfloat16 where the hardware has it, else float32.
        base: the model to put the adapters on, used by nobody else (`twin`); None: the one that the folder names.
        trainable: the adapters have gradients.

    Raises:
        FileNotFoundError: the folder holds no student, or its base is not there.
        ValueError: its adapters are damaged, incomplete, or made for another base.
    """
    folder = _adapter_folder(path)
    config = lora_config(folder)
    shapes = saved_shapes(folder)
    entry = entry_shapes(shapes)
    if ENTRY in (config.modules_to_save or ()) and not entry:
        raise ValueError(
            f"the student at {path} was trained with an entry adapter, but {ADAPTER_WEIGHTS} does not hold it: it was "
            "loaded and saved without latefusion; use the folder that training wrote."
        )
    model = base
    if model is None:
        model, _ = load_base(check_base_of(folder), dtype=dtype or compute_dtype())
    if entry:
        install_entry(model, **entry_sizes(entry))
    other = f"the student at {path} is of another base than {model.name_or_path}"
    fix = f"name the one it was trained on as {BASE} in {folder / ADAPTER_CONFIG}."
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # PEFT's
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error below
        try:
            student = PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=trainable)
        except (RuntimeError, ValueError) as error:  # shapes, names of modules
            raise ValueError(f"{other}: {str(error).splitlines()[-1].strip().rstrip('.')}; {fix}") from None
    unmatched = shapes.keys() ^ get_peft_model_state_dict(student, save_embedding_layers=False).keys()
    if unmatched:
        raise ValueError(f"{other}: {min(unmatched)} is in one of them alone; {fix}")
    hold_frozen(model)
    schedule = VisionSchedule.load(folder)
    return Student(
        model=student.eval(),
        processor=load_processor(str(folder)),
        attachment=attach(student, schedule),
        schedule=schedule,
    )


def _adapter_folder(path: str | Path) -> Path:
    for name in (ADAPTER_CONFIG, SCHEDULE_FILE):
        if not (Path(path) / name).is_file():
            raise FileNotFoundError(
                f"no student at {path}: it has no {name}; name a folder that training wrote."
            )
    return Path(path)


def lora_config(folder: Path) -> LoraConfig:
    """The LoRA settings of a student's folder, taken from its JSON as plain values.

    PEFT acts on some other settings (`megatron_core` names a module to import); a folder that sets them is refused.

    Raises:
        ValueError: the file is damaged, or sets what `build_student` never does.
    """
    settings = adapter_settings(folder)
    if settings.get("peft_type") not in (PEFT_TYPE, "LORA"):  # of an earlier format
        raise ValueError(
            f"{folder / ADAPTER_CONFIG} describes adapters of type {settings.get('peft_type')!r}; a student has LORA."
        )
    defaults = LoraConfig().to_dict()
    for name, value in settings.items():
        if name not in WRITTEN and value and value != defaults.get(name):
            raise ValueError(
                f"{folder / ADAPTER_CONFIG} sets {name}={value!r}, which no student of latefusion has; name a folder "
                "that training wrote."
            )
    names = {field.name for field in fields(LoraConfig)} & WRITTEN - {"peft_type"}
    return LoraConfig(**{name: settings[name] for name in names if name in settings})


def saved_start(folder: str | Path) -> CalibratedEntry | None:
    """A start of the sizes that the entry adapter in a student's folder has, all zero; None: it has no such start.

    Raises:
        FileNotFoundError: the folder holds no student.
        ValueError: its weights are damaged.
    """
    shapes = entry_shapes(saved_shapes(folder))
    sizes = entry_sizes(shapes)
    sizes.pop("rank")
    return CalibratedEntry(hidden_size=shapes["scale"][0], **sizes) if sizes["places"] else None


def has_entry(folder: str | Path) -> bool:
    """Whether a student's folder holds an entry adapter; raises as `saved_start`."""
    return bool(entry_shapes(saved_shapes(folder)))


# ---------------------------------------------------------------- start from, merge


def start_from(student: Student, folder: str | Path) -> None:
    """Give a new student the weights that an earlier one trained (`recipe=align`, say); its teacher stays the base.

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
    config: Any = student.model.peft_config["default"]
    for name in lora_config(path).modules_to_save or ():
        if name not in (config.modules_to_save or ()):
            raise ValueError(
                f"the student at {folder} trained {name}, which this one does not; set "
                f"{'entry.kind and schedule.enter' if name == ENTRY else 'lora.train_projector=true'} as there."
            )
    weights = load_file(path / ADAPTER_WEIGHTS)
    own = get_peft_model_state_dict(student.model, save_embedding_layers=False)
    for name, weight in sorted(weights.items()):
        if name not in own:
            fix = "; set lora.layers, lora.targets and lora.variant as there" if "lora_" in name else ""
            raise ValueError(f"the student at {folder} trained {name}, which this one does not have{fix}.")
        if weight.shape != own[name].shape:
            raise ValueError(
                f"the student at {folder} has {name} of shape {tuple(weight.shape)}, where this one has "
                f"{tuple(own[name].shape)}; set lora.r and entry.rank as there."
            )
    set_peft_model_state_dict(student.model, own | weights)


def merge(
    source: str | Path, target: str | Path, *, dtype: torch.dtype | None = None, plain: bool = False
) -> Merge:
    """Write the student at `source` as one checkpoint, LoRA merged, to `target`.

    Its model type is `latefusion` (`whole.py`): `load` reads it, `AutoModelForImageTextToText` once latefusion is
    imported, and whatever does not know the type refuses it. `config.json` carries the schedule as `vision_schedule`
    and the entry adapter's sizes as `vision_entry`; its tensors lie among the others.

    Args:
        plain: write a checkpoint of the base's type instead, without schedule and entry adapter. Everything loads it,
            and runs it dense, which it was not trained for.

    Raises:
        FileNotFoundError: `source` holds no student, or its base is not there.
        ValueError: `source` is whole already; `target` holds something or is a file; or merging changes nothing: the
            adapters never trained, or the changes are too small for the dtype.
    """
    if not isinstance(plain, bool):
        raise ValueError(f"plain={plain!r} must be True or False.")
    check_not_whole(source)
    check_free(target, fix="choose another folder to merge into")
    student = load_student(source, dtype=dtype)
    done = merge_adapters(student)
    if not done.changed:
        raise ValueError(
            f"merging {source} changed no weight of its base: its adapters never trained, or their changes are too "
            f"small for {_name(done.model.dtype)}; merge in float32."
        )
    if plain:
        forget(done.model)
        spare_deepspeed_the_guess()
        done.model.save_pretrained(target)
        student.processor.save_pretrained(target)
        return done
    save_student(
        Student(
            model=done.model,
            processor=student.processor,
            attachment=student.attachment,
            schedule=student.schedule,
        ),
        target,
    )
    return done


@torch.no_grad()
def merge_adapters(student: Student) -> Merge:
    """Add a student's LoRA to the weights of its base, in place, and take its policy off.

    The sums are made in float32 and rounded once to the weights' dtype.
    """
    student.attachment.detach()
    base = unwrapped(student.model)
    dtype = base.dtype
    changed, difference, change = 0, 0.0, 0.0
    for module in student.model.modules():
        if isinstance(module, LoraLayer):
            layer: Any = module.get_base_layer()
            before = layer.weight.data
            layer.weight.data = before.to(torch.float32, copy=True)
            module.merge()
            exact = layer.weight.data
            layer.weight.data = exact.to(before.dtype)
            changed += not torch.equal(layer.weight.data, before)
            difference += float((layer.weight.data.float() - exact).square().sum(dtype=torch.float64))
            change += float((exact - before.float()).square().sum(dtype=torch.float64))
        elif isinstance(module, ModulesToSaveWrapper) and not _is_entry(base, module):
            trained: Any = module.modules_to_save["default"]
            original = module.original_module.state_dict()
            trained.to(dtype)
            changed += sum(
                not torch.equal(weight, original[name]) for name, weight in trained.state_dict().items()
            )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        model = student.model.merge_and_unload()
    # as transformers loads a model; torch multiplies the last tokens of a batch slowly by a frozen head
    for weight in model.parameters():
        weight.requires_grad_(weight.is_floating_point())
    record(model, student.schedule)
    total = sum(1 for name in model.state_dict() if not name.startswith(f"{ENTRY}."))
    return Merge(model, changed, total, (difference / change) ** 0.5 if change else 0.0)


def _is_entry(base: nn.Module, module: nn.Module) -> bool:
    return base._modules.get(ENTRY) is module


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
