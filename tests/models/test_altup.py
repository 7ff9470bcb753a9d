"""Gemma 3n: four states a token (AltUp), inputs a layer, and layers that attend to the keys of a layer before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.families import IMAGE
from helpers.oracle import band, masked
from helpers.tiny_types import HIDDEN, LAYERS, build_type
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from latefusion import VisionSchedule
from latefusion.models.attach import attach
from latefusion.models.policies.divprune import DivPrune
from latefusion.models.student.entry import install_entry

ROWS = ["tttItttttttttttttt", "  IttttItttttttttt"]  # longer than the window of 8; the second padded
PER_IMAGE = 3
NEAR = 2e-5  # of logits of order 1


def inputs() -> dict[str, Any]:
    numbers = torch.Generator().manual_seed(3)
    ids = [
        [
            token
            for mark in row
            for token in {"t": [int(torch.randint(3, 90, (1,), generator=numbers))], " ": [0]}.get(
                mark, [IMAGE] * PER_IMAGE
            )
        ]
        for row in ROWS
    ]
    width = max(map(len, ids))
    ids = [[0] * (width - len(row)) + row for row in ids]
    tokens = torch.tensor(ids)
    features = torch.randn(3, PER_IMAGE, HIDDEN, generator=numbers)
    return {
        "input_ids": tokens,
        "attention_mask": (tokens != 0).long(),
        "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)},
    }


@pytest.fixture(scope="module")
def model() -> Any:
    return build_type("gemma3n")


def run(model: Any, batch: dict[str, Any], **options: Any) -> Any:
    return model(**copy.deepcopy(batch), **options)


def the_rest(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Vision tokens and text tokens, bool `[B, T]`."""
    vision = batch["input_ids"] == IMAGE
    return vision, batch["attention_mask"].bool() & ~vision


@pytest.mark.parametrize("exit", [3, 5], ids=["exit before the shared layers", "exit inside of them"])
def test_a_long_prompt_and_what_is_written_behind_it(model: Any, exit: int) -> None:
    """A shared layer sees the vision tokens that its source stored, also those that left in between."""
    batch = inputs()
    vision, text = the_rest(batch)
    with torch.no_grad():
        with masked(model, vision, band(vision, LAYERS, 1, exit), padding=batch["attention_mask"]):
            expected = run(model, batch, use_cache=False).logits
        stock = run(model, batch, use_cache=False).logits
        with attach(model, VisionSchedule(enter=1, exit=exit)):
            once = run(model, batch, use_cache=False).logits
            out = model.generate(
                **copy.deepcopy(batch),
                max_new_tokens=12,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        new = out.sequences[:, batch["input_ids"].shape[1] :]
        whole = dict(batch, input_ids=out.sequences)
        whole["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, new.shape[1]), value=1)
        longer = torch.nn.functional.pad(vision, (0, new.shape[1]))
        with masked(model, longer, band(longer, LAYERS, 1, exit), padding=whole["attention_mask"]):
            written = run(model, whole, use_cache=False).logits[:, -new.shape[1] - 1 : -1]
    assert (once - expected)[text].abs().max() < NEAR < 0.01 < (stock - expected)[text].abs().max()
    assert (torch.stack(out.logits, 1) - written).abs().max() < NEAR


def test_a_prompt_in_two_parts_equals_the_whole(model: Any) -> None:
    batch = inputs()
    _, text = the_rest(batch)
    first = int((batch["input_ids"] == IMAGE).nonzero()[:, 1].max()) + 3
    start = {
        **batch,
        "input_ids": batch["input_ids"][:, :first],
        "attention_mask": batch["attention_mask"][:, :first],
    }
    rest = {"input_ids": batch["input_ids"][:, first:], "attention_mask": batch["attention_mask"]}
    with torch.no_grad(), attach(model, VisionSchedule(enter=1, exit=5)):
        whole = run(model, batch, use_cache=False).logits
        cache = run(model, start, use_cache=True).past_key_values
        behind = model(**rest, past_key_values=cache).logits
    assert (behind - whole[:, first:])[text[:, first:]].abs().max() < NEAR


def test_gradients_are_those_of_the_masked_model(model: Any) -> None:
    """With checkpointing, too; its reentrant kind loses the gradient of shared keys in the stock model already."""
    batch = inputs()
    vision, text = the_rest(batch)
    model = copy.deepcopy(model)
    torch.nn.init.normal_(model.get_input_embeddings().weight.data[0])  # AltUp's norm has no gradient at zero

    def gradients() -> list[Tensor]:
        model.zero_grad()
        run(model, batch, use_cache=False).logits[text].square().mean().backward()
        return [p.grad.clone() for p in model.get_decoder().parameters() if p.grad is not None]

    with masked(model, vision, band(vision, LAYERS, 1, 5), padding=batch["attention_mask"]):
        expected = gradients()
    with attach(model, VisionSchedule(enter=1, exit=5)):
        got = [gradients()]
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        got.append(gradients())
    scale = max(g.abs().max() for g in expected)
    for run_of in got:
        assert len(run_of) == len(expected)
        assert max((a - b).abs().max() for a, b in zip(run_of, expected, strict=True)) < 1e-4 * scale


def test_recorded_states_have_all_tokens(model: Any) -> None:
    batch = inputs()
    vision, text = the_rest(batch)
    with torch.no_grad():
        with masked(model, vision, band(vision, LAYERS, 1, 4), padding=batch["attention_mask"]):
            expected = run(model, batch, use_cache=False, output_hidden_states=True).hidden_states
        with attach(model, VisionSchedule(enter=1, exit=4)):
            got = run(model, batch, use_cache=False, output_hidden_states=True).hidden_states
    assert len(got) == len(expected) > LAYERS
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b)[..., text, :].abs().max() < NEAR * max(1.0, float(b.abs().max()))


def test_divprune_sees_the_embeddings(model: Any) -> None:
    """Not the states that AltUp makes of them."""
    shown: list[Tensor] = []

    class Look(DivPrune):
        def begin(self, prompt: Any) -> Any:
            decision = super().begin(prompt)
            stock = decision.embedded
            decision.embedded = lambda states: (shown.append(states), stock(states))[1]
            return decision

    batch = inputs()
    vision, _ = the_rest(batch)
    with torch.no_grad(), attach(model, Look(keep_ratio=0.5)):
        run(model, batch, use_cache=False)
    features = batch["mm_encoder_outputs"]["image"].pooler_output.flatten(0, 1)
    assert torch.equal(shown[0][vision], features)


def test_an_entry_adapter_is_refused(model: Any) -> None:
    with pytest.raises(
        ValueError, match=r"carries 4 states of every token \(AltUp\), .*: use schedule.enter=0"
    ):
        install_entry(model, rank=2)
