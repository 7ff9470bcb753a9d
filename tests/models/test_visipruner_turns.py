"""VisiPruner over several forwards: second prompts and turns, beams, chunks; several queries in one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from helpers.visipruner_prompts import (
    NEW_TOKENS,
    PROMPTS,
    STAGES,
    Batch,
    build,
    check_trace,
    collate,
    generate,
    oracle,
    policy_of,
    prompts,
    references,
    settings_of,
    single,
)
from torch import Tensor
from transformers import LlamaForCausalLM

from latefusion.models.attach import attach
from latefusion.models.policies.visipruner.settings import VisiPruner
from latefusion.models.schedule import VisionSchedule


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
    kept = {}
    with attach(model, VisionSchedule(), vision_mask=batch.vision) as att:
        for name, rows in (("first", [16]), ("last", [18]), ("both", [16, 18])):
            policy = VisiPruner(boundary=2, layer_threshold=0.999, tokens_threshold=0.2, stages=("middle",))
            with att.using(policy), att.queries(torch.tensor([rows])):
                model(**batch.inputs)
                kept[name] = att.trace[0]
    layers = {name: record.fusion_layer for name, record in kept.items()}
    assert None not in layers.values()
    assert layers["both"] == min(layers["first"], layers["last"])
    same = [kept[name] for name in ("first", "last") if layers[name] == layers["both"]]
    assert same and all(set(record.kept) <= set(kept["both"].kept) for record in same)
    assert len(kept["both"].kept) > min(len(kept["first"].kept), len(kept["last"].kept))
