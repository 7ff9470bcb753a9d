"""Outcomes of VisiPruner's settings on batches of prompts; settings that agree so far share their prefills."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from latefusion.data.prompts import prompt_inputs
from latefusion.eval.metrics import normalise
from latefusion.eval.thresholds import replay
from latefusion.eval.thresholds.questions import Questions
from latefusion.eval.thresholds.replay import Batch, Outcome, Recorded, fusion_layers, surveyed
from latefusion.eval.thresholds.settings import Arguments, Setting, policy_of, prefix
from latefusion.models.attach import Attachment
from latefusion.models.flops import outside_flops
from latefusion.models.inputs import encode_images, fresh_inputs, stop_ids


class Prompts:
    """Prompts in batches: the dense model's answers, and what becomes of them under settings."""

    def __init__(self, arguments: Arguments, attachment: Attachment, processor: Any, rows: Questions):
        self.arguments, self.attachment = arguments, attachment
        self.processor, self.rows = processor, rows
        self.model: Any = attachment.model
        self.labelled = rows.labelled
        lengths = [len(str(row)) for row in rows.records]
        order = sorted(range(len(rows)), key=lambda i: (lengths[i], i))
        batches = [order[i : i + arguments.batch_size] for i in range(0, len(order), arguments.batch_size)]
        middle = len(batches) // 2
        self.batches = [batches[middle], *batches[:middle], *batches[middle + 1 :]]
        self.order = [i for batch in self.batches for i in batch]

    def survey(
        self, rows: Sequence[int], prefixes: Sequence[int], thresholds: Sequence[float]
    ) -> dict[str, Any]:
        """The dense model's answers and FLOPs, and what its prefills say about every setting (`replay.surveyed`)."""
        batch, right = self.dense_batch(rows)
        columns: dict[str, Any] = {"right": np.array(right, float)}
        for shallow in sorted(prefixes, reverse=True):  # 0, the dense one, last
            recorded = replay.record(batch, self.attachment, shallow, self.arguments.sink_rule)
            for name, values in surveyed(recorded, thresholds).items():
                columns[f"{name}_{shallow}"] = values
        dense = replay.judge(batch, self.attachment, recorded.logits, recorded.logits)
        trace, answers = self.attachment.trace, batch.real.sum(1).cpu().numpy()
        columns["vision"] = np.array([record.n_vision for record in trace])
        columns["text"] = np.array([record.tokens[0] for record in trace]) - columns["vision"] - answers
        padded = np.full((self.arguments.max_new_tokens, len(rows)), -1)
        padded[: batch.answers.shape[1]] = batch.answers.masked_fill(~batch.real, -1).T.cpu().numpy()
        return columns | {"answers": padded, "dense_flops": dense.flops, "dense_vision": dense.vision}

    def try_on(
        self, rows: Sequence[int], written: NDArray[np.int64], settings: Sequence[Setting]
    ) -> dict[str, NDArray]:
        """Outcomes of a batch whose dense answers are `written` `[A, B]` (-1: no token), `[settings, B]` a name."""
        answers = [[token for token in answer if token >= 0] for answer in written.T.tolist()]
        batch = Batch.build(self.model, self.encoded([self.rows[i] for i in rows]), answers)
        recorded = replay.record(batch, self.attachment, 0, self.arguments.sink_rule)
        outcomes = self.outcomes(batch, recorded, settings)
        return {n: np.stack([getattr(o, n) for o in outcomes]) for n in Outcome.__annotations__}

    def dense_batch(self, rows: Sequence[int]) -> tuple[Batch, list[bool]]:
        """These prompts with the dense model's answers behind them, and which answers are the labels."""
        arguments, samples = self.arguments, [self.rows[i] for i in rows]
        inputs = self.encoded(samples)
        with torch.no_grad():
            written = self.model.generate(
                **fresh_inputs(inputs),
                max_new_tokens=arguments.max_new_tokens,
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
        recorded = replay.record(batch, self.attachment, 0, self.arguments.sink_rule)
        return np.stack([outcome.same for outcome in self.outcomes(batch, recorded, settings)])

    def outcomes(self, batch: Batch, dense: Recorded, settings: Sequence[Setting]) -> list[Outcome]:
        """Outcomes of these settings, in their order; `dense` is the batch's last prefill."""
        done: dict[int, Outcome] = {}
        for shallow in sorted({prefix(setting) for setting in settings}):
            recorded = dense
            if shallow > 0:
                recorded = replay.record(batch, self.attachment, shallow, self.arguments.sink_rule)
            unpruned = replay.judge(batch, self.attachment, recorded.logits, dense.logits)
            layers, short = len(recorded.states), dict[Any, Outcome]()
            for number, setting in enumerate(settings):
                if prefix(setting) != shallow:
                    continue
                fusion = fusion_layers(recorded.least, setting["boundary"], setting["layer_threshold"])
                outcome = unpruned
                for layer in sorted({int(f) for f in fusion if f < layers - 1}):
                    key = layer, setting["tokens_threshold"], "deep" in setting["stages"]
                    if key not in short:
                        policy = policy_of(setting, self.arguments)
                        logits = replay.resume(batch, self.attachment, recorded, layer, policy)
                        short[key] = replay.judge(batch, self.attachment, logits, dense.logits)
                    outcome = short[key].where(fusion == layer, outcome)
                done[number] = outcome
        return [done[number] for number in range(len(settings))]

    def encoded(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        with torch.no_grad():
            return encode_images(self.model, prompt_inputs(self.model, self.processor, samples))

    def outside_flops(self) -> float | None:
        """FLOPs of a prefill outside the decoder layers, mean over the first batch; None if they cannot be counted."""
        samples = [self.rows[i] for i in self.batches[0]]
        return outside_flops(self.model, prompt_inputs(self.model, self.processor, samples))

    @property
    def stops(self) -> list[int]:
        """Tokens that end an answer."""
        return stop_ids(self.model.generation_config)


def ended(ids: Sequence[int], stops: Sequence[int]) -> list[int]:
    """An answer up to and with the token that ends it."""
    at = next((i for i, token in enumerate(ids) if token in stops), len(ids) - 1)
    return list(ids[: at + 1])
