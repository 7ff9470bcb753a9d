"""One training run, from a composed configuration to the report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin, set_seed

from latefusion.data import sources
from latefusion.data.collate import IGNORE, Collator
from latefusion.data.guard import SKIPPED_FILE, Guard, skipped, usable
from latefusion.data.load import training_data
from latefusion.data.mixing import Stream
from latefusion.data.scenes import load_scenes
from latefusion.models.build import (
    ADAPTER_CONFIG,
    Student,
    build_full,
    build_student,
    check_base,
    compute_dtype,
    load_base,
    start_from,
)
from latefusion.models.entry import CalibratedEntry, entry_of
from latefusion.models.policies.base import Policy
from latefusion.models.policies.visipruner import VisiPruner
from latefusion.models.schedule import VisionSchedule
from latefusion.training.calibrate import calibrated_entry
from latefusion.training.checkpoints import CannotSave, checkpoints, discard_after, find, step_of
from latefusion.training.config import (
    Config,
    DataConfig,
    Dtype,
    EntryConfig,
    EntryKind,
    Layers,
    Source,
    Teacher,
    Tune,
    Variant,
    VisiPrunerConfig,
    read,
)
from latefusion.training.estimate import estimated, numel
from latefusion.training.guard import PREEMPTED, Preempted, check_launch, claimed, leave_mark
from latefusion.training.nonfinite import NonFinite
from latefusion.training.objective import Objective
from latefusion.training.offline import Stale, Taught, expected
from latefusion.training.schedule import schedule_of, settle_schedule

DESCRIBED = 8  # samples whose sizes the printed lines speak of


def run(cfg: DictConfig) -> None:
    """Train, save to `output_dir`, evaluate; what cannot work ends in one sentence before any compute.

    Raises:
        SystemExit: with such a sentence; with `guard.PREEMPTED` if a signal stopped the run after a checkpoint.
    """
    started = time.perf_counter()
    with ExitStack() as held:
        try:
            config = read(cfg)
            engine: ModuleType = import_module(f"latefusion.training.engines.{config.engine.trainer.value}")
            resumed = check(config)
            settle_schedule(config, cfg)
            dataset = samples(config.data)
            held.enter_context(claimed(config.output_dir))
            settle(config, resumed)
            context = engine.prepare(config, dtype=dtype_of(config))
            student = student_of(config, dataset)
            collator = guarded(config, training_collator(config, student), dataset)
            some = collator(first_samples(dataset))
        except (ValueError, FileNotFoundError) as error:
            raise SystemExit(f"error: {error}") from None
        first = int(os.environ.get("RANK", "0")) == 0
        if first:
            OmegaConf.save(cfg, Path(config.output_dir) / "config.yaml", resolve=True)
            print(describe(config, student, some), flush=True)
        try:
            main = engine.fit(
                config, context, student, dataset, collator, objective_of(config, student), resumed
            )
        except (CannotSave, NonFinite, Stale) as error:
            raise SystemExit(f"error: {error}") from error.__cause__
        except Preempted as stop:
            if first:
                leave_mark(config.output_dir, stop.step)
                print(f"{stop}; go on with resume=true.", flush=True)
            raise SystemExit(PREEMPTED) from None
        if main:
            print(
                f"Trained in {time.perf_counter() - started:.0f} s; the student is in {config.output_dir}.",
                flush=True,
            )
            if left_out := skipped(config.output_dir):
                file = Path(config.output_dir) / SKIPPED_FILE
                print(f"{left_out} row(s) could not be used and were left out: {file} says why.", flush=True)
            evaluate(config)


def check(config: Config) -> Path | None:
    """Raise before anything is loaded if this run cannot work.

    Returns:
        The checkpoint to go on from, if any.

    Raises:
        ValueError, FileNotFoundError: in one sentence.
    """
    check_launch(config.engine.processes)
    schedule_of(config.schedule)
    visipruner(config.model.visipruner)
    check_base(config.model.path)
    output, train = Path(config.output_dir), config.train
    if config.resume is not False:
        samples = train.batch_size * train.accumulation * int(os.environ.get("WORLD_SIZE", "1"))
        return find(output, config.resume, samples=samples)
    if not config.overwrite and ((output / ADAPTER_CONFIG).exists() or checkpoints(output)):
        raise ValueError(
            f"{output} holds a run already; continue it with resume=true, replace it with overwrite=true, "
            "or choose another output_dir=FOLDER."
        )
    return None


def settle(config: Config, resumed: Path | None) -> None:
    """Threads, seeds, and an output folder without what a run left there that this one does over."""
    settle_threads(config)
    set_seed(config.train.seed)
    if int(os.environ.get("RANK", "0")) == 0:
        discard_after(config.output_dir, 0 if resumed is None else step_of(resumed))
        if resumed is None:
            (Path(config.output_dir) / SKIPPED_FILE).unlink(missing_ok=True)


def settle_threads(config: Config) -> None:
    if not torch.cuda.is_available():
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(config.train.threads or max(1, len(os.sched_getaffinity(0)) // processes))


def dtype_of(config: Config) -> torch.dtype:
    named = {Dtype.bfloat16: torch.bfloat16, Dtype.float32: torch.float32}
    return named.get(config.train.dtype) or compute_dtype()


def samples(data: DataConfig) -> Any:
    """The training set: samples `{"messages", "images"}` by index, or a stream of them."""
    return training_data(data)


def student_of(config: Config, dataset: Any = None) -> Student:
    """The student that `config` describes; `dataset`, the training set, is made anew if not at hand."""
    wanted = config.model
    model, processor = load_base(
        wanted.path,
        dtype=dtype_of(config),
        revision=wanted.revision,
        processor=wanted.processor,
        four_bits=wanted.load_in_4bit,
        trust_remote_code=wanted.trust_remote_code,
    )
    if wanted.attention is not None:
        model.set_attn_implementation(wanted.attention)
    return student_from(
        config,
        model,
        processor,
        calibrated_entry(config, model, processor, examples(config, dataset)),
    )


def examples(config: Config, dataset: Any) -> Any:
    """Samples that can be looked at before training, by index: the training set, or the beginning of a stream."""
    rows = samples(config.data) if dataset is None else dataset
    if not isinstance(rows, Stream):
        return rows
    return [usable(row) for row in islice(rows, config.entry.images)]


def student_from(
    config: Config,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    calibrated: CalibratedEntry | None = None,
) -> Student:
    """The student that `config` describes, on an already loaded base."""
    lora, schedule = config.lora, schedule_of(config.schedule)
    parts = {
        "schedule": schedule,
        "entry_rank": entry_rank(config.entry),
        "calibrated": calibrated,
        "train": [config.model.projector] if trains_projector(config) else [],
    }
    set_seed(config.train.seed)  # engines draw differently while they load; adapters start the same in all
    if config.tune is Tune.full:
        return build_full(model, processor, **parts)
    student = build_student(
        model,
        processor,
        base=config.model.path,
        rank=lora.r,
        alpha=lora.alpha,
        dropout=lora.dropout,
        targets=lora.targets,
        layers=adapted_layers(config, schedule, model.config.get_text_config().num_hidden_layers),
        rslora=lora.variant is Variant.rslora,
        dora=lora.variant is Variant.dora,
        **parts,
    )
    if config.init is not None:
        start_from(student, config.init)
    return student


def trains_projector(config: Config) -> bool:
    """Whether the module between vision tower and decoder learns."""
    return config.model.projector is not None and (
        config.lora.train_projector or config.tune is not Tune.lora
    )


def entry_rank(entry: EntryConfig) -> int | None:
    """The rank of the entry adapter, 0 for a scale alone, None for none."""
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
    """What makes batches for this student; `config` None: of samples of any length, turns seeing each other."""
    model, tokenizer = student.model, student.processor.tokenizer
    stop = model.generation_config.eos_token_id
    return Collator(
        processor=student.processor,
        vision_ids=[model.config.image_token_id],
        stop=tokenizer.convert_ids_to_tokens([stop] if isinstance(stop, int) else stop),
        max_length=config.data.max_length if config else None,
        isolate=dtype_of(config) if config and config.data.isolate else None,
    )


def first_samples(dataset: Any) -> list[Any]:
    if isinstance(dataset, Stream):
        return list(islice(dataset, DESCRIBED))
    return [dataset[i] for i in range(min(DESCRIBED, len(dataset)))]


def guarded(config: Config, collator: Collator | Taught, dataset: Any) -> Guard:
    """The collator, with what the configuration wants of rows that cannot be used."""
    return Guard(
        collator,
        on_error=config.data.on_error,
        too_long=config.data.too_long,
        dataset=None if isinstance(dataset, Stream) else dataset,
        folder=config.output_dir,
    )


def training_collator(config: Config, student: Student) -> Collator | Taught:
    """The collator of a run: that of its data, with the teacher's answers if they were written before."""
    collator = collator_of(student, config)
    if config.kl.cache is None:
        return collator
    return Taught(collator, config.kl.cache, expected(config, student, teacher(config)))


def objective_of(config: Config, student: Student, *, offline: bool | None = None) -> Objective:
    """The objective; `offline` (None: as `kl.cache` says): the teacher's answers come with the batch."""
    offline = config.kl.cache is not None if offline is None else offline
    sharded = config.engine.deepspeed or config.engine.fsdp
    blank = student.processor.image_processor(images=[Image.new("RGB", (32, 32))], return_tensors="pt")
    return Objective(
        model=student.model,
        attachment=student.attachment,
        teacher=None if offline else teacher(config),
        weight=config.kl.weight,
        temperature=config.kl.temperature,
        share_images=not trains_projector(config),
        blank=blank if sharded or trains_projector(config) else None,
        narrowing=narrowing(config, student),
    )


def narrowing(config: Config, student: Student) -> Callable[[float], Policy] | None:
    """The schedule of a moment of the run (0 to 1), if it changes."""
    if config.train.narrow == 0:
        return None
    layers = student.model.config.get_text_config().num_hidden_layers
    return lambda moment: student.schedule.widened(moment / config.train.narrow, layers)


def teacher(config: Config) -> Policy | None:
    if config.teacher is Teacher.none:
        return None
    return VisionSchedule() if config.teacher is Teacher.dense else visipruner(config.model.visipruner)


def visipruner(config: VisiPrunerConfig) -> VisiPruner:
    return VisiPruner(**{**vars(config), "stages": tuple(config.stages)})


def describe(config: Config, student: Student, batch: dict[str, Any]) -> str:
    """What is about to be trained: parameters, vision tokens by layer, FLOPs against dense."""
    model, schedule = student.model, student.schedule
    ids, n = batch["input_ids"], len(batch["input_ids"])
    prompt = torch.arange(ids.shape[1]) <= batch["queries"][:, :1]  # bool [B, T]: up to the first answer
    vision = ids == model.config.image_token_id
    n_vision, n_text = (round(int((prompt & part).sum()) / n) for part in (vision, ~vision))
    total = sum(numel(p) for p in model.parameters())
    trainable = sum(numel(p) for p in model.parameters() if p.requires_grad)
    real = ids != student.processor.tokenizer.pad_token_id
    masks = (real & ~vision, vision, batch["labels"] != IGNORE)
    all_text, all_vision, learnt = (round(int(mask.sum()) / n) for mask in masks)
    layers = model.config.get_text_config().num_hidden_layers
    entry: Any = entry_of(model)
    flops = schedule.flops(model.config, n_text, n_vision) + (
        entry.flops(n_vision) if schedule.enter and entry else 0
    )
    dense = VisionSchedule().flops(model.config, n_text, n_vision)
    train = config.train
    dtype = str(dtype_of(config)).removeprefix("torch.")
    return "\n".join(
        [
            f"{config.name}: {trainable / 1e6:.2f}M of {total / 1e6:.1f}M parameters train, "
            f"{train.steps} steps of {train.batch_size} x {train.accumulation} samples in "
            f"{os.environ.get('WORLD_SIZE', '1')} process(es), teacher {config.teacher.value}"
            f"{' (offline)' if config.kl.cache else ''}, {dtype}",
            f"vision tokens by layer: {runs(schedule.vision_tokens(layers, n_vision))}",
            f"decoder FLOPs a prompt: {flops / 1e9:.2f}G, {flops / dense:.1%} of dense "
            f"({n_vision} vision + {n_text} text tokens)",
            estimated(config, model, schedule, (all_text, all_vision, learnt), dtype_of(config)),
        ]
    )


def runs(tokens: list[int]) -> str:
    """`[0, 0, 144, 144, 16]` as `0-1: 0, 2-3: 144, 4: 16`."""
    starts = [i for i, n in enumerate(tokens) if i == 0 or n != tokens[i - 1]]
    ends = [*(i - 1 for i in starts[1:]), len(tokens) - 1]
    return ", ".join(
        f"{a}: {tokens[a]}" if a == b else f"{a}-{b}: {tokens[a]}" for a, b in zip(starts, ends, strict=True)
    )


def evaluate(config: Config) -> dict[str, Any] | None:
    """Compare the saved student with its dense base and the pruned base; writes the report."""
    if not config.eval.enabled:
        return None
    if config.tune is Tune.full:
        print("No evaluation: all weights have changed, so the dense base is not at hand to compare with.")
        return None
    if questions_of(config) is None:
        print("No evaluation: data.eval_path names no data set of questions and answers.")
        return None
    from latefusion.eval.evaluate import evaluate_checkpoint

    asked = config.eval
    return evaluate_checkpoint(
        config.output_dir,
        split=asked.split,
        samples=asked.samples,
        output=config.output_dir,
        batch_size=asked.batch_size,
    )


def questions_of(config: Config) -> Any:
    """Rows of `id`, `image`, `question`, `answer`, `type`, `scene` to evaluate on; None: there are none."""
    data, asked = config.data, config.eval
    if data.eval_path is not None:
        questions = sources.read(data.eval_path, split=asked.split)
    elif data.source is Source.scenes:
        questions = load_scenes(asked.split, seed=data.seed)
    else:
        return None
    if asked.samples is not None and asked.samples < len(questions):
        questions = questions.shuffle(seed=0).select(range(asked.samples))
    return questions
