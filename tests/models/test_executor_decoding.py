"""Decoding under a policy: beams, later turns, chunks, look-ahead, and the cache's own operations."""

from __future__ import annotations

import copy
import sys
import warnings
from typing import Any

import pytest
import torch
import transformers as hf
from helpers.families import (
    EVEN,
    HYBRID_FAMILIES,
    IMAGE,
    LAYERS,
    MIXED,
    build,
    build_from,
    close,
    continued,
    llava,
    positions,
    prompt,
    shared,
    vision_tokens,
)
from helpers.oracle import Fixed, band, masked
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import Cache, Fp8QuantizedLayer

from latefusion import VisionSchedule
from latefusion.models.attach import attach
from latefusion.models.inputs import encode_images, fresh_inputs
from latefusion.models.policies.divprune import DivPrune
from latefusion.models.policies.fastv import FastV
from latefusion.models.policies.pyramiddrop import PyramidDrop
from latefusion.models.policies.random import Random
from latefusion.models.policies.visipruner.settings import VisiPruner

BAND = VisionSchedule(enter=2, exit=4)
KEEPS = VisionSchedule(enter=1, exit=5, keep={2: 3, 4: 2})

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def generate(model: Any, inputs: dict[str, Any], tokens: int = 5, **options: Any) -> Any:
    inputs = copy.deepcopy(inputs)  # beam search changes the image features in place
    options = {"max_new_tokens": tokens, "do_sample": False, "output_logits": True, **options}
    with torch.no_grad():
        return model.generate(**inputs, return_dict_in_generate=True, **options)


def ragged(inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Different numbers of tokens in every sample and layer."""
    vision = vision_tokens(inputs)
    generator = torch.Generator().manual_seed(3)
    some = vision & (torch.rand(vision.shape, generator=generator) < 0.6)
    fewer = some & (torch.rand(vision.shape, generator=generator) < 0.5)
    none = torch.zeros_like(vision)
    return [none, vision, some, some, fewer, none]


def expected_logits(family: str, inputs: dict[str, Any], new: torch.Tensor, seen: list[torch.Tensor]) -> Any:
    """Of the full-length masked model over prompt and new tokens, at the places that predict the new ones."""
    longer, n = continued(family, inputs, new), new.shape[1]
    vision = pad(vision_tokens(inputs), (0, n))
    model = shared(family)
    seen = [pad(mask, (0, n)) for mask in seen]
    with torch.no_grad(), masked(model, vision, seen, padding=longer["attention_mask"]):
        return model(**longer, use_cache=False).logits[:, -n - 1 : -1]


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize(
    "family",
    ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl", "paligemma", "lfm2_vl", "qwen3_5"],
)
def test_beam_search_scores_equal_the_masked_model(family: str) -> None:
    model, inputs = build(family), prompt(family, MIXED)
    seen = ragged(inputs)
    length = inputs["input_ids"].shape[1]
    with attach(model, Fixed(seen)):
        out = generate(model, inputs, tokens=6, num_beams=3, output_scores=True)
    new = out.sequences[:, length:]
    steps = expected_logits(family, inputs, new, seen).log_softmax(-1)
    score = steps.gather(2, new[..., None]).squeeze(-1).sum(1) / new.shape[1]
    assert close(out.sequences_scores, score)
    scheduled = [layer for i, layer in enumerate(out.past_key_values.layers) if i != 1]  # where all take part
    if family in HYBRID_FAMILIES:  # a recurrence has no track
        return
    tracks = [id(layer.track) for layer in scheduled]
    assert tracks[1] == tracks[2] and len(set(tracks)) == 4, (
        "layers of one segment no longer share their index"
    )


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "glm4v", "lfm2_vl", "qwen3_5"])
def test_a_second_turn_on_a_kept_cache(family: str) -> None:
    model, inputs = build(family), prompt(family, MIXED)
    seen = ragged(inputs)
    with attach(model, Fixed(seen)):
        first = generate(model, inputs, tokens=3)
        question = torch.randint(3, 90, (3, 4), generator=torch.Generator().manual_seed(5))
        tokens = torch.cat([first.sequences, question], 1)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        turn = continued(family, inputs, new)
        for name in ("mm_encoder_outputs", "image_grid_thw", "position_ids"):
            turn.pop(name, None)
        second = generate(model, turn, tokens=4, past_key_values=first.past_key_values)
    written = second.sequences[:, inputs["input_ids"].shape[1] :]
    expected = expected_logits(family, inputs, written, seen)[:, -4:]
    assert close(torch.stack(second.logits, 1), expected)


@pytest.mark.parametrize("schedule", [BAND, KEEPS], ids=["band", "keeps"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "lfm2_vl"])
def test_looking_ahead_writes_the_same(family: str, schedule: VisionSchedule) -> None:
    model = build(family)
    for rows in (["tt I ttttt"], ["ttI t I ttt"]):
        with attach(model, schedule):
            plain = generate(model, prompt(family, rows), tokens=8, output_logits=False)
            ahead = generate(
                model, prompt(family, rows), tokens=8, output_logits=False, prompt_lookup_num_tokens=2
            )
        assert torch.equal(plain.sequences, ahead.sequences)


def test_an_assistant_model_writes_the_same() -> None:
    model, assistant = build("llava"), build("llava")
    with torch.no_grad():
        assistant.lm_head.weight.add_(
            0.02 * torch.randn(assistant.lm_head.weight.shape)
        )  # often right, not always
    with attach(model, KEEPS):
        plain = generate(model, prompt("llava", ["tt I ttttt"]), tokens=8, output_logits=False)
        assisted = generate(
            model, prompt("llava", ["tt I ttttt"]), tokens=8, output_logits=False, assistant_model=assistant
        )
    assert torch.equal(plain.sequences, assisted.sequences)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl", "lfm2_vl", "qwen3_5"])
@pytest.mark.parametrize("chunk", [2, 5])
def test_chunked_prefill_under_a_band(family: str, chunk: int) -> None:
    model = build(family)  # with chunks of two there is a chunk without any text
    for rows in (["tt I ttt"], EVEN, MIXED):
        with attach(model, BAND):
            whole = generate(model, prompt(family, rows))
            parts = generate(model, prompt(family, rows), prefill_chunk_size=chunk)
        assert close(torch.stack(whole.logits), torch.stack(parts.logits))


def test_generate_without_a_cache_sees_the_band_at_every_step() -> None:
    model, inputs = build("llava"), prompt("llava", MIXED)
    with attach(model, BAND):
        cached, uncached = generate(model, inputs), generate(model, inputs, use_cache=False)
    assert close(torch.stack(cached.logits), torch.stack(uncached.logits))


CHOOSING = {
    "keeps": KEEPS,
    "hidrop": VisionSchedule(enter=1, keep={2: 3, 4: 2}, ranking="hidrop"),
    "fastv": FastV(layer=1),
    "pyramiddrop": PyramidDrop(keep_ratios={1: 0.5, 3: 0.25}),
    "visipruner": VisiPruner(boundary=1, layer_threshold=0.9999, tokens_threshold=0.2),
    "random": Random(layer=2),
    "divprune": DivPrune(keep_ratio=0.5),
}


@pytest.mark.parametrize("policy", CHOOSING.values(), ids=list(CHOOSING))
def test_the_prompt_chooses_the_vision_tokens_whatever_comes_after_it(policy: Any) -> None:
    """Drafted tokens stand behind the prompt in its first forward, and without a cache generated ones in every one."""
    model, assistant = build("llava"), build("llava")
    assistant.lm_head.weight.data = assistant.lm_head.weight.flip(0)  # which drafts other tokens
    for row in ("tt I ttttt", "t I t I tttt"):
        with attach(model, policy) as attachment:
            plain = generate(model, prompt("llava", [row]), tokens=6)
            kept = attachment.trace[0].kept
            assert kept
            for options in (
                {"use_cache": False},
                {"assistant_model": assistant},
                {"prompt_lookup_num_tokens": 2},
            ):
                other = generate(model, prompt("llava", [row]), tokens=6, **options)
                assert attachment.trace[0].kept == kept, options
                assert torch.equal(other.sequences, plain.sequences), options
                assert close(torch.stack(other.logits), torch.stack(plain.logits)), options


@pytest.mark.parametrize("policy", CHOOSING.values(), ids=list(CHOOSING))
def test_answers_behind_the_last_query_choose_nothing(policy: Any) -> None:
    """As in training, or in a loop of one's own: `queries` says where prompts end."""
    model, inputs = build("llava"), prompt("llava", ["tt I ttt", "t I t I tt"])
    last = inputs["input_ids"].shape[1] - 1
    with torch.no_grad(), attach(model, policy) as attachment:
        model(**inputs)
        kept = [record.kept for record in attachment.trace]
        for seed in (1, 2):
            answers = torch.randint(3, 90, (2, 4), generator=torch.Generator().manual_seed(seed))
            with attachment.queries(torch.tensor([[last], [last]])):
                model(**continued("llava", inputs, answers))
            assert [record.kept for record in attachment.trace] == kept


def test_a_generated_placeholder_token_is_text() -> None:
    model, inputs = build("llava"), prompt("llava", EVEN)
    new = torch.tensor([[IMAGE, 7], [8, IMAGE]])
    with torch.no_grad(), attach(model, BAND):
        cache = model(**inputs).past_key_values
        model(
            input_ids=new,
            attention_mask=pad(inputs["attention_mask"], (0, 2), value=1),
            past_key_values=cache,
        )
    assert [layer.keys.shape[-2] for layer in cache.layers] == [7, 7, 11, 11, 7, 7]


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_prompt_whose_pixels_are_missing_is_refused(call: str) -> None:
    """It would be answered as if the placeholders were words; so would the model without a policy."""
    model, inputs = build("llava"), prompt("llava", EVEN)
    tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    count = int((inputs["input_ids"] == IMAGE).sum())
    for policy in (BAND, VisionSchedule()):
        with (
            attach(model, policy),
            pytest.raises(ValueError, match=rf"has {count} placeholder tokens of images"),
        ):
            model(**tokens) if call == "forward" else model.generate(**tokens, max_new_tokens=2)


def test_queries_beyond_the_rows_are_refused() -> None:
    model, inputs = build("llava"), prompt("llava", EVEN)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), attach(model, KEEPS) as attachment:
        with attachment.queries(torch.full((len(EVEN), 1), length - 1)):
            model(**inputs)
        with (
            attachment.queries(torch.full((len(EVEN), 1), length)),
            pytest.raises(ValueError, match="beyond the rows"),
        ):
            model(**inputs)
    with pytest.raises(ValueError, match="queries must be an int64 tensor"), attachment.queries([[1]]):  # type: ignore[arg-type]
        pass
    with pytest.raises(ValueError, match="vision_mask is a list; pass a bool tensor"):
        attach(model, BAND, vision_mask=[[True]])  # type: ignore[arg-type]


def test_a_placeholder_that_is_generated_without_a_cache_is_text() -> None:
    model = build("llava")
    words = torch.tensor([[5, 6, 7]])
    others = [token for token in range(model.config.get_text_config().vocab_size) if token != IMAGE]
    with attach(model, BAND):
        wrote = model.generate(
            input_ids=words, max_new_tokens=3, do_sample=False, use_cache=False, suppress_tokens=others
        )
    assert wrote[0, 3:].tolist() == [IMAGE] * 3


# ---------------------------------------------------------------- turns by hand


@pytest.mark.parametrize(
    ("policy", "warns"),
    [(CHOOSING["visipruner"], True), (KEEPS, True), (BAND, False), (CHOOSING["random"], False)],
)
def test_a_second_question_on_what_the_first_left_is_warned_of(policy: Any, warns: bool) -> None:
    model, inputs = build("llava"), prompt("llava", ["tt I ttttt"])
    with attach(model, policy):
        first = generate(model, inputs, tokens=2)
        longer = continued(
            "llava", inputs, torch.cat([first.sequences[:, -2:], torch.tensor([[7, 8, 9]])], 1)
        )
        tokens = {name: longer[name] for name in ("input_ids", "attention_mask")}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            generate(model, tokens, tokens=2, past_key_values=first.past_key_values)
            generate(model, prompt("llava", ["tt I ttttt"]), tokens=2)  # reads the image again
        assert sum("an earlier question needed" in str(w.message) for w in caught) == warns


def test_an_image_that_is_read_again_for_the_next_question_is_encoded_once() -> None:
    """The recipe of docs/inference.md: each question's answer is that of a fresh prefill."""
    model = build("llava")
    runs: list[int] = []
    model.model.vision_tower.register_forward_hook(lambda *args: runs.append(1))
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    conversations = []
    for row in ("tt I ttt", "tt I ttttttt"):
        inputs = prompt("llava", [row])
        del inputs["mm_encoder_outputs"]
        conversations.append(inputs | {"pixel_values": pixels})
    with torch.no_grad(), attach(model, KEEPS):
        expected = [generate(model, inputs).sequences for inputs in conversations]
        runs.clear()
        features = encode_images(model, conversations[0])["mm_encoder_outputs"]
        for conversation, sequences in zip(conversations, expected, strict=True):
            del conversation["pixel_values"]
            again = generate(model, fresh_inputs({**conversation, "mm_encoder_outputs": features}))
            assert torch.equal(again.sequences, sequences)
    assert len(runs) == 1


def turn(family: str, tokens: torch.Tensor, mask: torch.Tensor, images: Any, cache: Any) -> dict[str, Any]:
    """One turn's arguments; `mask` covers everything so far."""
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask, "past_key_values": cache}
    inputs["position_ids"] = positions(family, mask)[:, -tokens.shape[1] :]
    if images is not None:
        inputs["mm_encoder_outputs"] = {"image": images}
    if family == "gemma3":
        inputs["token_type_ids"] = (tokens == IMAGE).long()
    return inputs


@pytest.mark.parametrize("first_turn", ["dense", "band"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "internvl", "smolvlm"])
def test_an_image_in_a_later_turn(family: str, attention: str, first_turn: str) -> None:
    """Padding inside the history, an image in the second turn, perhaps another policy than before."""
    model = build(family, attention)
    one = prompt(family, ["tt I ttt", "t I t"], "right")
    two = prompt(family, ["t I tt", "tt I t"], seed=2)
    tokens = torch.cat([one["input_ids"], two["input_ids"]], 1)
    mask = torch.cat([one["attention_mask"], two["attention_mask"]], 1)
    vision = tokens == IMAGE
    enter, exit = 1, 4
    split = one["input_ids"].shape[1]
    seen = band(vision, LAYERS, enter, exit)
    if first_turn == "dense":
        seen = [torch.cat([vision[:, :split], layer[:, split:]], 1) for layer in seen]
    schedule = VisionSchedule(enter=enter, exit=exit)
    image = lambda inputs: inputs["mm_encoder_outputs"]["image"]  # noqa: E731
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        with attach(model, VisionSchedule() if first_turn == "dense" else schedule) as attachment:
            model(**turn(family, one["input_ids"], one["attention_mask"], image(one), cache))
            with attachment.using(schedule):
                logits = model(**turn(family, two["input_ids"], mask, image(two), cache)).logits
        both = prompt(family, ["I", "I", "I", "I"])["mm_encoder_outputs"]["image"]  # the container alone
        rows = [image(one).pooler_output[0], image(two).pooler_output[0]]
        rows += [image(one).pooler_output[1], image(two).pooler_output[1]]
        both.pooler_output = torch.stack(rows) if isinstance(both.pooler_output, torch.Tensor) else rows
        with masked(model, vision, seen, padding=mask):
            whole = turn(family, tokens, mask, both, None)
            expected = model(**whole, use_cache=False).logits[:, split:]
    text = (two["attention_mask"].bool()) & (two["input_ids"] != IMAGE)
    assert close(logits[text], expected[text])


def test_samples_stay_uneven_after_a_turn_that_is_even() -> None:
    """No row is padded, so the stock model has no mask, but the cache of the first turn is uneven."""
    model = build("llava")
    one, two = prompt("llava", ["tt I tt", "t I ttt"]), prompt("llava", ["t I tt", "t I tt"], seed=2)
    tokens = torch.cat([one["input_ids"], two["input_ids"], torch.tensor([[5], [6]])], 1)
    vision, everything = tokens == IMAGE, torch.ones_like(tokens)
    seen = [layer.clone() for layer in band(vision, LAYERS, 1, 4)]
    for layer in seen:
        layer[0, 2:4] = False  # two tokens of the first row's first image
        layer[:, 9] = False  # one token of both rows' second images
    part = lambda start, stop: [layer[:, start:stop] for layer in seen]  # noqa: E731
    image = lambda inputs: inputs["mm_encoder_outputs"]["image"]  # noqa: E731
    with torch.no_grad(), attach(model, Fixed(part(0, 8))) as attachment:
        cache = DynamicCache(config=model.config)
        model(**turn("llava", tokens[:, :8], everything[:, :8], image(one), cache))
        with attachment.using(Fixed(part(8, 15))):
            model(**turn("llava", tokens[:, 8:15], everything[:, :15], image(two), cache))
        last = model(**turn("llava", tokens[:, 15:], everything, None, cache)).logits[:, -1]
    both = image(prompt("llava", ["I", "I", "I", "I"]))
    both.pooler_output = [image(turn_).pooler_output[row] for row in (0, 1) for turn_ in (one, two)]
    with torch.no_grad(), masked(model, vision, seen):
        whole = turn("llava", tokens, everything, both, None)
        assert close(model(**whole, use_cache=False).logits[:, -1], last)


def test_a_cache_that_records_its_past_gives_the_window_alone() -> None:
    """As assisted decoding asks for it: sliding layers keep more than they show, until the next crop."""
    model = build_from(llava(hf.MistralConfig, sliding_window=5))
    inputs = prompt("llava", ["tt I tttt"])
    inputs["position_ids"] = positions("llava", inputs["attention_mask"])
    steps = []
    for record in (False, True):
        with torch.no_grad(), attach(model, BAND):
            cache, mask = DynamicCache(config=model.config), inputs["attention_mask"]
            if record:
                cache.activate_past_recording()
            model(**inputs, past_key_values=cache)
            for token in range(5, 11):
                mask = pad(mask, (0, 1), value=1)
                steps.append(decode(model, torch.tensor([[token]]), mask, cache))
        sizes = {layer.keys.shape[-2] for layer in cache.layers}
        assert (sizes == {4}) == (not record)
    assert all(close(a, b) for a, b in zip(steps[:6], steps[6:], strict=True))


# ---------------------------------------------------------------- the cache


def decode(model: Any, token: torch.Tensor, mask: torch.Tensor, cache: Any) -> torch.Tensor:
    with torch.no_grad():
        inputs = turn("llava", token, mask, None, cache)
        return model(**inputs).logits[:, -1]


def test_the_cache_holds_only_what_layers_computed() -> None:
    inputs = prompt("llava", ["tt I I ttt", "t I I tttt"])
    model = build("llava")
    with torch.no_grad():
        dense = model(**inputs).past_key_values
        with attach(model, VisionSchedule(enter=1, exit=5, keep={3: 2})):
            cache = model(**inputs).past_key_values
    assert [layer.keys.shape[-2] for layer in cache.layers] == [5, 13, 13, 7, 7, 5]
    assert all(layer.get_seq_length() == 13 for layer in cache.layers)
    size = lambda c: sum(layer.keys.untyped_storage().nbytes() for layer in c.layers)  # noqa: E731
    assert size(cache) * (6 * 13) == size(dense) * (5 + 13 + 13 + 7 + 7 + 5)


def test_operations_of_the_cache() -> None:
    model, inputs = build("llava"), prompt("llava", MIXED)
    seen, mask = ragged(inputs), inputs["attention_mask"]
    inputs["position_ids"] = positions("llava", mask)
    token = torch.tensor([[5], [6], [7]])
    grown = lambda m, n=1: pad(m, (0, n), value=1)  # noqa: E731
    with torch.no_grad(), attach(model, Fixed(seen)):
        cache = model(**inputs).past_key_values
        expected = decode(model, token, grown(mask), copy.deepcopy(cache))

        twice = copy.deepcopy(cache)
        twice.batch_repeat_interleave(2)
        rows = decode(model, token.repeat_interleave(2, 0), grown(mask.repeat_interleave(2, 0)), twice)
        assert close(rows, expected.repeat_interleave(2, 0))

        order = torch.tensor([2, 0, 2])
        for operation in ("reorder_cache", "batch_select_indices"):
            other = copy.deepcopy(cache)
            getattr(other, operation)(order)
            assert close(decode(model, token[order], grown(mask[order]), other), expected[order])

        longer = copy.deepcopy(cache)
        for n in range(1, 4):
            decode(model, token + n, grown(mask, n), longer)
        longer.crop(-3)
        assert close(decode(model, token, grown(mask), longer), expected)

        back = copy.deepcopy(cache)
        back.crop(-2)  # all rows end in two text tokens or more
        assert back.get_seq_length() == mask.shape[1] - 2
        again = model(**turn("llava", inputs["input_ids"][:, -2:], mask, None, back)).past_key_values
        assert close(decode(model, token, grown(mask), again), expected)
        with pytest.raises(ValueError, match=r"crop\(-9\) reaches into tokens that the policy removed"):
            copy.deepcopy(cache).crop(-9)

        cache.reset()
        assert cache.get_seq_length() == 0
        assert close(model(**inputs, past_key_values=cache).logits[:, -1], model(**inputs).logits[:, -1])


def test_static_and_quantised_caches_are_refused_before_any_compute() -> None:
    model, inputs = build("llava"), prompt("llava", EVEN)
    calls: list[int] = []
    model.get_decoder().layers[0].register_forward_hook(lambda *a: calls.append(1))
    quantised = Cache(layers=[Fp8QuantizedLayer() for _ in range(LAYERS)])
    with attach(model, BAND), torch.no_grad():
        with pytest.raises(ValueError, match="cache layers of type StaticLayer: pass past_key_values"):
            generate(model, inputs, cache_implementation="static", disable_compile=True)
        with pytest.raises(ValueError, match="cache layers of type Fp8QuantizedLayer"):
            model(**inputs, past_key_values=quantised)
    assert not calls


# ---------------------------------------------------------------- what a decode step costs


@pytest.mark.parametrize(
    ("policy", "most"),
    [(VisionSchedule(), 1), (BAND, 4), (KEEPS, 8), (VisionSchedule(cross=(1, 3)), 13)],
    ids=["all", "band", "keeps", "cross"],
)
def test_a_decode_step_runs_little_of_ours(policy: VisionSchedule, most: int) -> None:
    """At most this many calls of our functions a layer, beside those of the whole step."""
    model, inputs = build("llava"), prompt("llava", ["tt I ttt"])
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call" and "/models/executor/" in frame.f_code.co_filename

    with torch.no_grad(), attach(model, policy):
        cache = model(**copy.deepcopy(inputs)).past_key_values
        mask = pad(inputs["attention_mask"], (0, 1), value=1)
        sys.setprofile(count)
        try:
            model(input_ids=inputs["input_ids"][:, -1:], attention_mask=mask, past_key_values=cache)
        finally:
            sys.setprofile(None)
    assert calls <= most * LAYERS + 72
