"""Call a model's processor on texts with images and videos, in one batch or one row, whatever the family."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from latefusion.data.videos import Video, video_arguments

# types whose processor returns the pixels of images and of videos under one name, the videos' alone
ONE_TENSOR = ("smolvlm",)
Moved = list[dict[str, Any]]  # where the placeholders of a text stood and what replaced them, in their order


def called(
    processor: Any,
    family: str,
    texts: Sequence[str],
    images: Sequence[Sequence[Any]],
    videos: Sequence[Video],
    **settings: Any,
) -> Any:
    """What the processor returns for these texts.

    Args:
        family: the model's type.
        images: of each text.
        videos: of all texts, one after another.
        settings: the processor's own arguments.

    Raises:
        ValueError: the processor refuses them, or makes images and frames of different sizes for one tensor.
    """
    shown = {"images": list(images) if any(images) else None, **video_arguments(videos, family)}
    if not (videos and any(images) and family in ONE_TENSOR):
        return processor(text=list(texts), **shown, **settings)
    with (
        recorded(processor, "_process_images") as of_images,
        recorded(processor, "_process_videos") as of_videos,
        recorded(processor, "get_text_with_replacements") as of_texts,
    ):
        batch = processor(text=list(texts), **shown, **settings)
    ((pictures, _),), ((films, _),), ((_, moved),) = of_images, of_videos, of_texts
    for name in ("pixel_values", "pixel_attention_mask"):
        if name in batch:
            batch[name] = in_order_of_text(name, pictures, films, moved)
    return batch


def in_order_of_text(name: str, pictures: Any, films: Any, moved: Sequence[Moved]) -> Tensor:
    """Tiles of images and frames of videos in the order of their placeholders, `[B, N, ...]`, short rows filled with 0.

    Args:
        name: the tensor, `pixel_values` (`[..., C, H, W]`) or `pixel_attention_mask` (`[..., H, W]`).
        pictures: what the image processor returned: `[B, N, ...]`, and the rows and columns of tiles of each image.
        films: what the video processor returned: `[V, F, ...]`.
        moved: the placeholders of each text.
    """
    tiles, frames = torch.as_tensor(pictures[name]), torch.as_tensor(films[name])
    if tiles.shape[2:] != frames.shape[2:]:
        (h, w), (high, wide) = tiles.shape[-2:], frames.shape[-2:]
        raise ValueError(
            f"the processor makes images of {w} x {h} pixels and frames of {wide} x {high}, which one batch cannot "
            "hold; give max_image_size of its image and video processors one value."
        )
    video, rows = iter(frames), []
    for tile, down, across, placeholders in zip(
        tiles, pictures["rows"], pictures["cols"], moved, strict=True
    ):
        parts = iter(
            tile.split([m * n + 1 for m, n in zip(down, across, strict=True)] + [left(tile, down, across)])
        )
        row = [next(parts) if one["type"] == "image" else next(video) for one in placeholders]
        rows.append(torch.cat(row) if row else tile[:0])  # [N, ...]
    longest = max(map(len, rows))
    return torch.stack([pad(row, (0, 0) * (row.dim() - 1) + (0, longest - len(row))) for row in rows])


def left(tile: Tensor, down: Sequence[int], across: Sequence[int]) -> int:
    """The tiles of a row that fill it up to the longest: they show no image."""
    return len(tile) - sum(m * n + 1 for m, n in zip(down, across, strict=True))


@contextmanager
def recorded(processor: Any, method: str) -> Iterator[list[Any]]:
    """A list that is filled with what a method of the processor returns."""
    results: list[Any] = []
    before = vars(processor).get(method)
    call = getattr(processor, method)

    def record(*args: Any, **settings: Any) -> Any:
        results.append(call(*args, **settings))
        return results[-1]

    setattr(processor, method, record)
    try:
        yield results
    finally:
        if before is None:
            delattr(processor, method)
        else:
            setattr(processor, method, before)
