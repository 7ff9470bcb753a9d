"""What a model computes while a policy is attached: entry adapter, LoRA, no waits, any tokens in any layer."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from helpers.families import (
    CONFIGS,
    LAYERS,
    MIXED,
    build,
    close,
    prompt,
    shared,
    text_tokens,
    vision_tokens,
)
from helpers.forwards import BAND, KEEPS, logits
from helpers.oracle import Fixed, band, masked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from latefusion import VisionSchedule
from latefusion.models.attach import attach, attached
from latefusion.models.executor import selections
from latefusion.models.student.entry import install_entry

# ---------------------------------------------------------------- entry adapter, LoRA


def with_entry(family: str) -> Any:
    model = build(family)
    entry = install_entry(model, rank=4)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for weight in entry.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_the_entry_adapter_maps_late_tokens(family: str) -> None:
    model, inputs = with_entry(family), prompt(family, MIXED)
    vision, text = vision_tokens(inputs), text_tokens(inputs)
    late = vision & (torch.arange(vision.shape[1]) % 2 == 0)
    none = torch.zeros_like(vision)
    for seen in (
        band(vision, LAYERS, 2, 4),
        [none, late, vision, vision, late, none],  # in two steps
        [late, late, vision, late, late, none],  # some of them are there from the start
        band(vision, LAYERS, 0, 3),  # nobody is late
    ):
        padding = inputs["attention_mask"]
        with masked(model, vision, seen, padding=padding, entry=model.vision_entry), torch.no_grad():
            expected = model(**inputs, use_cache=False).logits[text]
        with attach(model, Fixed(seen)):
            assert close(logits(model, inputs)[text], expected)


@pytest.mark.parametrize("policy", [BAND, VisionSchedule()], ids=["late", "dense"])
def test_the_entry_adapter_runs_without_images_too(policy: VisionSchedule) -> None:
    """Every process of a distributed run does the same collectives and has all gradients, if zero ones."""
    model = with_entry("llava")
    calls: list[int] = []
    model.vision_entry.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    for rows in (["tttt", "ttt"], ["tt I tt"]):
        inputs = prompt("llava", rows)
        stock = logits(model, inputs) if policy is not BAND or "I" not in rows[0] else None
        with attach(model, policy):
            calls.clear()
            out = model(**inputs, labels=inputs["input_ids"])
            assert len(calls) == 1
            out.loss.backward()
            assert stock is None or torch.equal(out.logits, stock)
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert all(weight.grad is not None for weight in model.vision_entry.parameters())
        used = any(weight.grad.any() for weight in model.vision_entry.parameters())
        assert used == (policy is BAND and "I" in rows[0])
        model.zero_grad()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_lora_before_and_after(family: str) -> None:
    """Attached before PEFT wraps the model or after, adapters on, off, merged: always the masked model."""
    model, inputs = with_entry(family), prompt(family, MIXED)
    vision, text, padding = vision_tokens(inputs), text_tokens(inputs), inputs["attention_mask"]
    seen = band(vision, LAYERS, 2, 4)
    before = attach(model, BAND)
    config = LoraConfig(
        r=4,
        target_modules=r".*(language_model|text_model).*\.(q_proj|v_proj|down_proj)",
        modules_to_save=["vision_entry"],
        init_lora_weights=False,
    )
    wrapped = get_peft_model(model, config)
    assert attached(wrapped) is before
    adapted = logits(wrapped, inputs)[text]
    with wrapped.disable_adapter():
        base = logits(wrapped, inputs)[text]
    before.detach()
    entry = model.vision_entry
    for adapters, value in ((True, adapted), (False, base)):
        with masked(model, vision, seen, padding=padding, entry=entry), torch.no_grad():
            if adapters:
                expected = wrapped(**inputs, use_cache=False).logits[text]
            else:
                with wrapped.disable_adapter():
                    expected = wrapped(**inputs, use_cache=False).logits[text]
        assert close(value, expected)
    assert not close(adapted, base)
    with attach(wrapped, BAND):
        assert torch.equal(logits(wrapped, inputs)[text], adapted)
        merged = wrapped.merge_and_unload()
        assert (logits(merged, inputs)[text] - adapted).abs().max() < 2e-5
        assert attached(merged) is not None


# ---------------------------------------------------------------- cost


class Looks(TorchDispatchMode):
    """Counts the operations that make the host wait for the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__.rsplit(".", 1)[-1] in self.WAITS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3", "paligemma"])
@pytest.mark.parametrize("rows", [MIXED, ["tt I ttt", "t I tttt"]], ids=["ragged", "even"])
def test_layers_never_wait_for_the_device(family: str, rows: list[str], monkeypatch: Any) -> None:
    """One wait for the device a prefill (the counts), and in decoding no more than the stock model has."""
    monkeypatch.setattr(selections, "looking_is_free", lambda tensor: False)  # as on a GPU
    model, inputs = build(family), prompt(family, rows)
    lists: list[int] = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: (lists.append(1), tolist(t))[1])

    def looks() -> tuple[list[int], list[int]]:
        """Waits (and lists) of a prefill and of a decode step."""
        waits, listed = [], []
        cache, mask = None, inputs["attention_mask"]
        for step in range(1 if family == "qwen3_vl" else 2):  # whose positions only `generate` continues
            lists.clear()
            with Looks() as mode, torch.no_grad():
                if step == 0:
                    cache = model(**inputs).past_key_values
                else:
                    mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                    token = torch.full((len(rows), 1), 7)
                    model(input_ids=token, attention_mask=mask, past_key_values=cache)
            waits.append(mode.count)
            listed.append(len(lists))
        return waits, listed

    stock_waits, stock_lists = looks()
    cross = VisionSchedule(cross=(1, 3))
    for policy in (VisionSchedule(), BAND, KEEPS, cross):
        with attach(model, policy):
            waits, listed = looks()
        assert waits == stock_waits
        assert [a - b for a, b in zip(listed, stock_lists, strict=True)] == [1, 0][: len(waits)]


def test_index_work_is_done_once_a_segment(monkeypatch: Any) -> None:
    from latefusion.models.executor import masks as executor
    from latefusion.models.executor.layout import Layout

    counts = {"layout": 0, "mask": 0, "rope": 0}

    def counting(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(Layout, "build", counting("layout", Layout.build))
    monkeypatch.setattr(executor, "compact_mask", counting("mask", executor.compact_mask))
    model, inputs = build("llava"), prompt("llava", MIXED)
    with torch.no_grad(), attach(model, KEEPS):
        cache = model(**inputs).past_key_values
        assert counts == {"layout": 4, "mask": 4, "rope": 0}  # none, (all), 3, 2, none
        counts.update(layout=0, mask=0)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        model(input_ids=torch.full((3, 1), 7), attention_mask=mask, past_key_values=cache)
        assert counts["layout"] == 0 and counts["mask"] == 4


# ---------------------------------------------------------------- anything goes


@st.composite
def situations(draw: Any) -> tuple[list[str], str, list[list[tuple[int, int]]], bool, bool]:
    """Rows, padding side, for every vision token of every row the layers [first, last) that compute it."""
    rows = draw(st.lists(st.text("tI", min_size=0, max_size=5), min_size=1, max_size=3))
    rows = [
        re.sub("I(?=I)", "It", row) + "t" for row in rows
    ]  # M-RoPE wants text between images and at the end
    if not any("I" in row for row in rows):
        rows[0] = "I" + rows[0]
    number = max(row.count("I") for row in rows) * 4
    interval = st.tuples(st.integers(0, LAYERS), st.integers(0, LAYERS)).map(sorted).map(tuple)
    intervals = draw(st.lists(st.lists(interval, min_size=number, max_size=number), min_size=3, max_size=3))
    side = draw(st.sampled_from(["left", "right"]))
    return rows, side, intervals, draw(st.booleans()), draw(st.booleans())


def check_situation(family: str, situation: Any, attention: str) -> None:
    rows, side, intervals, counted, cached = situation
    model, inputs = shared(family, attention), prompt(family, rows, side)
    vision, text = vision_tokens(inputs), text_tokens(inputs)
    seen = [torch.zeros_like(vision) for _ in range(LAYERS)]
    for b in range(len(rows)):
        for (first, last), t in zip(intervals[b], vision[b].nonzero().flatten().tolist(), strict=False):
            for i in range(first, last):
                seen[i][b, t] = True
    with masked(model, vision, seen, padding=inputs["attention_mask"]):
        expected = logits(model, inputs, use_cache=False)[text]
    with attach(model, Fixed(seen, counted)):
        assert close(logits(model, inputs, use_cache=cached)[text], expected)


def examples(number: int) -> settings:
    return settings(
        max_examples=number,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=True,
    )


@examples(60)
@given(situations())
def test_any_tokens_in_any_layers(situation: Any) -> None:
    check_situation("llava", situation, "sdpa")


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_any_tokens_in_any_layers_of_any_family(family: str, attention: str) -> None:
    @examples(40)
    @given(situations())
    def check(situation: Any) -> None:
        check_situation(family, situation, attention)

    check()
