"""Frozen vision tokens (`VisionSchedule(cross=...)`) against a full-length model whose vision rows are put back."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from helpers.families import (
    FAMILIES,
    LAYERS,
    MIXED,
    TOLERANCE,
    build,
    close,
    continued,
    gradient_tolerance,
    prompt,
    shared,
    softmax,
    text_tokens,
    vision_tokens,
)
from helpers.flop_counter import N_TEXT, N_VISION, counted_flops, flops_prompt, llama_config
from helpers.forwards import generate, gradients, gradients_checkpointed, ranking_rows
from helpers.oracle import gone_afterwards, masked
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from latefusion import VisionSchedule
from latefusion.models.attach import attach, attached
from latefusion.models.flops import account
from latefusion.models.student.entry import CalibratedEntry, install_entry
from latefusion.models.student.entry_fit import installed

CROSS = [(1, 3, 4), (0, 2), (0, 5)]

# a second implementation, and gradients, where a family is different; elsewhere in the slow tier
SPECIAL = ("llava", "gemma3", "paligemma", "qwen3_vl", "lfm2_vl", "qwen3_5")
EVERY = [
    pytest.param(
        family, attention, marks=[] if attention == "sdpa" or family in SPECIAL else pytest.mark.slow
    )
    for family in FAMILIES
    for attention in ("sdpa", "eager")
]
SOME = [
    pytest.param(
        family, attention, marks=[] if family in SPECIAL and attention == "sdpa" else pytest.mark.slow
    )
    for family in FAMILIES
    for attention in ("sdpa", "eager")
]
WITHOUT_MASK = [
    pytest.param(family, marks=[] if family in SPECIAL else pytest.mark.slow) for family in FAMILIES
]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def layers_of(family: str, cross: tuple[int, ...]) -> tuple[int, ...]:
    """Layers that read: in a hybrid, those that attend with a softmax."""
    return tuple(sorted({softmax(family, layer) for layer in cross}))


def seen_at(vision: torch.Tensor, cross: tuple[int, ...]) -> list[torch.Tensor]:
    return [vision if i in cross else torch.zeros_like(vision) for i in range(LAYERS)]


@pytest.mark.parametrize(("family", "attention"), EVERY)
def test_frozen_tokens_equal_the_model_that_puts_them_back(family: str, attention: str) -> None:
    model = shared(family, attention)
    for side, cross in (("left", CROSS[0]), ("left", CROSS[1]), ("right", CROSS[2])):
        cross = layers_of(family, cross)
        inputs = prompt(family, MIXED, side)
        vision, text = vision_tokens(inputs), text_tokens(inputs)
        with torch.no_grad():
            hide = masked(
                model, vision, seen_at(vision, cross), padding=inputs["attention_mask"], frozen=True
            )
            with hide:
                expected = model(**inputs, use_cache=False).logits[text]
            with attach(model, VisionSchedule(cross=cross)):
                assert close(model(**inputs, use_cache=False).logits[text], expected)
                assert close(model(**inputs, use_cache=True).logits[text], expected)


@pytest.mark.parametrize("family", WITHOUT_MASK)
def test_without_padding_there_is_no_mask_to_start_from(family: str) -> None:
    model, inputs, cross = shared(family), prompt(family, ["tt I ttt", "t I tttt"]), layers_of(family, (1, 4))
    vision, text = vision_tokens(inputs), text_tokens(inputs)
    with torch.no_grad():
        with masked(model, vision, seen_at(vision, cross), padding=inputs["attention_mask"], frozen=True):
            expected = model(**inputs, use_cache=False).logits[text]
        with attach(model, VisionSchedule(cross=cross)):
            assert close(model(**inputs, use_cache=False).logits[text], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_reads_what_the_prefill_left(family: str) -> None:
    model, inputs, cross = shared(family), prompt(family, MIXED), layers_of(family, (1, 3, 4))
    with torch.no_grad():
        with attach(model, VisionSchedule(cross=cross)):
            out = generate(model, inputs)
        new = out.sequences[:, inputs["input_ids"].shape[1] :]
        longer = continued(family, inputs, new)
        vision = torch.nn.functional.pad(vision_tokens(inputs), (0, new.shape[1]))
        with masked(model, vision, seen_at(vision, cross), padding=longer["attention_mask"], frozen=True):
            expected = model(**longer, use_cache=False).logits[:, -new.shape[1] - 1 : -1]
    assert close(torch.stack(out.logits, 1), expected)


@pytest.mark.parametrize(("family", "attention"), SOME)
def test_gradients_reach_weights_and_image(family: str, attention: str) -> None:
    """With the same ones under gradient checkpointing, which computes each layer a second time."""
    model, inputs = shared(family, attention), prompt(family, MIXED, "right")
    cross = layers_of(family, (1, 2, 4))
    vision = vision_tokens(inputs)
    with masked(model, vision, seen_at(vision, cross), padding=inputs["attention_mask"], frozen=True):
        expected, expected_loss = gradients(model, inputs)
    with attach(model, VisionSchedule(cross=cross)):
        (grads, loss), (again, _) = gradients(model, inputs), gradients_checkpointed(model, inputs)
    assert grads.keys() == expected.keys()
    scale = max(1.0, *(grad.abs().max().item() for grad in expected.values()))
    assert all(close(grads[name], expected[name], gradient_tolerance(family) * scale) for name in grads)
    assert abs(loss - expected_loss) <= TOLERANCE and all(torch.equal(grads[n], again[n]) for n in grads)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keeps_rank_by_what_was_read(attention: str) -> None:
    model, inputs, cross = shared("llava", attention), prompt("llava", MIXED), (1, 2, 4)
    vision, text = vision_tokens(inputs), text_tokens(inputs)
    schedule = VisionSchedule(cross=cross, keep={2: 3, 4: 2})
    with torch.no_grad(), attach(model, schedule) as attachment:
        logits, trace = model(**inputs).logits[text], attachment.trace
    seen = seen_at(vision, cross)
    for layer in (2, 4):
        chosen = torch.zeros_like(vision)
        for record in trace:
            assert record.vision[layer] == min(schedule.keep[layer], record.n_vision)
        scores = ranked_frozen(inputs, vision, seen, [i for i in cross if i < layer])
        for b in range(len(vision)):
            left = [t for t in seen[1 if layer == 2 else 2][b].nonzero().flatten().tolist()]
            for t in sorted(left, key=lambda t: (-scores[b][t], t))[: schedule.keep[layer]]:
                chosen[b, t] = True
        seen[layer] = chosen
    assert [record.kept for record in trace if record.n_vision] == [
        row.nonzero().flatten().tolist() for row in seen[4] if row.any()
    ]
    with torch.no_grad(), masked(model, vision, seen, padding=inputs["attention_mask"], frozen=True):
        assert close(logits, model(**inputs, use_cache=False).logits[text])


def ranked_frozen(
    inputs: dict[str, Any], vision: torch.Tensor, seen: list[torch.Tensor], layers: list[int]
) -> list[dict[int, float]]:
    """Per sample, the largest share that a token had in what a head of an asking row reads, in loops."""
    eager = shared("llava", "eager")
    score: list[dict[int, float]] = [{} for _ in vision]
    for layer in layers:
        attention = eager.get_decoder().layers[layer].self_attn
        values: dict[str, torch.Tensor] = {}
        handle = attention.v_proj.register_forward_hook(lambda m, a, out, values=values: values.update(v=out))
        with masked(eager, vision, seen, frozen=True), torch.no_grad():
            maps = eager(**inputs, use_cache=False, output_attentions=True).attentions[layer]
        handle.remove()
        value = values["v"].unflatten(-1, (-1, attention.head_dim))  # [B, T, Hkv, D]
        group = maps.shape[1] // value.shape[2]
        for b, rows in enumerate(ranking_rows(inputs)):
            tokens = seen[layer][b].nonzero().flatten().tolist()
            for h in range(maps.shape[1]):
                for q in rows:
                    read = {
                        t: (maps[b, h, q, t] * value[b, t, h // group]).norm().item() ** 2 for t in tokens
                    }
                    for t in tokens:
                        score[b][t] = max(score[b].get(t, 0.0), read[t] / sum(read.values()))
    return score


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_the_entry_adapter_maps_them_once(family: str) -> None:
    model, inputs, cross = build(family), prompt(family, MIXED), (2, 4)
    entry = install_entry(model, rank=4)
    with torch.no_grad():
        for weight in entry.parameters():
            weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    vision, text = vision_tokens(inputs), text_tokens(inputs)
    with torch.no_grad():
        with masked(
            model,
            vision,
            seen_at(vision, cross),
            padding=inputs["attention_mask"],
            frozen=True,
            entry=entry,
        ):
            del model._modules["vision_entry"]
            expected = model(**inputs, use_cache=False).logits[text]
        model.add_module("vision_entry", entry)
        with attach(model, VisionSchedule(cross=cross)):
            assert close(model(**inputs).logits[text], expected)


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen3_vl"])
@pytest.mark.parametrize("keep", [{}, {3: 3}])
@pytest.mark.parametrize("rank", [None, 5])
def test_they_move_on_to_each_layer_that_reads_them(
    family: str, keep: dict[int, int], rank: int | None
) -> None:
    """By a map of each place and layer: rows of no, one and two images, through layers that do not read between."""
    model, inputs, cross = build(family), prompt(family, MIXED), (1, 3, 4)
    vision, text = vision_tokens(inputs), text_tokens(inputs)
    entry = CalibratedEntry(hidden_size=32, places=4, later=cross[1:], later_rank=rank)
    generator = torch.Generator().manual_seed(0)
    for name, value in entry.state_dict().items():
        value.normal_(0, 0.5 if name.endswith("bias") else 0.2, generator=generator)

    def moved(fitted: Any, rows: torch.Tensor) -> torch.Tensor:
        low = hasattr(fitted, "up")
        weight = torch.eye(32) + fitted.down @ fitted.up if low else fitted.weight
        out = rows.clone()
        for b in range(len(rows)):
            for n, t in enumerate(vision[b].nonzero().flatten().tolist()):
                out[b, t] = rows[b, t] @ weight + fitted.bias[n % 4]
        return out

    def before(layer: Any, args: tuple, fitted: Any) -> tuple:
        return (moved(fitted, args[0]), *args[1:])

    with torch.no_grad():
        with installed(model, entry), attach(model, VisionSchedule(cross=cross, keep=keep)) as attachment:
            logits, trace = model(**inputs).logits[text], attachment.trace
        seen = seen_at(vision, cross)
        for layer in (3, 4) if keep else ():
            seen[layer] = torch.zeros_like(vision)
            for b, record in enumerate(trace):
                seen[layer][b, record.kept or []] = True
        hide = masked(
            model, vision, seen, padding=inputs["attention_mask"], frozen=True, entry=partial(moved, entry)
        )
        with hide:
            layers = model.get_decoder().layers
            handles = [
                layers[i].register_forward_pre_hook(partial(before, fitted=entry.later[str(i)]))
                for i in cross[1:]
            ]
            with gone_afterwards(handles):
                assert close(logits, model(**inputs, use_cache=False).logits[text])


def test_gradients_pass_the_maps_between_layers() -> None:
    """To the entry adapter before them, with the same ones under gradient checkpointing."""
    model, inputs = build("llava"), prompt("llava", MIXED, "right")
    entry = install_entry(model, 4, 4, (3, 4))
    assert entry.start is not None
    for fitted in (entry.start, *entry.start.later.values()):
        fitted.weight.add_(0.1 * torch.randn(32, 32, generator=torch.Generator().manual_seed(1)))
    with attach(model, VisionSchedule(cross=(1, 3, 4))):
        (grads, _), (again, _) = gradients(model, inputs), gradients_checkpointed(model, inputs)
    assert float(grads["vision_entry.scale"].abs().max()) > 0
    assert all(torch.equal(grads[name], again[name]) for name in grads)


def test_lora_around_the_projections_works_on_text_rows_alone() -> None:
    """Attached before and after PEFT put its layers around the linear ones."""
    inputs, cross = prompt("llava", MIXED), (1, 4)
    vision, text = vision_tokens(inputs), text_tokens(inputs)
    seen_rows = []
    for first in (True, False):
        model = build("llava")
        schedule = VisionSchedule(cross=cross)
        if first:
            attach(model, schedule)
        student = get_peft_model(
            model, LoraConfig(r=2, target_modules="all-linear", exclude_modules=".*tower.*")
        )
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for name, weight in student.named_parameters():
                if "lora_" in name:
                    weight.normal_(0, 0.3, generator=generator)
        if not first:
            attach(student, schedule)
        rows: dict[str, int] = {}

        def note(name: str, rows: dict[str, int], module: Any, args: tuple, output: Any) -> None:
            rows[name] = args[0].shape[1]

        for name, module in student.named_modules():
            if "layers.1." in name and name.endswith("lora_A.default"):
                module.register_forward_hook(partial(note, name.split(".")[-3], rows))
        with torch.no_grad():
            seen_rows.append(student(**inputs).logits[text])
        longest, most_text = 12, 5
        assert rows == {
            **dict.fromkeys(("k_proj", "v_proj"), longest),
            **dict.fromkeys(("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), most_text),
        }
    attachment = attached(student)
    assert attachment is not None
    attachment.detach()
    with (
        torch.no_grad(),
        masked(
            student.get_base_model(),
            vision,
            seen_at(vision, cross),
            padding=inputs["attention_mask"],
            frozen=True,
        ),
    ):
        expected = student(**inputs, use_cache=False).logits[text]
    assert all(close(logits, expected) for logits in seen_rows)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kv_heads", [4, 1], ids=["mha", "gqa"])
def test_flops_are_those_of_a_real_run(kv_heads: int, attention: str) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(kv_heads, attention)).eval()
    inputs_embeds, vision = flops_prompt()
    for schedule in (VisionSchedule(cross=(0, 2, 3)), VisionSchedule(cross=(1, 3, 5), keep={5: 10})):
        with attach(model, schedule, vision_mask=vision) as attachment:
            measured = counted_flops(model, inputs_embeds)
            record = attachment.trace[0]
        assert schedule.flops(model.config, N_TEXT, N_VISION) == pytest.approx(measured, rel=0.01)
        counted = account(model.config, [record])
        assert counted.flops == schedule.flops(model.config, N_TEXT, N_VISION) - schedule.ranking_flops(
            model.config, N_TEXT, record.vision
        )
        after = N_TEXT - 10  # text after the image
        assert counted.attention == after * sum(record.vision)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_chunks_give_the_same(family: str) -> None:
    model, inputs = build(family), prompt(family, MIXED)
    with torch.no_grad(), attach(model, VisionSchedule(cross=(1, 3, 4))):
        whole = generate(model, copy.deepcopy(inputs))
        parts = generate(model, copy.deepcopy(inputs), prefill_chunk_size=5)
    assert close(torch.stack(whole.logits), torch.stack(parts.logits))


def test_the_cache_holds_keys_in_the_layers_that_read() -> None:
    model, inputs = build("llava"), prompt("llava", ["tt I ttt"])
    with torch.no_grad(), attach(model, VisionSchedule(cross=(1, 4))):
        cache = model(**inputs).past_key_values
    assert [layer.keys.shape[-2] for layer in cache.layers] == [5, 9, 5, 5, 9, 5]


def test_a_deep_copy_and_a_detached_model_are_their_own() -> None:
    model, inputs = build("llava"), prompt("llava", MIXED)
    with torch.no_grad():
        dense = model(**inputs).logits
        with attach(model, VisionSchedule(cross=(1, 4))):
            expected = model(**inputs).logits
            twin = copy.deepcopy(model)
            assert torch.equal(twin(**inputs).logits, expected)
        assert torch.equal(model(**inputs).logits, dense)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.get_decoder().modules())
        assert not any("forward" in vars(module) for module in model.modules())
        assert torch.equal(twin(**inputs).logits, expected)


def test_an_error_inside_the_attention_leaves_nothing_behind() -> None:
    model, inputs = build("llava"), prompt("llava", MIXED)

    class Broken(Exception):
        pass

    def broken(*args: Any) -> None:
        raise Broken

    with torch.no_grad(), attach(model, VisionSchedule(cross=(1, 4))):
        expected = model(**inputs).logits
        handle = model.get_decoder().layers[1].self_attn.o_proj.register_forward_pre_hook(broken)
        with pytest.raises(Broken):
            model(**inputs)
        handle.remove()
        layer, rows = model.get_decoder().layers[1], torch.randn(3, 12, 32)
        for part in (layer.self_attn.q_proj, layer.mlp):
            assert torch.equal(part(rows), part.forward(rows))  # whole rows again
        assert torch.equal(model(**inputs).logits, expected)
    assert not layer.self_attn.q_proj._forward_pre_hooks


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cross": [-1, 2]}, r"^cross=\[-1, 2\] names layer -1; layers count from 0\.$"),
        ({"cross": [2, 4], "enter": 1}, r"^cross=\[2, 4\] says where .* contradicts enter=1, exit=None"),
        ({"cross": [2, 4], "exit": 6}, r"contradicts enter=0, exit=6: leave those out\.$"),
        ({"cross": [2, 4], "keep": {3: 5}}, r"^keep names layer 3, which cross=\[2, 4\] does not read"),
        ({"cross": [2, 4], "keep": {2: 5}}, r"^keep=\{2: 5\} must lie after enter=2"),
    ],
)
def test_contradictions_are_one_sentence(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionSchedule(**values)


def test_it_says_what_it_is() -> None:
    schedule = VisionSchedule(cross=[4, 1, 4], keep={4: 2})
    assert (schedule.cross, schedule.enter, schedule.exit) == ((1, 4), 1, 5)
    assert schedule.vision_tokens(6, 9) == [0, 9, 0, 0, 2, 0]
    assert VisionSchedule.from_dict(schedule.to_dict()) == schedule
    assert VisionSchedule().to_dict() == {"enter": 0, "exit": None, "keep": {}}
    with pytest.raises(ValueError, match=r"^cross names layer 4, .* choose at most 3"):
        schedule.validate(4)
    with pytest.raises(
        ValueError, match=r"^cross=\[1, 4\] has no band that could narrow; use train\.narrow=0"
    ):
        schedule.widened(0.5, 6)


def test_kernels_that_come_later_compute_the_text_rows_alone() -> None:
    """As Liger's do, which a trainer puts in place of a module's `forward`."""
    model, inputs = build("llava"), prompt("llava", MIXED)
    layer = model.get_decoder().layers[1]
    parts = (layer.mlp, layer.self_attn.q_proj, layer.self_attn.o_proj, layer.self_attn)
    with torch.no_grad(), attach(model, VisionSchedule(cross=(1, 4))):
        expected = model(**inputs).logits
        for part in parts:
            part.forward = type(part).forward.__get__(part)
        assert torch.equal(model(**inputs).logits, expected)
