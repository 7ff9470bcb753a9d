"""Base model, student, and what is saved of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from latefusion.models import embedded
from latefusion.models.attach import Attachment, attach
from latefusion.models.entry import ENTRY, CalibratedEntry, entry_of, install_entry
from latefusion.models.schedule import SCHEDULE_FILE, VisionSchedule

EMBEDDED = "embedded"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ENTRY_WEIGHTS = f"{ENTRY}.safetensors"


@dataclass(frozen=True, kw_only=True)
class Student:
    """A late-fusion model: base, LoRA and entry adapter in one PEFT model, with its schedule attached.

    The base under any policy, the teacher among them, is the same object inside `model.disable_adapter()`.
    """

    model: PeftModel
    processor: ProcessorMixin
    attachment: Attachment
    schedule: VisionSchedule


def compute_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """bfloat16 where the hardware multiplies in it, else float32."""
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def load_base(path: str, *, dtype: torch.dtype) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A base model and its processor: `embedded`, a local folder, or a hub id.

    Raises:
        FileNotFoundError: there are no such weights, or they cannot be reached from here.
    """
    if path == EMBEDDED:
        return embedded.load_base(dtype)
    check_base(path)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
    return model.eval(), AutoProcessor.from_pretrained(path)


def check_base(path: str) -> None:
    """Raise FileNotFoundError, in one sentence, where `load_base` cannot find its weights."""
    if path == EMBEDDED or (Path(path) / "config.json").is_file():
        return
    fix = f"name a folder or hub id with model.path=..., or run `hf download {path}` where there is a network"
    if Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise FileNotFoundError(f"no model at {path}: it has no config.json; {fix}.")
    if isinstance(try_to_load_from_cache(path, "config.json"), str):
        return
    try:
        HfApi().model_info(path, timeout=10)
    except Exception as error:  # every way a network, a hub or a name can fail
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"the weights of {path} are not on this machine and cannot be downloaded ({reason}); {fix}."
        ) from None


def decoder_linears(model: PreTrainedModel, names: Sequence[str] | None = None) -> str:
    """A regular expression of the decoder layers' linear modules; `names` picks among their last names."""
    layers = model.get_decoder().layers
    root = next(name for name, module in model.named_modules() if module is layers)
    found = sorted(
        {name.rpartition(".")[2] for name, m in layers.named_modules() if isinstance(m, nn.Linear) and name}
    )
    for name in names or ():
        if name not in found:
            raise ValueError(
                f"lora.targets names {name!r}, but the decoder's linear layers are {', '.join(found)}."
            )
    return rf"{re.escape(root)}\.\d+\.(.*\.)?({'|'.join(map(re.escape, names or found))})"


def build_student(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    *,
    base: str,
    schedule: VisionSchedule,
    rank: int,
    alpha: int,
    dropout: float,
    targets: Sequence[str] | None = None,
    entry_rank: int = 0,
    calibrated: CalibratedEntry | None = None,
    train: Sequence[str] = (),
) -> Student:
    """Freeze `model` and put LoRA, entry adapter and schedule on it.

    Args:
        base: what `load_base` found the model by; written into the adapter's configuration.
        rank, alpha, dropout, targets: LoRA's; `targets` None: every linear layer of every decoder layer.
        entry_rank: 0: no entry adapter; there is none either if the schedule enters at layer 0.
        calibrated: what the entry adapter starts from, if there is one.
        train: names of further modules to train in full (the projector).
    """
    schedule.validate(model.config.get_text_config().num_hidden_layers)
    saved = list(train)
    if entry_rank > 0 and schedule.enter > 0:
        entry = install_entry(model, entry_rank, 0 if calibrated is None else len(calibrated.bias))
        if calibrated is not None and entry.start is not None:
            entry.start.load_state_dict(calibrated.state_dict())
        saved.append(ENTRY)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=decoder_linears(model, targets),
        modules_to_save=saved or None,
        task_type="CAUSAL_LM",
    )
    student = get_peft_model(model, config)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # masters; PEFT does so for LoRA only
    config.base_model_name_or_path = base  # PEFT writes the folder that the weights came from
    return Student(
        model=student, processor=processor, attachment=attach(student, schedule), schedule=schedule
    )


def save_student(student: Student, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """A PEFT adapter folder with `vision_schedule.json` and the processor beside it; `load` reads it.

    Args:
        state_dict: the model's, where an engine has gathered it from shards.
    """
    student.model.save_pretrained(str(folder), state_dict=state_dict, save_embedding_layers=False)
    student.processor.save_pretrained(folder)
    student.schedule.save(folder)


def load_student(path: str | Path, *, dtype: torch.dtype | None = None) -> Student:
    """A student from the adapter folder that `save_student` wrote, for inference.

    Raises:
        FileNotFoundError: the folder holds no student, or its base is not there.
    """
    folder = Path(path)
    for name in (ADAPTER_CONFIG, SCHEDULE_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"no student at {path}: it has no {name}; name a folder that training wrote."
            )
    config = PeftConfig.from_pretrained(str(folder))
    model, _ = load_base(config.base_model_name_or_path, dtype=dtype or compute_dtype())
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    entries = {name.partition(f"{ENTRY}.")[2]: shape for name, shape in shapes.items() if f"{ENTRY}." in name}
    if entries:
        install_entry(model, entries["down.weight"][0], entries.get("start.bias", [0])[0])
    student = PeftModel.from_pretrained(model, str(folder)).eval()
    schedule = VisionSchedule.load(folder)
    return Student(
        model=student,
        processor=AutoProcessor.from_pretrained(folder),
        attachment=attach(student, schedule),
        schedule=schedule,
    )


def merge(source: str | Path, target: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write the student at `source` as a plain Hugging Face checkpoint, LoRA merged, to `target`.

    Its `config.json` carries the schedule as `vision_schedule`; the entry adapter lies beside the weights,
    so any stock class loads the folder (and runs it dense). `load` restores both.
    """
    student = load_student(source, dtype=dtype)
    student.attachment.detach()
    model = student.model.merge_and_unload()
    entry = entry_of(model)
    if entry is not None:
        del model._modules[ENTRY]
    model.config.vision_schedule = student.schedule.to_dict()
    model.save_pretrained(target)
    if entry is not None:
        save_file(entry.state_dict(), Path(target) / ENTRY_WEIGHTS)
    student.processor.save_pretrained(target)


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
    if (folder / ENTRY_WEIGHTS).is_file():
        weights = load_file(folder / ENTRY_WEIGHTS)
        places = len(weights["start.bias"]) if "start.bias" in weights else 0
        install_entry(model, weights["down.weight"].shape[0], places).load_state_dict(weights)
    attach(model, VisionSchedule.from_dict(model.config.vision_schedule))
    return model, processor
