"""Outcomes of VisiPruner's settings on batches of prompts; settings that agree so far share their prefills."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from latefusion.data.prompts import check_fit, prompt_inputs
from latefusion.data.samples import number_of
from latefusion.eval.comparison.encoded import EncodedImages
from latefusion.eval.metrics import normalise
from latefusion.eval.thresholds.questions import Questions
from latefusion.eval.thresholds.replay import Batch, Outcome, surveyed
from latefusion.eval.thresholds.settings import Arguments, Setting
from latefusion.eval.thresholds.tried import Tried
from latefusion.models.attach import Attachment
from latefusion.models.flops import outside_flops
from latefusion.models.inputs import fresh_inputs, stop_ids

HELD = (
    2**30
)  # bytes of recorded prefills that are held; those of further batches run again where a pass needs them


class Prompts:
    """Prompts in batches: the dense model's answers, and what becomes of them under settings.

    The first batches are small: most settings are ruled out by a handful of prompts.
    """

    def __init__(self, arguments: Arguments, attachment: Attachment, processor: Any, rows: Questions):
        self.arguments, self.attachment = arguments, attachment
        self.processor, self.rows = processor, rows
        self.model: Any = attachment.model
        self.labelled = rows.labelled
        self.images, self.room = EncodedImages(), HELD
        self.tried: dict[tuple[int, ...], Tried] = {}
        lengths = [len(str(row)) for row in rows.records]
        order = sorted(range(len(rows)), key=lambda i: (lengths[i], i))
        middle = len(order) // 2  # the first batches are of typical length
        filmed = [number_of("video", row.get("messages") or []) > 0 for row in rows.records]
        mixed = growing(order[middle:] + order[:middle], arguments.batch_size)
        # no prompt with a video beside one with images alone
        parts = [[i for i in batch if filmed[i] == kind] for batch in mixed for kind in (False, True)]
        self.batches = [part for part in parts if part]
        self.order = [i for batch in self.batches for i in batch]

    def survey(
        self, rows: Sequence[int], prefixes: Sequence[int], thresholds: Sequence[float]
    ) -> dict[str, Any]:
        """The dense model's answers and FLOPs, and what its prefills say about every setting (`replay.surveyed`)."""
        batch, right = self.dense_batch(rows)
        written = batch.answers.masked_fill(~batch.real, -1).T.cpu().numpy()
        tried = self._tried(rows, written)
        columns: dict[str, Any] = {"right": np.array(right, float)}
        tried.recorded(0)
        dense, trace = tried.unpruned[0], self.attachment.trace
        answers = batch.real.sum(1).cpu().numpy()
        for shallow in prefixes:
            for name, values in surveyed(tried.recorded(shallow), thresholds).items():
                columns[f"{name}_{shallow}"] = values
        columns["vision"] = np.array([record.n_vision for record in trace])
        columns["text"] = np.array([record.tokens[0] for record in trace]) - columns["vision"] - answers
        padded = np.full((self.arguments.max_new_tokens, len(rows)), -1)
        padded[: batch.answers.shape[1]] = written
        self._hold(tried)
        return columns | {"answers": padded, "dense_flops": dense.flops, "dense_vision": dense.vision}

    def try_on(
        self, rows: Sequence[int], written: NDArray[np.int64], settings: Sequence[Setting]
    ) -> dict[str, NDArray]:
        """Outcomes of a batch whose dense answers are `written` `[A, B]` (-1: no token), `[settings, B]` a name."""
        tried = self._tried(rows, written)
        outcomes = tried.outcomes(settings)
        self._hold(tried)
        return {n: np.stack([getattr(o, n) for o in outcomes]) for n in Outcome.__annotations__}

    def _tried(self, rows: Sequence[int], written: NDArray[np.int64]) -> Tried:
        """What is known of a batch whose dense answers are `written` `[A, B]` (-1: no token)."""

        def make() -> Batch:
            answers = [[token for token in answer if token >= 0] for answer in written.T.tolist()]
            return Batch.build(self.model, self.encoded([self.rows[i] for i in rows]), answers)

        return self.tried.setdefault(tuple(rows), Tried(make, self.attachment, self.arguments))

    def _hold(self, tried: Tried) -> None:
        """Hold a batch's prefills as long as there is room for them."""
        self.room += tried.held
        self.room -= tried.hold(self.room)

    def dense_batch(self, rows: Sequence[int]) -> tuple[Batch, list[bool]]:
        """These prompts with the dense model's answers behind them, and which answers are the labels."""
        arguments, samples = self.arguments, [self.rows[i] for i in rows]
        inputs = self.encoded(samples)
        check_fit(self.model.config, samples, inputs, arguments.max_new_tokens)
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
        outcomes = Tried(lambda: batch, self.attachment, self.arguments).outcomes(settings)
        return np.stack([outcome.same for outcome in outcomes])

    def encoded(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        with torch.no_grad():
            inputs = prompt_inputs(self.model, self.processor, samples)
            return self.images.encode(self.model, inputs)

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


def growing(order: Sequence[int], size: int) -> list[list[int]]:
    """Batches of an eighth of `size`, then twice as large each, up to `size`."""
    batches: list[list[int]] = []
    start = 0
    for n in (min(max(1, size // 8) * 2**i, size) for i in count()):
        if start >= len(order):
            break
        batches.append(list(order[start : start + n]))
        start += n
    return batches
