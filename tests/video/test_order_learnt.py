"""A question that only the order of frames answers is learnt under a band, and is lost with the order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.data_rows import turn
from helpers.families import build_from
from helpers.video_models import inputs_of, video_collator, video_model

from latefusion import VisionSchedule
from latefusion.data.videos import Video
from latefusion.models.attach import attach

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
COLORS = np.array([(230, 20, 20), (20, 230, 20), (20, 20, 230)], np.uint8)
FRAMES, SIDE, ASKED = 4, 28, 200


def rows(rng: np.random.Generator, n: int, orders: list[list[int]]) -> list[dict[str, Any]]:
    """Lights that turn red, green, blue, red, or the other way round, from any color on; "yes" or "no" says which way.

    No frame, and no set of frames without their order, tells one way from the other.

    Args:
        orders: of the frames that are shown, one after the other.
    """
    made = []
    for i in range(n):
        way, start = int(rng.choice([-1, 1])), int(rng.integers(len(COLORS)))
        colors = COLORS[[(start + way * t) % len(COLORS) for t in orders[i % len(orders)]]]  # [F, 3]
        frames = np.ascontiguousarray(np.broadcast_to(colors[:, None, None], (FRAMES, SIDE, SIDE, 3)))
        messages = [
            turn("user", {"type": "video"}, "is it red?"),
            turn("assistant", "yes" if way > 0 else "no"),
        ]
        video = Video(frames, tuple(range(FRAMES)), FRAMES, 2.0, FRAMES)
        made.append({"messages": messages, "images": [], "videos": [video]})
    return made


@torch.no_grad()
def share_right(model: Any, batch: dict[str, Any]) -> float:
    """How often the likeliest first token is the answer's."""
    at = batch["queries"][:, 0]
    each = torch.arange(len(at))
    likeliest = model(**inputs_of(batch), use_cache=False).logits[each, at].argmax(-1)
    return float((likeliest == batch["labels"][each, at + 1]).float().mean())


def test_the_way_of_lights_is_learnt_under_a_band_and_lost_with_the_order_of_frames() -> None:
    collate, rng = video_collator("llava_onevision"), np.random.default_rng(0)
    model = build_from(video_model("llava_onevision")[0].config)
    torch.manual_seed(0)
    for weight in model.parameters():  # small enough to be trained from
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    forwards = list(range(FRAMES))
    with attach(model, VisionSchedule(enter=1, exit=5)):
        for _ in range(400):
            batch = collate(rows(rng, 16, [forwards]))
            loss = model(**inputs_of(batch), labels=batch["labels"], use_cache=False).loss
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            if loss.item() < 0.01:
                break
        model.eval()
        tested = np.random.default_rng(1)
        shuffled = [tested.permutation(FRAMES).tolist() for _ in range(ASKED)]
        still = [[t] * FRAMES for t in forwards]
        shares = {
            name: share_right(model, collate(rows(tested, ASKED, orders)))
            for name, orders in {
                "forwards": [forwards],
                "backwards": [forwards[::-1]],
                "shuffled": shuffled,
                "still": still,
            }.items()
        }
    assert shares["forwards"] == 1.0 and shares["backwards"] == 0.0
    assert all(0.36 < shares[name] < 0.64 for name in ("shuffled", "still")), shares  # four deviations
