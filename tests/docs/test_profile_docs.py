"""The tables of docs/profile.md hold what docs/results/profile_embedded holds."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from latefusion.models.profile_folder import read_schedule

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "results" / "profile_embedded"
LAYERS = 16


def table(header: str) -> list[list[str]]:
    """The rows of the one table whose head begins so."""
    (lines,) = re.findall(
        rf"^{re.escape(header)}.*\n\|[ :|-]+\n((?:\|.*\n)+)", (ROOT / "docs/profile.md").read_text(), re.M
    )
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines.splitlines()]


def rows(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((FOLDER / name).open()))


def measured(words: str, *, calibrated: bool) -> dict[str, str]:
    """The row of a schedule such as `chosen: [2, 10), {4: 36}`."""
    found = re.search(r"\[(\d+), (\d+)\)(?:, (\{.*\}))?", words)
    assert found is not None, words
    leave = "" if int(found[2]) == LAYERS else found[2]
    keep = {str(layer): k for layer, k in yaml.safe_load(found[3] or "{}").items()}
    (row,) = [
        row
        for row in rows("schedules.csv")
        if (row["enter"], row["exit"]) == (found[1], leave)
        and yaml.safe_load(row["keep"]) == keep
        and row["calibrated"] == str(calibrated)
    ]
    return row


def said(row: dict[str, str], kl: str = "kl", right: str = "accuracy") -> str:
    return f"{float(row[kl]):.3f}, {100 * float(row[right]):.1f}%"


def test_what_the_profile_chose() -> None:
    found = table("| schedule | FLOPs | KL (95%)")
    chosen = next(words for words, *_ in found if "chosen" in words)
    for words, *cells in found:
        if words == "dense":
            row: Any = rows("schedules.csv")[0]
            assert cells == ["100%", "0", f"{100 * float(row['accuracy']):.1f}"]
            continue
        raw = words == "the same without its calibrated entry"
        row = measured(chosen if raw else words, calibrated=not raw)
        kl, low, high = (float(row[name]) for name in ("kl", "low", "high"))
        assert cells == [
            f"{100 * float(row['flops']):.1f}%",
            f"{kl:.3f} ({low:.3f} to {high:.3f})",
            f"{100 * float(row['accuracy']):.1f}",
        ], words
        assert ("beyond" in words) == (kl > 0.05 and not raw) and (
            "front" not in words or row["front"] == "True"
        )
    assert read_schedule(FOLDER).to_dict()["keep"] == yaml.safe_load(
        measured(chosen, calibrated=True)["keep"]
    )


def test_knock_outs_layer_by_layer() -> None:
    layers = rows("layers.csv")
    for number, *cells in table("| layer | hidden in all layers before"):
        if number.isdecimal():
            row = layers[int(number)]
            for cell, kind in zip(cells, ("prefix", "suffix", "single"), strict=True):
                assert cell == said(row, f"{kind}_kl", f"{kind}_accuracy") or (kind, number) == (
                    "prefix",
                    "0",
                )


def test_what_calibration_gains() -> None:
    layers = rows("layers.csv")
    for words, raw, calibrated, exact in table("| schedule | raw: KL, right"):
        assert raw == said(measured(words, calibrated=False)), words
        if calibrated:
            assert calibrated == said(measured(words, calibrated=True)), words
        if exact:
            assert exact == said(layers[int(words[1])], "prefix_kl", "prefix_accuracy"), words


def test_how_samples_differ() -> None:
    text = (ROOT / "docs/profile.md").read_text()
    kl = sorted((float(row["kl_chosen"]) for row in rows("samples.csv")), reverse=True)
    assert f"{sum(value < 0.05 for value in kl)} stay" in text and sum(kl[:2]) / sum(kl) == pytest.approx(
        0.5, abs=0.02
    )
    fuses = [row["fusion_layer"] for row in rows("samples.csv")]
    assert f"{fuses.count('0') / len(fuses):.0%} of the samples" in text
    assert f"never holds for {fuses.count('') / len(fuses):.0%}" in text
