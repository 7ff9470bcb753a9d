"""The sortable table: a row a method, a column a quantity, each cell with what it sorts by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from latefusion.eval.report.tables import percent, points, si, times


@dataclass(frozen=True)
class Column:
    """A heading; `hint` says what the number is, `best`: 1 if more is better, -1 if less is, 0 if neither."""

    name: str
    hint: str
    best: int


@dataclass(frozen=True)
class Cell:
    """What is shown, its small print, and the number to sort by (None: no number, sorted last)."""

    text: str
    detail: str = ""
    value: float | None = None


COLUMNS = (
    Column("accuracy, %", "mean score; 95% interval", 1),
    Column("to dense", "difference in points, same questions; 95% interval", 1),
    Column("McNemar p", "exact test that wins and losses against dense are as likely", 0),
    Column("same as dense, %", "share of prompts answered as dense answers them", 1),
    Column("FLOPs", "of the decoder's prefill; ratio to dense", -1),
    Column(
        "prefill FLOPs", "of the whole prefill, with vision tower, projector and head; ratio to dense", -1
    ),
    Column("vision tokens", "a layer; ratio to dense", -1),
    Column("vision-only MACs", "the literature's 4nd²+2n²d+3ndm; ratio to dense", -1),
    Column("vision attention", "causal query-key pairs with a vision token; ratio to dense", -1),
    Column("first token", "milliseconds, batch 1; ratio to dense", -1),
    Column("per token", "milliseconds a further token, batch 1; ratio to dense", -1),
    Column("KV cache", "bytes after the prefill; ratio to dense", -1),
    Column("memory", "working memory beyond the weights; ratio to dense", -1),
    Column("peak memory", "of everything, weights and libraries too; ratio to dense", -1),
    Column("energy", "joules an answer; ratio to dense", -1),
)
NONE = Cell("–")


def methods(results: dict[str, Any]) -> tuple[list[Column], list[tuple[str, list[Cell]]]]:
    """Columns that hold anything, and a row of cells for each system's key."""
    rows = [(key, _cells(results, key)) for key in results["systems"]]
    filled = [i for i in range(len(COLUMNS)) if any(cells[i].value is not None for _, cells in rows)]
    return [COLUMNS[i] for i in filled], [(key, [cells[i] for i in filled]) for key, cells in rows]


def _cells(results: dict[str, Any], key: str) -> list[Cell]:
    system, against = results["systems"][key], results["against"].get(key)
    score = system["accuracy"]["overall"]
    interval = f"{percent(score['low'])}–{percent(score['high'])}"
    return [
        Cell(percent(score["value"]), interval, score["value"]),
        *(_against(against) if against else [NONE, NONE, NONE]),
        _amount(system["flops"]),
        _amount(system.get("prefill_flops")),
        _plain(system["vision_tokens"], f"{system['vision_tokens']['mean']:.1f}"),
        _amount(system["vision_macs"]),
        _amount(system["vision_attention"]),
        _seconds(system.get("ttft")),
        _seconds(system.get("tpot")),
        _amount(system.get("kv_bytes"), "B"),
        _amount(system.get("working_bytes"), "B"),
        _amount(system.get("peak_bytes"), "B"),
        _amount(system.get("joules"), "J"),
    ]


def _against(pair: dict[str, Any]) -> list[Cell]:
    gap, p, same = pair["difference"], pair["mcnemar_p"], pair["agreement"]
    return [
        Cell(points(gap["value"]), f"{points(gap['low'])} to {points(gap['high'])}", gap["value"]),
        Cell("< 0.001" if p < 0.001 else f"{p:.3f}", f"{pair['wins']} : {pair['losses']}", p),
        Cell(percent(same["value"]), f"{percent(same['low'])}–{percent(same['high'])}", same["value"]),
    ]


def _amount(figures: dict[str, Any] | None, unit: str = "") -> Cell:
    return NONE if figures is None else _plain(figures, si(figures["mean"], unit))


def _plain(figures: dict[str, Any], text: str) -> Cell:
    return Cell(text, times(figures["ratio"]), figures["mean"])


def _seconds(figures: dict[str, Any] | None) -> Cell:
    return (
        NONE
        if figures is None
        else Cell(f"{1000 * figures['median']:.3g}", times(figures["ratio"]), figures["median"])
    )
