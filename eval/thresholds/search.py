"""Finds the setting of VisiPruner of nearly the least FLOPs whose KL to dense stays under a bound; others accept it.

The same setting that trying all of them would find, for a fraction of it (branch and bound). Two facts rule settings
out for sure. KL is never negative, so a setting is above the bound once the KL of the prompts that it ran on adds up to
more than all prompts together may have. And a prefill of each prompt says what a setting computes at least
(`flops_bound`), so nothing much dearer than a setting known to be under the bound need run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from latefusion.eval.comparison.answers import progress_bar
from latefusion.eval.thresholds import replay
from latefusion.eval.thresholds.accept import Accepted, accept
from latefusion.eval.thresholds.prefills import Prompts
from latefusion.eval.thresholds.questions import Questions
from latefusion.eval.thresholds.replay import Batch, fusion_layers
from latefusion.eval.thresholds.scores import EXACT, Scores
from latefusion.eval.thresholds.settings import Arguments, Setting, grid, policy_of, prefix
from latefusion.models.attach import Attachment
from latefusion.models.fingerprint import fingerprint, model_identity, rows_fingerprint
from latefusion.models.flops import decoder_flops, layer_flops

SHARES = (0.5, 0.25, 0.12, 0.06, 0.03, 0.015)  # of the vision tokens, that the tried tokens_thresholds keep


class Search:
    """All settings on as many prompts as it takes, batch by batch; what is done is kept on disk."""

    def __init__(
        self,
        arguments: Arguments,
        attachment: Attachment,
        processor: Any,
        rows: Questions,
        others: Questions | None = None,
    ):
        attention = attachment.traits.attention
        if not all(attention):
            raise ValueError(
                f"calibrate.py records softmax attention in every layer, but layer {attention.index(False)} "
                "of this decoder runs a recurrence (linear attention or a convolution): name VisiPruner's numbers "
                "yourself, or profile the model for a VisionSchedule."
            )
        self.arguments, self.attachment, self.rows, self.others = arguments, attachment, rows, others
        self.prompts = Prompts(arguments, attachment, processor, rows)
        self.confirming = None if others is None else Prompts(arguments, attachment, processor, others)
        self.outcomes: dict[int, dict[str, NDArray]] = {}  # of settings on the confirming prompts
        self.ends = np.cumsum([0, *map(len, self.prompts.batches)])
        layers = len(attachment.layers)
        boundaries = list(range(layers - 1)) if arguments.boundaries is None else arguments.boundaries
        first, _ = self.prompts.dense_batch(self.prompts.batches[0])
        recorded = replay.record(first, attachment, 0, arguments.sink_rule)
        self.longest = max(attachment.trace, key=lambda record: record.tokens[0])
        self.thresholds = arguments.tokens_thresholds or scale(recorded)
        self.limit = self.shallow_limit(boundaries, first, recorded.logits)
        self.settings = [
            setting
            for setting in grid(arguments, boundaries, self.thresholds)
            if "shallow" not in setting["stages"] or setting["boundary"] <= self.limit
        ]
        for setting in self.settings:
            policy_of(setting, arguments).validate(layers)
        self.prefixes = sorted({0, *map(prefix, self.settings)})
        self.folder = Path(arguments.output) / "batches" / self.fingerprint()
        self.sweeps = 0

    def cost(self) -> str:
        """What the search will compute, in words, before it does."""
        config, layers = self.attachment.model.config, len(self.attachment.layers)
        text, vision = self.longest.tokens[0] - self.longest.vision[0], self.longest.vision[0]
        dense = decoder_flops(config, self.longest.tokens)
        passes, resumed = 0, 0.0
        for shallow in {prefix(s) for s in self.settings}:
            group = [s for s in self.settings if prefix(s) == shallow]
            fusions = range(min(s["boundary"] for s in group) + 1, layers - 1)
            kinds = {(s["tokens_threshold"], "deep" in s["stages"]) for s in group}
            passes += len(kinds) * len(fusions)
            left = text + vision // 4
            resumed += (
                sum(decoder_flops(config, [left] * (layers - 1 - f)) for f in fusions) * len(kinds) / dense
            )
        others = 0 if self.others is None else len(self.others)
        first, prefills = self.ends[1] / self.ends[-1], 1 + len(self.prefixes)
        return (
            f"{len(self.rows)} prompts in {len(self.prompts.batches)} batches, {len(self.settings)} settings. Each "
            f"prompt: the dense answer and {prefills - 1} recorded prefill{'s' * (prefills > 2)}. Then all settings on "
            f"the first batch, {passes} short passes over what is left after fusion at most; on the others those that "
            "are not ruled out yet, the most promising first; no pass runs twice. Together at least like "
            f"{prefills + resumed * first:.1f} dense prefills of every prompt ({dense / 1e9:.2g} GFLOPs each), "
            f"{prefills + resumed:.0f} if nothing can be ruled out, more where they do not fit into memory."
            + (
                f" Then {others} other prompts accept the setting: the dense answer, a prefill and a short pass each."
                if others
                else ""
            )
        )

    def run(self) -> dict[str, Any]:
        """Every setting's numbers on every prompt that it ran on; NaN elsewhere."""
        self.folder.mkdir(parents=True, exist_ok=True)
        batches = self.prompts.batches
        with progress_bar() as progress:
            task, done = progress.add_task("Survey", total=len(self.rows)), []
            for number, rows in enumerate(batches):
                work = partial(self.prompts.survey, rows, self.prefixes, self.thresholds)
                done.append(self.kept(f"survey_{number:05d}", work))
                progress.advance(task, len(rows))
            self.dense = joined(done)
            most = int((self.dense["text"] + self.dense["vision"]).max())
            self.layer_cost = np.array(
                [layer_flops(self.attachment.model.config, n) for n in range(most + 1)], float
            )
            floors = np.stack([self.bound_of(setting) for setting in self.settings])  # [settings, N]
            boundaries = [setting["boundary"] for setting in self.settings]
            self.scores = Scores(floors, self.dense["dense_flops"], boundaries)
            if self.confirming is None:
                accepted = Accepted(self.best(self.arguments.kl, 0.0, progress))
            else:
                accepted = accept(
                    partial(self.best, progress=progress),
                    lambda setting: self.confirmed(setting, progress)["kl"],
                    lambda setting: float(self.scores.least_flops()[setting]),
                    self.arguments.kl,
                    scenes(self.confirming),
                )
            return self.results(self.correct(progress), accepted)

    def best(self, bound: float, least: float, progress: Any) -> int | None:
        """The `nearly_cheapest` setting whose KL on all prompts is at most `bound`, among those of `least` FLOPs."""
        scores, batches = self.scores, len(self.prompts.batches)
        scores.bound, scores.least = bound, least
        self.sweep(scores.alive(), 1, progress)
        while not np.isfinite(scores.best()) and scores.alive().any():
            self.sweep(scores.promising(), batches, progress)
        while scores.alive().any():
            self.sweep(scores.alive(), batches, progress)
        return scores.chosen()

    def confirmed(self, number: int, progress: Any) -> dict[str, NDArray]:
        """What a setting does to the confirming prompts: `kl`, `same` and `flops` against dense, `[N]` each.

        Ends as soon as the KL of those that it ran on puts the mean over all beyond the bound.
        """
        prompts, parts = self.confirming, []
        assert prompts is not None
        most = self.arguments.kl * len(prompts.order) * (1 + EXACT)
        task = progress.add_task("Confirm", total=len(prompts.order))
        for at, rows in enumerate(prompts.batches):
            survey = self.kept(f"dense_{at:05d}", partial(prompts.survey, rows, [0], self.thresholds))
            work = partial(prompts.try_on, rows, survey["answers"], [self.settings[number]])
            outcome = self.kept(f"confirm{number}_{at:05d}", work)
            parts.append(
                {
                    "kl": outcome["kl"][0],
                    "same": outcome["same"][0],
                    "flops": outcome["flops"][0] / survey["dense_flops"],
                }
            )
            progress.advance(task, len(rows))
            if sum(part["kl"].sum() for part in parts) > most:
                break
        self.outcomes[number] = joined(parts)
        return self.outcomes[number]

    def bound_of(self, setting: Setting) -> NDArray:
        shallow = prefix(setting)
        return flops_bound(
            self.layer_cost,
            setting,
            least=self.dense[f"least_{shallow}"],
            kept=self.dense[f"kept_{shallow}"][:, self.thresholds.index(setting["tokens_threshold"])],
            text=self.dense["text"],
            vision=self.dense["vision"],
            patience=self.arguments.exit_patience,
        )

    # ---------------------------------------------------------------- passes over the prompts

    def sweep(self, which: NDArray[np.bool_], batches: int, progress: Any) -> None:
        """Run these settings on the first `batches` batches, as long as any of them is not ruled out."""
        self.sweeps += 1  # also where nothing is left to do: files are named by it
        if not which.any():
            return
        task = progress.add_task(f"{which.sum()} settings", total=int(self.ends[batches]))
        for number, rows in enumerate(self.prompts.batches[:batches]):
            here = slice(self.ends[number], self.ends[number + 1])
            left = np.flatnonzero(which & self.scores.alive() & ~self.scores.ran()[:, here].any(1))
            if len(left):
                tried, written = [self.settings[i] for i in left], self.dense["answers"][:, here]
                work = partial(self.prompts.try_on, rows, written, tried)
                outcomes = self.kept(f"sweep{self.sweeps}_{number:05d}", work)
                for name, column in self.scores.columns.items():
                    column[left, here] = outcomes[name]
            progress.advance(task, len(rows))

    def kept(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of `compute`, from disk if it was computed before."""
        file = self.folder / f"{name}.npz"
        if not file.exists():
            part = file.with_suffix(".part.npz")
            np.savez(part, **compute())
            part.replace(file)  # whole or not at all
        with np.load(file) as arrays:
            return dict(arrays)

    def correct(self, progress: Any) -> NDArray | None:
        """Which settings that ran on all prompts write which label, `[settings, N]`; None without labels."""
        if not self.prompts.labelled:
            return None
        right = self.dense["right"]
        correct = self.scores.columns["same"] * right
        wrong, whole = np.flatnonzero(right == 0), np.flatnonzero(self.scores.ran().all(1))
        if not (len(wrong) and len(whole)):
            return correct
        task = progress.add_task("Labels", total=len(wrong))
        for start in range(0, len(wrong), self.arguments.batch_size):
            at = wrong[start : start + self.arguments.batch_size]
            rows, tried = [self.prompts.order[i] for i in at], [self.settings[i] for i in whole]
            correct[np.ix_(whole, at)] = self.prompts.try_labels(rows, tried)
            progress.advance(task, len(at))
        return correct

    # ---------------------------------------------------------------- around it

    def shallow_limit(self, boundaries: Sequence[int], first: Batch, dense: torch.Tensor) -> int:
        """The last boundary up to which the shallow rule alone stays under the bound, on one batch."""
        limit = 0
        if any("shallow" in stages for stages in self.arguments.stages):
            for boundary in sorted(b for b in boundaries if b > 0):
                logits = replay.record(first, self.attachment, boundary, self.arguments.sink_rule).logits
                outcome = replay.judge(first, self.attachment, logits, dense)
                if outcome.kl.mean() > self.arguments.kl:
                    break
                limit = boundary
        return limit

    def fingerprint(self) -> str:
        """Hash of everything that a batch's numbers depend on: arguments, model, processor, prompts with images."""
        arguments = {
            name: value
            for name, value in asdict(self.arguments).items()
            if name not in ("output", "overwrite")
        }
        model = model_identity(
            self.arguments.model, processor=self.prompts.processor, dtype=self.attachment.model.dtype
        )
        every = (part[i] for part in (self.rows, self.others) if part is not None for i in range(len(part)))
        return fingerprint(arguments, model, self.settings, rows_fingerprint(every))

    def results(self, correct: NDArray | None, accepted: Accepted) -> dict[str, Any]:
        dense = {name: self.dense[name] for name in ("right", "dense_flops", "dense_vision")}
        outside = self.prompts.outside_flops()
        return {
            "arguments": {k: v for k, v in asdict(self.arguments).items() if k != "overwrite"},
            "settings": self.settings,
            "shallow_limit": self.limit,
            "columns": self.scores.columns | dense,
            "outside": None if outside is None else outside / float(self.dense["dense_flops"].mean()),
            "correct": correct,
            "accepted": accepted,
            "confirmed": self.outcomes,
            "scenes": scenes(self.prompts),
        }


def scenes(prompts: Prompts) -> list[str]:
    """What each prompt is about, in the order in which they are measured."""
    return [str(prompts.rows.records[i]["scene"]) for i in prompts.order]


def joined(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Arrays of several batches, side by side."""
    return {name: np.concatenate([batch[name] for batch in batches], axis=-1) for name in batches[0]}


def scale(recorded: replay.Recorded) -> list[float]:
    """`tokens_threshold`s that keep about `SHARES` of the vision tokens in the layers of the middle half."""
    quarter = len(recorded.norms) // 4
    norms = torch.cat([norm[norm >= 0] for norm in recorded.norms[quarter : 3 * quarter]])
    at = torch.quantile(
        norms.double().cpu()[:: max(1, len(norms) // 1_000_000)], 1 - torch.tensor(SHARES).double()
    )
    return sorted({float(f"{value:.1g}") for value in at.tolist()})


def flops_bound(
    cost: NDArray,
    setting: dict[str, Any],
    *,
    least: NDArray,
    kept: NDArray,
    text: NDArray,
    vision: NDArray,
    patience: int,
) -> NDArray:
    """Lower bound of a setting's FLOPs on each prompt, `[N]`: exact if vision leaves as soon as it may.

    Args:
        cost: FLOPs of a layer over 0, 1, 2, ... tokens.
        least: `[layers, N]`; kept: tokens above the setting's threshold, `[layers, N]`.
        text, vision: tokens of each prompt, `[N]`.
        patience: layers after fusion that have to pass before vision leaves.
    """
    layers = len(least)
    fusion = fusion_layers(least, setting["boundary"], setting["layer_threshold"])
    chosen = np.take_along_axis(kept, np.minimum(fusion, layers - 1)[None], 0)[0]
    whole = np.minimum(fusion + 1, layers)  # layers that compute every token
    pruned = layers - whole
    if "deep" in setting["stages"]:
        pruned = np.minimum(pruned, patience)
    rest = layers - whole - pruned
    return whole * cost[text + vision] + pruned * cost[text + chosen] + rest * cost[text]
