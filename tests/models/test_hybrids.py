"""Decoders with recurrent layers, in float64 where it matters, against a loop over tokens (helpers/recurrences)."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import transformers as hf
from helpers.families import (
    HYBRID_FAMILIES,
    IMAGE,
    MIXED,
    build,
    build_from,
    close,
    lfm2_vl,
    positions,
    prompt,
    qwen3_5,
    shared,
    text,
    text_tokens,
    vision_tokens,
)
from helpers.forwards import generate, gradients, gradients_checkpointed, logits, ranking_rows
from helpers.oracle import attending, band, masked, ranked, recurrence
from helpers.recurrences import compute_in_float64, scan
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

from latefusion import VisionSchedule
from latefusion.models.attach import attach
from latefusion.models.policies.fastv import FastV
from latefusion.models.policies.pyramiddrop import PyramidDrop
from latefusion.models.policies.visipruner.settings import VisiPruner
from latefusion.models.student.build import decoder_linears

# as published: three recurrent layers to one that attends, and LFM2's irregular pattern
CONFIGS = {
    "lfm2_vl": lambda: lfm2_vl([*["conv", "conv", "full_attention"] * 2, "conv", "full_attention"]),
    "qwen3_5": lambda: qwen3_5([*["linear_attention"] * 3, "full_attention"] * 2),
}
EXACT = 1e-11  # in float64
BAND = VisionSchedule(enter=2, exit=5)
every_family = pytest.mark.parametrize("family", HYBRID_FAMILIES)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def precise(monkeypatch: Any, family: str, rows: list[str], side: str = "left") -> tuple[Any, dict[str, Any]]:
    model, inputs = build_from(CONFIGS[family](), "eager"), prompt(family, rows, side)
    for features in inputs["mm_encoder_outputs"].values():
        features.pooler_output = [image.double() for image in features.pooler_output]
    return compute_in_float64(monkeypatch, model), inputs


@every_family
def test_the_textbook_is_what_the_stock_layer_computes(family: str, monkeypatch: Any) -> None:
    model, _ = precise(monkeypatch, family, MIXED)
    mixer = recurrence(model.get_decoder().layers[0])
    hidden_states = torch.randn(2, 70, 32, dtype=torch.float64)  # more than one of stock's chunks
    everything = torch.ones(2, 70, dtype=torch.bool)
    with torch.no_grad():
        difference = mixer(hidden_states=hidden_states) - scan(mixer, hidden_states, everything)
    assert difference.abs().max() < EXACT


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_bands_and_keeps_are_exact(family: str, side: str, monkeypatch: Any) -> None:
    model, inputs = precise(monkeypatch, family, MIXED, side)
    vision, written, layers = vision_tokens(inputs), text_tokens(inputs), len(model.get_decoder().layers)
    keeps = VisionSchedule(enter=1, exit=7, keep={4: 3, 6: 2})
    for schedule in (BAND, keeps):
        seen = band(vision, layers, schedule.enter, schedule.exit)
        if schedule.keep:
            seen = ranked(
                model, inputs, vision, enter=1, exit=7, keep={4: 3, 6: 2}, queries=ranking_rows(inputs)
            )
        with masked(model, vision, seen, padding=inputs["attention_mask"]):
            expected = logits(model, inputs, use_cache=False)[written]
            by_hand, loss = gradients(model, inputs)
        with attach(model, schedule):
            for cached in (False, True):
                assert close(logits(model, inputs, use_cache=cached)[written], expected, EXACT)
            ours, same = gradients(model, inputs)
        assert abs(loss - same) < EXACT
        assert ours.keys() == by_hand.keys()
        assert all(close(ours[name], by_hand[name], EXACT) for name in by_hand)


def join(family: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Several turns as one row each, with their images in the order of the rows."""
    images = [[] for _ in parts[0]["input_ids"]]  # type: ignore[var-annotated]
    for part in parts:
        rest = list(part["mm_encoder_outputs"]["image"].pooler_output)
        for row, tokens in enumerate(part["input_ids"]):
            for _ in range(int((tokens == IMAGE).sum()) // 4):
                images[row].append(rest.pop(0))
    whole = {name: torch.cat([part[name] for part in parts], 1) for name in ("input_ids", "attention_mask")}
    features = prompt(family, ["I"])["mm_encoder_outputs"]["image"]
    features.pooler_output = [image for row in images for image in row]
    return {**whole, "mm_encoder_outputs": {"image": features}}


@every_family
@pytest.mark.parametrize("first", ["dense", "band"])
def test_a_turn_with_images_of_some_rows_goes_on_from_their_states(
    family: str, first: str, monkeypatch: Any
) -> None:
    """Outside the band, rows then bring 4, 8 and 0 tokens: each goes on from its own state, then decodes."""
    model, one = precise(monkeypatch, family, ["tt I tt", "t I ttt", "tttt I"])
    _, two = precise(monkeypatch, family, ["t I ttt", "tttttttt", "I I"])
    last = prompt(family, ["t", "t", "t"], seed=9)
    assert one["attention_mask"].all() and two["attention_mask"].all()
    whole = join(family, [one, two])
    vision, split = whole["input_ids"] == IMAGE, one["input_ids"].shape[1]
    seen = band(vision, len(model.get_decoder().layers), BAND.enter, BAND.exit)
    if first == "dense":
        seen = [torch.cat([vision[:, :split], layer[:, split:]], 1) for layer in seen]
    tokens = torch.cat([whole["input_ids"], last["input_ids"]], 1)
    mask, place = torch.ones_like(tokens), positions(family, torch.ones_like(tokens))
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), attach(model, VisionSchedule() if first == "dense" else BAND) as attachment:
        start = 0
        with_images = [one["mm_encoder_outputs"], two["mm_encoder_outputs"], None]
        outputs = []
        for number, end in enumerate((split, whole["input_ids"].shape[1], tokens.shape[1])):
            turn = {"input_ids": tokens[:, start:end], "position_ids": place[:, start:end]}
            images = {} if with_images[number] is None else {"mm_encoder_outputs": with_images[number]}
            with attachment.using(BAND if number else attachment.policy):
                step = model(**turn, **images, attention_mask=mask[:, :end], past_key_values=cache)
            outputs.append(step.logits)
            start = end
    grown = torch.nn.functional.pad(vision, (0, 1))
    with torch.no_grad(), masked(model, grown, [torch.nn.functional.pad(s, (0, 1)) for s in seen]):
        images = {"mm_encoder_outputs": whole["mm_encoder_outputs"]}
        expected = model(
            input_ids=tokens, attention_mask=mask, position_ids=place, **images, use_cache=False
        ).logits
    assert close(torch.cat(outputs, 1)[~grown], expected[~grown], EXACT)


# ---------------------------------------------------------------- padding that stock reads


@every_family
def test_a_cache_whose_rows_end_in_padding_is_not_continued(family: str) -> None:
    model, inputs = shared(family), prompt(family, MIXED, "right")
    expected = logits(model, inputs)
    with attach(model, VisionSchedule()), torch.no_grad():  # nothing leaves: as stock
        cache = model(**inputs).past_key_values
        model(input_ids=torch.tensor([[5]] * 3), past_key_values=cache)
        assert torch.equal(logits(model, inputs), expected)
    with attach(model, VisionSchedule(exit=4)), torch.no_grad():
        cache = model(**inputs).past_key_values
        with pytest.raises(ValueError, match=r"rows of this cache end in padding.* pad prompts on the left"):
            model(input_ids=torch.tensor([[5]] * 3), past_key_values=cache)


@every_family
def test_padding_between_tokens_is_refused_where_tokens_leave(family: str) -> None:
    model = build(family)
    one, two = prompt(family, ["tt I ttt", "t I tttt"]), prompt(family, ["t I t", "I t"], seed=2)
    mask = torch.cat([one["attention_mask"], two["attention_mask"]], 1)
    two = {"input_ids": two["input_ids"], "mm_encoder_outputs": two["mm_encoder_outputs"]}
    two["position_ids"] = positions(family, mask)[:, -two["input_ids"].shape[1] :]
    with torch.no_grad(), attach(model, VisionSchedule(exit=4)) as attachment:
        cache = model(**one).past_key_values
        with pytest.raises(ValueError, match="padding lies between the tokens of a row"):
            model(**two, attention_mask=mask, past_key_values=cache)
        with attachment.using(VisionSchedule()):
            model(**two, attention_mask=mask, past_key_values=cache)


# ---------------------------------------------------------------- what is refused


REFUSED = [
    (
        FastV(layer=1),
        r"layer=1 looks at the attention of layer 0, .* nearest softmax layers are 1, so choose layer=2",
    ),
    (FastV(layer=3), r"nearest softmax layers are 1 and 3, so choose layer=2 or 4"),
    (PyramidDrop(keep_ratios={2: 0.5, 5: 0.2}), r"a layer of keep_ratios=5 .* softmax layers are 3 and 5"),
    (VisiPruner(boundary=2), r"boundary=2 looks at .* nearest softmax layers are 1 and 3"),
    (
        VisionSchedule(keep={1: 4}),
        r"keep=\{1: 4\} ranks .* layers 0 to 0 run a recurrence .* choose a layer above 1",
    ),
    (VisionSchedule(keep={2: 4}, ranking="hidrop"), r"a layer of keep=2 .* softmax layers are 1 and 3"),
    (VisionSchedule(cross=(1, 2)), r"a layer of cross=2 .* softmax layers are 1 and 3"),
    (VisionSchedule(cross=(1, 3), freeze_prefix=True), r"freeze_prefix=True silences attention"),
]


@pytest.mark.parametrize(("policy", "sentence"), REFUSED)
@every_family
def test_what_needs_attention_names_the_nearest_softmax_layers(
    family: str, policy: Any, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        attach(shared(family), policy)
    with (
        attach(shared(family), VisionSchedule()) as attachment,
        pytest.raises(ValueError, match=sentence),
        attachment.using(policy),
    ):
        pass


class LooksAtLayer0:
    def validate(self, num_layers: int) -> None:
        pass

    def begin(self, prompt: Any) -> Any:
        self.watch, self.fusion_layer = {0}, None
        self.select = lambda layer: None
        return self


@every_family
def test_a_policy_of_ones_own_that_looks_at_a_recurrence_is_refused(family: str) -> None:
    with (
        attach(shared(family), LooksAtLayer0()),  # type: ignore[arg-type]
        pytest.raises(ValueError, match=r"looks at the attention of layer 0, but .* runs a recurrence"),
    ):
        logits(shared(family), prompt(family, MIXED))


@every_family
def test_packed_rows_are_refused(family: str) -> None:
    inputs = prompt(family, ["tt I ttt"])
    length = inputs["input_ids"].shape[1]
    inputs["position_ids"] = torch.tensor([[*range(length - 2), 0, 1]])
    with (
        attach(shared(family), VisionSchedule(exit=4)),
        pytest.raises(ValueError, match="recurrent layers of this decoder would read one after the other"),
    ):
        logits(shared(family), inputs)


def test_a_convolution_with_biases_is_refused() -> None:
    config = lfm2_vl(["conv", "full_attention"])
    config.text_config.conv_bias = True
    with pytest.raises(ValueError, match=r"(conv|in_proj) of Lfm2ShortConv has a bias"):
        attach(build_from(config), VisionSchedule())


def test_a_recurrence_of_another_kind_is_refused() -> None:
    config = text(hf.Qwen3NextConfig, num_hidden_layers=4, num_experts=2, num_experts_per_tok=1)
    model = build_from(config, auto=hf.AutoModelForCausalLM)
    with pytest.raises(
        ValueError, match="Qwen3NextGatedDeltaNet runs a recurrence that has not been shown exact"
    ):
        attach(model, VisionSchedule(), vision_mask=torch.ones(1, 3, dtype=torch.bool))


def test_transformers_itself_refuses_drafts_for_a_recurrent_state() -> None:
    model = build("qwen3_5")
    with attach(model, VisionSchedule(exit=4)), pytest.raises(ValueError, match="stateful"):
        generate(model, prompt("qwen3_5", ["tt I ttt"]), prompt_lookup_num_tokens=2)


# ---------------------------------------------------------------- what is reported, interrupted, shared


@every_family
def test_attention_maps_are_those_of_the_softmax_layers_at_full_size(family: str) -> None:
    model, inputs = build(family, "eager"), prompt(family, MIXED)
    vision, length = vision_tokens(inputs), inputs["input_ids"].shape[1]
    with torch.no_grad(), attach(model, VisionSchedule(enter=2, exit=4)):
        out = model(**inputs, output_attentions=True, output_hidden_states=True)
    assert len(out.attentions) == len(attending(model)) == 3
    assert all(maps.shape[-2:] == (length, length) for maps in out.attentions)
    assert all(states.shape[1] == length for states in out.hidden_states)
    read = [maps.transpose(1, 3)[vision].abs().sum() for maps in out.attentions]  # what vision columns get
    assert read[0] == 0 and read[1] > 0 and read[2] == 0  # layers 1, 3 and 5


@every_family
def test_interrupts_and_threads_leave_no_trace(family: str) -> None:
    model, inputs = build(family), prompt(family, MIXED)
    policies = [VisionSchedule(enter=2, exit=4), VisionSchedule(exit=3), VisionSchedule(keep={2: 3})]
    with attach(model, VisionSchedule()) as attachment:

        def run(policy: Any) -> torch.Tensor:
            with attachment.using(policy):
                return logits(model, {**inputs, "mm_encoder_outputs": dict(inputs["mm_encoder_outputs"])})

        alone = [run(policy) for policy in policies]

        def stop(*args: Any) -> None:
            raise KeyboardInterrupt

        handle = recurrence(model.get_decoder().layers[2]).out_proj.register_forward_pre_hook(stop)
        for policy in policies:
            with pytest.raises(KeyboardInterrupt):
                run(policy)
        handle.remove()
        results: list[Any] = [None] * 6
        threads = [
            threading.Thread(target=lambda i=i: results.__setitem__(i, run(policies[i % 3])))  # type: ignore[misc]
            for i in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(result, alone[i % 3]) for i, result in enumerate(results))
    assert "forward" not in vars(recurrence(model.get_decoder().layers[0]))  # detached


# ---------------------------------------------------------------- others of the kind


def moe(**more: Any) -> Any:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    heads = {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    heads |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    return text(hf.Qwen3_5MoeTextConfig, **experts, **heads, shared_expert_intermediate_size=16, **more)


OTHERS = {
    "qwen3_5_moe": lambda: moe(layer_types=["linear_attention", "full_attention"] * 3),
    "lfm3": lambda: text(
        hf.Lfm3Config,
        layer_types=["conv", "full_attention", "conv", "sliding_attention"],
        num_hidden_layers=4,
    ),
}


@pytest.mark.parametrize("other", OTHERS)
@torch.no_grad()
def test_other_recurrent_decoders_are_exact(other: str) -> None:
    model = build_from(OTHERS[other](), auto=hf.AutoModelForCausalLM)
    vision = torch.zeros(2, 14, dtype=torch.bool)
    vision[0, 2:8] = vision[1, 5:10] = True
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[1, :3] = 0
    tokens = torch.randint(3, 90, (2, 14), generator=torch.Generator().manual_seed(0))
    place = (mask.cumsum(1) - 1).clamp(min=0)
    embeds = model.get_input_embeddings()(tokens)
    inputs = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": place}
    written, layers = mask.bool() & ~vision, len(model.get_decoder().layers)
    assert VisionSchedule(exit=2).flops(model.config, 9, 5) < VisionSchedule().flops(model.config, 9, 5)
    for enter, exit in ((1, 3), (0, 2), (2, None)):
        with masked(model, vision, band(vision, layers, enter, exit), padding=mask):
            expected = model(**inputs, use_cache=False).logits[written]
        with attach(model, VisionSchedule(enter=enter, exit=exit), vision_mask=vision):
            for cached in (False, True):
                assert close(model(**inputs, use_cache=cached).logits[written], expected)


@every_family
def test_adapters_on_recurrences_get_the_gradients_of_the_loop(family: str, monkeypatch: Any) -> None:
    model, inputs = precise(monkeypatch, family, MIXED)
    layers = model.get_decoder().layers
    linears = [name for name, module in layers.named_modules() if isinstance(module, torch.nn.Linear)]
    assert any(".conv.in_proj" in name or ".linear_attn.in_proj_qkv" in name for name in linears)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=decoder_linears(model))).double()
    generator = torch.Generator().manual_seed(0)
    for name, weight in peft.named_parameters():
        if "lora_B" in name:
            weight.data = 0.2 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    vision = vision_tokens(inputs)
    seen = band(vision, len(layers), BAND.enter, BAND.exit)
    with masked(model, vision, seen, padding=inputs["attention_mask"]):
        by_hand, loss = gradients(peft, inputs)
    with attach(peft, BAND):
        ours, same = gradients(peft, inputs)
        again, _ = gradients_checkpointed(peft, inputs)
    assert abs(loss - same) < EXACT and ours.keys() == by_hand.keys()
    assert sum("lora_A" in name and bool(grad.any()) for name, grad in ours.items()) == len(linears)
    assert all(close(ours[name], by_hand[name], EXACT) for name in by_hand)
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def test_visipruner_leaves_after_softmax_layers_that_do_not_use_vision() -> None:
    """Fusion, then the exit, each in a softmax layer: tokens go before the recurrent layer behind it."""
    model, inputs = build_from(lfm2_vl(["conv", "full_attention"] * 5)), prompt("lfm2_vl", MIXED)
    vision, written = vision_tokens(inputs), text_tokens(inputs)
    policy = VisiPruner(
        boundary=1,
        layer_threshold=1.0,
        tokens_threshold=0.05,
        exit_threshold=1e-6,
        exit_patience=2,
        stages=("middle", "deep"),
    )
    with attach(model, policy) as attachment:
        ours, trace = logits(model, inputs)[written], attachment.trace
    assert [record.fusion_layer for record in trace] == [3, None, 3]
    assert [record.exit_layer for record in trace] == [8, None, 8]  # layers 5 and 7 do not use what was kept
    kept = torch.zeros_like(vision)
    for row, record in enumerate(trace):
        kept[row, record.kept or []] = True
    assert 0 < kept.sum() < vision.sum()
    with masked(model, vision, [vision] * 4 + [kept] * 4 + [kept & False] * 2):
        assert close(ours, logits(model, inputs, use_cache=False)[written])
