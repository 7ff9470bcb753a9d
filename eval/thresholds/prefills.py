"""What settings of VisiPruner do on batches of prompts; prefills are shared by all that agree so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from latefusion.data.prompts import prompt_inputs
from latefusion.eval.metrics import normalise
from latefusion.eval.thresholds import replay as calibration
from latefusion.eval.thresholds.floor import fusion_layers, surveyed
from latefusion.eval.thresholds.replay import Batch, Outcome, Recorded
from latefusion.models.attach import Attachment
from latefusion.models.inputs import encode_images, fresh_inputs, stop_ids
from latefusion.models.policies.visipruner.settings import VisiPruner

if TYPE_CHECKING:
    from latefusion.eval.calibrate import Arguments
    from latefusion.eval.thresholds.questions import Questions

Setting = dict[str, Any]  # arguments of VisiPruner that are searched


def settings(
    asked: Arguments, boundaries: Sequence[int], tokens_thresholds: Sequence[float]
) -> list[Setting]:
    """All that are tried, in an order of their own; the shallow rule needs a layer below the boundary."""
    return [
        {
            "stages": tuple(stages),
            "boundary": boundary,
            "layer_threshold": layer_threshold,
            "tokens_threshold": tokens_threshold,
        }
        for stages in asked.stages
        for boundary in boundaries
        if boundary > 0 or "shallow" not in stages
        for layer_threshold in asked.layer_thresholds
        for tokens_threshold in tokens_thresholds
    ]


def policy_of(setting: Setting, asked: Arguments) -> VisiPruner:
    return VisiPruner(
        **setting,
        exit_threshold=asked.exit_threshold,
        exit_patience=asked.exit_patience,
        sink_rule=asked.sink_rule,
    )


def prefix(setting: Setting) -> int:
    """Settings with the same one run alike up to their fusion: the layers under the shallow rule."""
    return setting["boundary"] if "shallow" in setting["stages"] else 0


class Prompts:
    """Prompts in batches: what the dense model writes, and what becomes of it under settings."""

    def __init__(self, asked: Arguments, attachment: Attachment, processor: Any, rows: Questions):
        self.asked, self.attachment, self.processor, self.rows = asked, attachment, processor, rows
        self.model: Any = attachment.model
        self.labelled = rows.labelled
        lengths = [len(str(row)) for row in rows.known]
        order = sorted(range(len(rows)), key=lambda i: (lengths[i], i))
        batches = [order[i : i + asked.batch_size] for i in range(0, len(order), asked.batch_size)]
        middle = len(batches) // 2
        self.batches = [batches[middle], *batches[:middle], *batches[middle + 1 :]]
        self.order = [i for batch in self.batches for i in batch]

    def survey(
        self, rows: Sequence[int], prefixes: Sequence[int], thresholds: Sequence[float]
    ) -> dict[str, Any]:
        """What the dense model writes and computes, and what its prefills say of every setting (`floor.py`)."""
        batch, right = self.dense_batch(rows)
        found: dict[str, Any] = {"right": np.array(right, float)}
        for prefix in sorted(prefixes, reverse=True):  # 0, the dense one, last
            recorded = calibration.record(batch, self.attachment, prefix, self.asked.sink_rule)
            for name, values in surveyed(recorded, thresholds).items():
                found[f"{name}_{prefix}"] = values
        dense = calibration.judge(batch, self.attachment, recorded.logits, recorded.logits)
        trace, answers = self.attachment.trace, batch.real.sum(1).cpu().numpy()
        found["vision"] = np.array([record.n_vision for record in trace])
        found["text"] = np.array([record.tokens[0] for record in trace]) - found["vision"] - answers
        padded = np.full((self.asked.max_new_tokens, len(rows)), -1)
        padded[: batch.answers.shape[1]] = batch.answers.masked_fill(~batch.real, -1).T.cpu().numpy()
        return found | {"answers": padded, "dense_flops": dense.flops, "dense_vision": dense.vision}

    def try_on(
        self, rows: Sequence[int], written: NDArray[np.int64], settings: Sequence[Setting]
    ) -> dict[str, NDArray]:
        """What becomes of a batch with the dense answers `written` `[A, B]` (-1: none), `[settings, B]` a name."""
        answers = [[token for token in answer if token >= 0] for answer in written.T.tolist()]
        batch = Batch.build(self.model, self.encoded([self.rows[i] for i in rows]), answers)
        recorded = calibration.record(batch, self.attachment, 0, self.asked.sink_rule)
        outcomes = self.outcomes(batch, recorded, settings)
        return {n: np.stack([getattr(o, n) for o in outcomes]) for n in Outcome.__annotations__}

    def dense_batch(self, rows: Sequence[int]) -> tuple[Batch, list[bool]]:
        """These prompts with the dense model's answers behind them, and which answers are the labels."""
        asked, samples = self.asked, [self.rows[i] for i in rows]
        inputs = self.encoded(samples)
        with torch.no_grad():
            written = self.model.generate(
                **fresh_inputs(inputs),
                max_new_tokens=asked.max_new_tokens,
                do_sample=False,
                num_beams=1,
            )[:, inputs["input_ids"].shape[1] :].tolist()
        answers = [ended(ids, self.stops) for ids in written]
        texts = self.processor.batch_decode(answers, skip_special_tokens=True)
        right = [
            self.labelled and normalise(text) == normalise(row["answer"])
            for text, row in zip(texts, samples, strict=True)
        ]
        return Batch.build(self.model, inputs, answers), right

    def try_labels(self, rows: Sequence[int], settings: Sequence[Setting]) -> NDArray[np.bool_]:
        """Which settings write the label where the dense model does not, `[settings, rows]`."""
        samples = [self.rows[i] for i in rows]
        labels = self.processor.tokenizer(
            [row["answer"] for row in samples], add_special_tokens=False
        ).input_ids
        batch = Batch.build(self.model, self.encoded(samples), [[*ids, self.stops[0]] for ids in labels])
        recorded = calibration.record(batch, self.attachment, 0, self.asked.sink_rule)
        return np.stack([outcome.same for outcome in self.outcomes(batch, recorded, settings)])

    def outcomes(self, batch: Batch, dense: Recorded, settings: Sequence[Setting]) -> list[Outcome]:
        """Of these settings, in their order; `dense` is the batch's last prefill."""
        done: dict[int, Outcome] = {}
        for shallow in sorted({prefix(setting) for setting in settings}):
            recorded = dense
            if shallow > 0:
                recorded = calibration.record(batch, self.attachment, shallow, self.asked.sink_rule)
            unpruned = calibration.judge(batch, self.attachment, recorded.logits, dense.logits)
            layers, short = len(recorded.states), dict[Any, Outcome]()
            for number, setting in enumerate(settings):
                if prefix(setting) != shallow:
                    continue
                fusion = fusion_layers(recorded.least, setting["boundary"], setting["layer_threshold"])
                outcome = unpruned
                for layer in sorted({int(f) for f in fusion if f < layers - 1}):
                    key = layer, setting["tokens_threshold"], "deep" in setting["stages"]
                    if key not in short:
                        policy = policy_of(setting, self.asked)
                        logits = calibration.resume(batch, self.attachment, recorded, layer, policy)
                        short[key] = calibration.judge(batch, self.attachment, logits, dense.logits)
                    outcome = short[key].where(fusion == layer, outcome)
                done[number] = outcome
        return [done[number] for number in range(len(settings))]

    def encoded(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        with torch.no_grad():
            return encode_images(self.model, prompt_inputs(self.model, self.processor, samples))

    @property
    def stops(self) -> list[int]:
        """Tokens that end an answer."""
        return stop_ids(self.model.generation_config)


def ended(ids: Sequence[int], stops: Sequence[int]) -> list[int]:
    """An answer up to and with the token that ends it."""
    at = next((i for i, token in enumerate(ids) if token in stops), len(ids) - 1)
    return list(ids[: at + 1])
