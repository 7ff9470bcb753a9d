"""The tables of docs/benchmarks.md and of the pages beside it are those of their files, number by number."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from latefusion.eval.bench.end_to_end_table import markdown, read

ROOT = Path(__file__).parents[2]
Row = tuple[str, ...]


def cells(line: str) -> Row:
    return tuple(cell.strip().replace("**", "") for cell in line.strip().strip("|").split("|"))


def rows_of(page: str) -> set[Row]:
    return {cells(line) for line in (ROOT / page).read_text().splitlines() if line.startswith("|")}


def results(name: str) -> Any:
    return json.loads((ROOT / f"docs/results/{name}.json").read_text())


def end_to_end() -> Iterator[Row]:
    files = sorted((ROOT / "docs/results/end_to_end").glob("*.json"))
    return (cells(line) for line in markdown(read(files)).splitlines() if line.startswith("|"))


def decoding() -> Iterator[Row]:
    for name in ("bench_decoding", "bench_decoding_embedded"):
        for row in results(name)["rows"]:
            stock = row["policy"] == "stock"
            quartiles = f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
            yield (
                f"{row['vision'] + row['text']:,}", row["policy"], f"{row['keys']:,.0f}", f"{row['calls']:,}",
                f"{row['ms']:.2f}", "1" if stock else quartiles, "1" if stock else f"{row['tenth']:.3f}",
            )  # fmt: skip


def first_token() -> Iterator[Row]:
    for row in results("bench_first_token")["rows"]:
        yield (
            row["policy"], f"{row['ms']:.1f}", f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})",
            f"{row['fastest']:.3f}", f"{row['decoder_flops']:.0%}",
            *(f"{row['parts_ms'][part]:.1f}" for part in ("tower", "layers", "rest")), f"{row['calls']:,}",
        )  # fmt: skip


def executor() -> Iterator[Row]:
    for row in results("bench_executor")["rows"]:
        low, high = row["quartiles"]
        spread = "" if low == high else f" ({low:.3f} to {high:.3f})"
        predicted, saved = row["predicted_ratio"], row["saved_of_predicted"]
        of_flops = ("", "") if predicted is None else (f"{predicted:.3f}", f"{saved:.0%}")
        yield (
            row["what"],
            row["policy"],
            f"{row['ratio']:.3f}{spread}",
            f"{row['fastest_ratio']:.3f}",
            *of_flops,
        )


def inference() -> Iterator[Row]:
    for row in results("bench_inference")["rows"]:
        first, each, stock = row["ttft"], row["tpot"], row["variant"] == "stock"
        where = (str(row["batch"]), str(row["text"]), row["variant"], f"{row['predicted_ratio']:.3f}")
        if stock:
            whole = row
            sizes = (f"{row['kv_bytes'] / 1e6:.1f} MB", f"{row['peak_bytes'] / 1e6:.0f} MB")
            yield (*where, f"{first['ms']:.0f} ms", "", "", f"{each['ms']:.1f} ms", "", *sizes)
            continue
        shares = (f"{row[size] / whole[size]:.3f}" for size in ("kv_bytes", "peak_bytes"))
        yield (
            *where, f"{first['ratio']:.3f}", f"{first['low']:.3f}–{first['high']:.3f}",
            "met" if row["met"] else "missed", f"{each['ratio']:.3f}", f"{each['low']:.3f}–{each['high']:.3f}", *shares,
        )  # fmt: skip


def ranking() -> Iterator[Row]:
    for row in results("bench_ranking")["rows"] + results("bench_ranking_long")["rows"]:
        low, high = row["added_quartiles"]
        stock, counted, lengths = (row[f"{name}of_stock"] for name in ("", "counted_", "at_lengths_"))
        added = (row[name] for name in ("added", "added_fastest", "counted_added"))
        median, fastest, flops = (f"{100 * value:+.1f}%" for value in added)
        yield (
            f"{row['text']:,}", f"`{row['ranking']}`", median, f"{100 * low:+.1f} to {100 * high:+.1f}", fastest, flops,
            f"{stock:.3f}", f"{counted:.3f}", f"{stock / counted:.2f}", f"{lengths:.3f}", f"{stock / lengths:.2f}",
        )  # fmt: skip


def training() -> Iterator[Row]:
    for batch in ("1", "4"):
        for row in results(f"bench_training_batch{batch}")["steps"]:
            yield (
                batch, row["recipe"], row["lora"], f"{row['seconds']:.1f} s", f"{row['speedup']:.2f}x",
                f"{1 / row['high']:.2f}–{1 / row['low']:.2f}", f"{row['predicted_speedup']:.2f}x",
                f"{row['share_of_prediction']:.0%}", f"{row['peak_bytes'] / 1e6:,.0f} MB", f"{row['peak_ratio']:.0%}",
            )  # fmt: skip


BENCHMARKS = (end_to_end, decoding, first_token, executor, inference, ranking, training)


@pytest.mark.parametrize("table", BENCHMARKS, ids=lambda table: table.__name__)
def test_a_table_of_the_benchmarks_is_that_of_its_files(table: Any) -> None:
    missing = set(table()) - rows_of("docs/benchmarks.md")
    assert not missing


def test_readme_has_the_speed_ups_of_the_benchmarks() -> None:
    measured = list(end_to_end())
    steps = {row[:3]: row[5] for row in measured if len(row) == 8}
    requests = {row[:3]: (row[4], row[8]) for row in measured if len(row) == 10}
    seen = 0
    for row in rows_of("README.md"):
        if match := re.fullmatch(r"([\d,]+), `(\w+)`(, eight at once)?", row[0]):
            where, name = ("8" if match[3] else "1", match[1].replace(",", "")), match[2]
            taught, alone = (steps.get((*where, f"{name}{teacher}"), "–") for teacher in ("", ", no teacher"))
            assert row[1:] == (taught, alone, *requests[(*where, f"{name}, merged")])
            seen += 1
    assert seen == 15


def kept() -> Iterator[Row]:
    rules = {
        "`question`: the last 16 text tokens, every layer since entry": "16 rows, all layers",
        "`reading`: all text, every layer since entry": "reading",
        "the last 16, the layer before each keep": "16 rows, layer before",
        "the last one, every layer": "1 rows, all layers",
        "the last one, the layer before": "1 rows, layer before",
        "`hidrop`": "hidrop",
    }
    columns = [row["rules"] for row in results("kept_embedded")["rows"]]
    for name, key in rules.items():
        of = [column[key] for column in columns]
        yield (name, *(f"{v['kl']:.3f} ±{v['kl_error']:.3f}, {100 * v['other_answer']:.1f}%" for v in of))


def calibrated() -> Iterator[Row]:
    for row in results("calibration")["front"]:
        yield (
            str(row["boundary"]), f"{row['layer_threshold']} / {row['tokens_threshold']}", ", ".join(row["stages"]),
            f"{row['kl']:.4f}", f"{100 * row['same_answer']:.1f}",
            f"{100 * row['flops_ratio']:.1f} ({100 * row['prefill_ratio']:.1f})",
        )  # fmt: skip


def against_random() -> Iterator[Row]:
    for system in results("evaluation")["systems"].values():
        value, low, high = (100 * system["accuracy"]["overall"][key] for key in ("value", "low", "high"))
        decoder, prefill = (f"{system[flops]['ratio']:.2f}×" for flops in ("flops", "prefill_flops"))
        tokens = f"{int(system['vision_tokens']['mean'] + 0.5)}"  # 40.5 is 41
        yield (system["name"], f"{value:.1f} ({low:.1f}–{high:.1f})", f"{decoder} ({prefill})", tokens)


@pytest.mark.parametrize("table", [kept, calibrated, against_random], ids=lambda table: table.__name__)
def test_a_table_of_the_band_is_that_of_its_file(table: Any) -> None:
    page, expected = rows_of("docs/choosing_the_band.md"), set(table())
    width = len(next(iter(expected)))
    assert not expected - {row[:width] for row in page}


def test_the_layers_of_the_profile_are_those_of_its_file() -> None:
    page = rows_of("docs/profile.md")
    with (ROOT / "docs/results/profile_embedded/layers.csv").open() as file:
        for row in csv.DictReader(file):
            shown = [
                f"{float(row[f'{kind}_kl']):.3f}, {100 * float(row[f'{kind}_accuracy']):.1f}%"
                for kind in ("prefix", "suffix", "single")
                if row[f"{kind}_kl"]
            ]
            if 0 < int(row["layer"]) < 12:
                assert (row["layer"], *shown) in page
