"""Prompts with their answers as batches whose samples have their images at the same places."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from latefusion.data.collate import IGNORE, Collator, label_columns
from latefusion.data.samples import videos_of_sample
from latefusion.data.videos import TIMES
from latefusion.models.executor.vision import vision_token_ids
from latefusion.models.inputs import encode_images, fresh_inputs


@dataclass(frozen=True)
class Group:
    """A batch that is not made yet.

    Attributes:
        numbers: of its samples among all.
        make: encodes its images and collates it.
        places: of the vision tokens, the same in every sample; lengths: tokens of each sample.
        answers: tokens of all answers.
        content: a hash of what the model is given.
    """

    numbers: tuple[int, ...]
    make: Callable[[], Batch]
    places: tuple[int, ...]
    lengths: tuple[int, ...]
    answers: int
    content: str = ""

    @property
    def together(self) -> bool:
        """Whether no text stands between vision tokens."""
        return self.places[-1] - self.places[0] + 1 == len(self.places)


@dataclass(frozen=True)
class Batch:
    """Prompts with their answers, padded on the right.

    Attributes:
        names: of the samples.
        inputs: of the model; images and videos as `mm_encoder_outputs`, so that no forward encodes them again.
        labels: int64 `[B, T]`, the answer's tokens, -100 elsewhere; queries: int64 `[B, Q]`, the token before it.
        vision: bool `[B, T]`.
    """

    names: tuple[str, ...]
    inputs: dict[str, Any]
    labels: Tensor
    queries: Tensor
    vision: Tensor

    @property
    def size(self) -> int:
        return len(self.labels)

    @property
    def columns(self) -> Tensor:
        """Positions that predict an answer token in any sample, int64 `[R]`."""
        return label_columns(self.labels)

    @property
    def real(self) -> Tensor:
        """Bool `[B, T]`, false for padding."""
        return self.inputs["attention_mask"].bool()

    @property
    def bytes(self) -> int:
        """Of its tensors, features of the images included."""
        return size([self.inputs, self.labels, self.queries, self.vision])

    def fresh(self) -> dict[str, Any]:
        """The inputs, for a forward that may write into `mm_encoder_outputs`."""
        return fresh_inputs(self.inputs)

    def head(self, cut: int) -> dict[str, Any]:
        """The inputs of the first `cut` tokens."""
        shape = self.labels.shape
        return {
            name: value[:, :cut] if isinstance(value, Tensor) and value.shape[:2] == shape else value
            for name, value in self.fresh().items()
        }

    def rest(self, cut: int) -> dict[str, Any]:
        """The inputs of what follows on the head's cache: text alone."""
        rest = {
            name: value[:, cut:]
            for name, value in self.inputs.items()
            if isinstance(value, Tensor) and value.shape[:2] == self.labels.shape
        }
        return {**rest, "attention_mask": self.inputs["attention_mask"]}


def size(tensors: Any) -> int:
    """Bytes of the tensors in a tree of lists and dictionaries."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    if isinstance(tensors, Mapping):
        return sum(map(size, tensors.values()))
    return sum(map(size, tensors)) if isinstance(tensors, list | tuple) else 0


def collated(
    model: Any, collator: Collator, samples: Sequence[dict[str, Any]], names: Sequence[str]
) -> Batch:
    """A batch of samples, on the model's device, images encoded."""
    inputs: dict[str, Any] = dict(collator(samples))
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            pixels = value.is_floating_point() and name != TIMES
            inputs[name] = value.to(model.device, model.dtype if pixels else None)
    labels, queries = inputs.pop("labels"), inputs.pop("queries")
    tokens = torch.tensor(sorted(set(vision_token_ids(model.base_model.config).values())))
    vision = torch.isin(inputs["input_ids"], tokens.to(model.device)) & inputs["attention_mask"].bool()
    with torch.no_grad():  # the tower's graph would stay in memory as long as the batch
        encoded = encode_images(model, inputs)
    return Batch(tuple(names), encoded, labels, queries, vision)


def batches(model: Any, collator: Collator, samples: Sequence[dict[str, Any]], size: int) -> list[Group]:
    """Batches of at most `size` samples.

    Samples whose images stand at the same places share a batch (`blind.CachedRuns` works on such), like lengths
    together, those with videos apart.
    """
    vision_ids = set(vision_token_ids(model.base_model.config).values())
    keys: list[tuple[tuple[tuple[int, ...], bool], int]] = []
    answers: list[int] = []
    content: list[bytes] = []
    for sample in samples:
        row = collator([sample])
        content.append(_hashed(row))
        ids = row["input_ids"][0].tolist()
        places = tuple(i for i, token in enumerate(ids) if token in vision_ids)
        keys.append(((places, bool(videos_of_sample(sample))), len(ids)))
        answers.append(int((row["labels"] != IGNORE).sum()))
    order = sorted(range(len(samples)), key=lambda i: (keys[i], i))
    groups: list[list[int]] = []
    for i in order:
        if groups and keys[groups[-1][0]][0] == keys[i][0] and len(groups[-1]) < size:
            groups[-1].append(i)
        else:
            groups.append([i])

    def maker(group: list[int]) -> Callable[[], Batch]:
        return lambda: collated(
            model, collator, [samples[i] for i in group], [str(samples[i].get("id", i)) for i in group]
        )

    return [
        Group(
            tuple(group),
            maker(group),
            places=keys[group[0]][0][0],
            lengths=tuple(keys[i][1] for i in group),
            answers=sum(answers[i] for i in group),
            content=sha256(b"".join(content[i] for i in group)).hexdigest()[:16],
        )
        for group in groups
    ]


def _hashed(row: dict[str, Tensor]) -> bytes:
    digest = sha256()
    for name in sorted(row):
        value = row[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.digest()


def counts(groups: Sequence[Group]) -> tuple[float, float]:
    """Text and vision tokens of a sample, on average, answers included."""
    samples = sum(len(group.numbers) for group in groups)
    vision = sum(len(group.numbers) * len(group.places) for group in groups)
    return (sum(sum(group.lengths) for group in groups) - vision) / samples, vision / samples
