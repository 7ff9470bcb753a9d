"""A whole profile: samples, measurements, decision, files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedModel, ProcessorMixin

from latefusion.data.collate import Collator, build_collator
from latefusion.data.prompt_batches import Group, batches, counts
from latefusion.eval.fusion.causal import Runner
from latefusion.eval.fusion.continued import Continued, cacheable
from latefusion.eval.fusion.cost import Cost, Shape, planned
from latefusion.eval.fusion.files import write
from latefusion.eval.fusion.measure import EXAMPLES, Measurer
from latefusion.eval.fusion.study import Study, Wishes
from latefusion.eval.fusion.summary import summarise
from latefusion.eval.ledger import Ledger
from latefusion.models.attach import Attachment, attach
from latefusion.models.executor.vision import vision_token_ids
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.entry_fit import Calibration, fit_entry

SCHEMA = 3  # of profile.json; raise it when a key changes its meaning


def profile(
    *,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[dict[str, Any]],
    fit_on: Sequence[dict[str, Any]],
    labelled: bool,
    about: dict[str, Any],
    output_dir: str | Path,
    wishes: Wishes,
    batch_size: int = 16,
    remarks: Sequence[str] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure where `model` fuses vision into text on `samples`, and write the schedule that follows.

    Writes `profile.json`, `schedule.yaml`, `entry.safetensors`, `report.html` with its pictures and tables, and
    `measured.jsonl`, from which the next call with the same `about` goes on.

    Args:
        samples: `{"messages", "images"}`, each ending in the answer that it is judged by.
        fit_on: samples whose images calibrate the entry; no sample's own image should be among them.
        labelled: whether answers are labels (else they are the model's own, and there is no accuracy).
        about: what the measurements depend on (weights, data, seed, dtype) beside what samples are made of, for
            resuming and for the report.
        remarks: what a reader of the report should know of the samples.

    Returns:
        What `profile.json` holds.

    Raises:
        ValueError: the model or the data does not allow it, in one sentence.
    """
    from latefusion.eval.fusion.examples import views  # drawing libraries: seconds

    console = console or Console()
    folder = Path(output_dir)
    layers = model.config.get_text_config().num_hidden_layers
    if layers < 2:
        raise ValueError(f"a decoder of {layers} layer leaves nothing to choose; profile a deeper model.")
    collator = build_collator(processor, model.config, model.generation_config)
    sources = batches(model, collator, samples, min(batch_size, -(-len(samples) // 2)))  # see `planned`
    depends = {**about, "batch_size": batch_size, "fit_on": sorted(map(hash_of, fit_on))}
    ledger = Ledger(folder / "measured.jsonl", {**depends, "prompts": [group.content for group in sources]})
    with attach(model, VisionSchedule()) as attachment:
        plan = planned(model.config, shapes(attachment, sources))
        expense = plan.cost
        announce(console, expense, len(samples), layers, len(fit_on), ledger)
        with bar(console) as progress:
            task = progress.add_task("Profiling", total=expense.total * len(samples))
            measurer = Measurer(
                model, attachment, sources, ledger, plan, lambda share: progress.advance(task, share)
            )
            study = Study(measurer, wishes, labelled, *counts(sources))
            found = study.run(lambda enter: calibrate(attachment, collator, fit_on, enter, batch_size))
            progress.update(task, completed=expense.total * len(samples))
    note = found["note"]  # the remarks were said before
    found["note"] = " ".join(filter(None, [*remarks, note]))
    found = {"schema": SCHEMA, "about": about, "cost": vars(expense) | {"total": expense.total}, **found}
    found = summarise(found, processor.tokenizer)
    vision = set(vision_token_ids(model.base_model.config).values())
    shown = [views(collator([sample]), sample, vision) for sample in samples[:EXAMPLES]]
    write(folder, found, study.calibration, samples, shown)
    report(console, folder, found, note)
    return found


def shapes(attachment: Attachment, sources: Sequence[Group]) -> list[Shape]:
    """Of each batch, for `planned`: whether a prompt can be continued is tried on the first that may be."""
    model = attachment.model
    tried = [
        source.together and cacheable(model.config, source.places[-1] + 1) for source in sources
    ]  # as `Continued` does
    continued = False
    if any(tried):
        example = sources[tried.index(True)].make()
        continued = isinstance(Runner(model, attachment, example).way()[-1], Continued)
    return [
        Shape(
            samples=len(source.numbers),
            answers=source.answers,
            length=max(source.lengths),
            cut=source.places[-1] + 1,
            vision=len(source.places),
            tried=may,
            continued=may and continued,
        )
        for source, may in zip(sources, tried, strict=True)
    ]


def hash_of(sample: dict[str, Any]) -> str:
    """Of a sample's images and words."""
    digest = sha256(json.dumps(sample["messages"], sort_keys=True).encode())
    for image in sample["images"]:
        digest.update(f"{image.mode}{image.size}".encode() + image.tobytes())
    return digest.hexdigest()[:16]


def calibrate(
    attachment: Attachment,
    collator: Collator,
    samples: Sequence[dict[str, Any]],
    enter: int,
    batch_size: int,
) -> Calibration:
    made = (group.make() for group in batches(attachment.model, collator, samples, batch_size))
    return fit_entry(attachment, ((batch.inputs, batch.vision) for batch in made), enter)


def announce(console: Console, cost: Cost, samples: int, layers: int, images: int, ledger: Ledger) -> None:
    """What is about to be spent."""
    console.print(
        f"{samples} samples, {layers} layers: up to {cost.total * samples:,.0f} prefills' worth of FLOPs, "
        f"{cost.total:.0f} a sample ({cost.observing:.0f} to observe, {cost.knock_outs:.1f} for knock-outs, at most "
        f"{cost.deciding:.0f} to decide). Calibrating the entry runs {images} more images through the layers before it."
    )
    if ledger.resumed:
        console.print(f"{ledger.resumed} measurements are there already; going on from them.")


def bar(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def report(console: Console, folder: Path, found: dict[str, Any], note: str) -> None:
    """The decision in a few lines; `note`: on what came of it."""
    chosen, schedule = found["chosen"], found["chosen"]["schedule"]
    accuracy = (
        ""
        if chosen["accuracy"] is None
        else f", {chosen['accuracy']:.1%} right (dense {found['dense_accuracy']:.1%})"
    )
    leave = found["layers"] if schedule["exit"] is None else schedule["exit"]
    keeps = ", ".join(f"{k} from {layer}" for layer, k in schedule["keep"].items())
    console.print(
        f"Vision tokens in layers {schedule['enter']} to {leave - 1} of {found['layers']}, "
        f"keeps {keeps or 'none'}: {chosen['flops']:.1%} of dense FLOPs, "
        f"KL {chosen['kl']:.4f} ({chosen['low']:.4f} to {chosen['high']:.4f}) nats{accuracy}."
    )
    entry = found["entry"]
    if entry is not None:
        console.print(
            f"Entry at layer {entry['layer']}: KL {entry['kl_raw']:.4f} raw, {entry['kl_calibrated']:.4f} calibrated, "
            f"{entry['kl_ceiling']:.4f} with the dense model's own vision states."
        )
    console.print(f"Chosen for {chosen['why']}. {note}".strip())
    console.print(f"{folder / 'report.html'}, {folder / 'schedule.yaml'}")
