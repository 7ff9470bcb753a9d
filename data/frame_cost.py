"""What the frames of videos cost, in words: tokens and FLOPs a frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from latefusion.data.videos import STACKED, Video
from latefusion.models.schedule import VisionSchedule


def frames_in_words(
    config: Any,
    videos: Sequence[Video],
    counts: Sequence[tuple[int, int]],
    *,
    encoder: float | None,
    encoded: int,
    schedule: VisionSchedule | None = None,
) -> str:
    """How many frames of these videos are shown, and what a frame costs.

    Args:
        config: the model's.
        counts: text and vision tokens of each prompt that shows some of the videos and nothing else.
        encoder: FLOPs of vision tower and projector on `encoded` vision tokens; None: not counted.
        schedule: of the decoder; None: dense.
    """
    policy = VisionSchedule() if schedule is None else schedule
    shown = sum(video.limit if config.model_type in STACKED else len(video.indices) for video in videos)
    tokens = sum(vision for _, vision in counts)
    decoder = sum(policy.flops(config, text, n) - policy.flops(config, text, 0) for text, n in counts)
    seen = (
        ""
        if encoder is None
        else f"{gigas(encoder * tokens / encoded / shown)} in vision tower and projector and "
    )
    under = "dense decoder" if policy == VisionSchedule() else "decoder under the schedule"
    return (
        f"Video: {shown:,} frames shown of {sum(video.total for video in videos):,}, {tokens:,} vision tokens. A frame "
        f"has {tokens / shown:.1f} and costs {seen}{gigas(decoder / shown)} in the {under}; a policy chooses among the "
        "tokens of all frames."
    )


def gigas(flops: float) -> str:
    return f"{flops / 1e9:.3g} GFLOPs"
