"""A whole profile: batches, measurements, decision, files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedModel, ProcessorMixin

from latefusion.data.collate import Collator, build_collator
from latefusion.data.draw import images_key
from latefusion.data.prompt_batches import Group, batches, counts
from latefusion.data.prompts import check_positions
from latefusion.data.samples import videos_of_sample
from latefusion.eval.fusion.blind import CachedRuns, Runner, cacheable, cheapest_runs
from latefusion.eval.fusion.decide import Goal
from latefusion.eval.fusion.measure import EXAMPLES, Measurer
from latefusion.eval.fusion.plan import CONFIRM, Cost, Shape, fits_on_host, make_plan, reading_prefills
from latefusion.eval.fusion.reading_layers import CONFIRMED, nested_sets
from latefusion.eval.fusion.study import Study
from latefusion.eval.fusion.summary import summarise, write
from latefusion.eval.ledger import Ledger
from latefusion.models.attach import Attachment, attach
from latefusion.models.executor.vision import vision_token_ids
from latefusion.models.fingerprint import fingerprint
from latefusion.models.flops import outside_flops, shares_in_words
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.entry_fit import Calibration, fit_entry

SCHEMA = 4  # of profile.json; raise it when a key changes its meaning


@dataclass(frozen=True, kw_only=True)
class DrawnPrompts:
    """What a profile is measured on: samples `{"messages", "images"}`, each ending in the answer it is judged by.

    Attributes:
        measured: what every measurement runs on.
        confirming: others, which the schedule is accepted on; empty: those measured confirm it.
        calibrating: samples whose images calibrate the entry; none should share an image with those measured.
        labelled: whether answers are labels (else they are the model's own, and there is no accuracy).
        remarks: sentences about the samples for the report.
    """

    measured: Sequence[dict[str, Any]]
    confirming: Sequence[dict[str, Any]]
    calibrating: Sequence[dict[str, Any]]
    labelled: bool = True
    remarks: Sequence[str] = ()


def profile(
    *,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    prompts: DrawnPrompts,
    about: dict[str, Any],
    output_dir: str | Path,
    goal: Goal,
    batch_size: int = 16,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure where `model` fuses vision into text on its prompts, and write the schedule that follows.

    Writes `profile.json`, `schedule.yaml`, `entry.safetensors` (and `cross.yaml`, with `goal.cross`), `report.html`
    with its pictures and tables, and `measured.jsonl` and `confirmed.jsonl`, from which the next call with the same
    `about` goes on.

    Args:
        about: what the measurements depend on (weights, data, seed, dtype) beside the samples' contents, for
            resuming and for the report.

    Returns:
        What `profile.json` holds.

    Raises:
        ValueError: the model or the data does not allow it, in one sentence.
    """
    from latefusion.eval.fusion.examples import views  # lazy: drawing libraries take seconds

    console = console or Console()
    folder, samples = Path(output_dir), prompts.measured
    text = model.config.get_text_config()
    layers, states = text.num_hidden_layers, getattr(text, "altup_num_inputs", 1)
    if layers < 2:
        raise ValueError(f"a decoder of {layers} layer leaves nothing to choose; profile a deeper model.")
    if states > 1:
        raise ValueError(
            f"a profile reads one state of a token, and {type(model).__name__} carries {states} (AltUp): give the "
            "schedule yourself (schedule.exit=..., schedule.keep={...})."
        )
    collator = build_collator(processor, model.config, model.generation_config)
    # two batches at least: a single one can leave out no knock-out (`plan.make_plan`)
    groups = batches(model, collator, samples, min(batch_size, -(-len(samples) // 2)))
    confirming = batches(model, collator, prompts.confirming, batch_size)
    if goal.by_hand is not None:
        most = max(len(group.places) for group in [*groups, *confirming])
        goal.by_hand.check_keep(most, "any prompt, and model.schedule has it for this model")
    for of_samples, of_groups in ((samples, groups), (prompts.confirming, confirming)):
        for group in of_groups:
            for i, length in zip(group.numbers, group.lengths, strict=True):
                check_positions(model.config, f"row {of_samples[i].get('id', i)}", length, 0)
    conditions = {
        **about,
        "batch_size": batch_size,
        "fit_on": sorted(
            fingerprint(s["messages"], s["images"], *(v.fingerprint() for v in videos_of_sample(s)))
            for s in prompts.calibrating
        ),
    }

    def ledger_of(name: str, groups: Sequence[Group]) -> Ledger:
        return Ledger(folder / name, {**conditions, "prompts": [group.content for group in groups]})

    ledger, confirmed = ledger_of("measured.jsonl", groups), ledger_of("confirmed.jsonl", confirming)
    with attach(model, VisionSchedule()) as attachment:
        extra = {}
        if goal.cross:
            sets = len(nested_sets(range(layers)))
            extra = {"reading": reading_prefills(sets), "confirming": CONFIRM + reading_prefills(CONFIRMED)}
        plan = make_plan(model.config, shapes(attachment, groups), **extra)
        announce(console, plan.cost, len(samples), len(prompts.confirming), layers, len(prompts.calibrating))
        if resumed := ledger.resumed + confirmed.resumed:
            console.print(f"{resumed} measurements are there already; going on from them.")
        with progress_bar(console) as bar:
            prefills = plan.cost.total * len(samples) + plan.cost.confirming * len(prompts.confirming)
            task = bar.add_task("Profiling", total=prefills)

            def advance(done: float) -> None:
                bar.advance(task, done)

            measurer = Measurer(model, attachment, groups, ledger, plan, advance)
            hold = fits_on_host(model.config, sum(group.answers for group in confirming))
            confirmer = Measurer(model, attachment, confirming, confirmed, replace(plan, hold=hold), advance)
            study = Study(
                measurer,
                confirmer if confirming else None,
                goal,
                prompts.labelled,
                *counts(groups),
                images=[images_key(sample) for sample in prompts.measured],
                confirming_images=[images_key(sample) for sample in prompts.confirming],
            )
            results = study.run(
                lambda enter: calibrate(attachment, collator, prompts.calibrating, enter, batch_size)
            )
            bar.update(task, completed=prefills)
    note = results["note"]
    results["note"] = " ".join(filter(None, [*prompts.remarks, note]))
    results = {
        "schema": SCHEMA,
        "about": about,
        "cost": vars(plan.cost) | {"total": plan.cost.total},
        "outside": outside_share(model, collator, samples[:EXAMPLES], results["tokens"]),
        **results,
    }
    results = summarise(results, processor.tokenizer)
    vision = set(vision_token_ids(model.base_model.config).values())
    shown = [views(collator([sample]), sample, vision) for sample in samples[:EXAMPLES]]
    write(folder, results, study.calibration, samples, shown)
    report(console, folder, results, note)
    return results


def outside_share(
    model: Any, collator: Collator, samples: Sequence[dict[str, Any]], tokens: dict[str, float]
) -> float | None:
    """FLOPs of vision tower, projector and head, as a share of the dense decoder's; None if they cannot be counted.

    Args:
        samples: some of the profile's; `tokens`: text and vision tokens of the average one.
    """
    outside = []
    for sample in samples:
        inputs = {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in collator([sample]).items()
        }
        outside.append(outside_flops(model, inputs))
    dense = VisionSchedule().flops(model.config, round(tokens["text"]), round(tokens["vision"]))
    return None if None in outside else fmean(n for n in outside if n is not None) / dense


def shapes(attachment: Attachment, groups: Sequence[Group]) -> list[Shape]:
    """The shape of each batch; whether prompts can run on a cache is tried on the first batch that may."""
    model = attachment.model
    tried = [group.together and cacheable(model.config, group.places[-1] + 1) for group in groups]
    cached = False
    if any(tried):
        example = groups[tried.index(True)].make()
        cached = isinstance(cheapest_runs(Runner(model, attachment, example))[-1], CachedRuns)
    return [
        Shape(
            samples=len(group.numbers),
            answers=group.answers,
            length=max(group.lengths),
            cut=group.places[-1] + 1,
            vision=len(group.places),
            tried=may,
            cached=may and cached,
        )
        for group, may in zip(groups, tried, strict=True)
    ]


def calibrate(
    attachment: Attachment,
    collator: Collator,
    samples: Sequence[dict[str, Any]],
    enter: int,
    batch_size: int,
    later: Sequence[int] = (),
    later_rank: int | None = None,
) -> Calibration:
    """Fit the entry at a layer; raises TooFew as `fit_entry`, and if the map does not hold on other images."""
    size = max(1, min(batch_size, len(samples) // 4))  # the last batch tests the map of the others
    made = (group.make() for group in batches(attachment.model, collator, samples, size))
    pairs = ((batch.inputs, batch.vision) for batch in made)
    calibration = fit_entry(attachment, pairs, enter, later=later, later_rank=later_rank)
    calibration.check(len(samples), enter)
    return calibration


def announce(console: Console, cost: Cost, samples: int, confirming: int, layers: int, images: int) -> None:
    """Print what the profile will cost."""
    prefills = cost.total * samples + cost.confirming * confirming
    console.print(
        f"{samples} samples, {layers} layers: up to {prefills:,.0f} prefills' worth of FLOPs, "
        f"{cost.total:.0f} a sample ({cost.observing:.0f} to observe, {cost.knock_outs:.1f} for knock-outs, at most "
        f"{cost.deciding:.0f} to decide) and at most {cost.confirming:.0f} for each of {confirming} other prompts that "
        f"confirm the schedule. Calibrating the entry runs {images} more images through the layers before it."
    )


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def layers_in_words(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def report(console: Console, folder: Path, results: dict[str, Any], note: str) -> None:
    """Print the decision in a few lines; the remarks before `note` were printed earlier."""
    chosen, schedule, confirmed = results["chosen"], results["chosen"]["schedule"], results["confirmed"]
    accuracy = (
        ""
        if confirmed["accuracy"] is None
        else f", {confirmed['accuracy']:.1%} right (dense {confirmed['dense_accuracy']:.1%})"
    )
    leave = results["layers"] if schedule["exit"] is None else schedule["exit"]
    keeps = ", ".join(f"{k} from {layer}" for layer, k in schedule["keep"].items())
    console.print(
        f"Vision tokens in layers {schedule['enter']} to {leave - 1} of {results['layers']}, "
        f"keeps {keeps or 'none'}: {shares_in_words(chosen['flops'], results['outside'])}, "
        f"KL {confirmed['kl']:.4f} nats (upper limit {confirmed['limit']:.4f}){accuracy} on {confirmed['prompts']} "
        f"{'other prompts' if confirmed['held_out'] else 'prompts, those that chose it'}."
    )
    entry = results["entry"]
    if entry is not None:
        console.print(
            f"Entry at layer {entry['layer']}: KL {entry['kl_raw']:.4f} raw, {entry['kl_calibrated']:.4f} calibrated, "
            f"{entry['kl_ceiling']:.4f} with the dense model's own vision states."
        )
    console.print(f"Chosen for {chosen['why']}. {note}".strip(), markup=False)
    if (reading := results["reading"]) is not None:
        console.print(
            "Frozen vision tokens (recipe=cross_only): text reads them in "
            f"{layers_in_words(reading['layers'])}; with the dense model's own states KL {reading['kl']:.4f} nats "
            f"(upper limit {reading['limit']:.4f}), {reading['why']}."
        )
    console.print(f"{folder / 'report.html'}, {folder / 'schedule.yaml'}")
