"""A whole profile: samples, measurements, decision, files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedModel, ProcessorMixin

from latefusion.data.collate import Collator
from latefusion.eval.profiling import decide
from latefusion.eval.profiling.causal import Runner
from latefusion.eval.profiling.continued import Continued
from latefusion.eval.profiling.cost import Cost, expected
from latefusion.eval.profiling.files import write
from latefusion.eval.profiling.ledger import Ledger
from latefusion.eval.profiling.measure import Measurer, point
from latefusion.eval.profiling.samples import Batch, batches, stop_tokens
from latefusion.eval.profiling.summary import summarise
from latefusion.models.attach import Attachment, attach
from latefusion.models.calibration import Calibration, fit_entry
from latefusion.models.entry import CalibratedEntry
from latefusion.models.schedule import VisionSchedule

SCHEMA = 1  # of profile.json; raise it when a key changes its meaning


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a profile is to decide by.

    Attributes:
        bound: nats of KL per answer token that each of the two decisions, band and keeps, may cost.
        budget: parts of dense decoder FLOPs; None: as few as the bound allows.
    """

    bound: float = 0.05
    budget: float | None = None


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
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure where `model` fuses vision into text on `samples`, and write the schedule that follows.

    Writes `profile.json`, `schedule.yaml`, `entry.safetensors`, `report.html` with its pictures and tables, and
    `measured.jsonl`, from which the next call with the same `about` goes on.

    Args:
        samples: `{"messages", "images"}`, each ending in the answer that it is judged by.
        fit_on: samples whose images calibrate the entry; no sample's own image should be among them.
        labelled: whether answers are labels (else they are the model's own, and there is no accuracy).
        about: what the measurements depend on (model, data, seed, dtype), for resuming and for the report.

    Returns:
        What `profile.json` holds.

    Raises:
        ValueError: the model or the data does not allow it, in one sentence.
    """
    console = console or Console()
    folder = Path(output_dir)
    layers = model.config.get_text_config().num_hidden_layers
    if layers < 2:
        raise ValueError(f"a decoder of {layers} layer leaves nothing to choose; profile a deeper model.")
    collator = Collator(
        processor=processor,
        vision_ids=[model.config.image_token_id],
        stop=stop_tokens(model, processor),
    )
    sources = batches(model, collator, samples, batch_size)
    example = sources[0][1]()
    n_text, n_vision = example.counts
    ledger = Ledger(folder / "measured.jsonl", {**about, "samples": len(samples), "batch_size": batch_size})
    with attach(model, VisionSchedule()) as attachment:
        expense = expected(model.config, n_text, n_vision)
        announce(console, expense, len(samples), layers, continued(example, attachment), ledger)
        with bar(console) as progress:
            task = progress.add_task("Profiling", total=expense.total * len(samples))
            measurer = Measurer(
                model, attachment, sources, ledger, lambda share: progress.advance(task, share)
            )
            study = Study(measurer, wishes, labelled, n_text, n_vision)
            found = study.run(lambda enter: calibrate(attachment, collator, fit_on, enter, batch_size))
            progress.update(task, completed=expense.total * len(samples))
    found = {"schema": SCHEMA, "about": about, "cost": vars(expense) | {"total": expense.total}, **found}
    found = summarise(found, processor.tokenizer)
    write(folder, found, study.calibration, samples)
    report(console, folder, found)
    return found


@dataclass
class Study:
    """The order of measurements and decisions."""

    measurer: Measurer
    wishes: Wishes
    labelled: bool
    n_text: float
    n_vision: float
    calibration: Calibration | None = None

    def run(self, calibrate: Callable[[int], Calibration]) -> dict[str, Any]:
        measurer, wishes, layers = self.measurer, self.wishes, self.measurer.layers
        looks = measurer.looks()["samples"]
        effects = measurer.effects()
        mean = {key: float(np.mean(effect["kl"])) for key, effect in effects.items()}
        prefix = [0.0, *(mean[f"prefix {a}"] for a in range(1, layers + 1))]
        suffix = [prefix[-1], *(mean[f"suffix {b}"] for b in range(1, layers)), 0.0]
        enter, leave = decide.latest(prefix, wishes.bound), decide.earliest(suffix, wishes.bound)
        if enter == layers:
            raise ValueError(
                f"hiding the image from the text in every layer changes the answers by {prefix[-1]:.4f} nats, less "
                f"than bound={wishes.bound}: the model does not need its images on this data; choose a lower bound or "
                "other data."
            )
        pairs = decide.near_bands(enter, leave, layers)
        joint = measurer.bands(pairs)
        band_kl = {(a, b): float(np.mean(joint[f"{a} {b}"]["kl"])) for a, b in pairs}
        a, b = decide.choose_band(band_kl, wishes.bound, self.flops, layers)
        band = decide.band_schedule(a, b, layers)
        if a > 0:
            self.calibration = calibrate(a)
        entry = None if self.calibration is None else self.calibration.entry
        points = self._known(effects)
        whole = self.measured(band, entry)
        raw = self.measured(band, None) if entry is not None else whole
        keeps = self._keeps(band, entry, whole.kl) if b - a > 1 else []
        chosen, why = decide.choose([whole, *keeps], whole.kl + wishes.bound, wishes.budget)
        points += [whole, raw, *keeps] if entry is not None else [whole, *keeps]
        right = effects["dense"]["right"]
        return {
            "layers": layers,
            "labelled": self.labelled,
            "tokens": {"text": self.n_text, "vision": self.n_vision},
            "wishes": vars(wishes),
            "dense_accuracy": float(np.mean(right)) if self.labelled else None,
            "effects": effects,
            "looks": looks,
            "bands": [{"enter": a, "exit": b, "kl": kl} for (a, b), kl in band_kl.items()],
            "ends": {"enter": enter, "exit": leave},
            "entry": self._entry(a, mean, band_kl.get((a, b)), raw, whole),
            "kept": self._kept(chosen, entry),
            "points": [p.to_dict() for p in points],
            "front": [p.to_dict() for p in decide.pareto(points)],
            "chosen": chosen.to_dict() | {"why": why, "band_kl": band_kl[a, b]},
            "note": ""
            if b - a > 1
            else f"Vision is needed in layer {a} alone: a band of one layer has no room for a keep.",
        }

    def flops(self, schedule: VisionSchedule) -> float:
        config = self.measurer.model.config
        text, vision = round(self.n_text), round(self.n_vision)
        return schedule.flops(config, text, vision) / VisionSchedule().flops(config, text, vision)

    def measured(self, schedule: VisionSchedule, entry: CalibratedEntry | None) -> decide.Point:
        flops = self.flops(schedule)
        kl, right = self.measurer.schedule(schedule, entry, flops)
        return point(schedule, entry is not None, flops, kl, right, self.labelled)

    def _known(self, effects: dict[str, Any]) -> list[decide.Point]:
        """Schedules that were carried out among the knock-outs: dense, late entry alone, early exit alone."""
        right = effects["dense"]["right"]
        found = [point(VisionSchedule(), False, 1.0, [0.0] * len(right), right, self.labelled)]
        for kind in ("late", "suffix"):
            for layer in range(1, self.measurer.layers):
                schedule = VisionSchedule(enter=layer) if kind == "late" else VisionSchedule(exit=layer)
                effect = effects[f"{kind} {layer}"]
                found.append(
                    point(schedule, False, self.flops(schedule), effect["kl"], effect["right"], self.labelled)
                )
        return found

    def _keeps(self, band: VisionSchedule, entry: CalibratedEntry | None, base: float) -> list[decide.Point]:
        """Single keeps, then the pyramids that they promise, measured."""
        layers, bound = self.measurer.layers, self.wishes.bound
        leave = layers if band.exit is None else band.exit
        table: dict[tuple[int, int], float] = {}
        points: list[decide.Point] = []

        def with_keep(keep: Any) -> VisionSchedule:
            return decide.band_schedule(band.enter, leave, layers, keep)

        for layer in decide.keep_layers(band.enter, leave):
            for k in decide.keep_sizes(round(self.n_vision)):
                found = self.measured(with_keep({layer: k}), entry)
                points.append(found)
                table[layer, k] = max(0.0, found.kl - base)
                if table[layer, k] > 4 * bound and self.wishes.budget is None:
                    break  # fewer tokens will not cost less
        for keep in decide.pyramids(table, lambda keep: self.flops(with_keep(keep))):
            if len(keep) > 1:
                points.append(self.measured(with_keep(keep), entry))
        return points

    def _kept(self, chosen: decide.Point, entry: CalibratedEntry | None) -> dict[str, Any]:
        """Each sample's KL and correctness under the chosen schedule; of the first few, which tokens it kept."""
        kl, right = self.measurer.schedule(chosen.schedule, entry, chosen.flops)
        return {"kl": kl, "right": right, "tokens": self.measurer.kept(chosen.schedule, entry)}

    def _entry(
        self,
        enter: int,
        mean: dict[str, float],
        ceiling: float | None,
        raw: decide.Point,
        whole: decide.Point,
    ) -> dict[str, Any] | None:
        if self.calibration is None:
            return None
        return {
            "layer": enter,
            "explained": self.calibration.explained,
            "tokens": self.calibration.tokens,
            "places": len(self.calibration.entry.bias),
            "kl_raw": raw.kl,
            "kl_calibrated": whole.kl,
            "kl_ceiling": ceiling,
            "accuracy_raw": raw.accuracy,
            "accuracy_calibrated": whole.accuracy,
        }


def calibrate(
    attachment: Attachment,
    collator: Collator,
    samples: Sequence[dict[str, Any]],
    enter: int,
    batch_size: int,
) -> Calibration:
    made = (make() for _, make in batches(attachment.model, collator, samples, batch_size))
    return fit_entry(attachment, ((batch.inputs, batch.vision) for batch in made), enter)


def continued(batch: Batch, attachment: Attachment) -> bool:
    """Whether the batch's knock-outs can follow on the cache of the images (as far as its prompts tell)."""
    return Continued.of(Runner(attachment.model, attachment, batch)) is not None


def announce(console: Console, cost: Cost, samples: int, layers: int, follows: bool, ledger: Ledger) -> None:
    """What is about to be spent."""
    knock_outs = cost.knock_outs if follows else cost.whole
    total = cost.observing + knock_outs + cost.deciding
    console.print(
        f"{samples} samples, {layers} layers: up to {total * samples:,.0f} prefills' worth of FLOPs, {total:.0f} a "
        f"sample ({cost.observing:.0f} to observe, {knock_outs:.0f} for knock-outs, at most {cost.deciding:.0f} to "
        "decide)."
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


def report(console: Console, folder: Path, found: dict[str, Any]) -> None:
    """The decision in a few lines."""
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
    console.print(f"Chosen for {chosen['why']}. {found['note']}".strip())
    console.print(f"{folder / 'report.html'}, {folder / 'schedule.yaml'}")
