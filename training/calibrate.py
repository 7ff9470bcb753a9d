"""`entry.init=calibrated`: the entry adapter's starting point, fitted before training or read from a profile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from latefusion.data.bad_rows import Guard
from latefusion.data.collate import build_collator
from latefusion.data.draw import NoImages, distinct_images
from latefusion.data.prompt_batches import batches
from latefusion.models.attach import attach
from latefusion.models.fingerprint import model_fingerprint
from latefusion.models.policies.configured import schedule_of
from latefusion.models.profile_folder import ENTRY, read_entry, write_entry
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.entry import CalibratedEntry
from latefusion.models.student.entry_fit import fit_entry
from latefusion.recipes.schema import Config, EntryInit, EntryKind
from latefusion.training.first import first_says

IMAGES_AT_ONCE = 32
FITTED = "entry"  # in the run's folder


def settle_entry(
    config: Config,
    base: Callable[[], tuple[PreTrainedModel, ProcessorMixin]],
    rows: Callable[[], Any],
    resumed: Path | None = None,
) -> None:
    """Have the map that `entry.init` asks for in a file: a profile's, or fitted on images of the training set.

    Of several processes the first fits it, on a GPU if there is one, and all read what it wrote: before the engine
    is prepared, for ZeRO-3 shards every model that is loaded later. It holds a model of its own, whole, meanwhile.

    Args:
        base: loads the model.
        rows: samples of the training set by index.
        resumed: the checkpoint that the run goes on from; its entry is not fitted again.

    Raises:
        ValueError: the data has too few images to fit it on, or a row among those with the first images cannot be used
            and must not be left out.
    """
    if not calibrated(config) or _profiled(config) is not None:
        return
    folder = Path(config.output_dir) / FITTED

    def fitted() -> str:
        if resumed is None or not (folder / ENTRY).is_file():
            try:
                write_entry(folder, _fit(config, *base(), rows()), weights_of(config))
            finally:
                torch.cuda.empty_cache()
        return str(folder)

    first_says("entry", fitted)


def calibrated(config: Config) -> bool:
    """Whether there is an entry adapter that starts from a fitted map: not where vision enters at the first layer."""
    entry = config.entry
    if entry.kind is EntryKind.none or entry.init is not EntryInit.calibrated:
        return False
    return schedule_of(config.schedule).enter > 0


def entry_start(config: Config) -> CalibratedEntry | None:
    """The map that `settle_entry` found or fitted; None: the entry adapter starts as the identity.

    Raises:
        FileNotFoundError: this process does not see what the first one wrote.
    """
    if not calibrated(config):
        return None
    folder = Path(config.output_dir) / FITTED
    if (found := _profiled(config) or read_entry(folder, weights_of(config))) is None:
        raise FileNotFoundError(
            f"no calibrated entry in {folder}, where the first process wrote it; choose an output_dir=FOLDER that all "
            "machines share."
        )
    return found


def _profiled(config: Config) -> CalibratedEntry | None:
    profile = config.schedule.profile
    return None if profile is None else read_entry(profile, weights_of(config))


def weights_of(config: Config) -> str:
    return model_fingerprint(config.model.path, config.model.revision)


def _fit(config: Config, model: PreTrainedModel, processor: ProcessorMixin, rows: Any) -> CalibratedEntry:
    if torch.cuda.is_available() and not config.model.load_in_4bit:  # where 4 bits are already
        model.cuda()  # type: ignore[call-arg]
    collator = build_collator(
        processor, model.config, model.generation_config, max_length=config.data.max_length
    )
    guard = Guard(
        collator,
        on_error=config.data.on_error,
        too_long=config.data.too_long,
        dataset=rows,
        folder=None,
    )
    enter = schedule_of(config.schedule).enter
    try:
        chosen = distinct_images(rows, config.entry.images, guard.fits)
    except NoImages:
        raise ValueError(
            "entry.init=calibrated is fitted on images, and none of the training set's samples has one; use "
            "entry.init=identity."
        ) from None
    at_once = max(1, min(IMAGES_AT_ONCE, len(chosen) // 4))  # the last batch tests the map of those before it
    with attach(model, VisionSchedule()) as attachment:
        found = fit_entry(
            attachment,
            (
                (batch.inputs, batch.vision)
                for batch in (group.make() for group in batches(model, collator, chosen, at_once))
            ),
            enter,
        )
    if found.unseen is None or found.raw is None or found.unseen <= found.raw:
        raise ValueError(
            f"{len(chosen)} images are too few to calibrate the entry at layer {enter}: on images it was not fitted to "
            "the map is no better than none; use more (entry.images, rows that can be read) or entry.init=identity."
        )
    print(
        f"Entry calibrated on {len(chosen)} images: fitted without the last {at_once}, it explains {found.unseen:.1%} "
        f"of the dense model's vision states at layer {enter} in those (the projector's output as it is: "
        f"{found.raw:.1%}).",
        flush=True,
    )
    return found.entry
