"""The training-free relatives against plain loops over the stock model's own attention maps and embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import FAMILIES, HYBRID_FAMILIES, LAYERS, prompt, shared, text_tokens, vision_tokens
from helpers.oracle import attending, band, masked
from torch import Tensor

from latefusion.models.attach import attach
from latefusion.models.policies.base import Policy
from latefusion.models.policies.divprune import DivPrune
from latefusion.models.policies.fastv import FastV
from latefusion.models.policies.pyramiddrop import PyramidDrop
from latefusion.models.policies.random import Random
from latefusion.models.policies.vtw import VTW

ROWS = ["t I tt", "tttt", "t I tt I t", "I t I t I t"]  # one image, none, several with text between
TOLERANCE = 5e-6  # logits are of order 1

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


# ---------------------------------------------------------------- what each paper would keep, in loops


def by_attention(eager: Any, inputs: dict[str, Any], keep_ratios: dict[int, float]) -> list[Tensor]:
    vision, real = vision_tokens(inputs), inputs["attention_mask"]
    seen = band(vision, LAYERS)
    for layer, ratio in keep_ratios.items():
        with masked(eager, vision, seen):
            every = eager(**inputs, use_cache=False, output_attentions=True).attentions
        maps = every[attending(eager).index(layer - 1)]
        chosen = torch.zeros_like(vision)
        for b in range(len(vision)):
            columns = seen[layer - 1][b].nonzero().flatten().tolist()
            last = int(real[b].nonzero().max())
            score = {t: sum(maps[b, h, last, t].item() for h in range(maps.shape[1])) for t in columns}
            k = max(1, round(ratio * int(vision[b].sum())))
            ordered = sorted(score, key=lambda t: -score[t])
            if 0 < k < len(ordered):
                least, next_ = (
                    score[ordered[k - 1]],
                    score[ordered[k]],
                )  # both 0 beyond a window: the earlier one stays
                assert least - next_ > 1e-6 or least == next_ == 0, "a decision hangs on rounding"
            chosen[b, ordered[:k]] = True
        seen[layer:] = [chosen] * (LAYERS - layer)
    return seen


def by_diversity(eager: Any, inputs: dict[str, Any], ratio: float) -> list[Tensor]:
    caught: list[Tensor] = []
    handle = (
        eager.get_decoder()
        .layers[0]
        .register_forward_pre_hook(lambda module, args, kwargs: caught.append(args[0]), with_kwargs=True)
    )
    eager(**inputs, use_cache=False)
    handle.remove()
    vision = vision_tokens(inputs)
    chosen = torch.zeros_like(vision)
    for b in range(len(vision)):
        columns = vision[b].nonzero().flatten().tolist()
        rows = {t: caught[0][b, t].double().numpy() for t in columns}

        def distance(s: int, t: int, rows: dict[int, Any] = rows) -> float:
            return 1 - rows[s] @ rows[t] / np.linalg.norm(rows[s]) / np.linalg.norm(rows[t])

        picked: list[int] = []
        while columns and len(picked) < max(1, round(ratio * len(columns))):
            rest = [t for t in columns if t not in picked]
            gap = {t: min(distance(s, t) for s in (picked or [s for s in columns if s != t])) for t in rest}
            picked.append(
                max(rest, key=lambda t: (round(gap[t], 6), -t))
            )  # the first two are each other's nearest
        chosen[b, picked] = True
    return [chosen] * LAYERS


CASES: dict[str, tuple[Policy, Callable[[Any, dict[str, Any]], list[Tensor]]]] = {
    "fastv": (
        FastV(layer=2, keep_ratio=0.4),
        lambda eager, inputs: by_attention(eager, inputs, {2: 0.4}),
    ),
    "pyramiddrop": (
        PyramidDrop(keep_ratios={1: 0.75, 3: 0.5, 4: 0.2}),
        lambda eager, inputs: by_attention(eager, inputs, {1: 0.75, 3: 0.5, 4: 0.2}),
    ),
    "vtw": (VTW(layer=3), lambda eager, inputs: band(vision_tokens(inputs), LAYERS, exit=3)),
    "divprune": (DivPrune(keep_ratio=0.4), lambda eager, inputs: by_diversity(eager, inputs, 0.4)),
}


HYBRID_CASES = CASES | {  # stages begin after softmax layers
    "pyramiddrop": (
        PyramidDrop(keep_ratios={2: 0.75, 4: 0.3}),
        lambda eager, inputs: by_attention(eager, inputs, {2: 0.75, 4: 0.3}),
    ),
}


@torch.no_grad()
def check(family: str, name: str, side: str, attention: str) -> None:
    policy, reference = (HYBRID_CASES if family in HYBRID_FAMILIES else CASES)[name]
    inputs, eager = prompt(family, ROWS, side), shared(family, "eager")
    vision, text = vision_tokens(inputs), text_tokens(inputs)
    seen = reference(eager, inputs)
    with attach(shared(family, attention), policy) as att:
        logits = att.model(**inputs, use_cache=False).logits
        trace = att.trace
    for b, record in enumerate(trace):
        assert record.tokens == [int(text[b].sum() + layer[b].sum()) for layer in seen]
        if record.kept is not None:
            fewest = next(layer[b] for layer in reversed(seen) if layer[b].any())
            assert record.kept == fewest.nonzero().flatten().tolist()
    with masked(eager, vision, seen):
        assert (logits - eager(**inputs, use_cache=False).logits)[text].abs().max() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_rankings_on_every_family(family: str) -> None:
    check(family, "fastv", "left", "sdpa")
    check(family, "divprune", "left", "sdpa")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CASES)
def test_decides_and_computes_as_the_paper_says(name: str, side: str) -> None:
    check("llava", name, side, "sdpa")


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_everywhere(family: str, name: str, side: str, attention: str) -> None:
    check(family, name, side, attention)


# ---------------------------------------------------------------- random


@torch.no_grad()
def kept_at_random(policy: Random, rows: list[str]) -> list[list[int] | None]:
    model, inputs = shared("llava"), prompt("llava", rows)
    with attach(model, policy) as att:
        logits = model(**inputs, use_cache=False).logits
        kept, tokens = [record.kept for record in att.trace], [record.tokens for record in att.trace]
    vision, text, chosen = vision_tokens(inputs), text_tokens(inputs), torch.zeros_like(vision_tokens(inputs))
    for b, positions in enumerate(kept):
        chosen[b, positions or []] = True
        assert tokens[b][policy.layer :] == [int(text[b].sum()) + len(positions or [])] * (
            LAYERS - policy.layer
        )
    seen = [vision] * policy.layer + [chosen] * (LAYERS - policy.layer)
    with masked(model, vision, seen, padding=inputs["attention_mask"]):
        assert (logits - model(**inputs, use_cache=False).logits)[text].abs().max() < TOLERANCE
    return kept


@pytest.mark.parametrize("layer", [0, 2])
def test_random_is_a_function_of_the_prompt_and_the_seed(layer: int) -> None:
    policy = Random(layer=layer, keep_ratio=0.5)
    together = kept_at_random(policy, ROWS)
    assert [len(kept or []) for kept in together] == [2, 0, 4, 6]
    longest = max(len(row.replace(" ", "")) + 3 * row.count("I") for row in ROWS)
    for row, kept in zip(ROWS, together, strict=True):
        pad = longest - (len(row.replace(" ", "")) + 3 * row.count("I"))
        alone = kept_at_random(policy, [row])[0] if "I" in row else None
        assert kept == (None if alone is None else [pad + i for i in alone])


def test_random_seeds_spread_over_all_tokens() -> None:
    chosen = [kept_at_random(Random(keep_ratio=0.25, seed=seed), ["t I tt I t"])[0] for seed in range(24)]
    assert len({tuple(kept or ()) for kept in chosen}) > 12
    assert {i for kept in chosen for i in kept or ()} == {1, 2, 3, 4, 7, 8, 9, 10}


# ---------------------------------------------------------------- at the edges


@torch.no_grad()
def test_equal_tokens_are_chosen_once() -> None:
    """Patches of an empty background are all alike; DivPrune must still keep as many as it promised."""
    from latefusion.models.policies.divprune import diverse

    tokens = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1], [1, 0]])[None]
    real = torch.tensor([[True, True, True, True, False]])
    assert diverse(tokens, real, [3])[0].tolist() == [True, True, False, True, False]
    assert diverse(tokens.expand(2, -1, -1), real.expand(2, -1), [4, 1]).sum(1).tolist() == [4, 1]


@torch.no_grad()
def test_the_token_that_answers_is_never_dropped() -> None:
    model, inputs = shared("llava"), prompt("llava", ["tt I"])
    for policy in (FastV(layer=2, keep_ratio=0.25), PyramidDrop(keep_ratios={2: 0.5, 3: 0.25})):
        with attach(model, policy) as att:
            model(**inputs)
            assert att.trace[0].kept == [5]


@torch.no_grad()
def test_what_one_of_several_queries_attends_to_stays() -> None:
    """With two prompts' ends in a row, tokens are ranked by the most that either pays them."""
    inputs = prompt("llava", ["t I I ttt"])
    vision, length = vision_tokens(inputs)[0].nonzero().flatten().tolist(), inputs["input_ids"].shape[1]
    rows = [length - 2, length - 1]
    maps = (
        shared("llava", "eager")(**inputs, use_cache=False, output_attentions=True).attentions[1][0].mean(0)
    )

    def best(queries: list[int]) -> list[int]:
        most = {i: max(maps[row, i].item() for row in queries) for i in vision}
        return sorted(sorted(vision, key=lambda i: -most[i])[:5])

    assert best(rows) not in (best(rows[:1]), best(rows[1:])), "either alone would keep the same"
    with attach(shared("llava"), FastV(layer=2, keep_ratio=0.6)) as att, att.queries(torch.tensor([rows])):
        att.model(**inputs)
        assert att.trace[0].kept == best(rows)


@torch.no_grad()
def test_bfloat16_ranks_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    from latefusion.models.policies import divprune, ranking

    seen = []
    best, normalize = ranking.best, divprune.normalize
    monkeypatch.setattr(
        ranking, "best", lambda scores, *rest: (seen.append(scores.dtype), best(scores, *rest))[1]
    )
    monkeypatch.setattr(
        divprune, "normalize", lambda x, dim: (seen.append(x.dtype), normalize(x, dim=dim))[1]
    )
    model = shared("llava_qwen2").bfloat16()
    inputs = prompt("llava_qwen2", ROWS)
    features = inputs["mm_encoder_outputs"]["image"]
    features.pooler_output = [row.bfloat16() for row in features.pooler_output]
    try:
        for policy in (FastV(), DivPrune(keep_ratio=0.5)):
            with attach(model, policy):
                assert model(**inputs).logits.isfinite().all()
    finally:
        model.float()
        shared.cache_clear()
    assert seen == [torch.float32] * 2


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: FastV(layer=0), "layer=0 must be 1 or above"),
        (lambda: FastV(keep_ratio=0), "keep_ratio=0 is the share of vision tokens to keep"),
        (
            lambda: FastV(layer=6).validate(6),
            "layer=6 is beyond a decoder with layers 0 to 5; choose at most 5",
        ),
        (lambda: PyramidDrop(keep_ratios={}), "drops nothing"),
        (lambda: PyramidDrop(keep_ratios={0: 0.5}), "names layer 0"),
        (lambda: PyramidDrop(keep_ratios={2: 0.5, 4: 0.6}), r"keep_ratios\[4\]=0.6 grows from 0.5"),
        (lambda: PyramidDrop(keep_ratios={2: 1.5}), r"keep_ratios\[2\]=1.5 is the share"),
        (lambda: PyramidDrop().validate(16), "a layer of keep_ratios=16 is beyond"),
        (lambda: VTW(layer=0), "layer=0 leaves no layer that sees vision tokens"),
        (lambda: VTW(layer=9).validate(9), "layer=9 is beyond"),
        (lambda: Random(layer=-1), "layer=-1 must not be negative"),
        (lambda: Random(keep_ratio=2), "keep_ratio=2 is the share"),
        (lambda: DivPrune(keep_ratio=-0.1), "keep_ratio=-0.1 is the share"),
    ],
)
def test_bad_settings_are_one_sentence(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        make()
    assert "\n" not in str(error.value)
