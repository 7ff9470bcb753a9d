"""What a profile says of its samples, against plain code over their numbers."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import LAYERS, shared
from helpers.planted_models import NO_PLAN
from helpers.profile_batches import MIXED, ONE_IMAGE, batch_of

from latefusion.data.prompt_batches import Group
from latefusion.eval.fusion import summary
from latefusion.eval.fusion.effects import interval
from latefusion.eval.fusion.knockouts import KINDS, knock_outs
from latefusion.eval.fusion.looks import kinds as kinds_of
from latefusion.eval.fusion.looks import logit_lens
from latefusion.eval.fusion.measure import Measurer
from latefusion.eval.ledger import Ledger
from latefusion.models.attach import attach
from latefusion.models.schedule import VisionSchedule

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
DEPTH, SAMPLES, BOUND = 5, 7, 0.4


def effects() -> dict[str, Any]:
    """KL of every knock-out and sample: small at first where it is a prefix, small at last where it is a suffix."""
    random = np.random.default_rng(0)
    measured = {"dense": {"kl": [0.0] * SAMPLES, "right": [True] * SAMPLES}}
    for kind, layer in knock_outs(DEPTH):
        kl = random.uniform(0, 1, SAMPLES)
        measured[f"{kind} {layer}"] = {"kl": kl.tolist(), "right": (kl < 0.5).tolist()}
    return measured


def looks() -> list[list[dict[str, Any]]]:
    random = np.random.default_rng(1)
    names = {"share": 0.5, "entropy": 1.0, "tokens": 3, "sink": 0.0}
    return [
        [
            {**names, "cosine": [float(random.choice([0.99, 0.997]))] * 4, "norm": [1.0] * 4}
            for _ in range(DEPTH)
        ]
        for _ in range(SAMPLES)
    ]


def study_of(chosen: dict[str, Any]) -> dict[str, Any]:
    return {
        "layers": DEPTH,
        "labelled": True,
        "goal": {"bound": BOUND},
        "effects": effects(),
        "chosen": {"schedule": chosen},
        "kept": {"kl": [0.1, 0.5, 0.4, 0.39, 2.0, 0.0, 0.3]},
    }


@pytest.mark.parametrize(
    "chosen", [{"enter": 1, "exit": 4}, {"enter": 0, "exit": None}, {"enter": 2, "exit": 3}]
)
def test_agreement_is_each_samples_own_band_and_fusion_layer(chosen: dict[str, Any]) -> None:
    study, seen = study_of(chosen), looks()
    agreement = summary.agreement(study, seen)
    kl, covered = study["effects"], 0
    for i in range(SAMPLES):
        enter = 0
        for a in range(1, DEPTH + 1):
            if kl[f"prefix {a}"]["kl"][i] > BOUND:
                break
            enter = a
        leave = DEPTH
        for b in range(DEPTH - 1, -1, -1):
            if kl[f"suffix {b}" if b else f"prefix {DEPTH}"]["kl"][i] > BOUND:
                break
            leave = b
        fusion = None
        for layer in range(DEPTH):
            if fusion is None and min(seen[i][layer]["cosine"]) < 0.995:
                fusion = layer
        assert (agreement["enter"][i], agreement["exit"][i], agreement["fusion"][i]) == (enter, leave, fusion)
        last = DEPTH if chosen["exit"] is None else chosen["exit"]
        covered += enter >= chosen["enter"] and leave <= last
    assert agreement["covered"] == pytest.approx(covered / SAMPLES)
    assert agreement["within"] == pytest.approx(5 / 7)  # 0.5 and 2 are beyond 0.4
    assert len(set(agreement["enter"])) > 1 and len(set(agreement["fusion"])) > 1, "the samples should differ"


def test_curves_are_means_with_students_interval_and_are_whole() -> None:
    study = study_of({"enter": 1, "exit": 4})
    rows = summary.curves(study)
    same = {
        ("suffix", 0): f"prefix {DEPTH}",
        ("single", 0): "prefix 1",
        ("single", DEPTH - 1): f"suffix {DEPTH - 1}",
    }
    lengths = {"prefix": DEPTH + 1, "suffix": DEPTH + 1, "single": DEPTH, "frozen": DEPTH, "late": DEPTH}
    assert set(rows) == set(KINDS)
    for kind, length in lengths.items():
        assert [row["layer"] for row in rows[kind]] == list(range(length))
        for row in rows[kind]:
            key = same.get((kind, row["layer"]), f"{kind} {row['layer']}")
            effect = study["effects"].get(key, study["effects"]["dense"])
            mean = sum(effect["kl"]) / SAMPLES
            half = 2.446912 * statistics.stdev(effect["kl"]) / math.sqrt(SAMPLES)  # t of 6 degrees of freedom
            assert row["kl"] == pytest.approx(mean) and row["high"] == pytest.approx(mean + half, rel=1e-4)
            assert row["low"] == pytest.approx(max(0.0, mean - half), abs=1e-4)
            assert row["median"] == statistics.median(effect["kl"])
            assert row["accuracy"] == sum(effect["right"]) / SAMPLES
    assert interval([0.3]) == (0.3, 0.0, math.inf)


def test_samples_about_one_image_do_not_narrow_a_curve() -> None:
    study = study_of({"enter": 1, "exit": 4})
    alone = summary.curves(study)["late"][2]
    study["images"] = [0, 0, 0, 1, 1, 1, 2][:SAMPLES]
    kl = study["effects"]["late 2"]["kl"]
    row = summary.curves(study)["late"][2]
    assert (row["low"], row["high"]) == interval(kl, study["images"])[1:] and row["high"] > alone["high"]
    kl[0] = study["effects"]["late 2"]["right"][0] = None  # left out: its image, too
    assert summary.curves(study)["late"][2]["high"] == interval(kl[1:], study["images"][1:])[2]


def test_a_curve_is_of_the_samples_that_it_was_measured_on() -> None:
    study = study_of({"enter": 1, "exit": 4})
    whole = summary.curves(study)
    for layer, missing in ((2, 3), (3, SAMPLES - 1)):
        effect = study["effects"][f"single {layer}"]
        effect["kl"][:missing], effect["right"][:missing] = [None] * missing, [None] * missing
        row, kl = summary.curves(study)["single"][layer], effect["kl"][missing:]
        assert (row["kl"], row["samples"]) == (pytest.approx(sum(kl) / len(kl)), SAMPLES - missing)
        assert row["accuracy"] == sum(effect["right"][missing:]) / len(kl)
        if len(kl) == 1:
            assert row["low"] == row["high"] == row["kl"]  # one sample has no interval
        else:
            assert row["high"] == interval(kl)[2]
    assert summary.curves(study)["late"] == whole["late"]


def test_quartiles_over_samples_by_hand() -> None:
    seen = looks()
    for i, sample in enumerate(seen):
        sample[2]["share"], sample[2]["norm"] = i / 10, [i, 0.0, 0.0, -i]
    quartiles = summary.observed(seen, DEPTH)
    assert quartiles["share"][2] == pytest.approx([0.15, 0.3, 0.45]) and quartiles["norm_max"][2] == [
        1.5,
        3,
        4.5,
    ]
    assert quartiles["norm_50%"][2] == [-4.5, -3, -1.5] and quartiles["share"][1] == [0.5] * 3


def test_lens_tables_count_words_over_samples() -> None:
    class Tokenizer:
        def decode(self, ids: list[int]) -> str:
            return {1: "a", 2: " b", 3: " ", 4: "d"}[ids[0]]

    def sample(first: int, written: int, kinds: list[int], words: list[int] | None) -> dict[str, Any]:
        logit = [([first, 4, 2], [0.5 + first / 10, 0.1, 0.1])]
        value = [([first], [written], [1.0])]
        maps = None if words is None else {"words": words}
        return {
            "logit": logit,
            "value": value,
            "written": written,
            "kinds": kinds,
            "maps": maps,
            "word_cosine": first,
        }

    seen = [sample(1, 1, [1, 0, 3], [2, 2, 1]), sample(1, 2, [0, 2, 2], [2]), sample(2, 2, [0, 4, 0], None)]
    tables = summary.lens_tables(seen, 1, Tokenizer())
    row = tables["layers"][0]
    assert row["logit"] == [("a", pytest.approx(2 / 3)), ("␣b", pytest.approx(1 / 3))]
    assert row["settled"] == pytest.approx(2 / 3) and row["probability"] == pytest.approx(0.6)
    assert row["head"] == 1 and row["value"][0] == ("␣b", pytest.approx(2 / 3))
    assert tables["kinds"]["sink"] == pytest.approx([0, 0, 0.125]) and tables["kinds"]["alive"][1] == 0.5
    assert tables["words"] == [("␣b", 0.75), ("a", 0.25)] and tables["word_cosine"] == pytest.approx(4 / 3)
    assert summary.word(Tokenizer(), 3) == "␣"


@pytest.mark.parametrize("rows", [ONE_IMAGE, MIXED])
def test_looks_of_a_batch_are_those_of_its_eager_model(rows: list[str], tmp_path) -> None:
    """What is kept of each sample: written word, lens words, maps, kinds (by attention of all layers)."""
    model, eager, batch = shared("llava"), shared("llava", "eager"), batch_of("llava", rows)
    with attach(model, VisionSchedule()) as attachment:
        groups = [Group((1, 0), lambda: batch, (), (), 0)]
        observed = Measurer(model, attachment, groups, Ledger(tmp_path / "m.jsonl", {}), NO_PLAN).looks()
    entered: list[torch.Tensor] = []
    handle = eager.get_decoder().layers[0].register_forward_pre_hook(lambda m, args: entered.append(args[0]))
    with torch.no_grad():
        plain = eager(**batch.fresh(), output_attentions=True, output_hidden_states=True)
    handle.remove()
    counts = batch.vision.sum(1).tolist()
    pooled = [entered[0][b][batch.vision[b]] for b in range(2)]
    if counts[0] == counts[1]:
        mean = torch.stack(pooled).mean(0)
        spread = torch.stack([(rows - mean).square().sum(-1) for rows in pooled]).mean()
    else:
        mean = torch.cat(pooled).mean(0, keepdim=True)
        spread = (torch.cat(pooled) - mean).square().sum(-1).mean()
    for b in range(2):
        sample, q, seen = observed[1 - b], int(batch.queries[b, 0]), batch.vision[b]
        assert sample["written"] == int(plain.logits[b, q].argmax())
        for layer in range(LAYERS - 1):
            share = logit_lens(model, plain.hidden_states[layer + 1][b, q])
            assert sample["logit"][layer][0] == share.topk(3).indices.tolist()
        maps = torch.stack([a[b, :, q].mean(0)[seen] for a in plain.attentions])  # [L, K]
        assert np.array(sample["maps"]["attention"]) == pytest.approx(maps.numpy(), abs=1e-5)
        kinds = kinds_of(pooled[b], maps.mean(0), mean, spread).tolist()
        assert sample["maps"]["kinds"] == kinds and sample["kinds"] == [kinds.count(k) for k in range(3)]
        assert len(sample["maps"]["words"]) == counts[b]
