"""The student that a run starts from (`init=FOLDER`): the run has a place for all that it trained. Without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latefusion.models.locate import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE,
    adapter_settings,
    decoder_layers,
    entry_shapes,
    saved_shapes,
)
from latefusion.models.policies.configured import is_known, schedule_of
from latefusion.models.schedule import SCHEDULE_FILE, VisionSchedule
from latefusion.recipes.schema import Config, EntryKind, Layers, Tune, Variant

LORA = re.compile(r"\.(\d+)\.(?:.*\.)?(\w+)\.lora_\w+(?:\.weight)?$")  # layer and linear module of a tensor


def check_earlier(config: Config, folder: str) -> None:
    """Check that a run can start from a student: of its base, and of the same size in all that the student trained.

    What depends on a schedule that `schedule=auto` has yet to find is left out; check again once it is known.

    Raises:
        FileNotFoundError, ValueError: it cannot, in one sentence.
    """
    file = Path(folder) / ADAPTER_CONFIG
    if not file.is_file():
        raise FileNotFoundError(
            f"no student at {folder}: it has no {ADAPTER_CONFIG}, which training writes and a merged "
            "student has no longer; name a folder of training with init=FOLDER."
        )
    earlier = adapter_settings(folder)
    if (base := earlier[BASE]) != config.model.path:
        raise ValueError(
            f"the student at {folder} has the base {base}, but model.path={config.model.path}; name that base, or, if "
            f"it only moved, write its new place as base_model_name_or_path in {file}."
        )
    projector = config.model.projector
    trains = config.lora.train_projector or config.tune is not Tune.lora
    if projector is not None and projector in (earlier["modules_to_save"] or ()) and not trains:
        raise ValueError(
            f"the student at {folder} trained {projector}, which this run does not; set lora.train_projector=true."
        )
    for name in (ADAPTER_WEIGHTS, SCHEDULE_FILE):
        if not (Path(folder) / name).is_file():
            raise FileNotFoundError(
                f"no student at {folder}: it has no {name}; name a folder of training with init=FOLDER."
            )
    shapes = saved_shapes(folder)
    if any(map(LORA.search, shapes)):
        _check_lora(config, folder, earlier)
        _check_adapted(config, folder, shapes)
    if entry := entry_shapes(shapes):
        _check_entry(config, folder, entry)


def _check_lora(config: Config, folder: str, earlier: Mapping[str, Any]) -> None:
    """Refuse LoRA that this run would not have, or would scale otherwise."""
    lora = config.lora
    if config.tune is Tune.align:
        raise ValueError(f"the student at {folder} trained LoRA, which tune=align has not; set tune=lora.")
    variant = {(True, False): Variant.rslora, (False, True): Variant.dora}.get(
        (bool(earlier.get("use_rslora")), bool(earlier.get("use_dora"))), Variant.lora
    )
    for key, now, before in (
        ("lora.r", lora.r, earlier.get("r")),
        ("lora.alpha", lora.alpha, earlier.get("lora_alpha")),
        ("lora.variant", lora.variant.value, variant.value),
    ):
        if now != before:
            raise ValueError(
                f"the student at {folder} was trained with {key}={before}, but this run has {now}; set {key}={before}."
            )


def _check_adapted(config: Config, folder: str, shapes: Mapping[str, Any]) -> None:
    """Refuse LoRA in layers or linear modules that get none in this run."""
    adapted = [match.groups() for match in map(LORA.search, shapes) if match]
    targets = sorted({target for _, target in adapted})
    lora, schedule = config.lora, config.schedule
    if lora.targets is not None and (lost := sorted({*targets} - {*lora.targets})):
        raise ValueError(
            f"the student at {folder} has LoRA in {', '.join(lost)}, where lora.targets=[{','.join(lora.targets)}] has "
            f"none; set lora.targets=[{','.join(targets)}], or leave it out for all."
        )
    depth = decoder_layers(config.model.path, config.model.revision)
    if lora.layers is Layers.all or depth is None or not is_known(schedule):
        return
    busy = {i for i, tokens in enumerate(schedule_of(schedule).vision_tokens(depth, 1)) if tokens}
    if idle := sorted({int(layer) for layer, _ in adapted} - busy):
        raise ValueError(
            f"the student at {folder} has LoRA in layers {', '.join(map(str, idle))}, which see no vision tokens in "
            "this run, so that lora.layers=busy has none there; set lora.layers=all, or the schedule as there."
        )


def _check_entry(config: Config, folder: str, shapes: Mapping[str, list[int]]) -> None:
    """Refuse an entry adapter that this run would not have, of another size, or with maps to other layers."""
    entry, before = config.entry, shapes.get("down.weight", (0,))[0]
    now = entry.rank if entry.kind is EntryKind.low_rank else 0
    setting = f"entry.rank={before}" if before else "entry.kind=scale"
    if before and entry.kind is not EntryKind.low_rank:
        setting = f"entry.kind=low_rank {setting}"
    if entry.kind is EntryKind.none or (entry.kind is EntryKind.low_rank and entry.rank == 0):
        raise ValueError(
            f"the student at {folder} has an entry adapter, which this run has not; set {setting}."
        )
    if now != before:
        raise ValueError(
            f"the student at {folder} has an entry adapter of rank {before}, but this run's has rank {now}; set "
            f"{setting}."
        )
    if not is_known(config.schedule):
        return
    schedule, earlier = schedule_of(config.schedule), VisionSchedule.load(folder)
    if schedule.enter == 0:
        raise ValueError(
            f"the student at {folder} has an entry adapter, which stands at no layer where vision tokens enter at "
            f"layer 0; set the schedule as there (it enters at layer {earlier.enter})."
        )
    maps = later_maps(shapes)
    if maps and maps != list((schedule.cross or ())[1:]):
        raise ValueError(
            f"the student at {folder} has maps of frozen vision tokens to layers {maps}, which this run does not "
            f"read; set schedule.cross={list(earlier.cross or ())}."
        )


def later_maps(shapes: Mapping[str, Any]) -> list[int]:
    """The later layers to which an entry adapter maps frozen vision tokens, by the names of its tensors."""
    return sorted({int(name.split(".")[2]) for name in shapes if name.startswith("start.later.")})
