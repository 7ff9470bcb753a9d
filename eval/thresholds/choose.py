"""Choose the best setting from every setting's numbers, and write the files that say so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy import stats

from latefusion.eval.fusion.effects import by_image
from latefusion.eval.metrics import accuracy, paired
from latefusion.eval.thresholds.accept import Accepted
from latefusion.models.flops import prefill_share
from latefusion.models.folder_contents import POLICY
from latefusion.recipes.printable import printable

TABLE = "table.md"
ROWS = 12  # of the table
NEARLY = 1.05  # times the least FLOPs: what a setting may cost that waits longer before it prunes
HEADER = ("boundary", "layer / tokens threshold", "stages", "KL, nats", "same answer, %", "decoder FLOPs, %")
WHOLE = "whole prefill, %"
LABELLED = ("accuracy, %", "against dense, points")


def write(results: dict[str, Any], folder: Path, console: Console) -> dict[str, Any]:
    """Write `calibration.json`, `table.md` and `policy.yaml`, and print the table.

    Raises:
        ValueError: no setting is accepted; what was tried is written all the same.
    """
    accepted: Accepted = results["accepted"]
    arguments, columns, correct = results["arguments"], results["columns"], results["correct"]
    dense, number = columns["dense_flops"].mean(), (~np.isnan(columns["kl"])).sum(1)  # [settings]
    kl, flops = np.nanmean(columns["kl"], 1), np.nanmean(columns["flops"] / columns["dense_flops"], 1)
    prompts, outside = columns["kl"].shape[1], results["outside"]
    complete = number == prompts  # the others were ruled out before
    rows = [
        {
            **setting,
            "stages": list(setting["stages"]),
            "prompts": int(number[i]),
            "kl": float(kl[i]),
            "kl_standard_error": standard_error(columns["kl"][i], results["scenes"]),
            "same_answer": float(np.nanmean(columns["same"][i])),
            "flops_ratio": float(flops[i]),
            "prefill_ratio": None if outside is None else prefill_share(float(flops[i]), outside),
            "vision_tokens_per_layer": float(np.nanmean(columns["vision"][i])),
            "accuracy": float(np.mean(correct[i])) if correct is not None and complete[i] else None,
        }
        for i, setting in enumerate(results["settings"])
    ]
    partial, kl = kl, np.where(complete, kl, np.inf)
    best = accepted.setting
    tried = [confirmed(rows[i], accepted.limits[i], results["confirmed"][i]) for i in accepted.limits]
    shown = (
        [] if best is None else around(sorted({*front(kl, flops), best}, key=lambda i: flops[i]), best, ROWS)
    )
    lines = [line(rows[i], results, i) for i in shown]
    out = {
        "arguments": arguments,
        "prompts": prompts,
        "seconds": results["seconds"],
        "dense": {
            "flops": float(dense),
            "vision_tokens_per_layer": float(columns["dense_vision"].mean()),
            "accuracy": None if correct is None else float(columns["right"].mean()),
        },
        "shallow_limit": results["shallow_limit"],
        "chosen": None if best is None else rows[best],
        "confirmed": tried,
        "front": [rows[i] for i in front(kl, flops)],
        "settings": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name in (TABLE, POLICY):
        (folder / name).unlink(missing_ok=True)  # of an earlier calibration, if this one accepts no setting
    (folder / "calibration.json").write_text(json.dumps(out, indent=1) + "\n")
    if best is None and tried:
        least = min(tried, key=lambda one: one["limit"])
        raise ValueError(
            f"no setting is accepted: on {least['prompts']} other prompts the upper limit of the KL is "
            f"{least['limit']:.2g} at least, beyond kl={arguments['kl']}; raise kl, or use more prompts to confirm."
        )
    if best is None:
        nearest = rows[int(partial.argmin())]
        raise ValueError(
            f"no setting stays under kl={arguments['kl']}: the least is {nearest['kl']:.2g} (on {nearest['prompts']} "
            f"prompts), at boundary {nearest['boundary']}; raise kl, or try higher boundaries or lower "
            "tokens_thresholds."
        )
    header = HEADER + (() if outside is None else (WHOLE,)) + (LABELLED if correct is not None else ())
    bold = shown.index(best)
    (folder / TABLE).write_text(markdown(header, lines, bold))
    (folder / POLICY).write_text(recipe(rows[best], out))
    report(out, header, lines, bold, console, folder)
    return out


def standard_error(kl: NDArray, scenes: list[str]) -> float | None:
    """Of the mean KL of the prompts that a setting ran on; prompts about one image are not independent."""
    ran = ~np.isnan(kl)
    of_prompts = kl[ran].tolist()
    of_images = by_image(of_prompts, [scene for scene, there in zip(scenes, ran, strict=True) if there])
    if len(of_images) < 2:
        return None
    return max(float(stats.sem(of_prompts)), float(stats.sem(of_images)))


def confirmed(row: dict[str, Any], limit: float, outcome: dict[str, NDArray]) -> dict[str, Any]:
    """A setting that was tried on the confirming prompts, and what it does to them."""
    names = ("boundary", "layer_threshold", "tokens_threshold", "stages")
    return {name: row[name] for name in names} | {
        "prompts": len(outcome["kl"]),
        "kl": float(np.mean(outcome["kl"])),
        "limit": limit,
        "same_answer": float(np.mean(outcome["same"])),
        "flops_ratio": float(np.mean(outcome["flops"])),
    }


def nearly_cheapest(
    kl: NDArray, flops: NDArray, bound: float, boundaries: Sequence[int] | NDArray
) -> int | None:
    """Of the settings with KL at most `bound` and nearly the least FLOPs, the one that waits longest to prune.

    A few prompts fuse later than all others, and an early boundary costs them everything: prompts that do not have one
    of these do not tell such a setting from one that waits.

    Args:
        kl, flops: of each setting.
        boundaries: of each setting; settings of the same one are ordered by FLOPs, KL and number.

    Returns:
        Its number; None: no setting fits.
    """
    fits = np.flatnonzero(kl <= bound)
    if not len(fits):
        return None
    near = fits[flops[fits] <= NEARLY * flops[fits].min()]
    late = np.asarray(boundaries)[near]
    return int(near[np.lexsort((near, kl[near], flops[near], -late))[0]])


def front(kl: NDArray, flops: NDArray) -> list[int]:
    """Settings that no other beats in both, from least FLOPs to least KL."""
    best, least = [], np.inf
    for i in np.lexsort((np.arange(len(kl)), kl, flops)):
        if kl[i] < least:
            best.append(int(i))
            least = kl[i]
    return best


def around(settings: list[int], best: int, rows: int) -> list[int]:
    """At most `rows` of the front, `best` among them, half of them cheaper."""
    at = settings.index(best)
    start = max(0, min(at - rows // 2, len(settings) - rows))
    return settings[start : start + rows]


def line(row: dict[str, Any], results: dict[str, Any], i: int) -> list[str]:
    """The cells of a setting's row in the table."""
    cells = [
        str(row["boundary"]),
        f"{row['layer_threshold']:g} / {row['tokens_threshold']:g}",
        ", ".join(row["stages"]),
        f"{row['kl']:.4f}",
        f"{100 * row['same_answer']:.1f}",
        f"{100 * row['flops_ratio']:.1f}",
    ]
    if row["prefill_ratio"] is not None:
        cells.append(f"{100 * row['prefill_ratio']:.1f}")
    correct = results["correct"]
    if correct is not None:
        scenes, dense = results["scenes"], results["columns"]["right"]
        of, gap = accuracy(correct[i], scenes), paired(correct[i], dense, scenes).difference
        cells += [
            f"{100 * of.value:.1f} ({100 * of.low:.1f}–{100 * of.high:.1f})",
            f"{100 * gap.value:+.2f} ({100 * gap.low:+.2f} to {100 * gap.high:+.2f})",
        ]
    return cells


def markdown(header: tuple[str, ...], lines: list[list[str]], bold: int) -> str:
    rule = ["---:" if name not in ("stages",) else "---" for name in header]
    body = [[f"**{cell}**" if n == bold else cell for cell in cells] for n, cells in enumerate(lines)]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in [list(header), rule, *body])


def flops_in_words(row: dict[str, Any]) -> str:
    """A setting's share of the dense decoder's FLOPs and, where it is known, of the whole prefill's."""
    whole = "" if row["prefill_ratio"] is None else f" ({row['prefill_ratio']:.1%} of the whole prefill's)"
    return f"{row['flops_ratio']:.1%} of the dense decoder's FLOPs{whole}"


def distance(row: dict[str, Any], out: dict[str, Any]) -> str:
    """How far the setting's answers are from the dense model's: on the prompts that accepted it, if there are any."""
    bound = f"bound {out['arguments']['kl']:g}"
    if not out["confirmed"]:
        return f"KL {row['kl']:.4f} ({bound}), {row['same_answer']:.1%} of the answers unchanged"
    last = out["confirmed"][-1]
    return (
        f"KL {last['kl']:.4f}, upper limit {last['limit']:.4f} ({bound}), {last['same_answer']:.1%} of the answers "
        f"unchanged, on {last['prompts']} prompts beside these"
    )


def recipe(row: dict[str, Any], out: dict[str, Any]) -> str:
    arguments = out["arguments"]
    stages = ", ".join(row["stages"])
    model, data = printable(arguments["model"]), printable(arguments["data"])
    return (
        f"# VisiPruner for {model}, calibrated on {out['prompts']} prompts of {data}, "
        f"{arguments['split']}:\n"
        f"# {flops_in_words(row)} at {distance(row, out)}.\n"
        "_target_: latefusion.models.policies.visipruner.settings.VisiPruner\n"
        f"boundary: {row['boundary']}\n"
        f"layer_threshold: {row['layer_threshold']:g}\n"
        f"tokens_threshold: {row['tokens_threshold']:g}\n"
        f"exit_threshold: {arguments['exit_threshold']:g}\n"
        f"exit_patience: {arguments['exit_patience']}\n"
        f"stages: [{stages}]\n"
        f"sink_rule: {arguments['sink_rule']}\n"
    )


def report(
    out: dict[str, Any],
    header: tuple[str, ...],
    lines: list[list[str]],
    bold: int,
    console: Console,
    folder: Path,
) -> None:
    row, dense = out["chosen"], out["dense"]["accuracy"]
    of_dense = "" if dense is None else f"; dense answers {dense:.1%} right"
    ran = sum(row["prompts"] == out["prompts"] for row in out["settings"])
    title = (
        f"Best of {len(out['settings'])} settings, {ran} of them on all {out['prompts']} prompts{of_dense}"
    )
    table = Table(title=title)
    narrow = [
        n for n, name in enumerate(header) if name not in ("stages", LABELLED[1])
    ]  # the rest is in table.md
    for n in narrow:
        table.add_column(header[n].replace("layer / tokens threshold", "thresholds"), justify="right")
    for n, cells in enumerate(lines):
        table.add_row(*(cells[i].split(" (")[0] for i in narrow), style="bold" if n == bold else "")
    console.print(table)
    console.print(
        f"Chosen: boundary {row['boundary']}, layer_threshold {row['layer_threshold']:g}, tokens_threshold "
        f"{row['tokens_threshold']:g}, stages {', '.join(row['stages'])}: {flops_in_words(row)}, "
        f"{distance(row, out)} ({out['seconds']:.0f} s).\n"
        f"Use it: policy={folder / 'policy.yaml'}",
        highlight=False,
        soft_wrap=True,
    )
