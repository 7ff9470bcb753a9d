"""HiDrop's ranking and ViCA's frozen prefix on every family, against plain code over the stock model's own maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.families import (
    FAMILIES,
    HYBRID_FAMILIES,
    LAYERS,
    MIXED,
    TOLERANCE,
    build,
    close,
    continued,
    gradient_tolerance,
    prompt,
    shared,
    text_tokens,
    vision_tokens,
)
from helpers.forwards import generate, gradients, gradients_checkpointed
from helpers.oracle import attending, band, masked

from latefusion import VisionSchedule
from latefusion.models.attach import attach

HIDROP = VisionSchedule(enter=1, exit=5, keep={2: 3, 4: 2}, ranking="hidrop")
HYBRID = VisionSchedule(enter=1, keep={3: 3, 5: 2}, ranking="hidrop")
FROZEN = VisionSchedule(cross=(1, 3, 4), freeze_prefix=True)
SPECIAL = ("llava", "gemma3", "qwen3_vl")
SOME = [pytest.param(f, marks=[] if f in SPECIAL else pytest.mark.slow) for f in FAMILIES]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def hidrop(family: str) -> VisionSchedule:
    return HYBRID if family in HYBRID_FAMILIES else HIDROP


def seen_by_hidrop(family: str, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Per layer bool `[B, T]`: a keep ranks by what its own layer attends to on the tokens of the layer before."""
    eager, vision = shared(family, "eager"), vision_tokens(inputs)
    schedule, reports = hidrop(family), attending(eager)
    seen = band(vision, LAYERS, schedule.enter, schedule.exit)
    for layer, k in schedule.keep.items():
        with masked(eager, vision, seen), torch.no_grad():
            every = eager(**inputs, use_cache=False, output_attentions=True).attentions
        maps = every[reports.index(layer)]  # [B, H, T, T]
        chosen = torch.zeros_like(vision)
        for b, real in enumerate(inputs["attention_mask"].bool()):
            last = int(real.nonzero().max())
            tokens = seen[layer][b].nonzero().flatten().tolist()
            best = sorted(tokens, key=lambda t: -maps[b, :, last, t].mean().item())[:k]
            chosen[b, best] = True
        seen = [chosen & s if i >= layer else s for i, s in enumerate(seen)]
    return seen


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidrop_keeps_what_its_own_layer_looks_at(family: str, side: str) -> None:
    model, inputs = shared(family, "sdpa"), prompt(family, MIXED, side)
    vision, text, seen = vision_tokens(inputs), text_tokens(inputs), seen_by_hidrop(family, inputs)
    with torch.no_grad():
        with masked(model, vision, seen, padding=inputs["attention_mask"]):
            expected = model(**inputs, use_cache=False).logits[text]
        with attach(model, hidrop(family)) as att:
            for cached in (False, True):
                assert close(model(**inputs, use_cache=cached).logits[text], expected)
                kept = [record.kept for record in att.trace]
    last = max(hidrop(family).keep)
    for chosen, sees, by_hand in zip(seen[last], vision, kept, strict=True):
        assert by_hand == (chosen.nonzero().flatten().tolist() if sees.any() else None)


@pytest.mark.parametrize("family", SOME)
def test_hidrop_decodes_and_has_the_gradients_of_its_masks(family: str) -> None:
    inputs = prompt(family, MIXED, "left")
    model = build(family, "sdpa")
    with attach(model, hidrop(family)):
        steps = generate(model, inputs)
        plain, loss = gradients(model, inputs)
        again, same = gradients_checkpointed(model, inputs)
    assert loss == same and all(close(plain[name], again[name]) for name in plain)
    seen, new = seen_by_hidrop(family, inputs), steps.sequences[:, inputs["input_ids"].shape[1] :]
    grow = lambda mask: torch.nn.functional.pad(mask, (0, new.shape[1]))  # noqa: E731
    longer = continued(family, inputs, new)
    whole = masked(
        model, grow(vision_tokens(inputs)), [grow(mask) for mask in seen], padding=longer["attention_mask"]
    )
    with whole, torch.no_grad():
        expected = model(**longer, use_cache=False).logits[:, -new.shape[1] - 1 : -1]
    assert close(torch.stack(steps.logits, 1), expected)
    with masked(model, vision_tokens(inputs), seen, padding=inputs["attention_mask"]):
        expected, loss_masked = gradients(model, inputs)
    assert abs(loss - loss_masked) < TOLERANCE
    tolerance = gradient_tolerance(family)
    assert all(close(plain[name], expected[name], tolerance) for name in expected)


def test_several_rows_rank_by_their_mean_and_none_removes_nothing() -> None:
    model, inputs = shared("llava", "sdpa"), prompt("llava", ["tttt", "tt I ttt"], "left")
    row = vision_tokens(inputs).any(1).nonzero().flatten()[0].item()
    length = inputs["input_ids"].shape[1]
    with attach(model, HIDROP) as att, torch.no_grad():
        for queries, count in (([length - 1, -1], 2), ([length - 1, length - 1], 2), ([-1, -1], None)):
            with att.queries(torch.tensor([queries] * len(inputs["input_ids"]))):
                model(**inputs)
            record = att.trace[row]
            n = record.n_vision
            assert record.vision == [0, n, *([n, n, n] if count is None else [3, 3, 2]), 0]
        with att.queries(torch.empty(len(inputs["input_ids"]), 0, dtype=torch.long)):
            model(**inputs)
        assert att.trace[row].vision[4] == att.trace[row].n_vision


def silenced(model: Any, rows: torch.Tensor) -> list[Any]:
    """Hooks that make the attention output of these rows `[B, T]` zero in every layer, at full length."""
    return [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args: (args[0] * ~rows[..., None],))
        for layer in model.get_decoder().layers
    ]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in HYBRID_FAMILIES])
def test_a_frozen_prefix_has_no_attention_output(family: str) -> None:
    model, inputs = build(family, "sdpa"), prompt(family, MIXED, "left")
    vision, text, real = vision_tokens(inputs), text_tokens(inputs), inputs["attention_mask"].bool()
    prefix = real & ~vision & (vision.cumsum(1) == 0) & vision.any(1, keepdim=True)
    assert prefix.any()
    seen = [vision if i in FROZEN.cross else torch.zeros_like(vision) for i in range(LAYERS)]  # type: ignore[operator]
    hooks = silenced(model, prefix)
    with masked(model, vision, seen, padding=inputs["attention_mask"], frozen=True):
        expected, loss = gradients(model, inputs)
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[text]
    for hook in hooks:
        hook.remove()
    with attach(model, FROZEN):
        with torch.no_grad():
            assert close(model(**inputs).logits[text], logits)
        ours, by_hand = gradients(model, inputs)
        again, same = gradients_checkpointed(model, inputs)
    assert abs(loss - by_hand) < TOLERANCE and abs(loss - same) < TOLERANCE
    assert all(close(ours[name], expected[name]) and close(again[name], expected[name]) for name in expected)


def test_no_layer_reads() -> None:
    """`cross=()` is blind: the answer does not depend on the image."""
    model, inputs = shared("llava", "sdpa"), prompt("llava", ["tt I ttt"], "left")
    text = text_tokens(inputs)
    with torch.no_grad(), attach(model, VisionSchedule(cross=())) as att:
        first = model(**inputs).logits[text]
        assert att.trace[0].vision == [0] * LAYERS
        for image in inputs["mm_encoder_outputs"]["image"].pooler_output:
            image += 1
        assert torch.equal(model(**inputs).logits[text], first)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"ranking": "hidden"},
            r"^ranking='hidden' does not exist; choose one of question, reading, hidrop\.$",
        ),
        (
            {"freeze_prefix": True},
            r"^freeze_prefix=True is for frozen vision tokens: name the layers that read",
        ),
        ({"cross": [2, 3], "keep": {3: 2}, "ranking": "hidrop"}, r'with cross use ranking="question"'),
        (
            {"cross": (), "enter": 2},
            r"^cross=\(\) says that no layer reads vision tokens, and contradicts enter=2",
        ),
    ],
)
def test_contradictions_are_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        VisionSchedule(**arguments)


def test_a_prefix_of_an_earlier_forward_is_refused() -> None:
    model, inputs = shared("llava", "sdpa"), prompt("llava", ["tt I ttt"], "left")
    with attach(model, FROZEN), torch.no_grad():
        past = model(input_ids=inputs["input_ids"][:, :2], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="freeze_prefix=True concerns the text before the image"):
            model(**inputs, past_key_values=past)
