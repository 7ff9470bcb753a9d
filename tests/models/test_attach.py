"""The public surface: attach, detach, using, queries, trace; the entry adapter; PEFT; what is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers as hf
from helpers.families import (
    LAYERS,
    MIXED,
    build,
    build_from,
    close,
    prompt,
    shared,
    text,
    text_tokens,
    vision_tokens,
)
from helpers.forwards import BAND, KEEPS, logits, prompts_as_asked
from helpers.oracle import Fixed, band, masked, ranked

from latefusion import VisionSchedule
from latefusion.models.attach import attach, attached
from latefusion.models.policies.visipruner.settings import VisiPruner

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


# ---------------------------------------------------------------- attach and detach


def footprint(model: Any) -> list[Any]:
    """Everything a hook or an attribute could leave on a model's modules."""
    out = []
    for name, module in model.named_modules():
        state = {key: len(value) if isinstance(value, dict) else None for key, value in vars(module).items()}
        out.append((name, type(module), state))
    return out


def test_detach_leaves_no_trace() -> None:
    for family in ("llava", "qwen3_vl", "gemma3"):
        model, inputs = build(family), prompt(family, MIXED)
        before, forward = logits(model, inputs), footprint(model)
        attachment = attach(model, KEEPS)
        assert footprint(model) != forward and attached(model) is attachment
        logits(model, inputs)
        attachment.detach()
        assert footprint(model) == forward and attached(model) is None
        cache = model(**inputs).past_key_values
        assert {type(layer).__name__ for layer in cache.layers} <= {
            "DynamicLayer",
            "DynamicSlidingWindowLayer",
        }
        assert torch.equal(logits(model, inputs), before)
        attach(model, BAND).detach()  # and it can be attached again


def test_an_exception_inside_leaves_nothing_behind() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, inputs = build("llava"), prompt("llava", MIXED)
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(RuntimeError, match="broken"), attach(model, KEEPS) as attachment:
        expected = logits(model, inputs)

        def broken(*args: Any) -> None:
            raise RuntimeError("broken")

        handle = model.get_decoder().layers[2].mlp.register_forward_hook(broken)
        try:
            with pytest.raises(RuntimeError, match="broken"):
                logits(model, inputs)
        finally:
            handle.remove()
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is stock
        assert torch.equal(logits(model, inputs), expected)
        assert attachment.model is model
        raise RuntimeError("broken")
    assert attached(model) is None  # the context manager detached


def test_no_state_stays_after_a_forward() -> None:
    model, inputs = build("llava"), prompt("llava", MIXED)
    with attach(model, KEEPS) as attachment:
        model(**inputs)
        held = pickle.dumps(attachment)
        attachment.detach()
        assert len(held) < len(pickle.dumps(model)) + 20_000  # masks, no activations


def test_a_deep_copy_has_its_own_attachment() -> None:
    model, inputs = build("llava"), prompt("llava", MIXED)
    dense = logits(model, inputs)
    attachment = attach(model, KEEPS)
    pruned = logits(model, inputs)
    twin = copy.deepcopy(model)
    unpickled = pickle.loads(pickle.dumps(model))
    attachment.detach()
    for other in (twin, unpickled):
        assert torch.equal(logits(other, inputs), pruned)
        copied = attached(other)
        assert copied is not None and copied.model is other and copied.policy == KEEPS
        copied.detach()
        assert torch.equal(logits(other, inputs), dense)
    assert torch.equal(logits(model, inputs), dense)


def test_using_swaps_the_policy_for_a_scope() -> None:
    model, inputs = build("llava"), prompt("llava", MIXED)
    dense = logits(model, inputs)
    with attach(model, BAND) as attachment:
        pruned = logits(model, inputs)
        with attachment.using(VisionSchedule()):
            assert torch.equal(logits(model, inputs), dense)
            with attachment.using(KEEPS):
                assert not torch.equal(logits(model, inputs), pruned)
            assert torch.equal(logits(model, inputs), dense)
        assert torch.equal(logits(model, inputs), pruned)
        with (
            pytest.raises(ValueError, match="enter names layer 6"),
            attachment.using(VisionSchedule(enter=6)),
        ):
            pass
        assert attachment.policy is BAND


def test_prompt_text_ranks_and_answers_do_not() -> None:
    model, inputs = shared("llava"), prompt("llava", ["tt I ttttt", "t I I tt"], "right")
    queries, answers = torch.tensor([[6, 9], [9, 9]]), torch.zeros(2, 11, dtype=torch.bool)
    answers[0, [7, 8, 10]] = True
    answers[1, 10] = True
    rows = [[6, 9], [9]]
    seen = ranked(
        shared("llava", "eager"),
        inputs,
        vision_tokens(inputs),
        enter=1,
        exit=5,
        keep=dict(KEEPS.keep),
        queries=rows,
    )
    with masked(model, vision_tokens(inputs), seen, padding=inputs["attention_mask"]):
        expected = logits(model, inputs, use_cache=False)
    with attach(model, KEEPS) as attachment, attachment.queries(queries, answers=answers):
        pruned = logits(model, inputs)
        assert [r.kept for r in attachment.trace] == [m.nonzero().flatten().tolist() for m in seen[4]]
    assert close(pruned[text_tokens(inputs)], expected[text_tokens(inputs)])
    with attach(model, KEEPS) as attachment:
        with pytest.raises(ValueError, match=r"queries must be int64 \[batch, rows\]"):
            attachment.queries(torch.tensor([1.0])).__enter__()
        with attachment.queries(torch.tensor([[1]])), pytest.raises(ValueError, match="for 1 samples"):
            logits(model, inputs)


def test_trace_tells_what_the_last_prefill_did() -> None:
    model, inputs = build("llava"), prompt("llava", MIXED)
    with attach(model, KEEPS) as attachment:
        assert attachment.trace == []
        model.generate(**inputs, max_new_tokens=3)  # decode steps do not overwrite it
        one, none, two = attachment.trace
        assert [r.fusion_layer for r in (one, none, two)] == [None] * 3
        assert [r.tokens for r in (one, none, two)] == [
            [5, 9, 8, 8, 7, 5],
            [4] * 6,
            [4, 12, 7, 7, 6, 4],
        ]
        assert (one.exit_layer, none.exit_layer, two.exit_layer) == (5, None, 5)
        assert one.kept is not None and len(one.kept) == 2 and one.kept == sorted(one.kept)
        assert none.kept is None
        with attachment.using(BAND):
            logits(model, inputs)
            assert attachment.trace[0].kept is None and attachment.trace[0].exit_layer == 4
        with attachment.using(VisionSchedule()):
            logits(model, inputs)
            assert attachment.trace[0].exit_layer is None and attachment.trace[0].tokens == [9] * 6
        logits(model, prompt("llava", ["tttt", "tt"]))
        assert [r.tokens for r in attachment.trace] == [[4] * 6, [2] * 6]
        assert [(r.fusion_layer, r.kept, r.exit_layer) for r in attachment.trace] == [(None, None, None)] * 2


def test_hidden_states_are_full_length() -> None:
    for family in ("llava", "qwen3_vl"):
        model, inputs = build(family), prompt(family, MIXED)
        vision, real = vision_tokens(inputs), inputs["attention_mask"].bool()
        with torch.no_grad():
            with masked(model, vision, band(vision, LAYERS, 2, 4), padding=inputs["attention_mask"]):
                expected = model(**inputs, output_hidden_states=True).hidden_states
            with attach(model, BAND):
                states = model(**inputs, output_hidden_states=True).hidden_states
                again = model(**inputs, output_hidden_states=True).hidden_states
        assert len(states) == LAYERS + 1
        for i, (state, twin, reference) in enumerate(zip(states, again, expected, strict=True)):
            assert torch.equal(state, twin)
            assert close(state[real & ~vision], reference[real & ~vision])
            if i in (3, 4):  # outputs of layers 2 and 3, which see vision
                assert close(state[vision], reference[vision])
        if family == "llava":
            assert torch.equal(states[1][vision], states[0][vision])  # not computed: as before


@pytest.mark.parametrize("frozen", [False, True], ids=["leaving", "frozen"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_attention_maps_are_full_size(family: str, frozen: bool) -> None:
    """Zero for tokens that do not take part, elsewhere those of the masked model; in decoding, too."""
    model, inputs = build(family, "eager"), prompt(family, MIXED)
    vision, text = vision_tokens(inputs), text_tokens(inputs)
    none, some = torch.zeros_like(vision), vision & (torch.arange(vision.shape[1]) % 3 > 0)
    seen = [none, vision, none, vision, none, none] if frozen else [none, vision, some, some, none, none]
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    with torch.no_grad():
        with masked(model, vision, seen, padding=inputs["attention_mask"], frozen=frozen):
            expected = model(**inputs, use_cache=False, output_attentions=True).attentions
        stock = model.generate(**prompt(family, MIXED), output_attentions=True, **options).attentions
        with attach(model, VisionSchedule(cross=(1, 3)) if frozen else Fixed(seen)):
            maps = model(**inputs, output_attentions=True).attentions
            steps = model.generate(**prompt(family, MIXED), output_attentions=True, **options).attentions
    for weights, reference in zip(maps, expected, strict=True):
        assert weights.shape == reference.shape
        assert all(close(weights[b][:, text[b]], reference[b][:, text[b]]) for b in range(len(text)))
    for step, stock_step in zip(steps, stock, strict=True):
        assert [weights.shape for weights in step] == [weights.shape for weights in stock_step]
    past = torch.nn.functional.pad(vision & ~seen[2], (0, 2))
    assert not steps[2][2].transpose(1, 3)[past[:, -steps[2][2].shape[3] :]].any()


# ---------------------------------------------------------------- refusals


def test_what_cannot_work_is_refused_in_a_sentence() -> None:
    model = build("llava")
    with attach(model, BAND), pytest.raises(ValueError, match="has a policy already: detach it"):
        attach(model, BAND)
    with pytest.raises(ValueError, match="exit names layer 7, but the decoder has layers 0 to 5"):
        attach(model, VisionSchedule(exit=7))
    bare = build_from(text(hf.LlamaConfig), auto=hf.AutoModelForCausalLM)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no image_token_id .* pass vision_mask"):
        attach(bare, BAND)
    with pytest.raises(ValueError, match="Linear is not a Hugging Face model"):
        attach(torch.nn.Linear(2, 2), BAND)
    tower = hf.AutoModel.from_config(
        hf.CLIPVisionConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match="CLIPVisionModel has no decoder"):
        attach(tower, BAND)
    gpt2 = hf.AutoModelForCausalLM.from_config(hf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no decoder with a list `layers`"):
        attach(gpt2, BAND, vision_mask=torch.ones(1, 1, dtype=torch.bool))
    assert attached(model) is None


def test_a_vision_mask_must_fit() -> None:
    bare = build_from(text(hf.LlamaConfig), auto=hf.AutoModelForCausalLM)
    ids = torch.randint(3, 90, (2, 6))
    for mask, complaint in (
        (torch.ones(2, 6), "must be bool"),
        (torch.ones(6, dtype=torch.bool), "must be bool"),
        (torch.ones(3, 6, dtype=torch.bool), "does not fit a forward of 2 x 6"),
    ):
        with attach(bare, BAND, vision_mask=mask), pytest.raises(ValueError, match=complaint):
            bare(input_ids=ids)
    short = lambda **arguments: torch.ones(2, 5, dtype=torch.bool)  # noqa: E731
    with (
        attach(bare, BAND, vision_mask=short),
        pytest.raises(ValueError, match="does not fit a forward of 2 x 6"),
    ):
        bare(input_ids=ids)


def test_replacing_attention_under_checkpointing_is_refused() -> None:
    model, inputs = build("llava"), prompt("llava", MIXED)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with attach(model, VisiPruner(boundary=2)):
        with (
            prompts_as_asked(model, inputs),
            pytest.raises(ValueError, match="layer 0, which gradient checkpointing cannot repeat"),
        ):
            model(**inputs)
        logits(model, inputs)  # a teacher needs no gradient


@pytest.mark.parametrize("policy", ["fastv", None, 5, VisionSchedule])
def test_what_is_no_policy_is_refused_in_a_sentence(policy: Any) -> None:
    model = build("llava")
    forward = footprint(model)
    with pytest.raises(ValueError, match="is no policy; give an object such as") as error:
        attach(model, policy)
    assert "\n" not in str(error.value) and footprint(model) == forward
