"""A student on its base: LoRA, entry adapter and schedule."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import DUMMY_TARGET_MODULES
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from latefusion.models.attach import Attachment, attach
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.entry import ENTRY, CalibratedEntry, install_entry


@dataclass(frozen=True, kw_only=True)
class Student:
    """A late-fusion model: base, LoRA and entry adapter in one PEFT model, with its schedule attached.

    The base under any policy, the teacher among them, is the same object inside `model.disable_adapter()`. Where all
    weights train there are no adapters: `model` is the Hugging Face model itself, and its base is gone.
    """

    model: Any
    processor: ProcessorMixin
    attachment: Attachment
    schedule: VisionSchedule


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
    layers: Sequence[int] | None = None,
    rslora: bool = False,
    dora: bool = False,
    entry_rank: int | None = None,
    calibrated: CalibratedEntry | None = None,
    train: Sequence[str] = (),
) -> Student:
    """Freeze `model` and put LoRA, entry adapter and schedule on it.

    Args:
        base: what `load_base` found the model by; written into the adapter's configuration.
        rank, alpha, dropout, targets, layers: LoRA's; `targets` None: every linear layer, `layers` None: of every
            decoder layer, empty: of none (only `train` and the entry adapter learn).
        rslora: scale by `alpha / sqrt(rank)` (arXiv 2312.03732); dora: learn magnitudes apart (arXiv 2402.09353).
        entry_rank: of the entry adapter, 0: a scale alone, None: no adapter; there is none either if the schedule
            enters at layer 0.
        calibrated: what the entry adapter starts from, if there is one.
        train: names of further modules to train in full (the projector).

    Raises:
        ValueError: nothing would train, or the schedule does not fit.
    """
    schedule.validate(model.config.get_text_config().num_hidden_layers)
    saved = [*train, *_with_entry(model, schedule, entry_rank, calibrated)]
    if layers is not None and not layers and not saved:
        raise ValueError(
            "tune=align trains projector and entry adapter, but this model names no projector and the schedule enters "
            "at layer 0; set model.projector=NAME."
        )
    none = layers is not None and not layers
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=DUMMY_TARGET_MODULES if none else decoder_linears(model, targets, layers),
        modules_to_save=saved or None,
        use_rslora=rslora,
        use_dora=dora,
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


def build_full(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    *,
    schedule: VisionSchedule,
    entry_rank: int | None = None,
    calibrated: CalibratedEntry | None = None,
    train: Sequence[str] = (),
) -> Student:
    """A student whose decoder, output head, entry adapter and modules `train` all learn; see `build_student`."""
    schedule.validate(model.config.get_text_config().num_hidden_layers)
    names = (*train, *_with_entry(model, schedule, entry_rank, calibrated))
    model.requires_grad_(False)
    modules = [m for name, m in model.named_modules() if name.rpartition(".")[2] in names]
    for module in (model.get_decoder(), model.get_output_embeddings(), *modules):
        for parameter in module.parameters():
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()  # masters
    return Student(model=model, processor=processor, attachment=attach(model, schedule), schedule=schedule)


def _with_entry(
    model: PreTrainedModel, schedule: VisionSchedule, rank: int | None, calibrated: CalibratedEntry | None
) -> list[str]:
    """The names of the entry adapter, which is installed if the schedule wants one."""
    if rank is None or schedule.enter == 0:
        return []
    entry = install_entry(model, rank, 0 if calibrated is None else len(calibrated.bias))
    if calibrated is not None and entry.start is not None:
        entry.start.load_state_dict(calibrated.state_dict())
    return [ENTRY]


def decoder_linears(
    model: PreTrainedModel, names: Sequence[str] | None = None, among: Sequence[int] | None = None
) -> str:
    """A regular expression of the decoder layers' linear modules.

    Args:
        names: picks among their last names.
        among: picks among the layers.
    """
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
    index = r"\d+" if among is None else f"({'|'.join(map(str, among))})"
    return rf"{re.escape(root)}\.{index}\.(.*\.)?({'|'.join(map(re.escape, names or found))})"
