"""Re-indexed positions against the full-length masked model whose RoPE is closed up by loops, layer by layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.families import (
    FAMILIES,
    LAYERS,
    MIXED,
    MROPE_FAMILIES,
    TOLERANCE,
    build,
    close,
    continued,
    prompt,
    shared,
    text_tokens,
    vision_tokens,
)
from helpers.oracle import Fixed, band, masked, reindexed
from test_executor import generated, gradients, gradients_checkpointed, seen_by_keeps
from torch.nn.functional import pad

from latefusion import VisionSchedule
from latefusion.models.attach import attach
from latefusion.models.executor.layout import Layout
from latefusion.models.executor.positions import Gaps
from latefusion.models.policies.base import Selection

BAND = VisionSchedule(enter=2, exit=4, positions="reindexed")
KEEPS = VisionSchedule(enter=1, exit=5, keep={2: 3, 4: 2}, positions="reindexed")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Reindexed(Fixed):
    """`Fixed`, with positions closed up."""

    def begin(self, prompt: Any) -> Any:
        decision = super().begin(prompt)
        select = decision.select

        def reindexing(layer: int) -> Selection | None:
            found = select(layer)
            return None if found is None else Selection(found.vision, found.counts, reindexed=True)

        decision.select = reindexing
        return decision


def some(inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Different tokens in every sample and layer, so that holes of all shapes appear in the images."""
    vision = vision_tokens(inputs)
    generator = torch.Generator().manual_seed(3)
    few = vision & (torch.rand(vision.shape, generator=generator) < 0.6)
    fewer = few & (torch.rand(vision.shape, generator=generator) < 0.5)
    return [torch.zeros_like(vision), vision, few, few, fewer, torch.zeros_like(vision)]


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_the_model_with_closed_positions(family: str) -> None:
    model = shared(family)
    for side in ("left", "right"):
        inputs = prompt(family, MIXED, side)
        vision, text, real = vision_tokens(inputs), text_tokens(inputs), inputs["attention_mask"]
        seen = some(inputs)
        with torch.no_grad():
            with masked(model, vision, seen, padding=real):
                gaps_open = model(**inputs, use_cache=False).logits[text]
                with reindexed(model, vision, seen, real):
                    expected = model(**inputs, use_cache=False).logits[text]
            with attach(model, Reindexed(seen)):
                assert close(model(**inputs, use_cache=False).logits[text], expected)
                assert close(model(**inputs, use_cache=True).logits[text], expected)
        assert not close(expected, gaps_open, 1e-4), "positions make no difference here"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_generated_goes_on_from_the_closed_positions(family: str) -> None:
    model, inputs = shared(family), prompt(family, MIXED)
    seen = some(inputs)
    with torch.no_grad():
        with attach(model, Reindexed(seen)):
            out = generated(model, inputs)
        new = out.sequences[:, inputs["input_ids"].shape[1] :]
        longer, n = continued(family, inputs, new), new.shape[1]
        vision, real = pad(vision_tokens(inputs), (0, n)), longer["attention_mask"]
        seen = [pad(layer, (0, n)) for layer in seen]
        with masked(model, vision, seen, padding=real), reindexed(model, vision, seen, real):
            expected = model(**longer, use_cache=False).logits[:, -n - 1 : -1]
    assert close(torch.stack(out.logits, 1), expected)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_gradients(family: str) -> None:
    model, inputs = shared(family), prompt(family, MIXED, "right")
    vision, real = vision_tokens(inputs), inputs["attention_mask"]
    seen = band(vision, LAYERS, 2, 4)
    with masked(model, vision, seen, padding=real), reindexed(model, vision, seen, real):
        expected, _ = gradients(model, inputs)
    with attach(model, BAND):
        (found, _), (again, _) = gradients(model, inputs), gradients_checkpointed(model, inputs)
    scale = max(1.0, *(grad.abs().max().item() for grad in expected.values()))
    assert all(close(found[name], expected[name], TOLERANCE * scale) for name in expected)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_a_schedule_with_keeps_and_frozen_tokens() -> None:
    """The choice is by attention under closed positions, so it is read off the trace."""
    model, inputs = shared("llava"), prompt("llava", MIXED)
    vision, text, real = vision_tokens(inputs), text_tokens(inputs), inputs["attention_mask"]
    for schedule in (KEEPS, VisionSchedule(cross=(1, 3), positions="reindexed")):
        with torch.no_grad(), attach(model, schedule) as attachment:
            logits, trace = model(**inputs).logits[text], attachment.trace
        if schedule.cross:
            seen = [vision if i in (1, 3) else torch.zeros_like(vision) for i in range(LAYERS)]
        else:
            seen = seen_by_keeps(
                "llava", inputs, schedule
            )  # the original's: layers 1 and 2 have all or 3 of them
            for b, record in enumerate(trace):
                assert [int(layer[b].sum()) for layer in seen] == record.vision
                seen[4][b] = False
                seen[4][b, record.kept or []] = True
            assert torch.equal(seen[2], seen_by_keeps("llava", inputs, schedule)[2])
        with (
            torch.no_grad(),
            masked(model, vision, seen, padding=real, frozen=bool(schedule.cross)),
            reindexed(model, vision, seen, real),
        ):
            assert close(logits, model(**inputs, use_cache=False).logits[text])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_plain_model_under_a_pruner_that_closes_up_is_the_shorter_prompt(family: str) -> None:
    """Without vision tokens in any layer: bit for bit the positions of a prompt that never had an image."""
    model, inputs = build(family), prompt(family, ["ttt I tttt"])
    none = [torch.zeros_like(vision_tokens(inputs))] * LAYERS
    text = text_tokens(inputs)
    with torch.no_grad():
        ids = inputs["input_ids"][text][None]
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        with attach(model, Reindexed(none)):
            assert close(model(**inputs).logits[:, text[0]], expected)
            out = generated(model, inputs)
        plain = generated(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert close(torch.stack(out.logits), torch.stack(plain.logits))


def test_beams_and_chunks_agree() -> None:
    for family in ("llava", "qwen2_5_vl"):
        model, inputs = build(family), prompt(family, MIXED)
        with torch.no_grad(), attach(model, BAND):
            whole = generated(model, inputs)
            looked = [generated(model, copy.deepcopy(inputs), use_cache=False)]
            if family == "llava":
                looked.append(generated(model, copy.deepcopy(inputs), prefill_chunk_size=9))
            beams = generated(model, copy.deepcopy(inputs), num_beams=2)
            uncached = generated(model, copy.deepcopy(inputs), num_beams=2, use_cache=False)
        for other in looked:
            assert close(torch.stack(whole.logits), torch.stack(other.logits))
        assert torch.equal(beams.sequences, uncached.sequences)


@pytest.mark.parametrize("family", MROPE_FAMILIES)
def test_mrope_cannot_begin_inside_an_image(family: str) -> None:
    model, inputs = build(family), prompt(family, ["tt I ttt"])
    sentence = r"^positions=reindexed cannot prefill an image in pieces .*: prefill the prompt at once"
    with torch.no_grad(), attach(model, BAND), pytest.raises(ValueError, match=sentence):
        generated(model, inputs, prefill_chunk_size=4)


def test_holes_that_the_model_made_itself_stay() -> None:
    """Positions of M-RoPE jump in time between a video's frames: only what removed tokens free is closed."""
    ids = torch.tensor([[[0, 4, 4, 9, 9, 20]], [[0, 4, 5, 4, 5, 20]]])  # [2, 1, 6]
    real = torch.ones(1, 6, dtype=torch.bool)
    for there, below, free in (
        ([1, 1, 1, 1, 1, 1], [[0] * 6] * 2, 0),
        ([1, 1, 1, 0, 0, 1], [[0, 0, 0, 1], [0, 0, 0, 1]], 1),  # time 9 is free
        ([1, 1, 0, 1, 0, 1], [[0, 0, 1, 1], [0, 0, 0, 1]], 1),  # column 5 is, time 9 is not
        ([1, 0, 0, 0, 0, 1], [[0, 3], [0, 3]], 3),
    ):
        active = torch.tensor([there], dtype=torch.bool)
        gaps = Gaps.of(ids, Layout.build(active, [sum(there)]), real)
        assert gaps.below[:, 0].tolist() == below and gaps.free.tolist() == [free]
