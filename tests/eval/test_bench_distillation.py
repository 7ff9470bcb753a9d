"""The bench of what a teacher gives: its rows, its wrong answers, and how cells become a table."""

import json
from pathlib import Path
from typing import Any

import pytest

from latefusion.eval.bench import distillation as bench
from latefusion.eval.report.__main__ import insert


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return bench.questions("scenes", "validation", 60, 0)


def test_a_fifth_of_the_training_answers_are_wrong_answers_to_such_a_question(rows: list[Any]) -> None:
    wrong = bench.with_wrong_answers(rows, 0.2, seed=3)
    changed = [(a, b) for a, b in zip(rows, wrong, strict=True) if a != b]
    assert len(changed) == 12 and wrong == bench.with_wrong_answers(rows, 0.2, seed=3)
    assert wrong != bench.with_wrong_answers(rows, 0.2, seed=4)
    for before, after in changed:
        assert {**after, "answer": before["answer"]} == before and after["answer"] != before["answer"]
        assert after["answer"] in {row["answer"] for row in rows if row["type"] == before["type"]}


def test_the_test_is_clean_and_the_same_for_every_seed() -> None:
    noise, scenes = (bench.rows_of(data, "test", 24, seed=0) for data in ("noise", "scenes"))
    assert noise == scenes and all(row["id"].startswith("test-") for row in noise)
    trained = [bench.rows_of("noise", "train", 24, seed) for seed in (0, 1)]
    assert trained[0] != trained[1] and all(row["id"].startswith("train-") for row in trained[0])


WHERE = {"data": "noise", "rows": 9, "steps": 2, "settings": []}


def cell(arm: str, seed: int, accuracy: float) -> dict[str, Any]:
    return {**WHERE, "arm": arm, "seed": seed, "accuracy": accuracy}


def decision(seed: int, trust: str) -> dict[str, Any]:
    return {**WHERE, "arm": "decision", "seed": seed, "auto": {"trust": trust, "right": 9, "answers": 10}}


def test_cells_become_means_with_t_intervals_and_differences_in_the_same_seeds() -> None:
    none = [cell("none", 0, 0.5), cell("none", 1, 0.7), cell("none", 2, 0.6)]
    full = [cell("all", 0, 0.8), cell("all", 1, 0.8), cell("all", 2, 0.5)]
    decisions = [decision(0, "all"), decision(1, "all"), decision(2, "none")]
    shared = [{**cell("all", 0, 0.9), "settings": ["kl.share=0.5"]}]
    (table,) = bench.merged(none + full + decisions + shared)["tables"]
    arms = table["arms"]
    assert arms["none"]["accuracy"] == pytest.approx(  # t of 2 degrees of freedom: 4.3027
        {"mean": 0.6, "low": 0.6 - 4.3027 * 0.1 / 3**0.5, "high": 0.6 + 4.3027 * 0.1 / 3**0.5, "seeds": 3},
        rel=1e-4,
    )
    assert arms["all"]["to_none"]["mean"] == pytest.approx((0.3 + 0.1 - 0.1) / 3)
    assert arms["auto"]["of_seeds"] == {"0": 0.8, "1": 0.8, "2": 0.6}  # the cells that it decided for
    assert arms["auto"]["to_better"]["mean"] == pytest.approx(0.1 / 3)  # `all` is the better control
    assert arms["all kl.share=0.5"]["accuracy"] == {"mean": 0.9, "seeds": 1} and "decision" not in arms


@pytest.mark.slow
def test_a_cell_is_written_and_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--rows", "24", "--steps", "1", "--questions", "12", "--output", str(tmp_path / "cells"))
    bench.main(["--data", "scenes", "--arm", "none,all,decision", *small, "entry.images=16"])
    bench.main(["--merge", str(tmp_path / "cells"), "--json", str(tmp_path / "all.json")])
    (table,) = json.loads((tmp_path / "all.json").read_text())["tables"]
    auto = table["arms"]["auto entry.images=16"]
    (decided,) = auto["decisions"]
    assert auto["of_seeds"] == table["arms"][f"{decided['trust']} entry.images=16"]["of_seeds"]
    assert decided["answers"] == 12 and "scenes" in capsys.readouterr().out


def test_the_table_of_the_page_is_that_of_its_file() -> None:
    root = Path(__file__).parents[2]
    result = json.loads((root / "docs/results/teacher.json").read_text())
    assert bench.merged(result["cells"]) == result
    page = (root / "docs/distillation.md").read_text()
    assert insert(page, "distillation", bench.markdown(result)) == page
