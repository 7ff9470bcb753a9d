"""Per-sample measurements as what a profile says per layer: quartiles, lens tables, agreement between samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from latefusion.eval.fusion.causal import KINDS
from latefusion.eval.fusion.decide import earliest, latest
from latefusion.eval.fusion.measure import interval, known
from latefusion.eval.fusion.observe import Look, fusion_layer

WORDS = 3  # of a lens table's cell
FUSES = 0.995  # removal cosine: VisiPruner's threshold for LLaVA-1.5-7B


def summarise(found: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """`found` of `Study.run`, with `curves`, `observed`, `lenses`, `agreement`, `maps` in place of raw looks."""
    looks, layers = found.pop("looks"), found["layers"]
    return {
        **found,
        "curves": curves(found),
        "observed": observed([sample["looks"] for sample in looks], layers),
        "lenses": lens_tables(looks, layers, tokenizer),
        "agreement": agreement(found, [sample["looks"] for sample in looks]),
        "maps": [
            {**sample["maps"], "words": [word(tokenizer, i) for i in sample["maps"]["words"]]}
            for sample in looks
            if sample["maps"] is not None
        ],
    }


def curves(found: dict[str, Any]) -> dict[str, list[dict[str, float]]]:
    """Per kind of knock-out a row a layer: KL with its interval and quartiles over samples, and accuracy.

    Rows that equal another kind's (see `knock_outs`) are filled in, so that each curve is whole.
    """
    effects, layers = found["effects"], found["layers"]
    same = {
        "suffix 0": f"prefix {layers}",
        "single 0": "prefix 1",
        f"single {layers - 1}": f"suffix {layers - 1}",
    }
    rows: dict[str, list[dict[str, float]]] = {}
    for kind in KINDS:
        for layer in range(layers + 1):
            key = f"{kind} {layer}"
            key = same.get(key, key)
            nothing = key in ("prefix 0", "frozen 0", "late 0", f"suffix {layers}")
            effect = effects["dense"] if nothing else effects.get(key)
            if effect is None:
                continue
            measured = known(effect["kl"])
            kl, low, high = interval(measured) if len(measured) > 1 else (measured[0],) * 3
            quartiles = np.quantile(measured, [0.25, 0.5, 0.75])
            row = {"layer": layer, "kl": kl, "low": low, "high": high, "samples": len(measured)}
            row |= dict(zip(("q25", "median", "q75"), map(float, quartiles), strict=True))
            if found["labelled"]:
                row["accuracy"] = float(np.mean(known(effect["right"])))
            rows.setdefault(kind, []).append(row)
    return rows


def observed(looks: Sequence[Sequence[dict[str, Any]]], layers: int) -> dict[str, list[list[float]]]:
    """Quartiles over samples of each measure of `observe.Look`, per layer `[25%, 50%, 75%]`."""

    def quartiles(pick: Any) -> list[list[float]]:
        return [
            np.quantile([pick(sample[layer]) for sample in looks], [0.25, 0.5, 0.75]).tolist()
            for layer in range(layers)
        ]

    return {
        "share": quartiles(lambda look: look["share"]),
        "entropy": quartiles(lambda look: look["entropy"]),
        "tokens": quartiles(lambda look: look["tokens"]),
        "sink": quartiles(lambda look: look["sink"]),
        "cosine_min": quartiles(lambda look: look["cosine"][0]),
        "cosine_1%": quartiles(lambda look: look["cosine"][1]),
        "cosine_10%": quartiles(lambda look: look["cosine"][2]),
        "cosine_50%": quartiles(lambda look: look["cosine"][3]),
        "norm_max": quartiles(lambda look: look["norm"][0]),
        "norm_99%": quartiles(lambda look: look["norm"][1]),
        "norm_90%": quartiles(lambda look: look["norm"][2]),
        "norm_50%": quartiles(lambda look: look["norm"][3]),
    }


def lens_tables(looks: Sequence[dict[str, Any]], layers: int, tokenizer: Any) -> dict[str, Any]:
    """Per layer the likeliest words over samples, by logit lens and by the strongest head's value-output lens."""
    n, rows = len(looks), []
    for layer in range(layers):
        first = [sample["logit"][layer][0][0] for sample in looks]
        strong = [sample["value"][layer][1][0] for sample in looks]
        heads = [sample["value"][layer][0][0] for sample in looks]
        rows.append(
            {
                "layer": layer,
                "logit": frequent(first, n, tokenizer),
                "settled": sum(i == sample["written"] for i, sample in zip(first, looks, strict=True)) / n,
                "probability": float(np.median([sample["logit"][layer][1][0] for sample in looks])),
                "head": Counter(heads).most_common(1)[0][0],
                "value": frequent(strong, n, tokenizer),
            }
        )
    kinds = np.array([sample["kinds"] for sample in looks], dtype=float)
    kinds /= kinds.sum(1, keepdims=True)
    words = Counter(i for sample in looks if sample["maps"] for i in sample["maps"]["words"])
    total = sum(words.values())
    return {
        "layers": rows,
        "kinds": {
            name: np.quantile(kinds[:, i], [0.25, 0.5, 0.75]).tolist()
            for i, name in enumerate(("sink", "dead", "alive"))
        },
        "words": [(word(tokenizer, i), count / total) for i, count in words.most_common(12)],
        "word_cosine": float(np.mean([sample["word_cosine"] for sample in looks])),
    }


def frequent(ids: Sequence[int], n: int, tokenizer: Any) -> list[tuple[str, float]]:
    counts = sorted(Counter(ids).items(), key=lambda pair: (-pair[1], pair[0]))[:WORDS]
    return [(word(tokenizer, i), count / n) for i, count in counts]


def word(tokenizer: Any, i: int) -> str:
    """A token as text, its spaces visible."""
    text = tokenizer.decode([i])
    return text.replace(" ", "␣") if text.strip() else repr(text)[1:-1].replace(" ", "␣") or "(empty)"


def agreement(found: dict[str, Any], looks: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """How much samples differ in where they need vision, so that one schedule for all is seen to be fair or not.

    Per sample: the latest enter and the earliest exit within the bound by its own KL, and VisiPruner's fusion layer.
    """
    effects, layers, bound = found["effects"], found["layers"], found["wishes"]["bound"]
    n = len(effects["dense"]["kl"])
    enters, exits = [], []
    for i in range(n):
        whole = effects[f"prefix {layers}"]["kl"][i]
        enters.append(latest([0.0, *(effects[f"prefix {a}"]["kl"][i] for a in range(1, layers + 1))], bound))
        exits.append(
            earliest([whole, *(effects[f"suffix {b}"]["kl"][i] for b in range(1, layers)), 0.0], bound)
        )
    fusions = [fusion_layer([Look(**layer) for layer in sample], FUSES) for sample in looks]
    schedule = found["chosen"]["schedule"]
    leave = layers if schedule["exit"] is None else schedule["exit"]
    return {
        "enter": enters,
        "exit": exits,
        "fusion": fusions,
        "fusion_threshold": FUSES,
        "covered": float(
            np.mean([a >= schedule["enter"] and b <= leave for a, b in zip(enters, exits, strict=True)])
        ),
        "within": float(np.mean([kl <= bound for kl in found["kept"]["kl"]])),
    }
