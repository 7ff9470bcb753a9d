"""The parts of a run, each from the configuration: first samples, collator, student, objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin, set_seed

from latefusion.data.bad_rows import Guard, usable
from latefusion.data.collate import Collator, build_collator, is_ranked
from latefusion.data.packing import Packed, check_isolation, isolates_images
from latefusion.data.streaming import Stream
from latefusion.models.base_model import load_base
from latefusion.models.policies.base import Policy
from latefusion.models.policies.configured import check_layers, schedule_of, teacher
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.build import Lora, Student, build_full, build_student
from latefusion.models.student.entry import CalibratedEntry
from latefusion.models.student.save import start_from
from latefusion.recipes.schema import (
    QUESTION_SETS,
    Config,
    EntryConfig,
    EntryKind,
    Layers,
    Tune,
    Variant,
)
from latefusion.training.objective import Distillation, Objective
from latefusion.training.prepare import dtype_of, entry_start
from latefusion.training.teacher import load_teacher, shared_vocabulary

DESCRIBED = 8  # samples that are checked before a run begins, and that its first lines describe


def first_samples(dataset: Any, count: int = DESCRIBED) -> list[Any]:
    """The first samples of a training set, opened; `Bad` in the place of a row that cannot be used."""
    if isinstance(dataset, Stream):
        return [usable(row) for row in dataset.first(count)]
    return [dataset[i] for i in range(min(count, len(dataset)))]


def check_keep(config: Config, n_vision: int) -> None:
    """Raise ValueError if `schedule.keep` is more than the vision tokens of a picture of a question set.

    Those are all of one size, one a row. Rows of other data differ: there a keep is the most that stay, and the run's
    first lines say so.

    Args:
        n_vision: the most that any of the first samples has.
    """
    if config.data.source in QUESTION_SETS:
        try:
            schedule_of(config.schedule).check_keep(n_vision, f"a picture of data={config.data.source.value}")
        except ValueError as error:
            raise ValueError(f"schedule.{error}") from None


def images_to_fit(config: Config, dataset: Any) -> Any:
    """Samples by index to fit the entry on: the training set, or the beginning of a stream."""
    if not isinstance(dataset, Stream):
        return dataset
    return first_samples(dataset, config.entry.images)


def base_of(config: Config) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model to start from, and its processor.

    Raises:
        ValueError: its decoder has too few layers for the schedule.
    """
    options = config.model
    model, processor = load_base(
        options.path,
        dtype=dtype_of(config),
        revision=options.revision,
        processor=options.processor,
        four_bits=options.load_in_4bit,
        trust_remote_code=options.trust_remote_code,
    )
    if options.attention is not None:
        model.set_attn_implementation(options.attention)
    check_layers(config, model.config.get_text_config().num_hidden_layers)  # also of a profile's schedule
    return model, processor


def student_of(config: Config) -> Student:
    """Load the base and build the configured student on it; its entry adapter starts from what `settle_entry` wrote."""
    return student_from(config, *base_of(config), entry_start(config))


def student_from(
    config: Config,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    calibrated: CalibratedEntry | None = None,
) -> Student:
    """Build the configured student on a loaded base."""
    lora, schedule = config.lora, schedule_of(config.schedule)
    parts = {
        "schedule": schedule,
        "entry_rank": entry_rank(config.entry),
        "calibrated": calibrated,
        "train": [config.model.projector] if trains_projector(config) else [],
    }
    set_seed(config.train.seed)  # adapters start the same under every engine, whatever it drew while loading
    if config.tune is Tune.full:
        return build_full(model, processor, **parts)
    student = build_student(
        model,
        processor,
        base=config.model.path,
        lora=Lora(
            rank=lora.r,
            alpha=lora.alpha,
            dropout=lora.dropout,
            targets=lora.targets,
            layers=adapted_layers(config, schedule, model.config.get_text_config().num_hidden_layers),
            rslora=lora.variant is Variant.rslora,
            dora=lora.variant is Variant.dora,
        ),
        **parts,
    )
    if config.init is not None:
        start_from(student, config.init)
    return student


def trains_projector(config: Config) -> bool:
    """Whether the module between vision tower and decoder trains."""
    return config.model.projector is not None and (
        config.lora.train_projector or config.tune is not Tune.lora
    )


def entry_rank(entry: EntryConfig) -> int | None:
    """Rank of the entry adapter; 0 = per-channel scale only, None = no adapter."""
    if entry.kind is EntryKind.scale:
        return 0
    return entry.rank or None if entry.kind is EntryKind.low_rank else None


def adapted_layers(config: Config, schedule: VisionSchedule, num_layers: int) -> list[int] | None:
    """The decoder layers that get LoRA; None: all."""
    if config.tune is Tune.align:
        return []
    if config.lora.layers is Layers.all:
        return None
    return [i for i, busy in enumerate(schedule.vision_tokens(num_layers, 1)) if busy]


def collator_of(student: Student, config: Config | None = None) -> Collator:
    """The collator of a student; without `config`: for samples of any length, whose turns see each other."""
    model = student.model
    return build_collator(
        student.processor,
        model.config,
        model.generation_config,
        max_length=config.data.max_length if config else None,
        isolate=dtype_of(config) if config and config.data.isolate else None,
        ranked=config is not None and is_ranked(config),
    )


def guarded(config: Config, collator: Any, dataset: Any, *, folder: str | None = None) -> Guard:
    """The collator, replacing or refusing rows that cannot be used, as configured; `folder` gets the list of them."""
    return Guard(
        collator,
        on_error=config.data.on_error,
        too_long=config.data.too_long,
        dataset=dataset,
        folder=folder,
    )


def packing(config: Config, student: Student, collator: Guard) -> Guard | Packed:
    """The collator, which packs samples if `data.pack` says so and the model can take it."""
    if not config.data.pack:
        return collator
    model = student.attachment.model
    if config.engine.deepspeed or config.engine.fsdp:  # whose weights may lie in shards already
        return Packed.of(model, collator, pictures=False)
    check_isolation(model)
    with student.attachment.using(VisionSchedule()):
        pictures = isolates_images(model, student.processor)
    return Packed.of(model, collator, pictures=pictures)


def objective_of(config: Config, student: Student, *, offline: bool | None = None) -> Objective:
    """The objective of a run.

    Args:
        offline: the teacher's answers come with the batch; None: as `kl.cache` says.

    Raises:
        FileNotFoundError: the model that is to teach (`kl.model`) is not there.
    """
    offline = config.kl.cache is not None if offline is None else offline
    policy, other = None if offline else teacher(config), None
    if config.kl.model is not None and policy is not None:
        other = load_teacher(config, policy, dtype=dtype_of(config))
    sharded = config.engine.deepspeed or config.engine.fsdp
    blank = student.processor.image_processor(images=[Image.new("RGB", (32, 32))], return_tensors="pt")
    return Objective(
        model=student.model,
        attachment=student.attachment,
        kl=Distillation(
            policy=policy,
            weight=config.kl.weight,
            temperature=config.kl.temperature,
            share=config.kl.share,
            seed=config.train.seed,
            other=other,
            vocabulary=None if config.kl.model is None else shared_vocabulary(config),
        ),
        share_images=not trains_projector(config),
        blank=blank if sharded or trains_projector(config) else None,
        narrowing=narrowing(config, student),
        # FSDP2 gathers all but the layers at once
        sharded=config.engine.in_shards and not config.engine.fsdp,
    )


def narrowing(config: Config, student: Student) -> Callable[[float], Policy] | None:
    """The schedule at a moment of the run (0 to 1); None: it does not change."""
    if config.train.narrow == 0:
        return None
    layers = student.model.config.get_text_config().num_hidden_layers
    return lambda moment: student.schedule.widened(moment / config.train.narrow, layers)
