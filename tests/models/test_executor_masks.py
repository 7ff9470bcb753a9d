"""Masks: packed rows, local attention, bidirectional prefixes, flash and flex, bare language models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from helpers.families import (
    EVEN,
    HYBRID_FAMILIES,
    LAYERS,
    MIXED,
    build,
    build_from,
    close,
    llava,
    prompt,
    text,
    text_tokens,
    vision_tokens,
)
from helpers.oracle import Fixed, band, masked
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_flash_attention_utils import (
    _is_packed_sequence,
    _pad_input,
    _unpad_input,
    _upad_input,
)

from latefusion import VisionSchedule
from latefusion.models.attach import attach
from latefusion.models.executor.masks import compact_mask
from latefusion.models.policies.fastv import FastV
from latefusion.models.policies.random import Random

BAND = VisionSchedule(enter=2, exit=4)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def ragged(vision: torch.Tensor) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    some = vision & (torch.rand(vision.shape, generator=generator) < 0.6)
    fewer = some & (torch.rand(vision.shape, generator=generator) < 0.5)
    none = torch.zeros_like(vision)
    return [none, vision, some, some, fewer, none]


def assert_equal_to_the_masked_model(
    model: Any, inputs: dict[str, Any], seen: list[torch.Tensor], counted: bool = True
) -> None:
    """Uncached and cached prefill against the masked model."""
    vision, text = vision_tokens(inputs), inputs["input_ids"] > 0
    text = text & ~vision
    with torch.no_grad():
        with masked(model, vision, seen, padding=inputs.get("padding")):
            expected = model(**inputs, use_cache=False).logits[text]
        with attach(model, Fixed(seen, counted)):
            assert close(model(**inputs, use_cache=False).logits[text], expected)
            assert close(model(**inputs, use_cache=True).logits[text], expected)


# ---------------------------------------------------------------- the user's own masks


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_two_conversations_packed_into_one_row(attention: str) -> None:
    """By a 4-D mask, and (sdpa) by position ids alone: as if each were run by itself."""
    model = build("llava", attention)
    packed = prompt("llava", ["tt I ttt t I I tt"])
    parts, start = [], 0
    features = packed["mm_encoder_outputs"]["image"].pooler_output
    allowed = torch.zeros(1, 1, 20, 20, dtype=torch.bool)
    position_ids = torch.zeros(1, 20, dtype=torch.long)
    for length, images in ((9, features[:1]), (11, features[1:])):
        at = slice(start, start + length)
        part = prompt("llava", ["I"])
        part["input_ids"], part["attention_mask"] = (
            packed["input_ids"][:, at],
            torch.ones(1, length, dtype=int),
        )
        part["mm_encoder_outputs"]["image"].pooler_output = images
        allowed[..., at, at] = torch.ones(length, length, dtype=torch.bool).tril()
        position_ids[:, at] = torch.arange(length)
        parts.append(part)
        start += length
    additive = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    mask = additive if attention == "eager" else allowed
    text = ~vision_tokens(packed)[0]
    with torch.no_grad(), attach(model, BAND):
        expected = torch.cat([model(**part).logits[0] for part in parts])[text]
        inputs = dict(packed, attention_mask=mask, position_ids=position_ids)
        assert close(model(**inputs).logits[0, text], expected)
        if attention == "sdpa":
            inputs = dict(packed, attention_mask=None, position_ids=position_ids)
            assert close(model(**inputs, use_cache=False).logits[0, text], expected)


def test_the_hosts_ignorance_of_counts_changes_nothing() -> None:
    inputs = prompt("llava", MIXED)
    assert_equal_to_the_masked_model(build("llava"), inputs, ragged(vision_tokens(inputs)), counted=False)


# ---------------------------------------------------------------- local attention


def sliding(family: str) -> Any:
    if family == "mistral":
        return llava(hf.MistralConfig, sliding_window=5)
    types = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    return llava(hf.Qwen2Config, sliding_window=5, use_sliding_window=True, layer_types=types)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_sliding_window_counts_all_tokens(family: str, attention: str) -> None:
    """The window is measured over the tokens of the stock model, not over those that are left."""
    model = build_from(sliding(family), attention)
    for side in ("left", "right"):
        inputs = prompt("llava", MIXED, side)
        assert_equal_to_the_masked_model(model, inputs, band(vision_tokens(inputs), LAYERS, 2, 4))
        assert_equal_to_the_masked_model(model, inputs, ragged(vision_tokens(inputs)))
    inputs = prompt("llava", MIXED)
    seen = ragged(vision_tokens(inputs))
    with torch.no_grad():
        with attach(model, Fixed(seen)):
            out = model.generate(
                **inputs, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        whole = dict(
            inputs, input_ids=out.sequences, attention_mask=pad(inputs["attention_mask"], (0, 6), value=1)
        )
        whole["position_ids"] = (whole["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with masked(model, pad(vision_tokens(inputs), (0, 6)), [pad(mask, (0, 6)) for mask in seen]):
            expected = model(**whole, use_cache=False).logits[:, -7:-1]
    assert close(torch.stack(out.logits, 1), expected)


def test_paligemma_stays_bidirectional_without_token_types() -> None:
    for attention in ("sdpa", "eager"):
        model = build("paligemma", attention)
        for rows in (MIXED, EVEN):
            inputs = prompt("paligemma", rows)
            del inputs["token_type_ids"]
            assert_equal_to_the_masked_model(model, inputs, ragged(vision_tokens(inputs)))


# ---------------------------------------------------------------- other inputs


@pytest.mark.parametrize(
    "family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "llava_onevision", "qwen3_5"]
)
def test_videos_are_vision(family: str) -> None:
    inputs = prompt(family, ["tt V ttt", "tttt", "t V t V tt"])
    model = build(family)
    assert_equal_to_the_masked_model(model, inputs, band(vision_tokens(inputs), LAYERS, 2, 4))
    with torch.no_grad(), attach(model, BAND) as attachment:
        model(**inputs)
    assert [record.tokens[2] - record.tokens[0] for record in attachment.trace] == [4, 0, 8]


def test_pixels_go_through_the_vision_tower() -> None:
    model = build("llava")
    inputs = prompt("llava", MIXED)
    del inputs["mm_encoder_outputs"]
    inputs["pixel_values"] = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    assert_equal_to_the_masked_model(model, inputs, ragged(vision_tokens(inputs)))


def test_placeholders_are_found_in_embeddings_too() -> None:
    model, inputs = build("llava"), prompt("llava", MIXED)
    embeds = dict(inputs, inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]))
    del embeds["input_ids"]
    with torch.no_grad(), attach(model, BAND):
        assert torch.equal(model(**embeds).logits, model(**inputs).logits)
        wrote = model.generate(**embeds, max_new_tokens=4, do_sample=False)
        assert torch.equal(wrote[:, -4:], model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, -4:])


# ---------------------------------------------------------------- bare language models


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("by", ["mask", "callable"])
def test_a_bare_language_model_with_a_vision_mask(attention: str, by: str) -> None:
    model = build_from(text(hf.Qwen2Config), attention, hf.AutoModelForCausalLM)
    inputs = prompt("llava", MIXED)
    vision, mask = vision_tokens(inputs), inputs["attention_mask"]
    embeds = torch.randn(*vision.shape, 32, generator=torch.Generator().manual_seed(4))
    embedded = {"inputs_embeds": embeds, "attention_mask": mask}

    def rule(**arguments: Any) -> torch.Tensor | None:
        tokens = arguments["inputs_embeds"]
        return vision if tokens is not None and tokens.shape[1] == vision.shape[1] else None

    seen = ragged(vision)
    with torch.no_grad():
        with masked(model, vision, seen, padding=mask):
            expected = model(**embedded, use_cache=False).logits[text_tokens(inputs)]
        vision_mask = vision if by == "mask" else rule
        with attach(model, Fixed(seen), vision_mask=vision_mask) as attachment:
            assert close(model(**embedded).logits[text_tokens(inputs)], expected)
            out = model.generate(
                **embedded,
                max_new_tokens=4,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            assert attachment.trace[2].tokens == [4, 12, *[4 + int(s[2].sum()) for s in seen[2:]]]
        whole = torch.cat([embeds, model.get_input_embeddings()(out.sequences)], 1)
        longer = pad(mask, (0, 4), value=1)
        positions = (longer.cumsum(-1) - 1).clamp(min=0)
        with masked(model, pad(vision, (0, 4)), [pad(s, (0, 4)) for s in seen], padding=longer):
            expected = model(
                inputs_embeds=whole, attention_mask=longer, position_ids=positions, use_cache=False
            ).logits[:, -5:-1]
    assert close(torch.stack(out.logits, 1), expected)


def test_a_vision_mask_overrules_the_placeholders() -> None:
    model, inputs = build("llava"), prompt("llava", ["tt I I ttt"])
    second = vision_tokens(inputs).clone()
    second[:, :6] = False
    with torch.no_grad(), attach(model, BAND, vision_mask=second) as attachment:
        model(**inputs)
    assert attachment.trace[0].tokens == [9, 9, 13, 13, 9, 9]


# ---------------------------------------------------------------- flash attention, without its kernels


def varlen(q: Any, k: Any, v: Any, starts_q: Any, starts_k: Any, scale: float | None) -> torch.Tensor:
    """What the flash kernel computes: causal attention, aligned at the end, row by row without padding."""
    out = []
    for i in range(len(starts_q) - 1):
        rows = [t[s[i] : s[i + 1]].transpose(0, 1) for t, s in ((q, starts_q), (k, starts_k), (v, starts_k))]
        query, key, value = rows
        group = query.shape[0] // key.shape[0]
        key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
        n, m = query.shape[1], key.shape[1]
        mask = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        out.append(
            scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(0, 1)
        )
    return torch.cat(out)


calls: list[str] = []


def flash_stand_in(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: Any = None, **kwargs: Any) -> Any:
    """The stock flash path (`_flash_attention_forward`) with its kernel written in plain torch."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    (batch, n), keys = q.shape[:2], k.shape[1]
    position_ids = kwargs.get("position_ids")
    assert position_ids is None or position_ids.shape[-1] == n
    assert not _is_packed_sequence(position_ids, batch)
    calls.append("dense" if mask is None else "ragged")
    if mask is None:
        flat = [t.reshape(-1, *t.shape[2:]) for t in (q, k, v)]
        starts = torch.arange(batch + 1)
        return varlen(*flat, starts * n, starts * keys, scaling).view(batch, n, *q.shape[2:]), None
    assert mask.dim() == 2 and mask.shape[1] == keys
    q, k, v, indices, (starts_q, starts_k), _ = _upad_input(q, k, v, mask, n, _unpad_input)
    return _pad_input(varlen(q, k, v, starts_q, starts_k, scaling), indices, batch, n), None


@pytest.fixture
def flash() -> Iterator[str]:
    name = "flash_stand_in"
    AttentionInterface.register(name, flash_stand_in)
    AttentionMaskInterface.register(name, flash_attention_mask)
    calls.clear()
    yield name
    del AttentionInterface._global_mapping[name], AttentionMaskInterface._global_mapping[name]


RANKED = (
    VisionSchedule(enter=1, exit=5, keep={2: 3, 3: 1}),
    VisionSchedule(cross=(1, 3), keep={3: 2}),
)


@pytest.mark.parametrize(
    "family", ["llava", "qwen2_5_vl", "smolvlm", "internvl", "qwen3_vl", "lfm2_vl", "qwen3_5"]
)
def test_flash_attention_gets_lengths_not_masks(family: str, flash: str) -> None:
    # a recurrence that has read padding behind its rows cannot decode
    for side in ("left",) if family in HYBRID_FAMILIES else ("left", "right"):
        for rows in (EVEN, MIXED, ["tt I ttt"]):  # one row alone could be taken for a packed one
            inputs = prompt(family, rows, side)
            seen = ragged(vision_tokens(inputs))
            model, text = build(family), text_tokens(inputs)
            run = lambda: model(**inputs).logits[text]  # noqa: B023, E731
            write = lambda: model.generate(**inputs, max_new_tokens=4, do_sample=False)  # noqa: B023, E731
            for policy in (BAND, Fixed(seen), *RANKED):
                with torch.no_grad(), attach(model, policy):
                    model.set_attn_implementation({"text_config": "sdpa"})
                    expected, expected_tokens = run(), write()
                    model.set_attn_implementation({"text_config": flash})
                    calls.clear()
                    assert close(run(), expected)
                    if policy is BAND and rows is EVEN:
                        assert set(calls) == {"dense"}
                    if side == "left":
                        assert torch.equal(write(), expected_tokens)


def test_flash_attention_refuses_a_window_that_binds(flash: str) -> None:
    model, inputs = build_from(llava(hf.MistralConfig, sliding_window=5)), prompt("llava", MIXED)
    model.set_attn_implementation({"text_config": flash})
    with attach(model, BAND), torch.no_grad(), pytest.raises(ValueError, match="sliding window of 5"):
        model(**inputs)
    assert not calls
    wide = build_from(llava(hf.MistralConfig, sliding_window=50))
    with attach(wide, BAND), torch.no_grad():
        wide.set_attn_implementation({"text_config": flash})
        wide(**inputs)


# ---------------------------------------------------------------- flex attention


def test_a_block_mask_is_translated_cell_by_cell() -> None:
    """The kernels themselves need a GPU (`test_executor_gpu.py`): the CPU template of torch 2.13 does not compile."""
    padding = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)

    def causal(b, h, q, k):
        return (k <= q) & padding[b, k]

    stock = create_block_mask(causal, B=2, H=None, Q_LEN=6, KV_LEN=6, device="cpu")
    query = torch.tensor([[2, 3, 5], [0, 4, 5]])
    key = torch.tensor([[-1, 2, 3, 5], [0, 1, 4, 5]])
    compact = compact_mask(
        stock, torch.zeros(2, 3, 8), query, key, config=build("llava").config.get_text_config(), causal=True
    )
    for b in range(2):
        for q in range(3):
            for k in range(4):
                at = key[b, k]
                want = bool(at >= 0 and at <= query[b, q] and padding[b, at])
                assert (
                    bool(compact.mask_mod(torch.tensor(b), torch.tensor(0), torch.tensor(q), torch.tensor(k)))
                    == want
                )


# ---------------------------------------------------------------- rows that somebody else packed


def packed_by_others(with_lengths: bool) -> dict[str, Any]:
    """Two samples with an image each in one row, as a flattening collator makes it: told apart by positions alone."""
    inputs = prompt("llava", ["tt I ttt t I tt"])
    inputs["position_ids"] = torch.cat([torch.arange(9), torch.arange(7)])[None]
    inputs["attention_mask"] = None
    if with_lengths:
        starts = torch.tensor([0, 9, 16], dtype=torch.int32)
        inputs |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 9, "max_length_k": 9}
    return inputs


@pytest.mark.parametrize("with_lengths", [False, True])
def test_packed_rows_with_images_are_refused_under_flash_attention(with_lengths: bool, flash: str) -> None:
    model = build("llava")
    model.set_attn_implementation({"text_config": flash})
    for policy in (BAND, *RANKED):  # all of them lack tokens in layer 0
        with (
            attach(model, policy),
            torch.no_grad(),
            pytest.raises(ValueError, match="packed into a row with images"),
        ):
            model(**packed_by_others(with_lengths), use_cache=False)


def test_a_policy_that_chooses_among_tokens_refuses_packed_rows() -> None:
    """Its last token would rank the images of all samples; a band keeps each sample as it is alone."""
    model, inputs = build("llava"), packed_by_others(False)
    for policy in (FastV(layer=1), VisionSchedule(exit=5, keep={2: 3}), Random(layer=0)):
        with (
            attach(model, policy),
            torch.no_grad(),
            pytest.raises(ValueError, match="several samples are packed"),
        ):
            model(**inputs, use_cache=False)
    ends = torch.tensor([[8, 15]])  # the caller knows them
    with attach(model, VisionSchedule(exit=5, keep={2: 3})) as attachment, attachment.queries(ends):
        model(**inputs, use_cache=False)


def test_images_that_a_caller_merged_into_embeddings_are_not_overlooked() -> None:
    model, inputs = build("llava"), prompt("llava", EVEN)
    features = torch.cat([f for f in inputs["mm_encoder_outputs"]["image"].pooler_output])
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    embeds[vision_tokens(inputs)] = features
    merged = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    with torch.no_grad():
        with attach(model, BAND):
            expected = model(**inputs).logits
            for call in (model, lambda **kwargs: model.generate(**kwargs, max_new_tokens=2)):
                with pytest.raises(
                    ValueError, match=r"^inputs_embeds without pixel_values may have images .* vision_m"
                ):
                    call(**merged)
        with attach(model, BAND, vision_mask=vision_tokens(inputs)):
            assert close(model(**merged).logits[text_tokens(inputs)], expected[text_tokens(inputs)])
        dense = model(**merged).logits
        with attach(model, BAND, vision_mask=lambda **inputs: None):
            assert torch.equal(model(**merged).logits, dense)
