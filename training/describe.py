"""The lines that a run prints before its first step: its configuration, its size, and an estimate of its cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from enum import Enum
from textwrap import wrap
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from latefusion.data.bad_rows import Bad
from latefusion.data.collate import IGNORE
from latefusion.data.frame_cost import frames_in_words
from latefusion.data.printing import short
from latefusion.data.samples import videos_of_sample
from latefusion.data.streaming import Stream
from latefusion.models.base_model import with_blank_vision
from latefusion.models.executor.vision import vision_tokens
from latefusion.models.flops import head_flops, outside_flops, prefill_share
from latefusion.models.inputs import PIXELS, unwrapped
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.build import Student
from latefusion.models.student.entry import entry_of
from latefusion.recipes.launcher import world_size
from latefusion.recipes.schema import SCHEMA, Config, ModelConfig, Teacher
from latefusion.recipes.unread import OFFERS
from latefusion.training.assemble import dtype_of
from latefusion.training.step_cost import (
    activation_bytes,
    backward_ends,
    flops_per_second,
    logit_bytes,
    numel,
    training_flops,
    weight_bytes,
)
from latefusion.training.teacher import OtherTeacher

WIDTH = 80  # columns of the configuration
WORDS = 5  # that a warning names
MOMENTS = 10  # of a run whose band narrows
ALWAYS = {  # shown also where a run keeps the default
    *("model.path", "data.source", "teacher", "tune", "schedule.enter", "schedule.exit", "engine.trainer"),
    *("train.steps", "train.batch_size", "train.accumulation", "train.learning_rate", "train.scheduler"),
    *("train.warmup", "train.seed", "train.dtype", "lora.r", "lora.alpha", "lora.layers", "entry.init"),
    *("kl.weight", "kl.temperature", "kl.trust", "kl.share", "eval.split", "eval.samples"),
}
NEVER = {  # what `schedule`, `teacher` and `train.steps` were made of
    *(f"model.{name}" for name in OFFERS),
    "train.epochs",
}


def composed_tree(cfg: DictConfig) -> str:
    """The configuration of a run, a section a line: its main settings, and all that differ from their defaults."""
    values = OmegaConf.to_container(cfg, resolve=True)
    defaults = OmegaConf.to_container(SCHEMA, resolve=False)
    assert isinstance(values, dict) and isinstance(defaults, dict)
    sections: dict[str, list[str]] = {}
    for key, value in _shown(values, defaults):
        section, _, name = key.rpartition(".") if "." in key else ("run", "", key)
        sections.setdefault(section, []).append(f"{name}={_text(value)}")
    indent = 2 + max(map(len, sections))
    lines = []
    for section, words in sections.items():
        room = WIDTH - indent
        kept = [word.replace(" ", "\0") if len(word) <= room else word for word in words]  # not broken inside
        text = wrap("  ".join(kept), room, break_long_words=False)
        for number, part in enumerate(text):
            lines.append(f"{section if number == 0 else '':<{indent}}{part}".replace("\0", " "))
    return "\n".join([*lines, f"(every setting: --cfg job, or {cfg.output_dir}/config.yaml)"])


def _shown(values: dict[Any, Any], defaults: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings to print: those of `ALWAYS`, and those that differ from the defaults."""
    for name, value in values.items():
        key, default = f"{prefix}{name}", defaults.get(name)
        if key in NEVER:
            continue
        if isinstance(value, dict) and isinstance(default, dict) and default:
            yield from _shown(value, default, f"{key}.")
        elif key in ALWAYS or value != default:
            yield key, value


def _text(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_text(part)}" for name, part in value.items()) + "}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def describe(
    config: Config,
    student: Student,
    samples: Sequence[Any],
    batch: dict[str, Any],
    example: dict[str, Any] | None,
    dataset: Any,
    other: OtherTeacher | None = None,
) -> str:
    """Describe the run that begins: parameters, steps, vision tokens by layer, FLOPs against dense, an estimate.

    Args:
        samples: the first of the training set.
        batch: of these, whose sizes the lines give.
        example: a batch of the first of them that has images; None: none has.
        dataset: the training set.
        other: another model that teaches.
    """
    model, schedule = student.model, student.schedule
    ids, n = batch["input_ids"], len(batch["input_ids"])
    prompt = torch.arange(ids.shape[1]) <= batch["queries"][:, :1]  # bool [B, T]: up to the first answer
    vision = vision_tokens(model.config, ids)
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
    total_samples = train.total_steps * train.batch_size * train.accumulation * world_size()
    passes = (
        ""
        if isinstance(dataset, Stream)
        else f" ({total_samples / len(dataset):.3g} epochs of {len(dataset):,})"
    )
    return "\n".join(
        [
            *videos_in_words(student, samples, vision, real & ~vision, example),
            *borrowed(config.model),
            *unknown_words(samples, student.processor.tokenizer),
            f"{config.name}: {trainable / 1e6:.2f}M of {total / 1e6:.1f}M parameters train, "
            f"{train.total_steps} steps of {train.batch_size} x {train.accumulation} samples in "
            f"{world_size()} process(es){passes}, {teacher_in_words(config)}, {dtype}",
            f"vision tokens by layer: {runs(schedule.vision_tokens(layers, n_vision))}"
            f"{', frozen: keys and values alone' if schedule.cross is not None else ''}"
            f"{narrowing_in_words(train.narrow)}",
            *keeps_in_words(schedule, int(vision.sum(1).max())),
            *positions_in_words(model.config, batch),
            f"FLOPs a prompt ({n_vision} vision + {n_text} text tokens){at_the_end(train.narrow, dense)}: decoder "
            f"{flops / 1e9:.2f}G, {flops / dense:.1%} of dense{whole_prefill(flops, dense, student.model, example)}",
            estimate(
                config,
                model,
                schedule,
                (all_text, all_vision, learnt),
                dtype_of(config),
                online_teacher(config, model, other),
            ),
        ]
    )


def videos_in_words(
    student: Student,
    samples: Sequence[Any],
    vision: torch.Tensor,
    text: torch.Tensor,
    example: dict[str, Any] | None,
) -> list[str]:
    """How many frames the first samples with videos show, and what they cost; empty if none has any.

    Args:
        vision, text: bool `[B, T]`, of the batch of these samples; one that cannot be used (`Bad`) stands for another
            there.
        example: a batch of one sample with images or videos.
    """
    rows = [
        i
        for i, sample in enumerate(samples)
        if not isinstance(sample, Bad) and videos_of_sample(sample) and not sample["images"]
    ]
    if not rows or any(isinstance(sample, Bad) for sample in samples):
        return []
    model = student.model
    videos = [video for i in rows for video in videos_of_sample(samples[i])]
    counts = [(int(text[i].sum()), int(vision[i].sum())) for i in rows]
    encoder, encoded = None, 0
    if example is not None and PIXELS["video"] in example and PIXELS["image"] not in example:
        outside = outside_of(model, example)
        encoder = None if outside is None else outside - head_flops(model.config, 1)
        encoded = int(vision_tokens(model.config, example["input_ids"]).sum())
    return [
        frames_in_words(
            model.config, videos, counts, encoder=encoder, encoded=encoded, schedule=student.schedule
        )
    ]


def keeps_in_words(schedule: VisionSchedule, most: int) -> list[str]:
    """A note if a keep removes nothing from the first samples, of which each has at most `most` vision tokens."""
    idle = {layer: k for layer, k in schedule.keep.items() if k > most}
    if not idle or not most:
        return []
    return [
        f"note: keep={idle} removes nothing from the first samples, which have at most {most} vision tokens; it is the "
        "most that stay of a row's, all its images together."
    ]


def positions_in_words(config: Any, batch: dict[str, Any]) -> list[str]:
    """A note if one of the first samples has more tokens than the model has positions."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    isolated = batch.get("position_ids")  # positions that begin again
    length = int(batch["attention_mask"].shape[-1] if isolated is None else isolated.max() + 1)
    if not limit or length <= limit:
        return []
    return [
        f"note: the first samples have up to {length} tokens, vision included, and the model {limit} positions: longer "
        f"rows train badly; leave them out with data.max_length={limit}."
    ]


def whole_prefill(flops: float, dense: float, model: Any, example: dict[str, Any] | None) -> str:
    """FLOPs of the whole prefill in words: decoder, vision tower, projector and head; empty if not counted.

    Args:
        flops, dense: of the decoder, under the schedule and without.
        example: a batch of one sample with images.
    """
    outside = None if example is None else outside_of(model, example)
    if outside is None:
        return ""
    return (
        f"; with vision tower, projector and head {(flops + outside) / 1e9:.2f}G, "
        f"{prefill_share(flops / dense, outside / dense):.1%} of dense"
    )


def outside_of(model: Any, example: dict[str, Any]) -> float | None:
    """`outside_flops` of a batch of one sample, also of a model whose weights lie in shards."""
    inner, device = unwrapped(model), model.device
    if any(
        hasattr(weight, "ds_id") for weight in model.parameters()
    ):  # ZeRO-3: in shards, which cannot run yet
        inner, device = with_blank_vision(inner), torch.device("cpu")
    inputs = {
        name: value.to(device, inner.dtype if value.is_floating_point() else None)
        for name, value in example.items()
        if isinstance(value, torch.Tensor)
    }
    return outside_flops(inner, inputs)


def unknown_words(samples: Sequence[Any], tokenizer: Any) -> list[str]:
    """A warning that names the words of questions and answers that the tokenizer does not know.

    Args:
        samples: of the training set; what is not a sample (`Bad`) is passed over.
    """
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return []
    counts = {"user": [0, 0], "assistant": [0, 0]}  # words unknown, words in all
    words: Counter[str] = Counter()
    for sample in samples:
        for message in [] if isinstance(sample, Bad) else sample["messages"]:
            for word in text_of(message).split():
                count = counts["assistant" if message["role"] == "assistant" else "user"]
                count[1] += 1
                if unknown in tokenizer(word, add_special_tokens=False).input_ids:
                    count[0] += 1
                    words[word] += 1
    if not words:
        return []
    questions, answers = counts["user"], counts["assistant"]
    named = ", ".join(short(word) for word, _ in words.most_common(WORDS))
    learnt = " The student learns to answer with it." if answers[0] else ""
    return [
        f"This model's tokenizer does not know {questions[0]} of {questions[1]} words in the questions and "
        f"{answers[0]} of {answers[1]} in the answers of the first samples, and reads each as {tokenizer.unk_token}: "
        f"{named}{', ...' if len(words) > WORDS else ''}.{learnt}"
    ]


def text_of(message: dict[str, Any]) -> str:
    """The words of a message, without its images."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part["type"] == "text")


def borrowed(model: ModelConfig) -> list[str]:
    """A note if the settings were chosen for another model."""
    if model.tuned_for in (None, model.path):
        return []
    return [
        f"note: band, keeps, VisiPruner's thresholds and training settings that you did not give are those of "
        f"model={model.tuned_for}, chosen for it; for {model.path} take its configuration (model=...), or model=other, "
        "which borrows nothing."
    ]


def teacher_in_words(config: Config) -> str:
    """Who teaches, and in how many of the steps."""
    if config.teacher is Teacher.none or config.kl.weight == 0:
        return "no teacher"
    whose = f" of {config.kl.model}" if config.kl.model else ""
    share = "" if config.kl.share == 1 else f" in {config.kl.share:.3g} of the steps"
    return f"teacher {config.teacher.value}{whose}{' (offline)' if config.kl.cache else ''}{share}"


def online_teacher(config: Config, model: Any, other: OtherTeacher | None) -> Any:
    """The model that teaches online; None: no teacher, or an offline one."""
    if config.teacher is Teacher.none or config.kl.weight == 0 or config.kl.cache is not None:
        return None
    return model if other is None else other.model


def runs(tokens: list[int]) -> str:
    """`[0, 0, 144, 144, 16]` as `0-1: 0, 2-3: 144, 4: 16`."""
    starts = [i for i, n in enumerate(tokens) if i == 0 or n != tokens[i - 1]]
    ends = [*(i - 1 for i in starts[1:]), len(tokens) - 1]
    return ", ".join(
        f"{a}: {tokens[a]}" if a == b else f"{a}-{b}: {tokens[a]}" for a, b in zip(starts, ends, strict=True)
    )


def estimate(
    config: Any,
    model: Any,
    schedule: Any,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    teacher: Any = None,
) -> str:
    """A line with the estimated peak memory of a device and the shortest time of the run.

    Args:
        config: of the run.
        model: the student's.
        shape: number of text, vision and answer tokens of a sample.
        teacher: the model that teaches online (`model` itself, or another one); None: no online teacher.
    """
    n_text, n_vision, answers = shape
    train, model_config = config.train, model.config
    layers = model_config.get_text_config().num_hidden_layers
    moments = schedules_of(schedule, train.narrow, layers)
    vision, first = moments[0][1].vision_tokens(layers, n_vision), backward_ends(model)  # the most of the run
    each = activation_bytes(
        model_config,
        [n_text + n for n in vision[first:]],
        vision[first:] if schedule.cross is not None else [0] * (layers - first),
        dtype=dtype,
        checkpointing=train.gradient_checkpointing,
        eager=model_config._attn_implementation == "eager",
    )
    logits = logit_bytes(model_config, train.batch_size * answers, teacher=teacher is not None)
    held = weight_bytes(model) + (0 if teacher is None or teacher is model else weight_bytes(teacher))
    peak = held + train.batch_size * each + logits
    step = (
        train.batch_size
        * train.accumulation
        * sum(
            part
            * training_flops(
                model_config,
                at,
                n_text,
                n_vision,
                answers=answers,
                teacher=None if teacher is None else teacher.config,
                share=config.kl.share,
                first=first,
            )
            for part, at in moments
        )
    )
    seconds = step / flops_per_second(min(2048, max(256, model_config.get_text_config().hidden_size)), dtype)
    sharded = " before sharding" if config.engine.deepspeed or config.engine.fsdp else ""
    return (
        f"estimate: {_bytes(peak)} a device at the peak{sharded}, {_bytes(train.batch_size * each)} of it activations; "
        f"at least {_duration(train.total_steps * seconds)} for {train.total_steps} steps of {step / 1e9:.3g} GFLOPs"
        f"{' on average' if train.narrow else ''} (as fast as matrix products are here, the vision tower and loading "
        "left out)"
    )


def narrowing_in_words(narrow: float) -> str:
    """When the band of a run that narrows (`train.narrow` above 0) is the schedule's."""
    return f", from {narrow:.0%} of the steps on; in every layer at the start" if narrow else ""


def at_the_end(narrow: float, dense: float) -> str:
    """When FLOPs are the schedule's in a run that narrows (`train.narrow` above 0), and what they are before."""
    return f", {dense / 1e9:.2f}G at the start, from {narrow:.0%} of the steps on" if narrow else ""


def schedules_of(schedule: VisionSchedule, narrow: float, layers: int) -> list[tuple[float, VisionSchedule]]:
    """The schedules of a run, the widest first, each with the share of the steps that it stands for.

    Args:
        narrow: the fraction of the steps over which the band narrows (`train.narrow`); 0: one schedule.
    """
    if not narrow:
        return [(1.0, schedule)]
    widening = [(narrow / MOMENTS, schedule.widened(moment / MOMENTS, layers)) for moment in range(MOMENTS)]
    return [*widening, (1 - narrow, schedule)]


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
