"""One pass over the prompts: every measurement of a profile, batch by batch, written down as it is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel

from latefusion.data.prompt_batches import Batch, Group
from latefusion.eval.fusion import lenses
from latefusion.eval.fusion.answers import Answers
from latefusion.eval.fusion.causal import Runner, knock_outs
from latefusion.eval.fusion.cost import Plan
from latefusion.eval.fusion.decide import Point
from latefusion.eval.fusion.observe import Watch
from latefusion.eval.ledger import Ledger
from latefusion.models.attach import Attachment
from latefusion.models.executor.trace import PrefillTrace
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.entry import CalibratedEntry
from latefusion.models.student.entry_fit import installed

TOP = 3  # tokens of a lens
EXAMPLES = 6  # samples whose maps are kept


@dataclass
class Measurer:
    """Runs over the batches, one at a time on the device; what the ledger has is not measured again.

    Args:
        sources: the batches.
        plan: what each leaves out, and the prefills it takes; advance: called with the prefills that a step took.
    """

    model: PreTrainedModel
    attachment: Attachment
    sources: Sequence[Group]
    ledger: Ledger
    plan: Plan
    advance: Callable[[float], None] = lambda share: None

    def __post_init__(self) -> None:
        self.layers = len(self.attachment.layers)
        self._made: tuple[int, Batch] | None = None
        self._dense: dict[int, Answers] = {}
        self._mean: tuple[Tensor, Tensor] | None = None

    # ---------------------------------------------------------------- what is measured

    def effects(self) -> dict[str, Any]:
        """Per knock-out `kind layer` `kl` and `right` of each sample, in the samples' order; `dense`: `right` alone.

        None for the samples of a batch that leaves a kind out.
        """
        keys = knock_outs(self.layers)

        def measure(batch: Batch) -> dict[str, Any]:
            left_out = self.plan.left_out[self._at]
            dense, found = self._runner(batch).effects([key for key in keys if key[0] not in left_out])
            nothing = {"kl": [None] * batch.size, "right": [None] * batch.size}
            named = {f"{key[0]} {key[1]}": asdict(found[key]) if key in found else nothing for key in keys}
            return {"dense": asdict(dense), **named}

        return self._gathered("effects", measure, self.plan.knock_outs)

    def bands(self, pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Text sees vision in the layers [a, b) alone: per band `a b`, as `effects`."""

        def measure(batch: Batch) -> dict[str, Any]:
            return {f"{a} {b}": asdict(effect) for (a, b), effect in self._runner(batch).bands(pairs)}

        return self._gathered(f"bands {list(pairs)}", measure, self.plan.bands)

    def schedule(
        self, schedule: VisionSchedule, entry: CalibratedEntry | None, flops: float
    ) -> tuple[list[float], list[bool]]:
        """KL and correctness of each sample under a schedule that is carried out as in use."""

        def measure(batch: Batch) -> dict[str, Any]:
            runner = self._runner(batch)
            dense = self._dense_answers(runner)
            with installed(self.model, entry) if entry is not None else nullcontext():
                return {"it": asdict(dense.effect(runner.answers(schedule)))}

        name = f"schedule {schedule.to_dict()} {'calibrated' if entry is not None else 'raw'}"
        found = self._gathered(name, measure, [flops] * len(self.sources))["it"]
        return found["kl"], found["right"]

    def looks(self) -> dict[str, Any]:
        """What the dense model attends to and what its states say, per sample and layer (`observe.Look`, lenses)."""
        names = [f"looks / {i}" for i in range(len(self.sources))]
        if names[0] in self.ledger.values and any(name not in self.ledger.values for name in names):
            self._look(self._batch(0))  # the others are judged by its mean
        return self._gathered("looks", self._look, [1.0] * len(self.sources))

    def kept(self, schedule: VisionSchedule, entry: CalibratedEntry | None) -> list[list[Any] | None]:
        """Of the first few samples: per segment of the schedule its first layer, and which vision tokens take part.

        None for the others.
        """

        def measure(batch: Batch) -> dict[str, Any]:
            numbers = self.sources[self._at].numbers
            if all(number >= EXAMPLES for number in numbers):
                return {"kept": [None] * len(numbers)}
            with installed(self.model, entry) if entry is not None else nullcontext():
                self._runner(batch).answers(schedule)
            last = self.attachment._last
            steps = (
                [(layer, selection.vision) for layer, selection in last.selections]
                if isinstance(last, PrefillTrace)
                else []
            )
            return {
                "kept": [
                    None
                    if number >= EXAMPLES
                    else [[at, mask[b][batch.vision[b]].nonzero().flatten().tolist()] for at, mask in steps]
                    for b, number in enumerate(numbers)
                ]
            }

        nothing = [0.0] * len(self.sources)
        return self._gathered(f"kept {schedule.to_dict()} {entry is not None}", measure, nothing)["kept"]

    # ---------------------------------------------------------------- batches

    def _gathered(
        self, name: str, measure: Callable[[Batch], dict[str, Any]], shares: Sequence[float]
    ) -> dict[str, Any]:
        """Each entry's lists of all batches, put into the order of the samples; shares: prefills a sample."""
        parts = []
        for i, (source, share) in enumerate(zip(self.sources, shares, strict=True)):
            parts.append(self.ledger.get(f"{name} / {i}", lambda i=i: measure(self._batch(i))))
            self.advance(share * len(source.numbers))
        order = np.argsort([number for source in self.sources for number in source.numbers])

        def joined(values: list[Any]) -> Any:
            if isinstance(values[0], dict):
                return {key: joined([value[key] for value in values]) for key in values[0]}
            flat = [item for value in values for item in value]
            return [flat[i] for i in order]

        return joined(parts)

    def _batch(self, i: int) -> Batch:
        if self._made is None or self._made[0] != i:
            self._made = i, self.sources[i].make()
            if not self.plan.hold:
                self._dense = {}
        return self._made[1]

    @property
    def _at(self) -> int:
        """The number of the batch that is measured."""
        assert self._made is not None
        return self._made[0]

    def _runner(self, batch: Batch) -> Runner:
        return Runner(self.model, self.attachment, batch)

    def _dense_answers(self, runner: Runner) -> Answers:
        if self._at not in self._dense:
            self._dense[self._at] = runner.answers(VisionSchedule()).to("cpu")
        return self._dense[self._at].to(runner.batch.labels.device)

    # ---------------------------------------------------------------- looks

    def _look(self, batch: Batch) -> dict[str, Any]:
        watch, model = Watch(), self.model
        query = batch.queries[:, 0]
        features: list[Tensor] = []
        handle = self.attachment.layers[0].register_forward_pre_hook(
            lambda layer, args: features.append(args[0].float())
        )
        try:
            with lenses.states_at(self.attachment.layers, query) as states:
                answers = self._runner(batch).answers(watch)
        finally:
            handle.remove()
        if not bool(answers.log_probs.isfinite().all()):
            raise ValueError(
                f"the model's logits are not finite on sample {batch.names[0]} or one beside it; load it with "
                "dtype=float32."
            )
        first = torch.stack([answers.log_probs[answers.sample == i][0] for i in range(batch.size)])  # [B, V]
        written = first.argmax(-1)  # [B]
        logit, value = [], []
        for layer, state in enumerate(states):
            top = lenses.logit_lens(model, state).topk(TOP)
            share, norm = lenses.value_output_lens(model, layer, watch.heads[layer])
            best = share.max(-1)  # [B, H]
            logit.append([(i, p) for i, p in zip(top.indices.tolist(), _rounded(top.values), strict=True)])
            heads = norm.argsort(dim=1, descending=True)[:, :TOP]
            value.append(
                [
                    (heads[b].tolist(), best.indices[b, heads[b]].tolist(), _rounded(norm[b, heads[b]]))
                    for b in range(batch.size)
                ]
            )
        received = torch.stack(watch.attention).mean(0)  # [B, T]
        numbers, samples = self.sources[self._at].numbers, []
        for b, seen in enumerate(batch.vision):
            rows = features[0][b][seen]  # [K, D]
            words, cosine = lenses.nearest_words(model.get_input_embeddings().weight, rows)
            mean, spread = self._means(features[0], batch)
            fits = len(mean) in (1, len(rows))
            kind = lenses.kinds(rows, received[b][seen], mean if fits else mean.mean(0, keepdim=True), spread)
            samples.append(
                {
                    "looks": [asdict(layer[b]) for layer in watch.looks],
                    "written": int(written[b]),
                    "logit": [layer[b] for layer in logit],
                    "value": [layer[b] for layer in value],
                    "word_cosine": round(float(cosine.mean()), 4),
                    "kinds": kind.bincount(minlength=3).tolist(),
                    "maps": None
                    if numbers[b] >= EXAMPLES
                    else {
                        "words": words.tolist(),
                        "kinds": kind.tolist(),
                        "attention": [_rounded(layer[b][seen], 6) for layer in watch.attention],
                        "value_norm": [_rounded(layer[b][seen], 3) for layer in watch.values],
                    },
                }
            )
        return {"samples": samples}

    def _means(self, features: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of the first batch: the mean projected feature at each place, and the mean squared distance to it."""
        if self._mean is None:
            counts = batch.vision.sum(1)
            if bool((counts == counts[0]).all()):
                rows = features[batch.vision].unflatten(0, (batch.size, -1))  # [B, K, D]
                mean = rows.mean(0)
            else:
                rows = features[batch.vision][None]
                mean = rows[0].mean(0, keepdim=True)
            self._mean = mean, (rows - mean).square().sum(-1).mean()
        return self._mean


def point(
    schedule: VisionSchedule,
    calibrated: bool,
    flops: float,
    kl: Sequence[float],
    right: Sequence[bool],
    labelled: bool,
) -> Point:
    mean, low, high = interval(kl)
    return Point(
        schedule=schedule,
        calibrated=calibrated,
        flops=flops,
        kl=mean,
        low=low,
        high=high,
        accuracy=float(np.mean(right)) if labelled else None,
    )


def known(values: Sequence[Any]) -> list[Any]:
    """Without the samples that a measurement left out."""
    return [value for value in values if value is not None]


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean with its 95% interval over samples (Student's t; never below 0)."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, 0.0, float("inf")
    half = float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
    return mean, max(0.0, mean - half), mean + half


def _rounded(values: Tensor, digits: int = 4) -> Any:
    return [
        round(v, digits) if isinstance(v, float) else [round(w, digits) for w in v] for v in values.tolist()
    ]
