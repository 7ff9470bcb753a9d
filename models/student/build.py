"""Build a student on its base: freeze the base, add LoRA, entry adapter and schedule."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import DUMMY_TARGET_MODULES
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from latefusion.models.attach import Attachment, attach
from latefusion.models.base_model import beside_the_decoder
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.entry import ENTRY, CalibratedEntry, install_entry


@dataclass(frozen=True, kw_only=True)
class Student:
    """A late-fusion model: base, LoRA and entry adapter in one PEFT model, with its schedule attached.

    Inside `model.disable_adapter()` the same object is the base, for the teacher. If all weights train there are no
    adapters: `model` is the Hugging Face model itself, and the base is gone.
    """

    model: Any
    processor: ProcessorMixin
    attachment: Attachment
    schedule: VisionSchedule


@dataclass(frozen=True, kw_only=True)
class Lora:
    """LoRA on the linear modules of decoder layers.

    Attributes:
        rank, alpha, dropout: as PEFT has them.
        targets: names of the linear modules that get LoRA; None: all in a decoder layer.
        layers: the decoder layers that get LoRA; None: all; empty: none (only `train` and the entry adapter learn).
        rslora: scale by `alpha / sqrt(rank)` (arXiv 2312.03732).
        dora: learn magnitudes apart (arXiv 2402.09353).
    """

    rank: int
    alpha: int
    dropout: float = 0.0
    targets: Sequence[str] | None = None
    layers: Sequence[int] | None = None
    rslora: bool = False
    dora: bool = False


def build_student(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    *,
    base: str,
    schedule: VisionSchedule,
    lora: Lora,
    entry_rank: int | None = None,
    calibrated: CalibratedEntry | None = None,
    train: Sequence[str] = (),
) -> Student:
    """Freeze `model` and put LoRA, entry adapter and schedule on it.

    Args:
        base: the path or hub id that `load_base` loaded the model from; written into the adapter's configuration.
        lora: where LoRA goes, and its size.
        entry_rank: rank of the entry adapter; 0: a scale per channel only; None: no adapter. Ignored if the schedule
            enters at layer 0.
        calibrated: the fitted map that the entry adapter starts from; None: the identity.
        train: names of further modules to train in full (the projector).

    Raises:
        ValueError: nothing would train, or the schedule does not fit.
    """
    schedule.validate(model.config.get_text_config().num_hidden_layers)
    saved = [*train, *_add_entry(model, schedule, entry_rank, calibrated)]
    without_lora = lora.layers is not None and not lora.layers
    if without_lora and not saved:
        raise ValueError(
            "tune=align trains projector and entry adapter, but this model names no projector and the schedule enters "
            "at layer 0; set model.projector=NAME."
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=DUMMY_TARGET_MODULES
        if without_lora
        else decoder_linears(model, lora.targets, lora.layers),
        modules_to_save=saved or None,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
    )
    student = get_peft_model(model, config)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # masters; PEFT does so for LoRA only
    config.base_model_name_or_path = base  # PEFT writes the folder that the weights came from
    hold_frozen(model)
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
    names = (*train, *_add_entry(model, schedule, entry_rank, calibrated))
    model.requires_grad_(False)
    modules = [m for name, m in model.named_modules() if name.rpartition(".")[2] in names]
    for module in (model.get_decoder(), model.get_output_embeddings(), *modules):
        for parameter in module.parameters():
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()  # masters
    hold_frozen(model)
    return Student(model=model, processor=processor, attachment=attach(model, schedule), schedule=schedule)


def hold_frozen(model: PreTrainedModel) -> None:
    """Keep what does not train beside the decoder in eval mode, whatever `train()` is called on.

    Engines call `model.train()`, which would switch on the dropout of a frozen vision tower and move the statistics of
    its batch norms, for the teacher too.
    """
    for part in beside_the_decoder(model):
        learning = [module for module in part.modules() if _trains_whole(module)]
        inside = {module for root in learning for module in root.modules()}
        for module in part.modules():
            if module not in inside:
                module.train = partial(_stay_in_eval_mode, module)  # type: ignore[method-assign]
        part.train(model.training)


def _trains_whole(module: nn.Module) -> bool:
    """Whether the module has parameters, and all of them train."""
    learn = [parameter.requires_grad for parameter in module.parameters()]
    return bool(learn) and all(learn)


def _stay_in_eval_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    """In the place of `nn.Module.train`: children that train follow `mode`."""
    module.training = False
    for child in module.children():
        child.train(mode)
    return module


def _add_entry(
    model: PreTrainedModel, schedule: VisionSchedule, rank: int | None, calibrated: CalibratedEntry | None
) -> list[str]:
    """Install an entry adapter if the schedule enters late; the names of the modules to train, that or none."""
    if rank is None or schedule.enter == 0:
        return []
    if calibrated is None:
        install_entry(model, rank)
        return [ENTRY]
    entry = install_entry(model, rank, **calibrated.sizes())
    if entry.start is not None:
        entry.start.load_state_dict(calibrated.state_dict())
    return [ENTRY]


def decoder_linears(
    model: PreTrainedModel, names: Sequence[str] | None = None, among: Sequence[int] | None = None
) -> str:
    """A regular expression that matches the names of the decoder layers' linear modules.

    Args:
        names: last names of the modules to match; None: all.
        among: numbers of the layers to match; None: all.

    Raises:
        ValueError: no linear module has one of the names.
    """
    layers = model.get_decoder().layers
    root = next(name for name, module in model.named_modules() if module is layers)
    linear = sorted(
        {name.rpartition(".")[2] for name, m in layers.named_modules() if isinstance(m, nn.Linear) and name}
    )
    for name in names or ():
        if name not in linear:
            raise ValueError(
                f"lora.targets names {name!r}, but the decoder's linear layers are {', '.join(linear)}."
            )
    index = r"\d+" if among is None else f"({'|'.join(map(str, among))})"
    return rf"{re.escape(root)}\.{index}\.(.*\.)?({'|'.join(map(re.escape, names or linear))})"
