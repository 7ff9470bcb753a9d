"""The order in which a profile measures and decides: knock-outs, bands, keeps, and the choice on other prompts.

`Study.run` is that order; each decision is a function of `decide.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from latefusion.eval.fusion.decide import (
    Goal,
    Point,
    Rung,
    band_schedule,
    cheapest_bands,
    choose,
    descend,
    earliest,
    keep_layers,
    keep_sizes,
    ladder,
    latest,
    measured,
    near_bands,
    pareto,
    pyramids,
    spread,
    unseen,
)
from latefusion.eval.fusion.effects import interval, upper_limit
from latefusion.eval.fusion.measure import Measurer
from latefusion.eval.fusion.plan import KEEP_LAYERS, PROBES, SINGLES, START
from latefusion.eval.fusion.reading_layers import by_need, nested_sets, to_confirm
from latefusion.models.layer_kinds import attends
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.entry import CalibratedEntry
from latefusion.models.student.entry_fit import Calibration, TooFew

BAND_SHARE = 0.5  # of the bound, that the band may cost without its keeps


@dataclass
class Study:
    """The order of measurements and decisions.

    Candidates are found on the samples and accepted on other prompts: the least of many noisy means would be too low.

    Args:
        measurer: on the samples.
        confirmer: on the confirming prompts; None: the samples confirm their own choice.
        labelled: whether answers are labels (else they are the model's own, and there is no accuracy).
        text, vision: tokens of a sample, on average.
        images, confirming_images: what each sample, and each confirming prompt, is about; None: no two share an image.
    """

    measurer: Measurer
    confirmer: Measurer | None
    goal: Goal
    labelled: bool
    text: float
    vision: float
    calibration: Calibration | None = None
    images: Sequence[Hashable] | None = None
    confirming_images: Sequence[Hashable] | None = None

    def run(self, calibrate: Callable[[int], Calibration]) -> dict[str, Any]:
        """Measure and decide; `calibration` is then the chosen schedule's.

        Args:
            calibrate: fits the entry at a layer.

        Returns:
            Measurements and decision, as JSON holds them.

        Raises:
            ValueError: the model does not need its images on this data.
        """
        measurer, goal, layers = self.measurer, self.goal, self.measurer.layers
        looks, effects = measurer.looks(), measurer.knock_outs()
        mean = {key: float(np.mean(measured(effect["kl"]))) for key, effect in effects.items()}
        prefix = [0.0, *(mean[f"prefix {a}"] for a in range(1, layers + 1))]
        suffix = [prefix[-1], *(mean[f"suffix {b}"] for b in range(1, layers)), 0.0]
        enter, leave = latest(prefix, goal.bound), earliest(suffix, goal.bound)
        if enter == layers:
            raise ValueError(
                f"hiding the image from the text in every layer changes the answers by {prefix[-1]:.4f} nats, less "
                f"than bound={goal.bound}: the model does not need its images on this data; choose a lower bound or "
                "other data."
            )
        pairs = near_bands(enter, leave, layers)
        joint = measurer.bands(pairs)
        band_kl = {(a, b): float(np.mean(joint[f"{a} {b}"]["kl"])) for a, b in pairs}
        tried: dict[tuple[int, int], Point] = {}
        fitted: dict[int, Calibration] = {}
        notes: list[str] = []

        def entry_at(a: int) -> CalibratedEntry | None:
            if a > 0 and a not in fitted and not notes:
                try:
                    fitted[a] = calibrate(a)
                except TooFew as error:
                    notes.append(f"The entry is not calibrated: {error}")
            return _entry_of(fitted.get(a))

        alone: dict[tuple[int, int], Rung] = {}  # on the confirming prompts, which are more
        for a, b in cheapest_bands(band_kl, goal.bound, self.flops, layers):
            alone[a, b] = self._rung(band_schedule(a, b, layers), entry_at(a))
            if np.mean(alone[a, b].kl) <= BAND_SHARE * goal.bound:
                break
        else:
            a, b = min(alone, key=lambda band: (alone[band].limit, alone[band].flops))
        tried[a, b] = self.carried_out(band_schedule(a, b, layers), entry_at(a))
        singles, front = self._keeps((a, b), entry_at(a), tried[a, b].kl) if b - a > 1 else ([], [])
        if b - a == 1:
            notes.append(f"Vision is needed in layer {a} alone: a band of one layer has no room for a keep.")
        safest = min(band_kl, key=lambda band: (band_kl[band], band))
        rungs: list[Rung] = []
        for band in dict.fromkeys([(a, b), safest]):
            if band not in alone:
                alone[band] = self._rung(band_schedule(*band, layers), entry_at(band[0]))
            rungs += self._confirmed(band, alone[band], entry_at(band[0]), front)
            if rungs[-1].limit <= goal.bound:
                break
        best, why = choose(rungs, goal.bound, goal.budget)
        a, b = best.schedule.enter, layers if best.schedule.exit is None else best.schedule.exit
        entry, self.calibration = entry_at(a), fitted.get(a)
        band = band_schedule(a, b, layers)
        chosen, whole = self.carried_out(best.schedule, entry), self.carried_out(band, entry)
        raw = self.carried_out(band, None) if entry is not None else whole
        beside = {"chosen, raw entry": self.carried_out(chosen.schedule, None)} if entry is not None else {}
        if goal.by_hand is not None:
            beside["by hand"] = self.carried_out(goal.by_hand, entry_at(goal.by_hand.enter))
        points = [
            *self._among_knock_outs(effects),
            *tried.values(),
            *singles,
            whole,
            raw,
            chosen,
            *beside.values(),
        ]
        points = list({(str(p.schedule.to_dict()), p.calibrated): p for p in points}.values())
        right = effects["dense"]["right"]
        return {
            "layers": layers,
            "labelled": self.labelled,
            "tokens": {"text": self.text, "vision": self.vision},
            "goal": {"bound": goal.bound, "budget": goal.budget},
            "dense_accuracy": float(np.mean(right)) if self.labelled else None,
            "effects": effects,
            "images": numbered(self.images),
            "looks": looks,
            "bands": [{"enter": a, "exit": b, "kl": kl} for (a, b), kl in band_kl.items()],
            "ends": {"enter": enter, "exit": leave},
            "entry": self._entry(a, band_kl.get((a, b)), raw, whole),
            "kept": self._kept(chosen, entry, right),
            "points": [p.to_dict() for p in points],
            "front": [p.to_dict() for p in pareto(points)],
            "beside": {name: p.to_dict() for name, p in beside.items()},
            "ladder": [
                {"schedule": rung.schedule.to_dict(), "flops": rung.flops, "limit": rung.limit}
                | {"kl": float(np.mean(rung.kl))}
                for rung in rungs
            ],
            "confirmed": self._confirmation(best),
            "reading": self._reading(effects) if goal.cross else None,
            "chosen": chosen.to_dict() | {"why": why, "band_kl": band_kl.get((a, b), whole.kl)},
            "note": " ".join(notes),
        }

    def flops(self, schedule: VisionSchedule) -> float:
        """FLOPs of a prefill of the average sample under a schedule, as a share of dense."""
        config = self.measurer.model.config
        text, vision = round(self.text), round(self.vision)
        return schedule.flops(config, text, vision) / VisionSchedule().flops(config, text, vision)

    def carried_out(self, schedule: VisionSchedule, entry: CalibratedEntry | None) -> Point:
        flops = self.flops(schedule)
        kl, right = self.measurer.schedule(schedule, entry, flops)
        return self._point(schedule, entry is not None, flops, kl, right)

    def _point(
        self, schedule: VisionSchedule, calibrated: bool, flops: float, kl: list[float], right: list[bool]
    ) -> Point:
        mean, low, high = interval(kl, self.images)
        return Point(
            schedule, calibrated, flops, mean, low, high, float(np.mean(right)) if self.labelled else None
        )

    def _among_knock_outs(self, effects: dict[str, Any]) -> list[Point]:
        """The schedules that are knock-outs, too: dense, late entry alone, early exit alone."""
        right = effects["dense"]["right"]
        points = [self._point(VisionSchedule(), False, 1.0, [0.0] * len(right), right)]
        for layer in range(1, self.measurer.layers):
            for kind, schedule in (
                ("late", VisionSchedule(enter=layer)),
                ("suffix", VisionSchedule(exit=layer)),
            ):
                effect = effects.get(f"{kind} {layer}")  # a measurer may leave out what decides nothing
                if effect is not None:
                    points.append(
                        self._point(schedule, False, self.flops(schedule), effect["kl"], effect["right"])
                    )
        return points

    def _keeps(
        self, band: tuple[int, int], entry: CalibratedEntry | None, base: float
    ) -> tuple[list[Point], list[tuple[float, dict[int, int]]]]:
        """Measure single keeps and some of the pyramids that they promise; the points, and the pyramids with their KL.

        The pyramids are the `ladder` of those that no other beats in both FLOPs and expected KL.
        """
        layers, goal = self.measurer.layers, self.goal
        sizes = keep_sizes(round(self.vision))
        table: dict[tuple[int, int], float] = {}
        points: list[Point] = []

        def schedule(keep: Mapping[int, int]) -> VisionSchedule:
            return band_schedule(*band, layers, keep)

        def measure(keep: Mapping[int, int]) -> Point:
            points.append(self.carried_out(schedule(keep), entry))
            return points[-1]

        attention = attends(self.measurer.model.config)
        # a keep ranks by softmax attention, so it begins after the band's first layer that has some
        ranked = next((i for i in range(*band) if attention[i]), band[1]), band[1]
        if not keep_layers(*ranked):
            return [], []

        def price(most: int) -> float:
            return sum(
                self.flops(schedule({layer: k})) for layer in keep_layers(*ranked, most) for k in sizes
            )

        most = max((n for n in range(2, KEEP_LAYERS + 1) if price(n) <= SINGLES), default=1)
        for layer in keep_layers(*ranked, most):
            cost = 0.0
            for k in sizes:  # fewer tokens cannot cost less, nor less than what no sample may have shown
                cost = max(
                    cost, measure({layer: k}).kl - base, goal.bound * unseen(band, layer, k / self.vision)
                )
                table[layer, k] = cost
                if cost > 4 * goal.bound and goal.budget is None:
                    break
        rungs = ladder(pyramids(table, lambda keep: self.flops(schedule(keep))))
        for i in spread(len(rungs)):
            if len(rungs[i][1]) > 1:
                measure(rungs[i][1])
        return points, [(base + cost, keep) for cost, keep in rungs]

    @property
    def _images_of_rungs(self) -> Sequence[Hashable] | None:
        """What the prompts are about that `_rung` measures on."""
        return self.images if self.confirmer is None else self.confirming_images

    def _rung(self, schedule: VisionSchedule, entry: CalibratedEntry | None, least: float = 0.0) -> Rung:
        """A schedule on the confirming prompts; its limit is not below `least`."""
        flops = self.flops(schedule)
        kl, right = (self.confirmer or self.measurer).schedule(schedule, entry, flops)
        limit = max(upper_limit(kl, self._images_of_rungs), least)
        return Rung(schedule, entry is not None, flops, kl, right, limit)

    def _confirmed(
        self,
        band: tuple[int, int],
        alone: Rung,
        entry: CalibratedEntry | None,
        front: Sequence[tuple[float, dict[int, int]]],
    ) -> list[Rung]:
        """The band alone, and some of the pyramids in it, on the confirming prompts: the best of them last.

        Without a budget the cheapest whose limit stays within the bound is looked for; with one, those below it that
        cost most FLOPs are measured.

        Args:
            front: expected KL and pyramid, cheapest first.
        """
        layers, goal = self.measurer.layers, self.goal
        rungs: dict[int, Rung] = {}

        def within(i: int) -> bool:
            rungs[i] = self._rung(band_schedule(*band, layers, front[i][1]), entry, alone.limit)
            return rungs[i].limit <= goal.bound

        if goal.budget is not None:
            affordable = [
                i
                for i, (_, keep) in enumerate(front)
                if self.flops(band_schedule(*band, layers, keep)) <= goal.budget
            ]
            for i in affordable[-PROBES:]:
                within(i)
        elif alone.limit <= goal.bound:
            descend(len(front), sum(expected > START * goal.bound for expected, _ in front), within)
        return sorted([alone, *rungs.values()], key=lambda one: (one.limit <= goal.bound, -one.flops))

    def _confirmation(self, rung: Rung) -> dict[str, Any]:
        """What the chosen schedule does to the confirming prompts."""
        mean, low, high = interval(rung.kl, self._images_of_rungs)
        confirmer = self.confirmer or self.measurer
        _, dense_right = confirmer.schedule(VisionSchedule(), None, 1.0)
        pairs = list(zip(dense_right, rung.right, strict=True))
        return {
            "prompts": len(rung.kl),
            "images": len(rung.kl if self._images_of_rungs is None else set(self._images_of_rungs)),
            "held_out": self.confirmer is not None,
            "kl": mean,
            "low": low,
            "high": high,
            "limit": rung.limit,
            "accuracy": float(np.mean(rung.right)) if self.labelled else None,
            "dense_accuracy": float(np.mean(dense_right)) if self.labelled else None,
            "lost": pairs.count((True, False)),
            "gained": pairs.count((False, True)),
        }

    def _reading(self, effects: Mapping[str, Any]) -> dict[str, Any]:
        """The smallest of the nested sets of layers that the bound allows text to read vision in alone."""
        attention = attends(self.measurer.model.config)
        order = [i for i in by_need(effects, self.measurer.layers) if attention[i]]
        sets = nested_sets(order)
        kl = [float(np.mean(effect["kl"])) for effect in self.measurer.reading(sets)]
        bound = self.goal.bound
        candidates = to_confirm(sets, kl, bound)
        confirmed = [
            self._read(read, effect)
            for read, effect in zip(
                candidates, (self.confirmer or self.measurer).reading(candidates), strict=True
            )
        ]
        within = next((one for one in confirmed if one["limit"] <= bound), None)
        why = f"the fewest layers with an upper limit of at most {bound:g} nats"
        if within is None:
            why = f"the lowest upper limit, as no set of layers that was tried stays within the bound of {bound:g} nats"
        return {
            "order": order,
            "sets": [{"layers": list(read), "kl": value} for read, value in zip(sets, kl, strict=True)],
            "confirmed": confirmed,
            **(within or min(confirmed, key=lambda one: one["limit"])),
            "why": why,
        }

    def _read(self, layers: Sequence[int], effect: Mapping[str, Any]) -> dict[str, Any]:
        """What hiding vision from the text in all other layers does to the confirming prompts."""
        mean, low, high = interval(effect["kl"], self._images_of_rungs)
        return {
            "layers": list(layers),
            "flops": self.flops(VisionSchedule(cross=layers)),
            "kl": mean,
            "low": low,
            "high": high,
            "limit": upper_limit(effect["kl"], self._images_of_rungs),
            "accuracy": float(np.mean(effect["right"])) if self.labelled else None,
        }

    def _kept(
        self, chosen: Point, entry: CalibratedEntry | None, dense_right: Sequence[bool]
    ) -> dict[str, Any]:
        """Each sample's KL and correctness under the chosen schedule; of the first few, which tokens it kept."""
        kl, right = self.measurer.schedule(chosen.schedule, entry, chosen.flops)
        return {"kl": kl, "right": right, "tokens": self.measurer.kept(chosen.schedule, entry)}

    def _entry(self, enter: int, ceiling: float | None, raw: Point, whole: Point) -> dict[str, Any] | None:
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


def numbered(images: Sequence[Hashable] | None) -> list[int] | None:
    """The images as numbers, in the order in which they come."""
    numbers: dict[Hashable, int] = {}
    return None if images is None else [numbers.setdefault(image, len(numbers)) for image in images]


def _entry_of(calibration: Calibration | None) -> CalibratedEntry | None:
    return None if calibration is None else calibration.entry
