"""`entry.init=calibrated`: the entry adapter's starting point, fitted before training or read from a profile."""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from latefusion.data.collate import Collator
from latefusion.eval.profiling.files import ENTRY, read_entry
from latefusion.eval.profiling.samples import batches, distinct_images, stop_tokens
from latefusion.models.attach import attach
from latefusion.models.calibration import fit_entry
from latefusion.models.entry import CalibratedEntry
from latefusion.models.identity import identity
from latefusion.models.schedule import VisionSchedule
from latefusion.training.config import Config, EntryInit
from latefusion.training.schedule import schedule_of

IMAGES_AT_ONCE = 32


def calibrated_entry(
    config: Config, model: PreTrainedModel, processor: ProcessorMixin, dataset: Any
) -> CalibratedEntry | None:
    """The map that `entry.init` asks for, or None; fitted on images of the training set, the same in every process.

    Raises:
        ValueError: the data has too few images, or weights are sharded, so that nothing can be fitted here.
    """
    enter = schedule_of(config.schedule).enter
    if config.entry.init is not EntryInit.calibrated or enter == 0:
        return None
    if config.schedule.profile is not None:
        weights = identity(config.model.path, config.model.revision)
        if (entry := read_entry(config.schedule.profile, weights)) is not None:
            return entry
    stage = ((config.engine.deepspeed or {}).get("zero_optimization") or {}).get("stage", 0)
    if stage == 3:
        raise ValueError(
            f"entry.init=calibrated cannot run the model before ZeRO-3 shards it; run `python eval/profile.py` first "
            f"and name its folder, with its {ENTRY}: schedule.profile=FOLDER."
        )
    collator = Collator(
        processor=processor,
        vision_ids=[model.config.image_token_id],
        stop=stop_tokens(model, processor),
    )
    chosen = distinct_images(dataset, config.entry.images)
    with attach(model, VisionSchedule()) as attachment:
        found = fit_entry(
            attachment,
            (
                (batch.inputs, batch.vision)
                for batch in (group.make() for group in batches(model, collator, chosen, IMAGES_AT_ONCE))
            ),
            enter,
        )
    if int(os.environ.get("RANK", "0")) == 0:
        print(
            f"Entry calibrated on {len(chosen)} images: explains {found.explained:.1%} of what the dense model's "
            f"vision tokens are at layer {enter}.",
            flush=True,
        )
    return found.entry
