"""VisiPruner against a plain reference: its maths, one layer, and whole models in mixed batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_visipruner import ReferenceLlama, Run, Settings
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from latefusion.models.attach import attach
from latefusion.models.policies import visipruner
from latefusion.models.policies.base import AttentionCall, Decision, Prompt
from latefusion.models.policies.visipruner import VisiPruner, removal_effect
from latefusion.models.schedule import VisionSchedule

# One prompt each: runs of text (t) and vision (v) tokens. Together in a batch they fuse in different layers.
PROMPTS = {
    "one image": "t3 v12 t4",
    "short": "t2 v7 t3",
    "two images": "t2 v6 v6 t5",
    "interleaved": "v5 t3 v6 t2 v4 t4",
    "text only": "t9",
    "image first": "v10 t6",
}
STAGES = [("middle",), ("middle", "deep"), ("shallow",), ("shallow", "middle", "deep")]
NEW_TOKENS = 4


# ---------------------------------------------------------------- the settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stages": ("deep",)}, r"^stages=\('deep',\) has 'deep' without 'middle', .*add 'middle'\.$"),
        ({"stages": ("shallow", "deep")}, r"has 'deep' without 'middle'"),
        ({"stages": ("mid",)}, r"^stages names 'mid'; use 'shallow', 'middle', 'deep'\.$"),
        ({"stages": ()}, r"^stages=\(\) prunes nothing; name at least one"),
        ({"boundary": -1}, r"^boundary=-1 must not be negative"),
        ({"layer_threshold": 0.0}, r"^layer_threshold=0.0 is a cosine; choose it above 0 and at most 1\.$"),
        ({"layer_threshold": 1.5}, r"^layer_threshold=1.5 is a cosine"),
        ({"exit_threshold": float("nan")}, r"^exit_threshold=nan is a cosine"),
        ({"tokens_threshold": -0.1}, r"^tokens_threshold=-0.1 is a norm; choose it 0 or above\.$"),
        ({"exit_patience": 0}, r"^exit_patience=0 counts layers; choose it 1 or above\.$"),
        ({"sink_rule": "13b"}, r"^sink_rule='13b' is unknown; use 'first' or 'half'\.$"),
    ],
)
def test_bad_settings_are_one_sentence(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        VisiPruner(**values)
    assert "\n" not in str(error.value)


def test_boundary_must_leave_a_layer_to_fuse_in() -> None:
    VisiPruner(boundary=10).validate(12)
    with pytest.raises(ValueError, match=r"^boundary=11 leaves no layer .* 0 to 11; choose at most 10\.$"):
        VisiPruner(boundary=11).validate(12)
    VisiPruner(boundary=12, stages=("shallow",)).validate(12)
    with pytest.raises(ValueError, match=r"^boundary=13 is beyond the end .* 0 to 11; choose at most 12\.$"):
        VisiPruner(boundary=13, stages=("shallow",)).validate(12)


def test_stages_may_come_from_a_list() -> None:
    assert VisiPruner(stages=["middle", "deep"]) == VisiPruner(stages=("middle", "deep"))  # type: ignore[arg-type]


# ---------------------------------------------------------------- the maths of one row


@settings(deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4)]),
    keys=st.integers(2, 12),
    sharpness=st.floats(0.1, 8.0),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_removal_effect_equals_explicit_contributions(heads, keys, sharpness, dtype, seed) -> None:
    """Float32 however the values are stored: the oracle sees the same stored values, in float64."""
    torch.manual_seed(seed)
    n_heads, n_kv = heads
    weights = (sharpness * torch.randn(2, n_heads, 3, keys)).softmax(-1)
    value = torch.randn(2, n_kv, keys, 6).to(dtype)
    cosine, norm = removal_effect(weights, value)
    assert cosine.dtype == norm.dtype == torch.float32
    for b in range(2):
        for r in range(3):
            a = weights[b, :, r].double().numpy()
            v = value[b].double().repeat_interleave(n_heads // n_kv, dim=0).numpy()
            contributions = np.concatenate(
                [a[h][:, None] * v[h] for h in range(n_heads)], axis=-1
            )  # [K, H * D]
            output = contributions.sum(0)
            for i in range(keys):
                rest = output - contributions[i]
                assert norm[b, r, i].item() == pytest.approx(np.linalg.norm(contributions[i]), abs=1e-5)
                if np.linalg.norm(rest) > 0.05 * np.linalg.norm(output):
                    expected = rest @ output / np.linalg.norm(rest) / np.linalg.norm(output)
                    assert cosine[b, r, i].item() == pytest.approx(expected, abs=1e-4)


def test_removal_effect_of_the_only_key_is_finite() -> None:
    cosine, norm = removal_effect(torch.ones(1, 2, 1, 1), torch.randn(1, 2, 1, 8))
    assert cosine.isfinite().all() and norm.isfinite().all()
    cosine, _ = removal_effect(torch.zeros(1, 2, 1, 3), torch.randn(1, 2, 3, 8))
    assert not (cosine < 1).any(), "a row that attends to nothing turns nothing"


# ---------------------------------------------------------------- one layer of the shallow rule


@dataclass
class Layer:
    """Random attention over a padded batch in compact order (row 0 of sample 1 is padding), in float64."""

    vision: Tensor  # [B, T]
    index: Tensor  # [B, T]
    weights: Tensor  # [B, H, T, T]
    value: Tensor  # [B, H, T, D]
    reruns: list[int]  # query rows of each further call of the kernel

    @classmethod
    def random(cls) -> Layer:
        torch.manual_seed(0)
        vision = layout_mask("t1 v3 t2 v2 t3")[None].repeat(3, 1)
        vision[2] = False
        index = torch.arange(11).repeat(3, 1)
        vision[1, 0], index[1, 0] = False, -1
        scores = torch.randn(3, 2, 11, 11, dtype=torch.float64)
        scores.masked_fill_((index < 0)[:, None, None], -1e9).masked_fill_(
            ~torch.ones(11, 11).tril().bool(), -1e9
        )
        return cls(vision, index, scores.softmax(-1), torch.randn(3, 2, 11, 4, dtype=torch.float64), [])

    def call(self) -> AttentionCall:
        def rerun(value: Tensor, rows: Tensor | None) -> Tensor:
            self.reruns.append(11 if rows is None else rows.shape[1])
            output = (self.weights @ value).transpose(1, 2)  # [B, T, H, D]
            return output if rows is None else output[torch.arange(3)[:, None], rows]

        return AttentionCall(
            query=torch.zeros(3, 2, 11, 4),
            key=torch.zeros(3, 2, 11, 4),
            value=self.value,
            query_index=self.index,
            key_index=self.index,
            output=(self.weights @ self.value).transpose(1, 2),
            scaling=1.0,
            rerun=rerun,
            weights=lambda rows: pytest.fail("the shallow rule needs no attention map"),
        )


@pytest.mark.parametrize("sink_rule", ["first", "half"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("last", [10, 9])
def test_shallow_rule_equals_edited_weights(layer: int, sink_rule: str, last: int) -> None:
    """Also in training, where tokens follow the query (`last`): they are left alone."""
    data = Layer.random()
    real = data.index >= 0
    prompt = Prompt(
        vision=data.vision,
        real=real,
        queries=torch.full((3, 1), last),
        text=real & ~data.vision & (data.vision.cumsum(1) > 0) & (torch.arange(11) <= last),
        n_vision=tuple(data.vision.sum(1).tolist()),
        n_real=tuple(real.sum(1).tolist()),
        num_layers=4,
    )
    policy = VisiPruner(boundary=2, stages=("shallow",), sink_rule=sink_rule)
    decision = policy.begin(prompt)
    assert set(decision.watch) == {0, 1}
    got = decision.attended(layer, data.call())
    assert got is not None
    for b in range(3):
        for h in range(2):
            a = data.weights[b, h].numpy().copy()
            edited = ReferenceLlama._shallow(a, data.vision[b].numpy(), layer, sink_rule)
            edited[last + 1 :] = a[last + 1 :]
            rows = data.index[b] >= 0
            torch.testing.assert_close(
                got[b, rows, h], (torch.from_numpy(edited) @ data.value[b, h])[rows], rtol=0, atol=1e-12
            )
    text = 11  # the longest text of a sample bounds the rows of the second call
    assert data.reruns == ([11, text] if layer == 0 else [text])


# ---------------------------------------------------------------- whole models


def layout_mask(layout: str) -> Tensor:
    return torch.tensor([run[0] == "v" for run in layout.split() for _ in range(int(run[1:]))])


def build(attention: str = "sdpa", seed: int = 3) -> LlamaForCausalLM:
    """A random Llama with grouped heads, sharp enough that a single vision token can turn the output."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"attn_implementation": attention}
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        initializer_range=0.15,
        max_position_embeddings=128,
        eos_token_id=None,
        **options,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 2
    return model


def oracle(model: LlamaForCausalLM) -> ReferenceLlama:
    config = model.config
    assert config.rope_parameters is not None
    return ReferenceLlama(
        {name: weight.float().numpy() for name, weight in model.state_dict().items()},
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        eps=config.rms_norm_eps,
        theta=config.rope_parameters["rope_theta"],
    )


def settings_of(stages: tuple[str, ...], sink_rule: str = "first") -> Settings:
    return Settings(
        boundary=2,
        layer_threshold=0.9,
        tokens_threshold=0.3,
        exit_threshold=0.97,
        stages=stages,
        sink_rule=sink_rule,
    )


def policy_of(settings: Settings) -> VisiPruner:
    return VisiPruner(**vars(settings))


@dataclass
class Batch:
    inputs_embeds: Tensor  # [B, T, H]
    attention_mask: Tensor  # [B, T]
    vision: Tensor  # [B, T]
    offsets: list[int]  # where each prompt starts
    lengths: list[int]

    @property
    def inputs(self) -> dict[str, Any]:
        return {"inputs_embeds": self.inputs_embeds, "attention_mask": self.attention_mask}


def prompts(hidden_size: int = 32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    masks = [layout_mask(layout) for layout in PROMPTS.values()]
    return [(torch.randn(len(mask), hidden_size, generator=generator), mask) for mask in masks]


def collate(samples: list[tuple[Tensor, Tensor]], side: str) -> Batch:
    """Pad with noise, which must not matter."""
    length = max(len(mask) for _, mask in samples) + 1
    embeds = torch.randn(len(samples), length, samples[0][0].shape[1])
    real, vision = torch.zeros(2, len(samples), length, dtype=torch.bool)
    offsets, lengths = [], []
    for i, (sample, mask) in enumerate(samples):
        start = length - len(mask) if side == "left" else 0
        here = slice(start, start + len(mask))
        embeds[i, here], real[i, here], vision[i, here] = sample, True, mask
        offsets.append(start)
        lengths.append(len(mask))
    return Batch(embeds, real.long(), vision, offsets, lengths)


def references(model: LlamaForCausalLM, settings: Settings, new_tokens: int = NEW_TOKENS) -> list[Run]:
    runs = [
        oracle(model).run(embeds.numpy(), vision.numpy(), settings, new_tokens)
        for embeds, vision in prompts()
    ]
    assert min(run.margin for run in runs) > 1e-4, "a decision hangs on rounding; choose another seed"
    return runs


def check_trace(trace: list, runs: list[Run], offsets: list[int]) -> None:
    for record, run, offset in zip(trace, runs, offsets, strict=True):
        assert record.fusion_layer == run.fusion_layer
        assert record.exit_layer == run.exit_layer
        assert list(record.tokens) == run.tokens
        expected = None if run.kept is None else [offset + i for i in run.kept]
        if run.fusion_layer != len(run.tokens) - 1:
            assert (None if record.kept is None else list(record.kept)) == expected


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("stages", STAGES, ids="+".join)
@torch.no_grad()
def test_a_mixed_batch_equals_each_prompt_alone(stages, attention: str, side: str) -> None:
    model, chosen = build(attention), settings_of(stages)
    runs = references(model, chosen, 1)
    if "middle" in stages:
        assert len({run.fusion_layer for run in runs}) >= 4, "the prompts should fuse in different layers"
    batch = collate(prompts(), side)
    with attach(model, policy_of(chosen), vision_mask=batch.vision) as att:
        logits = model(**batch.inputs).logits
        check_trace(att.trace, runs, batch.offsets)
    for i, run in enumerate(runs):
        last = logits[i, batch.offsets[i] + batch.lengths[i] - 1].double().numpy()
        np.testing.assert_allclose(last, run.logits[0], atol=2e-5)


@pytest.mark.parametrize("sink_rule", ["first", "half"])
@torch.no_grad()
def test_generation_in_a_mixed_batch(sink_rule: str) -> None:
    model, chosen = build(), settings_of(STAGES[-1], sink_rule)
    runs = references(model, chosen)
    assert any(run.exit_layer is not None for run in runs)
    batch = collate(prompts(), "left")
    with attach(model, policy_of(chosen), vision_mask=batch.vision) as att:
        out = generate(model, batch)
        check_trace(att.trace, runs, batch.offsets)
    logits = torch.stack(out.logits, dim=1).double().numpy()  # [B, steps, V]
    for i, run in enumerate(runs):
        assert out.sequences[i].tolist() == run.ids
        np.testing.assert_allclose(logits[i], np.stack(run.logits), atol=5e-5)


def generate(model: LlamaForCausalLM, batch: Batch, **options):
    return model.generate(  # type: ignore[misc]
        **batch.inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


@torch.no_grad()
def test_a_second_prompt_is_not_touched_by_the_first() -> None:
    model, chosen = build(), settings_of(STAGES[-1])
    runs = references(model, chosen)
    first, second = collate(prompts()[:1], "left"), collate(prompts()[3:4], "left")
    current = first

    def vision_mask(**arguments: Tensor | None) -> Tensor | None:
        return None if arguments.get("inputs_embeds") is None else current.vision

    with attach(model, policy_of(chosen), vision_mask=vision_mask) as att:
        for current, run in ((first, runs[0]), (second, runs[3]), (first, runs[0])):
            out = generate(model, current)
            assert out.sequences[0].tolist() == run.ids
            check_trace(att.trace, [run], current.offsets)


@torch.no_grad()
def test_beam_search_in_a_mixed_batch() -> None:
    model, policy = build(), policy_of(settings_of(STAGES[-1]))

    def search(samples: list[tuple[Tensor, Tensor]]) -> list[list[int]]:
        batch = collate(samples, "left")
        with attach(model, policy, vision_mask=batch.vision):
            return generate(model, batch, num_beams=3).sequences.tolist()

    assert search(prompts()) == [search([sample])[0] for sample in prompts()]


@torch.no_grad()
def test_a_second_turn_sees_what_the_first_left() -> None:
    """Text after the answer, in one forward on the kept cache: as if decoded token by token."""
    model = build()
    batch = collate(prompts(), "left")
    turn = torch.randint(3, 60, (len(PROMPTS), 3))
    with attach(model, policy_of(settings_of(STAGES[-1])), vision_mask=batch.vision):
        logits = []
        for chunks in ([turn], list(turn.split(1, dim=1))):
            mask = batch.attention_mask
            cache = model(**batch.inputs).past_key_values
            for chunk in chunks:
                mask = torch.cat((mask, torch.ones_like(chunk)), dim=1)
                out = model(input_ids=chunk, attention_mask=mask, past_key_values=cache).logits
            logits.append(out[:, -1])
        assert len({layer.keys.shape[-2] for layer in cache.layers}) > 1, (
            "layers should hold different tokens"
        )
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_teacher_forcing_equals_generation() -> None:
    """In training the answer stands in the same forward; it sees what decoding would have seen."""
    model, chosen = build(), settings_of(STAGES[-1])
    runs = references(model, chosen)
    samples = []
    for (embeds, mask), run in zip(prompts(), runs, strict=True):
        answer = model.get_input_embeddings()(torch.tensor(run.ids[:-1]))
        samples.append(
            (torch.cat((embeds, answer)), torch.cat((mask, torch.zeros(len(answer), dtype=torch.bool))))
        )
    batch = collate(samples, "right")
    starts = [len(mask) - 1 for _, mask in prompts()]
    with (
        attach(model, policy_of(chosen), vision_mask=batch.vision) as att,
        att.queries(torch.tensor(starts)[:, None]),
    ):
        logits = model(**batch.inputs).logits.double().numpy()
        assert [record.fusion_layer for record in att.trace] == [run.fusion_layer for run in runs]
        assert [record.exit_layer for record in att.trace] == [run.exit_layer for run in runs]
    for i, run in enumerate(runs):
        np.testing.assert_allclose(
            logits[i, starts[i] : starts[i] + NEW_TOKENS], np.stack(run.logits), atol=5e-5
        )


@torch.no_grad()
def test_bfloat16_models_decide_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(weights: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((weights.dtype, value.dtype, *(found.dtype for found in removal_effect(weights, value))))
        return removal_effect(weights, value)

    monkeypatch.setattr(visipruner, "removal_effect", spy)
    model = build().bfloat16()
    batch = collate([(embeds.bfloat16(), mask) for embeds, mask in prompts()], "left")
    batch.inputs_embeds = batch.inputs_embeds.bfloat16()
    with attach(model, policy_of(settings_of(("middle", "deep"))), vision_mask=batch.vision):
        assert model(**batch.inputs).logits.isfinite().all()
    assert set(seen) == {(torch.float32, torch.bfloat16, torch.float32, torch.float32)}


@torch.no_grad()
def test_keep_none_and_keep_all() -> None:
    """No critical token: vision leaves right after the fusion layer. All critical: the exit still comes."""
    model = build()
    embeds, mask = prompts()[0]
    for tokens_threshold, n_kept in ((100.0, 0), (0.0, 12)):
        chosen = Settings(
            boundary=2,
            layer_threshold=0.999,
            tokens_threshold=tokens_threshold,
            exit_threshold=1e-3,
            stages=("middle", "deep"),
        )
        run = oracle(model).run(embeds.numpy(), mask.numpy(), chosen, NEW_TOKENS)
        assert run.fusion_layer == 3 and run.kept is not None and len(run.kept) == n_kept
        assert run.exit_layer == (4 if n_kept == 0 else 6)
        batch = collate([(embeds, mask)], "left")
        with attach(model, policy_of(chosen), vision_mask=batch.vision) as att:
            assert generate(model, batch).sequences[0].tolist() == run.ids
            check_trace(att.trace, [run], batch.offsets)


@torch.no_grad()
def test_a_prompt_that_ends_in_vision_is_left_alone() -> None:
    """Its last row is a vision token, which the next token is read from."""
    model = build()
    sample = (torch.randn(12, 32), layout_mask("t3 v9"))
    batch = collate([sample], "left")
    dense = generate(model, batch).logits
    chosen = replace(settings_of(("middle", "deep")), layer_threshold=1.0)
    with attach(model, policy_of(chosen), vision_mask=batch.vision) as att:
        assert torch.equal(torch.stack(generate(model, batch).logits), torch.stack(dense))
        assert att.trace[0].fusion_layer is None


@torch.no_grad()
def test_nothing_triggers_is_the_dense_model_bit_for_bit() -> None:
    model = build()
    batch = collate(prompts(), "left")
    with attach(model, VisionSchedule(), vision_mask=batch.vision) as att:
        dense = model(**batch.inputs).logits
        with att.using(VisiPruner(boundary=2, layer_threshold=1e-6, stages=("middle", "deep"))):
            assert torch.equal(model(**batch.inputs).logits, dense)


@torch.no_grad()
def test_layers_are_no_longer_watched_once_all_is_decided() -> None:
    class Recording:
        """The policy, remembering its decisions."""

        def __init__(self, policy: VisiPruner):
            self.policy, self.decisions = policy, list[Decision]()

        def validate(self, num_layers: int) -> None:
            self.policy.validate(num_layers)

        def begin(self, prompt: Prompt) -> Decision:
            self.decisions.append(self.policy.begin(prompt))
            return self.decisions[-1]

    model, chosen = build(), replace(settings_of(("middle",)), layer_threshold=1.0)
    batch = collate(prompts(), "left")
    policy = Recording(policy_of(chosen))
    with attach(model, policy, vision_mask=batch.vision) as att:
        model(**batch.inputs)
        assert {record.fusion_layer for record in att.trace} == {3, None}
    assert policy.decisions[0].watch == set()


# ---------------------------------------------------------------- chunks, several queries


def run_in_chunks(
    model: LlamaForCausalLM, batch: Batch, sizes: list[int]
) -> tuple[list[Tensor], list[Any], Any]:
    """Logits and trace of each chunk, and the cache, of a prompt that comes in pieces."""
    logits, traces, cache, start = [], [], None, 0
    for size in sizes:
        end = start + size

        def here(start: int = start, end: int = end, **arguments: Tensor | None) -> Tensor:
            return batch.vision[:, start:end]

        with attach(model, policy_of(settings_of(("middle", "deep"))), vision_mask=here) as att:
            out = model(
                inputs_embeds=batch.inputs_embeds[:, start:end],
                attention_mask=batch.attention_mask[:, :end],
                past_key_values=cache,
                use_cache=True,
            )
            traces.append(att.trace[0] if att.trace else None)  # none of a chunk without vision
        cache, start = out.past_key_values, end
        logits.append(out.logits)
    return logits, traces, cache


def single(sample: tuple[Tensor, Tensor]) -> Batch:
    embeds, mask = sample
    real = torch.ones(1, len(mask), dtype=torch.long)
    return Batch(embeds[None], real, mask[None], [0], [len(mask)])


@torch.no_grad()
def test_chunked_prefill_decides_as_of_what_has_come() -> None:
    """A chunk with the image and some text is decided like a prompt of that length; the rest sees what is left."""
    model = build()
    embeds, mask = prompts()[0]  # t3 v12 t4
    run = oracle(model).run(embeds[:17].numpy(), mask[:17].numpy(), settings_of(("middle", "deep")), 1)
    assert run.fusion_layer is not None and run.margin > 1e-4
    logits, traces, cache = run_in_chunks(model, single((embeds, mask)), [17, 2])
    assert (traces[0].fusion_layer, traces[0].kept, traces[0].tokens) == (
        run.fusion_layer,
        run.kept,
        run.tokens,
    )
    np.testing.assert_allclose(logits[0][0, -1].double().numpy(), run.logits[0], atol=2e-5)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [n + 2 for n in run.tokens]
    _, one_by_one, other = run_in_chunks(model, single((embeds, mask)), [17, 1, 1])
    for layer, again in zip(cache.layers, other.layers, strict=True):
        torch.testing.assert_close(layer.keys, again.keys, rtol=0, atol=1e-5)
    assert one_by_one[0].kept == run.kept


@torch.no_grad()
def test_a_chunk_that_ends_inside_an_image_is_left_whole() -> None:
    """Its last row is a vision token; the next chunk decides on the image's rest alone."""
    model = build()
    batch = single(prompts()[0])
    dense = model(**batch.inputs).logits
    logits, traces, _ = run_in_chunks(model, batch, [9, 10])
    assert traces[0].tokens == [9] * 10 and traces[0].fusion_layer is None
    torch.testing.assert_close(logits[0], dense[:, :9], rtol=0, atol=1e-5)
    fused = traces[1].fusion_layer
    assert fused is not None and traces[1].tokens[: fused + 1] == [10] * (fused + 1)
    assert set(traces[1].kept) <= set(range(6))  # positions in its own chunk


@torch.no_grad()
def test_what_any_of_several_queries_needs_is_kept() -> None:
    """Two prompts' ends in one row: least cosine and largest norm over both decide, as the settled rule says."""
    model = build()
    embeds, mask = prompts()[0]
    batch = single((embeds, mask))
    found = {}
    with attach(model, VisionSchedule(), vision_mask=batch.vision) as att:
        for name, rows in (("first", [16]), ("last", [18]), ("both", [16, 18])):
            policy = VisiPruner(boundary=2, layer_threshold=0.999, tokens_threshold=0.2, stages=("middle",))
            with att.using(policy), att.queries(torch.tensor([rows])):
                model(**batch.inputs)
                found[name] = att.trace[0]
    layers = {name: record.fusion_layer for name, record in found.items()}
    assert None not in layers.values()
    assert layers["both"] == min(layers["first"], layers["last"])
    same = [found[name] for name in ("first", "last") if layers[name] == layers["both"]]
    assert same and all(set(record.kept) <= set(found["both"].kept) for record in same)
    assert len(found["both"].kept) > min(len(found["first"].kept), len(found["last"].kept))
