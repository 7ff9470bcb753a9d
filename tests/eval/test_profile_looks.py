"""Attention, contribution, lenses and the search against plain code: loops over eager attention maps."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from helpers.families import HYBRID_FAMILIES, LAYERS, VOCAB, prompt, shared, text_tokens, vision_tokens
from helpers.oracle import recurrence

from latefusion.eval.fusion import decide, looks, plan
from latefusion.eval.fusion.effects import by_image, interval, upper_limit
from latefusion.eval.fusion.looks import Watch, fusion_layer, look
from latefusion.models.attach import attach
from latefusion.models.schedule import VisionSchedule

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ROWS = ["tt I I ttt", "t I ttt"]


@pytest.fixture(scope="module")
def seen():
    """The watch of an sdpa model, and what the same weights' eager attention says."""
    inputs = prompt("llava", ROWS, side="right")
    last = inputs["attention_mask"].sum(1) - 1
    eager, values = shared("llava", "eager"), {}
    handles = [
        layer.self_attn.v_proj.register_forward_hook(lambda m, a, out, i=i: values.update({i: out.detach()}))
        for i, layer in enumerate(eager.get_decoder().layers)
    ]
    with torch.no_grad():
        plain = eager(**inputs, output_attentions=True, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    watch, model = Watch(), shared("llava")
    layers = model.get_decoder().layers
    with (
        attach(model, watch),
        torch.no_grad(),
        looks.states_at(layers, last) as states,
        looks.written_at(layers, last) as heads,
    ):
        logits = model(**inputs).logits
    torch.testing.assert_close(
        logits[text_tokens(inputs)], plain.logits[text_tokens(inputs)], atol=1e-5, rtol=1e-5
    )
    return inputs, last, watch, states, plain, values, heads


def head_value(values: torch.Tensor, b: int, t: int, h: int) -> np.ndarray:
    """Value vector that head h of 4 reads from token t; two heads share one."""
    return values[b, t].view(2, 8)[h // 2].numpy().astype(np.float64)


def test_looks_equal_loops_over_attention_maps(seen) -> None:
    inputs, last, watch, _, plain, values, _ = seen
    vision = vision_tokens(inputs)
    for layer, b in itertools.product(range(LAYERS), range(2)):
        observed, q, n = watch.looks[layer][b], int(last[b]), int(last[b]) + 1
        maps = plain.attentions[layer][b, :, q].numpy().astype(np.float64)  # [H, T]
        places = vision[b].nonzero().flatten().tolist()
        weights = [maps[:, t].mean() for t in places]
        assert observed.share == pytest.approx(sum(weights), rel=1e-4)
        p = np.array(weights) / sum(weights)
        assert observed.entropy == pytest.approx(-sum(x * math.log(x) for x in p), rel=1e-4)
        held, count = 0.0, 0
        for x in sorted(p, reverse=True):
            held, count = held + x, count + 1
            if held >= 0.9:
                break
        assert observed.tokens == count
        parts = {
            t: np.concatenate([maps[h, t] * head_value(values[layer], b, t, h) for h in range(4)])
            for t in range(n)
        }
        whole = sum(parts.values())
        cosines = [
            np.dot(whole - parts[t], whole) / np.linalg.norm(whole - parts[t]) / np.linalg.norm(whole)
            for t in places
        ]
        norms = [np.linalg.norm(parts[t]) for t in places]
        assert observed.cosine == pytest.approx(
            [min(cosines), *np.quantile(cosines, [0.01, 0.1, 0.5])], abs=1e-4
        )
        assert observed.norm == pytest.approx([max(norms), *np.quantile(norms, [0.99, 0.9, 0.5])], rel=1e-3)
        sizes = [
            np.mean([np.abs(values[layer][b, t].view(2, 8)[g].numpy()).sum() for g in range(2)])
            for t in places
        ]
        ranks = [np.argsort(np.argsort(v)) for v in (weights, sizes)]
        assert observed.sink == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-5)


def test_even_attention_has_the_greatest_entropy_and_no_sink() -> None:
    even = torch.full((10,), 0.05)
    observed = look(even, torch.ones(10), torch.ones(10), torch.zeros(10))
    assert observed.share == pytest.approx(0.5) and observed.entropy == pytest.approx(math.log(10))
    assert observed.tokens in (9, 10) and observed.sink == 0.0


def test_vision_out_of_reach_draws_no_attention() -> None:
    """Behind the window of local attention: numbers, not NaN."""
    observed = look(torch.zeros(5), torch.rand(5), torch.ones(5), torch.zeros(5))
    assert (observed.share, observed.entropy, observed.tokens, observed.sink) == (0.0, 0.0, 0, 0.0)


def test_the_fusion_layer_is_the_first_below_the_threshold(seen) -> None:
    looks = [layer[0] for layer in seen[2].looks]
    minima = [observed.cosine[0] for observed in looks]
    threshold = sorted(minima)[2] + 1e-6
    assert fusion_layer(looks, threshold) == next(i for i, c in enumerate(minima) if c < threshold)
    assert fusion_layer(looks, -1.0) is None


def test_logit_lens_equals_the_head_on_recorded_states(seen) -> None:
    _, last, _, states, plain, *_ = seen
    model = shared("llava")
    for layer in range(LAYERS - 1):  # the last recorded state is normed already
        for b in range(2):
            state = plain.hidden_states[layer + 1][b, last[b]]
            normed = state / (state.square().mean() + model.config.text_config.rms_norm_eps).sqrt()
            scores = model.lm_head.weight @ (normed * model.get_decoder().norm.weight)
            lens = looks.logit_lens(model, states[layer])[b]
            torch.testing.assert_close(lens, scores.softmax(0), atol=1e-5, rtol=1e-4)
    final = looks.logit_lens(model, states[-1])
    expected = torch.stack([plain.logits[b, last[b]].softmax(0) for b in range(2)])
    torch.testing.assert_close(final, expected, atol=1e-5, rtol=1e-4)


def test_value_output_lens_equals_a_loop_over_heads(seen) -> None:
    _, last, _, _, plain, values, heads = seen
    model, layer = shared("llava"), 3
    shares, norms = looks.value_output_lens(model, layer, heads[layer])
    weight = model.get_decoder().layers[layer].self_attn.o_proj.weight.detach()
    total = torch.zeros(32)
    for b, h in itertools.product(range(2), range(4)):
        q = int(last[b])
        maps = plain.attentions[layer][b, h, q]
        out = sum(maps[t] * values[layer][b, t].view(2, 8)[h // 2] for t in range(q + 1))
        written = weight[:, h * 8 : h * 8 + 8] @ out
        total = total + written if b == 0 else total
        torch.testing.assert_close(norms[b, h], written.norm(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(shares[b, h], looks.logit_lens(model, written), atol=1e-5, rtol=1e-4)
    whole = weight @ heads[layer][0].flatten()
    torch.testing.assert_close(total, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "paligemma", "smolvlm", "glm4v", *HYBRID_FAMILIES])
def test_lenses_end_where_the_model_ends_in_every_family(family: str) -> None:
    """Its logits at the last layer; its attention's output from all heads together."""
    model, inputs = shared(family), prompt(family, ["tt I ttt", "t I tttt"], side="right")
    last, watch, written = inputs["attention_mask"].sum(1) - 1, Watch(), {}
    layers = model.get_decoder().layers
    mixers = [recurrence(layer) or layer.self_attn for layer in layers]
    handles = [
        mixer.register_forward_hook(
            lambda m, a, out, i=i: written.update({i: out[0] if isinstance(out, tuple) else out})
        )
        for i, mixer in enumerate(mixers)
    ]
    with (
        attach(model, watch),
        torch.no_grad(),
        looks.states_at(layers, last) as states,
        looks.written_at(layers, last) as heads,
    ):
        logits = model(**inputs).logits
    assert len(watch.looks) == len(watch.attention) == len(watch.values) == LAYERS
    for handle in handles:
        handle.remove()
    expected = torch.stack([logits[b, last[b]].softmax(0) for b in range(2)])
    torch.testing.assert_close(looks.logit_lens(model, states[-1]), expected, atol=1e-6, rtol=1e-4)
    for i, layer in enumerate(layers):
        whole = torch.stack([written[i][b, last[b]] for b in range(2)])
        made = heads[i].flatten(1)
        if recurrence(layer) is None:
            assert watch.looks[i][0].share > 0
            attention = layer.self_attn
            with torch.no_grad():
                made = (attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj)(made)
        else:
            assert watch.looks[i][0] == look(*torch.tensor([[0.0] * 4] * 2 + [[1.0] * 4, [0.0] * 4]))
        torch.testing.assert_close(made, whole, atol=1e-5, rtol=1e-4)
        assert looks.value_output_lens(model, i, heads[i])[1].shape == heads[i].shape[:2]


def test_nearest_words_and_kinds_equal_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    words, rows = torch.randn(VOCAB, 6, generator=generator), torch.randn(9, 6, generator=generator)
    ids, cosines = looks.nearest_words(words, rows)
    for row, i, cosine in zip(rows, ids, cosines, strict=True):
        by_hand = [torch.nn.functional.cosine_similarity(row, word, dim=0).item() for word in words]
        assert by_hand.index(max(by_hand)) == i and cosine.item() == pytest.approx(max(by_hand), abs=1e-5)
    mean = rows.mean(0, keepdim=True)
    spread = (rows - mean).square().sum(-1).mean()
    rows = rows.repeat(3, 1)
    rows[[2, 6]] = mean[0] + 1e-3
    attention = torch.full((27,), 0.01)
    attention[[5, 6]] = torch.tensor([2.0, 1.9])  # a sink, dead or not, is a sink
    expected = [0 if i in (5, 6) else 1 if i == 2 else 2 for i in range(27)]
    assert looks.kinds(rows, attention, mean, spread).tolist() == expected


# ---------------------------------------------------------------- the decision


def test_ends_are_the_outermost_layers_of_an_unbroken_run_within_the_bound() -> None:
    assert decide.latest([0, 0.01, 0.01, 0.5, 0.01], 0.02) == 2
    assert decide.latest([0, 0.5], 0.02) == 0 and decide.latest([0, 0, 0], 0.02) == 2
    assert decide.earliest([9, 0.01, 0.5, 0.01, 0], 0.02) == 3
    assert decide.earliest([9, 9, 0], 0.02) == 2 and decide.earliest([0, 0, 0], 0.02) == 0


def test_bands_are_wider_by_a_few_layers_and_hold_at_least_one() -> None:
    assert decide.near_bands(2, 4, 5) == [(a, b) for a in (0, 1, 2) for b in (4, 5)]
    assert all(a < b <= 6 for a, b in decide.near_bands(5, 3, 6))
    kl = {(0, 4): 0.0, (1, 4): 0.03, (2, 4): 0.5, (1, 5): 0.01}
    cheap = lambda s: (s.exit or 5) - s.enter  # noqa: E731
    assert decide.cheapest_bands(kl, 0.03, cheap, 5) == [(1, 4), (0, 4), (1, 5)]
    assert decide.cheapest_bands({**kl, (2, 5): 0.0}, 0.03, cheap, 5)[0] == (2, 5)
    assert decide.cheapest_bands(kl, -1, cheap, 5) == [(0, 4)]


def test_keeps_begin_inside_the_band() -> None:
    assert decide.keep_layers(2, 3) == [] and decide.keep_layers(2, 4) == [3]
    assert decide.keep_layers(0, 32, 1) == [1] and decide.keep_layers(0, 32, 2) == [1, 31]
    layers = decide.keep_layers(0, 32)
    assert len(layers) == plan.KEEP_LAYERS and layers[0] == 1 and layers[-1] == 31
    assert decide.keep_sizes(144) == [72, 36, 18, 9, 5] and decide.keep_sizes(1) == []


def test_pyramids_are_those_that_no_other_beats() -> None:
    table = {(layer, k): (6 - layer) / k for layer in (2, 3, 5) for k in (8, 4, 2)}
    flops = lambda keep: sum(k * 0.1 + layer for layer, k in keep.items()) / len(keep)  # noqa: E731
    front = decide.pyramids(table, flops)
    every = []
    for n in (1, 2, 3):
        for steps in itertools.permutations(table, n):
            down = all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(steps))
            if down:
                every.append((flops(dict(steps)), sum(table[s] for s in steps), dict(steps)))
    for fewer, cost, keep in front:
        assert (fewer, cost) == pytest.approx((flops(keep), sum(table[s] for s in keep.items())))
        assert not any(f <= fewer and c < cost for f, c, _ in every)
    for f, c, _ in every:
        assert any(fewer <= f and cost <= c for fewer, cost, _ in front)
    assert [f for f, *_ in front] == sorted(f for f, *_ in front)


def test_the_cheapest_rung_within_the_bound_is_looked_for_near_the_expected_one() -> None:
    def tried(n: int, start: int, held: set[int]) -> list[int]:
        probes: list[int] = []
        decide.descend(n, start, lambda i: (probes.append(i), i in held)[1])
        return probes

    assert tried(9, 4, set(range(3, 9))) == [4, 3, 1, 2]
    assert tried(9, 4, {7, 8}) == [4, 5, 7, 6]
    assert tried(30, 9, set(range(30))) == [9, 8, 6, 2, 0]
    assert len(tried(3000, 1500, set(range(777, 3000)))) == decide.PROBES, "at most"
    assert tried(9, 2, set()) == [2, 3, 5, 8]
    assert tried(3, 7, {2}) == [2, 1] and tried(2, 0, {0, 1}) == [0] and tried(0, 0, set()) == []
    assert decide.spread(0) == [] and decide.spread(1) == [0] and decide.spread(30) == [0, 10, 19, 29]


def test_of_pyramids_close_in_flops_the_one_of_least_cost_is_a_rung() -> None:
    front = [
        (flops, 1 - flops, {1: int(1000 * flops)}) for flops in (0.1, 0.104, 0.1049, 0.12, 0.1259, 0.19, 0.2)
    ]
    assert [keep for _, keep in decide.ladder(front)] == [{1: 104}, {1: 125}, {1: 190}, {1: 200}]
    assert [cost for cost, _ in decide.ladder(front)] == sorted(
        (1 - f for f in (0.1049, 0.1259, 0.19, 0.2)), reverse=True
    )
    # half of the tokens from layer 8 on, and the same with a last keep that saves 2% and may cost an answer
    assert decide.ladder([(0.545, 0.04, {8: 72, 23: 9}), (0.56, 0.01, {8: 72})]) == [(0.01, {8: 72})]
    assert decide.ladder([]) == []


def test_the_front() -> None:
    def point(flops: float, kl: float) -> decide.Point:
        return decide.Point(VisionSchedule(), True, flops, kl, 0.0, 1.0, None)

    points = [
        point(f, k) for f, k in ((1.0, 0.0), (0.5, 0.01), (0.6, 0.02), (0.3, 0.05), (0.4, 0.05), (0.2, 0.9))
    ]
    assert [(p.flops, p.kl) for p in decide.pareto(points)] == [
        (0.2, 0.9),
        (0.3, 0.05),
        (0.5, 0.01),
        (1.0, 0.0),
    ]


def test_the_choice_is_by_the_upper_limit() -> None:
    def rung(flops: float, kl: float, limit: float) -> decide.Rung:
        return decide.Rung(VisionSchedule(), True, flops, [kl, kl], [True, True], limit)

    rungs = [rung(0.5, 0.01, 0.02), rung(0.3, 0.02, 0.05), rung(0.2, 0.03, 0.06), rung(0.1, 0.5, 0.9)]
    assert decide.choose(rungs, 0.05, None)[0].flops == 0.3
    assert decide.choose(rungs, 0.01, None)[0].flops == 0.5
    assert decide.choose(rungs, 0.05, 0.45)[0].flops == 0.3
    assert "beyond the bound" in decide.choose(rungs, 0.005, 0.45)[1]
    small, why = decide.choose(rungs, 0.05, 0.05)
    assert small.flops == 0.1 and "no schedule" in why


def test_an_upper_limit_is_students_where_there_is_no_skewness_and_above_it_where_there_is() -> None:
    even = [0.0, 1.0] * 8
    assert upper_limit(even) == pytest.approx(0.5 + 1.753050 * np.std(even, ddof=1) / 4, rel=1e-4)
    skewed = [0.0] * 15 + [1.0]  # mean 1/16, skewness 4 with its bias removed
    student = 1 / 16 + 1.753050 * 0.25 / 4
    assert upper_limit(skewed) == pytest.approx(student + 0.25 / 4 * 4 * (1 + 2 * 1.753050**2) / 24, rel=1e-3)
    assert upper_limit([0.3] * 4) == 0.3 and upper_limit([0.3]) == math.inf


def test_an_upper_limit_is_missed_less_often_than_students_by_means_of_few_large_values() -> None:
    """Prompts of which one in fifty costs 1 nat and the others nothing, 384 at a time."""
    random = np.random.default_rng(0)
    samples = random.random((1000, 384)) < 0.02
    ours = np.mean([upper_limit(row) < 0.02 for row in samples.astype(float)])
    mean, error = samples.mean(1), samples.std(1, ddof=1) / np.sqrt(384)
    students = np.mean(mean + 1.649 * error < 0.02)
    assert ours <= 0.07 < students


def test_questions_about_one_image_do_not_narrow_an_interval() -> None:
    """Every prompt asked four times: as much is known as of asking each once."""
    once = [0.0, 0.1, 0.0, 0.4, 0.02, 0.3, 0.01, 0.0]
    four, images = np.repeat(once, 4).tolist(), np.repeat(range(8), 4).tolist()
    assert interval(four, images) == pytest.approx(interval(once))
    assert upper_limit(four, images) == pytest.approx(upper_limit(once))
    assert upper_limit(four) < 0.85 * upper_limit(once) and interval(four)[2] < 0.85 * interval(once)[2]
    assert interval(once, range(8)) == pytest.approx(interval(once)), "no two share an image"
    unlike = [
        0.0,
        1.0,
    ] * 4  # questions about one image differ more than images do: no narrower than over samples
    assert interval(unlike, [0, 0, 1, 1, 2, 2, 3, 3])[2] == interval(unlike)[2]
    assert upper_limit(once, ["one"] * 8) == math.inf, "one image says nothing of others"
    assert by_image([0.0, 0.6, 0.3], ["a", "a", "b"]) == pytest.approx([0.3, 0.3])


def test_limits_over_images_are_missed_less_often_than_over_prompts() -> None:
    """Ten prompts an image, alike: a limit over 60 images against one that takes the 600 prompts as independent."""
    random = np.random.default_rng(0)
    chances = random.beta(0.2, 1.8, (400, 60, 1))  # mean 0.1
    samples = (random.random((400, 60, 10)) < chances).reshape(400, -1).astype(float)
    images = np.repeat(range(60), 10).tolist()
    missed = [
        np.mean([limit(row) < 0.1 for row in samples])
        for limit in (lambda row: upper_limit(row.tolist(), images), lambda row: upper_limit(row.tolist()))
    ]
    assert missed[0] <= 0.09 < 0.15 < missed[1]
