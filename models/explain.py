"""`explain`: what a policy did with a prompt, in words, as a dict, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from latefusion.models.attach import attached
from latefusion.models.executor.trace import PrefillTrace, TraceRecord
from latefusion.models.flops import Account, account, encoder_flops, head_flops
from latefusion.models.inputs import PIXELS
from latefusion.models.picture import Patches, draw


@dataclass(frozen=True)
class Sample:
    """One prompt of the batch.

    Attributes:
        record: its trace.
        positions: where its vision tokens stand in the (padded) row, ascending.
        images: the picture's images with their grids of patches; empty where the patches' places are unknown.
        account: what it cost.
        outside: FLOPs of its prefill outside the decoder layers (vision tower, projector, head); None: unknown.
    """

    record: TraceRecord
    positions: list[int]
    images: list[Patches]
    account: Account
    outside: float | None = None

    @property
    def prefill_saved(self) -> float | None:
        """The share of the dense model's whole prefill that was not computed; None where that is unknown."""
        cost = self.account
        if self.outside is None:
            return None
        return (cost.dense_flops - cost.flops) / (cost.dense_flops + self.outside)

    @property
    def kept_patches(self) -> list[int] | None:
        """The kept tokens, counted among the vision tokens from 0; None if nothing was chosen among them."""
        if self.record.kept is None:
            return None
        order = {position: i for i, position in enumerate(self.positions)}
        return [order[position] for position in self.record.kept]

    def words(self) -> str:
        record, n = self.record, len(self.positions)
        layers, n_text = len(record.tokens), record.tokens[0] - record.vision[0]
        if n == 0:
            return f"{n_text} text tokens and no vision tokens: nothing to remove."
        sentences = [f"{n} vision and {n_text} text tokens, {layers} layers."]
        if record.fusion_layer is not None:
            sentences.append(f"Fusion in layer {record.fusion_layer}.")
        if self.kept_patches is not None:
            sentences.append(f"{len(self.kept_patches)} of {n} vision tokens were chosen to go on.")
        steps = [(0, record.vision[0])]
        for layer, count in enumerate(record.vision):
            if count != steps[-1][1]:
                steps.append((layer, count))
        ends = [first for first, _ in steps[1:]] + [layers]
        runs = [
            f"{'all' if count == n else 'none' if count == 0 else count} in "
            + (f"layers {first} to {end - 1}" if end - 1 > first else f"layer {first}")
            for (first, count), end in zip(steps, ends, strict=True)
        ]
        sentences.append(f"Vision tokens: {', '.join(runs)}.")
        if any(record.frozen):
            sentences.append(
                "They are only read there: keys and values are computed, their states never change."
            )
        whole = self.prefill_saved
        sentences.append(
            f"Saved: {self.account.flops_saved:.1%} of the decoder's FLOPs"
            + ("" if whole is None else f" ({whole:.1%} of the whole prefill's, with vision tower and head)")
            + f", {self.account.attention_saved:.1%} of the attention with vision tokens in it"
            + (
                f" ({self.account.attention_saved_after:.1%} after the last layer with all of them)."
                if len(steps) > 1
                else "."
            )
        )
        return " ".join(sentences)

    def to_dict(self) -> dict[str, Any]:
        record = self.record
        return {
            "fusion_layer": record.fusion_layer,
            "exit_layer": record.exit_layer,
            "kept": record.kept,
            "kept_patches": self.kept_patches,
            "tokens": record.tokens,
            "vision": record.vision,
            "flops_saved": self.account.flops_saved,
            "prefill_flops_saved": self.prefill_saved,
            "attention_saved": self.account.attention_saved,
            "attention_saved_after": self.account.attention_saved_after,
        }

    def picture(self) -> str:
        """An SVG: the kept patches over the image, and the tokens of each layer as steps."""
        return draw(self.record, self.kept_patches, self.images, self.words())


@dataclass(frozen=True)
class Explanation:
    """What happened to each prompt of a batch; `print` it."""

    samples: list[Sample]

    def __str__(self) -> str:
        if len(self.samples) == 1:
            return self.samples[0].words()
        return "\n".join(f"Prompt {i}: {sample.words()}" for i, sample in enumerate(self.samples))

    def to_dict(self) -> list[dict[str, Any]]:
        """One dict a prompt, of plain numbers and lists."""
        return [sample.to_dict() for sample in self.samples]

    def save(self, path: str | Path, sample: int = 0) -> None:
        """Write the picture of one prompt as an SVG file.

        Raises:
            ValueError: the path is not that of an SVG file, or there is no such prompt.
        """
        if not 0 <= sample < len(self.samples):
            raise ValueError(
                f"sample={sample} does not exist: the batch has prompts 0 to {len(self.samples) - 1}."
            )
        if Path(path).suffix.lower() != ".svg":
            raise ValueError(f"the picture is an SVG, and {path} is named otherwise; end its name in .svg.")
        Path(path).write_text(self.samples[sample].picture())


def explain(
    model: nn.Module, inputs: Mapping[str, Any], *, images: Sequence[Image.Image] | None = None
) -> Explanation:
    """Run one prefill under the model's policy and return what it did with the vision tokens.

    Args:
        model: with a policy attached (`attach`), maybe inside PEFT.
        inputs: of its forward, as the processor gives them.
        images: what the picture shows, in the order of the prompts' images; None: the pixels that the model sees,
            where `inputs` has them as images. If the processor crops, crop them too.

    Raises:
        ValueError: the model has no policy, the inputs are no processor's, or the number of images is not that of
            the prompts.
    """
    if not isinstance(inputs, Mapping):
        raise ValueError(
            f"inputs of type {type(inputs).__name__} are not a processor's; pass what "
            "processor(text=..., images=..., return_tensors='pt') returns."
        )
    attachment = attached(model)
    if attachment is None:
        raise ValueError(
            f"{type(model).__name__} has no policy to explain; attach one with lf.attach(model, policy)."
        )
    with torch.no_grad():
        model(**inputs, use_cache=False, logits_to_keep=1)
    trace, config = attachment.last, attachment.model.config
    masks = (
        trace.prompt.vision.cpu() if isinstance(trace, PrefillTrace) else [torch.zeros(1, dtype=torch.bool)]
    )
    masks = list(masks) if isinstance(trace, PrefillTrace) else masks * len(attachment.trace)
    runs = [run_lengths(mask) for mask in masks]
    n_images = sum(map(len, runs))
    if images is not None and len(images) != n_images:
        raise ValueError(f"{len(images)} images given for prompts with {n_images}; pass one for each.")
    shown: list[Any] = list(images) if images is not None else pixels(inputs.get("pixel_values"), n_images)
    grids = inputs.get("image_grid_thw")
    if PIXELS["video"] in inputs:  # runs of tokens are not images: tokens are shown by layer alone
        shown, grids = [], None
    tower = None
    if any(name in inputs for name in PIXELS.values()):
        tower = encoder_flops(attachment.model, dict(inputs))
    vision = sum(record.n_vision for record in attachment.trace)
    samples, at = [], 0
    for record, mask, lengths in zip(attachment.trace, masks, runs, strict=True):
        patches = []
        for length in lengths:
            shape = grid_shape(length, None if grids is None else grids[at].tolist())
            if shape is not None and at < len(shown):
                patches.append(Patches(shown[at], *shape))
            at += 1
        drawn = patches if len(patches) == len(lengths) else []
        positions = mask.nonzero().flatten().tolist()
        outside = None  # the tower's work is split by vision tokens
        if tower is not None and vision:
            outside = tower * record.n_vision / vision + head_flops(config, 1)
        samples.append(Sample(record, positions, drawn, account(config, [record]), outside))
    return Explanation(samples)


def run_lengths(mask: Tensor) -> list[int]:
    """Lengths of the runs of true in a bool row `[T]`."""
    edges = torch.nn.functional.pad(mask.int(), (1, 1)).diff()
    return ((edges == -1).nonzero() - (edges == 1).nonzero()).flatten().tolist()


def grid_shape(n: int, thw: Sequence[int] | None) -> tuple[int, int] | None:
    """Rows and columns of one image's n tokens, from its grid of patches or as a square; None if unknown."""
    if thw is not None:
        frames, rows, columns = thw
        merge = isqrt(frames * rows * columns // n)
        fits = frames == 1 and rows * columns == n * merge * merge
        return (rows // merge, columns // merge) if fits else None
    side = isqrt(n)
    return (side, side) if side * side == n else None


def pixels(values: Tensor | None, n_images: int) -> list[Image.Image]:
    """The normalised pixels `[N, 3, H, W]` as images, stretched to the range of colours; empty for other shapes."""
    if values is None or values.dim() != 4 or len(values) != n_images:
        return []
    low, high = values.amin().item(), values.amax().item()
    scaled = (values.float() - low) / max(high - low, 1e-6) * 255
    return [Image.fromarray(image.permute(1, 2, 0).byte().cpu().numpy()) for image in scaled]
