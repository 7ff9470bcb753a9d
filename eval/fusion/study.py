"""From measurements to a schedule: what is measured next, and what is decided by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from latefusion.eval.fusion import decide
from latefusion.eval.fusion.cost import SINGLES
from latefusion.eval.fusion.measure import Measurer, known, point
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.entry import CalibratedEntry
from latefusion.models.student.entry_fit import Calibration, TooFew


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a profile is to decide by.

    Attributes:
        bound: nats of KL per answer token, mean over samples, that the schedule may cost: where vision enters, where
            it leaves, both at once, and the whole of it with its entry and keeps.
        budget: parts of dense decoder FLOPs; None: as few as the bound allows.
        given: a schedule chosen by hand, measured beside the one that is decided.
    """

    bound: float = 0.05
    budget: float | None = None
    given: VisionSchedule | None = None


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
        mean = {key: float(np.mean(known(effect["kl"]))) for key, effect in effects.items()}
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
        tried: dict[tuple[int, int], decide.Point] = {}
        fitted: dict[int, Calibration] = {}
        notes: list[str] = []

        def fit(a: int) -> None:
            if a == 0 or a in fitted or notes:
                return
            try:
                fitted[a] = calibrate(a)
            except TooFew as few:
                notes.append(f"The entry is not calibrated: {few}")

        for a, b in decide.cheapest_bands(band_kl, wishes.bound, self.flops, layers):
            fit(a)
            tried[a, b] = self.measured(decide.band_schedule(a, b, layers), _entry_of(fitted.get(a)))
            if tried[a, b].kl <= wishes.bound:
                break
        else:
            a, b = min(tried, key=lambda band: (tried[band].kl, tried[band].flops))
        band, whole = decide.band_schedule(a, b, layers), tried[a, b]
        self.calibration = fitted.get(a)
        entry = _entry_of(self.calibration)
        points = self._known(effects)
        raw = self.measured(band, None) if entry is not None else whole
        keeps = self._keeps(band, entry, whole.kl) if b - a > 1 else []
        chosen, why = decide.choose([whole, *keeps], wishes.bound, wishes.budget)
        beside = {"chosen, raw entry": self.measured(chosen.schedule, None)} if entry is not None else {}
        if (given := wishes.given) is not None:
            fit(given.enter)
            beside["by hand"] = self.measured(given, _entry_of(fitted.get(given.enter)))
        if b - a == 1:
            notes.append(f"Vision is needed in layer {a} alone: a band of one layer has no room for a keep.")
        points += [*tried.values(), *keeps, *([raw] if entry is not None else []), *beside.values()]
        right = effects["dense"]["right"]
        return {
            "layers": layers,
            "labelled": self.labelled,
            "tokens": {"text": self.n_text, "vision": self.n_vision},
            "wishes": {"bound": wishes.bound, "budget": wishes.budget},
            "dense_accuracy": float(np.mean(right)) if self.labelled else None,
            "effects": effects,
            "looks": looks,
            "bands": [{"enter": a, "exit": b, "kl": kl} for (a, b), kl in band_kl.items()],
            "ends": {"enter": enter, "exit": leave},
            "entry": self._entry(a, mean, band_kl.get((a, b)), raw, whole),
            "kept": self._kept(chosen, entry, right),
            "points": [p.to_dict() for p in points],
            "front": [p.to_dict() for p in decide.pareto(points)],
            "beside": {name: p.to_dict() for name, p in beside.items()},
            "chosen": chosen.to_dict() | {"why": why, "band_kl": band_kl[a, b]},
            "note": " ".join(notes),
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
        """Single keeps; of the pyramids that they promise, some along their front, more where the limit is met."""
        layers, wishes = self.measurer.layers, self.wishes
        leave = layers if band.exit is None else band.exit
        sizes = decide.keep_sizes(round(self.n_vision))
        table: dict[tuple[int, int], float] = {}
        points: dict[tuple[tuple[int, int], ...], decide.Point] = {}

        def schedule(keep: Mapping[int, int]) -> VisionSchedule:
            return decide.band_schedule(band.enter, leave, layers, keep)

        def kl(keep: Mapping[int, int]) -> float:
            key = tuple(keep.items())
            if key not in points:
                points[key] = self.measured(schedule(keep), entry)
            return points[key].kl

        def price(most: int) -> float:
            where = decide.keep_layers(band.enter, leave, most)
            return sum(self.flops(schedule({layer: k})) for layer in where for k in sizes)

        most = max((n for n in range(2, decide.KEEP_LAYERS + 1) if price(n) <= SINGLES), default=1)
        for layer in decide.keep_layers(band.enter, leave, most):
            for k in sizes:
                table[layer, k] = max(0.0, kl({layer: k}) - base)
                if table[layer, k] > 4 * wishes.bound and wishes.budget is None:
                    break  # fewer tokens will not cost less
        front = decide.pyramids(table, lambda keep: self.flops(schedule(keep)))
        n = len(front)
        for i in decide.spread(n):
            kl(front[i][2])
        if wishes.budget is None:
            guess = sum(base + cost > wishes.bound for _, cost, _ in front)
            decide.bisect(n, guess, lambda i: kl(front[i][2]) <= wishes.bound)
        else:
            affordable = [keep for flops, _, keep in front if flops <= wishes.budget]
            for keep in affordable[-decide.PROBES :]:
                kl(keep)
        return list(points.values())

    def _kept(
        self, chosen: decide.Point, entry: CalibratedEntry | None, before: Sequence[bool]
    ) -> dict[str, Any]:
        """Each sample's KL and correctness under the chosen schedule; of the first few, which tokens it kept."""
        kl, right = self.measurer.schedule(chosen.schedule, entry, chosen.flops)
        pairs = list(zip(before, right, strict=True))
        return {
            "kl": kl,
            "right": right,
            "lost": pairs.count((True, False)),
            "gained": pairs.count((False, True)),
            "tokens": self.measurer.kept(chosen.schedule, entry),
        }

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


def _entry_of(calibration: Calibration | None) -> CalibratedEntry | None:
    return None if calibration is None else calibration.entry
