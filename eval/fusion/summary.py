"""What a profile says and writes: curves, quartiles, lens tables and agreement over samples, as JSON, CSV and YAML."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from latefusion.eval.fusion.decide import earliest, latest, measured
from latefusion.eval.fusion.effects import interval
from latefusion.eval.fusion.knockouts import KINDS
from latefusion.eval.fusion.looks import Look, fusion_layer
from latefusion.eval.metrics import quartiles
from latefusion.models.flops import prefill_share, shares_in_words
from latefusion.models.profile_folder import ENTRY_FILE, write_entry
from latefusion.models.profile_schedule import CROSS_FILE, PROFILE_FILE, SCHEDULE_FILE
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.entry_fit import Calibration

if TYPE_CHECKING:
    from latefusion.eval.fusion.examples import View

WORDS = 3  # in a cell of a lens table
FUSES = 0.995  # removal cosine: VisiPruner's threshold for LLaVA-1.5-7B


def summarise(results: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The results of `Study.run` with `curves`, `observed`, `lenses`, `agreement` and `maps` in place of raw looks."""
    looks, layers = results.pop("looks"), results["layers"]
    return {
        **results,
        "curves": curves(results),
        "observed": observed([sample["looks"] for sample in looks], layers),
        "lenses": lens_tables(looks, layers, tokenizer),
        "agreement": agreement(results, [sample["looks"] for sample in looks]),
        "maps": [
            {**sample["maps"], "words": [word(tokenizer, i) for i in sample["maps"]["words"]]}
            for sample in looks
            if sample["maps"] is not None
        ],
    }


def curves(results: dict[str, Any]) -> dict[str, list[dict[str, float]]]:
    """For each kind of knock-out one row a layer: KL with its interval and quartiles over samples, and accuracy.

    Rows that equal those of another kind (see `knock_outs`) are filled in, so that each curve is whole.
    """
    effects, layers = results["effects"], results["layers"]
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
            values = measured(effect["kl"])
            images = results.get("images")
            if images is not None:
                images = [i for i, one in zip(images, effect["kl"], strict=True) if one is not None]
            kl, low, high = interval(values, images) if len(values) > 1 else (values[0],) * 3
            row = {"layer": layer, "kl": kl, "low": low, "high": high, "samples": len(values)}
            row |= dict(zip(("q25", "median", "q75"), quartiles(values), strict=True))
            if results["labelled"]:
                row["accuracy"] = float(np.mean(measured(effect["right"])))
            rows.setdefault(kind, []).append(row)
    return rows


def observed(looks: Sequence[Sequence[dict[str, Any]]], layers: int) -> dict[str, list[list[float]]]:
    """Quartiles `[25%, 50%, 75%]` over samples of each measure of `looks.Look`, layer by layer."""

    def by_layer(pick: Any) -> list[list[float]]:
        return [list(quartiles([pick(sample[layer]) for sample in looks])) for layer in range(layers)]

    return {
        "share": by_layer(lambda look: look["share"]),
        "entropy": by_layer(lambda look: look["entropy"]),
        "tokens": by_layer(lambda look: look["tokens"]),
        "sink": by_layer(lambda look: look["sink"]),
        "cosine_min": by_layer(lambda look: look["cosine"][0]),
        "cosine_1%": by_layer(lambda look: look["cosine"][1]),
        "cosine_10%": by_layer(lambda look: look["cosine"][2]),
        "cosine_50%": by_layer(lambda look: look["cosine"][3]),
        "norm_max": by_layer(lambda look: look["norm"][0]),
        "norm_99%": by_layer(lambda look: look["norm"][1]),
        "norm_90%": by_layer(lambda look: look["norm"][2]),
        "norm_50%": by_layer(lambda look: look["norm"][3]),
    }


def lens_tables(looks: Sequence[dict[str, Any]], layers: int, tokenizer: Any) -> dict[str, Any]:
    """For each layer the likeliest words over samples, by logit lens and by the strongest head's value-output lens."""
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
        "kinds": {name: list(quartiles(kinds[:, i])) for i, name in enumerate(("sink", "dead", "alive"))},
        "words": [(word(tokenizer, i), count / total) for i, count in words.most_common(12)],
        "word_cosine": float(np.mean([sample["word_cosine"] for sample in looks])),
    }


def frequent(ids: Sequence[int], n: int, tokenizer: Any) -> list[tuple[str, float]]:
    """The most frequent tokens as words, with their share of `n`."""
    counts = sorted(Counter(ids).items(), key=lambda pair: (-pair[1], pair[0]))[:WORDS]
    return [(word(tokenizer, i), count / n) for i, count in counts]


def word(tokenizer: Any, i: int) -> str:
    """A token as text, its spaces visible."""
    text = tokenizer.decode([i])
    return text.replace(" ", "␣") if text.strip() else repr(text)[1:-1].replace(" ", "␣") or "(empty)"


def agreement(results: dict[str, Any], looks: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """How much samples differ in where they need vision: whether one schedule is fair to all.

    Each sample has the latest enter and the earliest exit within the bound by its own KL, and VisiPruner's fusion
    layer.
    """
    effects, layers, bound = results["effects"], results["layers"], results["goal"]["bound"]
    n = len(effects["dense"]["kl"])
    enters, exits = [], []
    for i in range(n):
        whole = effects[f"prefix {layers}"]["kl"][i]
        enters.append(latest([0.0, *(effects[f"prefix {a}"]["kl"][i] for a in range(1, layers + 1))], bound))
        exits.append(
            earliest([whole, *(effects[f"suffix {b}"]["kl"][i] for b in range(1, layers)), 0.0], bound)
        )
    fusions = [fusion_layer([Look(**layer) for layer in sample], FUSES) for sample in looks]
    schedule = results["chosen"]["schedule"]
    leave = layers if schedule["exit"] is None else schedule["exit"]
    return {
        "enter": enters,
        "exit": exits,
        "fusion": fusions,
        "fusion_threshold": FUSES,
        "covered": float(
            np.mean([a >= schedule["enter"] and b <= leave for a, b in zip(enters, exits, strict=True)])
        ),
        "within": float(np.mean([kl <= bound for kl in results["kept"]["kl"]])),
    }


# ---------------------------------------------------------------- files


def write(
    folder: Path,
    results: dict[str, Any],
    calibration: Calibration | None,
    samples: Sequence[dict[str, Any]],
    shown: Sequence[Sequence[View]],
) -> None:
    """Write all files, the report last; `shown`: the images of the first few samples."""
    from latefusion.eval.fusion.page import write_report  # lazy: drawing libraries take seconds

    (folder / PROFILE_FILE).write_text(json.dumps(results, indent=1, allow_nan=False, default=_plain) + "\n")
    (folder / SCHEDULE_FILE).write_text(schedule_yaml(results))
    (folder / CROSS_FILE).unlink(missing_ok=True)
    if results["reading"] is not None:
        (folder / CROSS_FILE).write_text(cross_yaml(results["reading"]))
    (folder / ENTRY_FILE).unlink(missing_ok=True)
    if calibration is not None:
        about = results["about"]
        write_entry(folder, calibration.entry, about.get("weights", ""), about.get("processor", ""))
    tables(folder, results)
    write_report(folder, results, samples, shown)


def schedule_yaml(results: dict[str, Any]) -> str:
    """The schedule, as `recipe=late_fusion schedule.profile=FOLDER` reads it."""
    chosen, confirmed = results["chosen"], results["confirmed"]
    keep = {int(layer): k for layer, k in chosen["schedule"]["keep"].items()}
    note = (
        f"# {shares_in_words(chosen['flops'], results.get('outside'))}, "
        f"KL {confirmed['kl']:.4f} nats per answer token untrained"
        f"{' with the calibrated entry' if chosen['calibrated'] else ''}, upper limit {confirmed['limit']:.4f}: "
        f"{chosen['why']}.\n"
    )
    return note + yaml.safe_dump(
        {**chosen["schedule"], "keep": keep},  # with the ranking that was measured
        sort_keys=False,
        default_flow_style=None,
    )


def cross_yaml(reading: dict[str, Any]) -> str:
    """The layers that read frozen vision tokens, as `recipe=cross_only schedule.profile=FOLDER` reads them."""
    note = (
        f"# KL {reading['kl']:.4f} nats per answer token if text reads the dense model's vision states in these layers "
        f"alone, upper limit {reading['limit']:.4f}: {reading['why']}.\n"
    )
    schedule = VisionSchedule(cross=reading["layers"]).to_dict()
    return note + yaml.safe_dump(
        {**schedule, "cross": list(reading["layers"])}, sort_keys=False, default_flow_style=None
    )


def tables(folder: Path, results: dict[str, Any]) -> None:
    """Write `layers.csv`, `schedules.csv` and `samples.csv`: every curve and point of the report."""
    kinds, layers = results["curves"], results["layers"]
    columns = ("kl", "low", "high", "accuracy")
    by_layer: list[dict[str, Any]] = [{"layer": layer} for layer in range(layers + 1)]
    for kind, rows in kinds.items():
        for row in rows:
            by_layer[int(row["layer"])] |= {f"{kind}_{c}": row[c] for c in columns if c in row}
    for name, rows in results["observed"].items():
        for layer, (q25, median, q75) in enumerate(rows):
            by_layer[layer] |= {f"{name}_q25": q25, name: median, f"{name}_q75": q75}
    for row in results["lenses"]["layers"]:
        by_layer[row["layer"]]["logit_lens_settled"] = row["settled"]
    _csv(folder / "layers.csv", by_layer)
    front = [(p["schedule"], p["calibrated"]) for p in results["front"]]
    _csv(
        folder / "schedules.csv",
        [
            {
                **p["schedule"],
                **{k: v for k, v in p.items() if k != "schedule"},
                "prefill": None
                if results["outside"] is None
                else prefill_share(p["flops"], results["outside"]),
                "front": (p["schedule"], p["calibrated"]) in front,
            }
            for p in results["points"]
        ],
    )
    agreement = results["agreement"]
    _csv(
        folder / "samples.csv",
        [
            {"sample": i, "enter": a, "exit": b, "fusion_layer": f, "kl_chosen": kl}
            for i, (a, b, f, kl) in enumerate(
                zip(
                    agreement["enter"],
                    agreement["exit"],
                    agreement["fusion"],
                    results["kept"]["kl"],
                    strict=True,
                )
            )
        ],
    )


def _csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def _plain(value: Any) -> Any:
    """A NumPy number as Python's."""
    return value.item()
