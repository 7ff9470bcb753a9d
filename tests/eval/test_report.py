"""What an evaluation writes: the page, its numbers, its text; comparisons of two; and the page in a real browser."""

from __future__ import annotations

import ast
import copy
import io
import json
import os
import re
import shutil
from dataclasses import replace
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from helpers import evaluated_student
from rich.console import Console

from latefusion.eval.compare import compare, main, notes
from latefusion.eval.comparison.run import budgets
from latefusion.eval.report import svg, tables
from latefusion.eval.report.__main__ import insert
from latefusion.eval.report.figures import tokens_per_layer
from latefusion.eval.report.gallery import EACH
from latefusion.eval.report.svg import standalone

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run() -> tuple[Path, dict[str, Any]]:
    return evaluated_student.full_run()


@pytest.fixture(scope="module")
def stored(run: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    return json.loads((run[0] / "report.json").read_text())


class Page(HTMLParser):
    """Collects what a page refers to and which sections, rows and cards it has."""

    def __init__(self, text: str):
        super().__init__()
        self.refers: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.kinds: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.refers += [values[name] for name in ("src", "href", "xlink:href", "data") if name in values]
        self.ids += [values["id"]] if "id" in values else []
        self.kinds += [values["data-kinds"]] if "data-kinds" in values else []


def test_page_has_every_section_and_needs_no_network(run: tuple[Path, dict[str, Any]]) -> None:
    folder, results = run
    text = (folder / "report.html").read_text()
    page = Page(text)
    sections = {"verdict", "methods", "figures", "accuracy", "latency", "disagreements", "next", "method"}
    assert sections <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("svg") == 6 and "img" in page.tags
    assert all(re.match(r"data:(image/(png|jpeg);base64)?,", reference) for reference in page.refers)
    assert "iframe" not in page.tags and page.tags.count("script") == 1
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text
    for system in results["systems"].values():
        assert system["name"] in text and f"{100 * system['accuracy']['overall']['value']:.1f}" in text
    assert results["environment"]["command"] in text.replace("&#39;", "'")
    assert tables.headline(results) in text.replace("&#39;", "'")
    assert len(text) < 600_000


def test_disagreements_are_what_the_predictions_say(run: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = run
    answers: dict[str, list[dict]] = {}
    for line in (folder / "predictions.jsonl").read_text().splitlines():
        answer = json.loads(line)
        answers.setdefault(answer["system"], []).append(answer)
    text = (folder / "report.html").read_text()
    for key, name in (("pruned", "Keep three"), ("student", "Late fusion")):
        pairs = [
            (other["score"] - base["score"])
            for base, other in zip(answers["dense"], answers[key], strict=True)
            if other["prediction"].lower().strip(" .") != base["prediction"].lower().strip(" .")
        ]
        lost, won = sum(gap < 0 for gap in pairs), sum(gap > 0 for gap in pairs)
        assert f"{name}: {lost} lost, {won} won, {len(pairs) - lost - won} otherwise" in text
        shown = [kinds for kinds in Page(text).kinds if f'"{key}"' in kinds]
        assert 0 < len(shown) <= 2 * EACH


def test_report_json_holds_every_number_and_says_where_it_comes_from(
    run: tuple[Path, dict[str, Any]], stored: dict[str, Any]
) -> None:
    assert stored["schema"] == 3
    assert set(stored) == {
        "schema", "title", "note", "checkpoint", "roles", "data", "model", "systems", "paired", "against",
        "sweeps", "settings", "environment",
    }  # fmt: skip
    keys = {"name", "policy", "adapters", "blind", "control", "source", "accuracy", "tasks"}
    counted = {"flops", "prefill_flops", "vision_macs", "vision_attention", "vision_tokens"}
    timed = {"ttft", "tpot", "kv_bytes", "working_bytes"}
    for system in stored["systems"].values():
        assert set(system) - {"joules", "peak_bytes"} == keys | counted | (
            set() if system["control"] else timed
        )
        types = system["accuracy"]["types"]
        assert set(types) == set(stored["data"]["types"])
        assert sum(score["n"] for score in types.values()) == stored["data"]["questions"]
        assert system["tasks"]["scenes"]["score"] == system["accuracy"]
    assert stored["systems"]["student"]["working_bytes"]["mean"] > 0
    assert set(stored["paired"]) == set(stored["systems"]) - {"student"}
    assert set(stored["against"]) == set(stored["systems"]) - {"dense"}
    assert stored["systems"]["student"]["policy"]["keep"] == {"2": 5}
    assert {"torch", "transformers", "latefusion"} <= set(stored["environment"]["versions"])
    first = evaluated_student.questions()[0]["question"]
    prompt = stored["settings"]["prompts"]["scenes"]
    assert first in prompt and prompt.count("<image>") == 1 and prompt != first
    assert f"<code>{escape(prompt)}</code>" in (run[0] / "report.html").read_text()


def test_controls_have_no_image_or_the_budget_of_a_method(stored: dict[str, Any]) -> None:
    systems = stored["systems"]
    controls = {key for key, system in systems.items() if system["control"]}
    assert controls == {"blind", "random_0.594", "random_0.328"}  # (16+16+3+3) and (0+16+5+0) of 64
    assert systems["blind"]["vision_tokens"]["per_layer"] == [0, 0, 0, 0]
    assert systems["random_0.594"]["vision_tokens"]["per_layer"] == [10, 10, 10, 10]
    assert systems["random_0.328"]["vision_tokens"]["per_layer"] == [5, 5, 5, 5]


def test_budgets_that_are_near_to_each_other_share_the_row_of_the_largest() -> None:
    assert budgets([0.5, 0.533, 0.749, 0.451, 0.097, 0.1, 1.0, 0.0]) == [0.749, 0.533, 0.451, 0.1]
    assert budgets([0.5, 0.45, 0.4]) == [0.5, 0.4]  # not a chain
    assert budgets([1.0, 0.0]) == []


def test_vision_costs_follow_their_conventions(stored: dict[str, Any]) -> None:
    """4nd² + 2n²d + 3ndm a layer; causal pairs of query and key with a vision token."""
    d, m = evaluated_student.WIDTH, evaluated_student.MLP
    for key, tokens in (("dense", [16] * 4), ("pruned", [16, 16, 3, 3]), ("student", [0, 16, 5, 0])):
        macs = sum(4 * n * d * d + 2 * n * n * d + 3 * n * d * m for n in tokens)
        assert stored["systems"][key]["vision_macs"]["mean"] == macs
        lengths = [length for _, length in evaluated_student.naive()[key]]
        pairs = [sum(i + 1 for n in tokens for i in range(n + t)) - 4 * sum(range(t + 1)) for t in lengths]
        assert stored["systems"][key]["vision_attention"]["mean"] == pytest.approx(sum(pairs) / len(pairs))


def test_agreement_counts_equal_answers(stored: dict[str, Any]) -> None:
    texts = {
        key: [text.lower().strip(" .") for text, _ in answers]
        for key, answers in evaluated_student.naive().items()
    }
    same = [a == b for a, b in zip(texts["dense"], texts["student"], strict=True)]
    assert stored["against"]["student"]["agreement"]["value"] == pytest.approx(sum(same) / len(same))


def test_sweeps_have_a_prediction_beside_each_measurement(stored: dict[str, Any]) -> None:
    batches, lengths = stored["sweeps"]["batch"], stored["sweeps"]["text"]
    assert [point["batch"] for point in batches] == [1, 3]
    assert 8 <= lengths[0]["text_tokens"] < 40 <= lengths[1]["text_tokens"]
    for point in (*batches, *lengths):
        assert set(point["systems"]) == {"dense", "pruned", "student"}
        assert point["systems"]["dense"]["predicted"] == point["systems"]["dense"]["prefill"]["ratio"] == 1
        assert 0 < point["systems"]["student"]["predicted"] < point["systems"]["pruned"]["predicted"] < 1
    assert batches[0]["systems"]["student"]["per_second"]["median"] > 0
    # The more text, the less there is to save
    assert lengths[0]["systems"]["student"]["predicted"] < lengths[1]["systems"]["student"]["predicted"]


def console_text(results: dict[str, Any]) -> str:
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    tables.print_table(results, console)
    return console.export_text()


def three(stored: dict[str, Any]) -> dict[str, Any]:
    """The report without its controls."""
    systems = {key: system for key, system in stored["systems"].items() if not system["control"]}
    return {**stored, "systems": systems}


def test_table_fits_a_terminal_of_80_columns_and_says_what_the_files_say(stored: dict[str, Any]) -> None:
    few = three(stored)
    text = console_text(few)
    assert max(map(len, text.splitlines())) <= 80
    flat, markdown = " ".join(text.split()), tables.markdown(few)
    for row in tables.rows(few):
        for value, _ in row.cells:
            assert value in flat and value in markdown
    many = console_text(stored)
    assert max(map(len, many.splitlines())) <= 80
    for system in stored["systems"].values():
        assert system["name"] in many and tables.percent(system["accuracy"]["overall"]["value"]) in many


@pytest.mark.parametrize(
    ("gap", "verdict"),
    [
        ((-0.031, -0.05, -0.012), "3.1 points below Dense base [−5.0 to −1.2]"),
        ((0.02, 0.001, 0.04), "2.0 points above Dense base [+0.1 to +4.0]"),
        ((0.0, -0.01, 0.01), "0.0 points from Dense base [−1.0 to +1.0]"),
    ],
)
def test_verdict_says_who_is_ahead(
    stored: dict[str, Any], gap: tuple[float, float, float], verdict: str
) -> None:
    results = copy.deepcopy(stored)
    results["paired"]["dense"]["difference"] = dict(zip(("value", "low", "high"), gap, strict=True))
    sentence = tables.headline(results)
    assert verdict in sentence and sentence.startswith("Late fusion answers ")
    decoder, whole = (
        tables.percent(stored["systems"]["pruned"][name]["ratio"], 0) for name in ("flops", "prefill_flops")
    )
    assert sentence.endswith(f"which needs {decoder}% ({whole}%).")
    results["systems"]["pruned"].pop("prefill_flops")  # a report of before
    assert tables.headline(results).endswith(f"which needs {decoder}%.")


def test_markdown_has_the_verdict_and_a_row_a_method(
    run: tuple[Path, dict[str, Any]], stored: dict[str, Any]
) -> None:
    text = (run[0] / "report.md").read_text()
    assert tables.headline(stored) in text
    for system in stored["systems"].values():
        assert f"| {system['name']} | {tables.percent(system['accuracy']['overall']['value'])} (" in text


@pytest.mark.parametrize("name", ["make_train", "longer_seed0"])
def test_the_results_behind_the_readme_are_read(name: str, tmp_path: Path) -> None:
    results = json.loads((ROOT / f"docs/results/{name}.json").read_text())
    for row in tables.rows(results):
        for value, _ in row.cells:
            assert value in tables.markdown(results)
    assert "<svg" in tokens_per_layer(results) and tables.headline(results).endswith(".")


def test_figure_for_the_readme_is_a_picture_of_its_own(run: tuple[Path, dict[str, Any]]) -> None:
    drawing = ElementTree.fromstring(standalone(tokens_per_layer(run[1])))
    space = {"s": "http://www.w3.org/2000/svg"}
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    lines = drawing.findall("s:path[@class]", space)
    assert sum("line" in line.attrib["class"] for line in lines) == len(evaluated_student.SYSTEMS)
    style = drawing.find("s:style", space)
    assert style is not None and "--s0" in str(style.text)


def test_readme_keeps_all_but_what_stands_between_the_marks() -> None:
    document = "before\n<!-- results -->\nold\n<!-- /results -->\nafter\n"
    assert insert(document, "results", "new") == "before\n<!-- results -->\nnew\n<!-- /results -->\nafter\n"
    with pytest.raises(ValueError, match="other"):
        insert(document, "other", "new")


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> | [x](javascript:y) ![z](http://e/p) `c` \x1b[31m\n# h"


def test_text_from_data_and_checkpoints_stays_text(tmp_path: Path) -> None:
    """Names, policies, tasks, prompts and paths that hold markup: none of it reaches page, Markdown or terminal."""
    rows = evaluated_student.questions().select(range(4)).remove_columns(["type", "question"])
    rows = rows.add_column("type", [HOSTILE] * 4).add_column("question", [HOSTILE] * 4)
    systems = {
        key: replace(system, name=f"{system.name} {HOSTILE}", source=HOSTILE)
        for key, system in evaluated_student.SYSTEMS.items()
    }
    task = evaluated_student.task(rows, name=HOSTILE, split=HOSTILE, source=HOSTILE, metric="exact match")
    checkpoint = 'x"); import os; os.system("true") #'
    results = evaluated_student.evaluate(
        tmp_path, systems=systems, tasks=[task], title=HOSTILE, note=HOSTILE, checkpoint=checkpoint
    )
    assert results is not None
    page = Page((tmp_path / "report.html").read_text())
    assert page.tags.count("script") == 1 and not any(reference == "x" for reference in page.refers)
    text = unescape((tmp_path / "report.html").read_text())
    call = ast.parse(text[text.index("lf.load(") :].split("  #")[0]).body[0]
    assert isinstance(call, ast.Expr) and isinstance(call.value, ast.Call)
    assert [argument.value for argument in call.value.args] == [checkpoint]  # type: ignore[attr-defined]
    markdown = (tmp_path / "report.md").read_text()
    outside = re.sub(r"(`+).*?\1", "", markdown.replace("\\`", ""))
    assert "<" not in outside and not re.search(r"(?<!\\)\]\(", outside) and "\n# h" not in markdown
    rows_of_table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert (
        len({len(re.findall(r"(?<!\\)\|", line)) for line in rows_of_table}) <= 2
    )  # two tables, no cell more
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    tables.print_table(results, console)
    assert "\x1b" not in console.file.getvalue() and "<script>" in console.file.getvalue()  # type: ignore[attr-defined]
    seeds = tables.seeds([results, results])
    assert "<" not in seeds and "\x1b" not in seeds


def test_the_mean_over_seeds_has_a_t_interval(stored: dict[str, Any]) -> None:
    runs = [copy.deepcopy(stored) for _ in range(3)]
    for run, value in zip(runs, (0.99, 0.98, 0.97), strict=True):
        run["systems"]["student"]["accuracy"]["overall"]["value"] = value
        run["paired"]["dense"]["difference"]["value"] = value - 1
    last = next(line for line in tables.seeds(runs).splitlines() if line.startswith("| mean"))
    half = 100 * 4.302653 * 0.01 / 3**0.5
    assert f"98.0 ({98 - half:.1f}–100.0)" in last and f"-2.0 ({-2 - half:+.1f} to {-2 + half:+.1f})" in last
    assert "95% t intervals of the mean over the 3 seeds" in " ".join(tables.seeds(runs).split())


# Comparing two reports


def changed(folder: Path, to: Path, change: Any, *, answers: bool = True) -> Path:
    """A copy of a report after `change(report)`, with or without the file of its answers."""
    shutil.copytree(folder, to)
    report = json.loads((to / "report.json").read_text())
    change(report)
    (to / "report.json").write_text(json.dumps(report))
    if not answers:
        (to / "predictions.jsonl").unlink()
    return to


def test_a_report_is_no_worse_than_itself(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    assert not any(change.worse for change in compare(run[0], run[0]))
    without = changed(run[0], tmp_path / "b", lambda report: None, answers=False)
    assert not any(change.worse for change in compare(run[0] / "report.json", without))


def test_lost_answers_are_a_regression(
    run: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose(report: dict[str, Any]) -> None:
        overall = report["systems"]["dense"]["accuracy"]["overall"]
        overall["value"] = overall["low"] = overall["high"] = 0.0

    def write_answers(folder: Path, **changes: Any) -> None:
        """As if every question had an image of its own."""
        lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        lines = [{**line, "cluster": line["id"]} for line in lines]
        lines = [{**line, **changes} if line["system"] == "dense" else line for line in lines]
        (folder / "predictions.jsonl").write_text("\n".join(map(json.dumps, lines)))

    before, after = (
        changed(run[0], tmp_path / name, change)
        for name, change in (("before", lambda report: None), ("after", lose))
    )
    write_answers(before)
    write_answers(after, score=0.0)
    worse = [change for change in compare(before, after) if change.worse]
    assert [(change.system, change.what) for change in worse] == [("Dense base", "accuracy")]
    accuracy = run[1]["systems"]["dense"]["accuracy"]["overall"]["value"]
    assert worse[0].difference == pytest.approx(-100 * accuracy)
    assert not any(change.worse for change in compare(after, before))  # the other way round it is progress
    with pytest.raises(SystemExit, match="1"):
        main([str(before), str(after)])
    assert "Worse: Dense base: accuracy." in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main([str(after), str(before)])


def test_a_report_on_other_images_is_not_paired(
    run: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: Any
) -> None:
    def swap(report: dict[str, Any]) -> None:
        report["data"]["fingerprint"] = "other"
        report["model"]["identity"]["processor"] = "other"

    after = changed(run[0], tmp_path / "after", swap)
    with pytest.raises(SystemExit, match="0"):
        main([str(run[0]), str(after)])
    text = " ".join(capsys.readouterr().out.split())
    assert "images are not the same: samples count as independent" in text and "differ in processor." in text
    accuracies = [
        next(c for c in compare(run[0], folder) if c.system == "Late fusion" and c.what == "accuracy")
        for folder in (run[0], after)
    ]
    assert accuracies[0].high > 0 and accuracies[0] != accuracies[1]


def test_dearer_is_a_regression_and_a_little_dearer_is_not(
    run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    def dearer(factor: float, what: str = "flops") -> Any:
        def change(report: dict[str, Any]) -> None:
            report["systems"]["student"][what]["mean"] *= factor

        return change

    assert not any(c.worse for c in compare(run[0], changed(run[0], tmp_path / "a", dearer(1.01))))
    worse = [c.what for c in compare(run[0], changed(run[0], tmp_path / "b", dearer(1.03))) if c.worse]
    assert worse == ["decoder FLOPs"]
    assert not any(c.worse for c in compare(run[0], tmp_path / "b", cost=0.05))
    tower = changed(run[0], tmp_path / "c", dearer(1.03, "prefill_flops"))  # the decoder's are as before
    assert [c.what for c in compare(run[0], tower) if c.worse] == ["whole prefill FLOPs"]


def test_slower_beyond_its_quartiles_is_a_regression(
    run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    def slower(report: dict[str, Any]) -> None:
        for name in ("ratio", "ratio_q25", "ratio_q75"):
            report["systems"]["student"]["ttft"][name] += 10

    changes = compare(run[0], changed(run[0], tmp_path / "a", slower))
    assert [c.what for c in changes if c.worse] == ["time to first token"]


def test_reports_that_have_nothing_in_common(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    def rename(report: dict[str, Any]) -> None:
        report["systems"] = {f"x{key}": system for key, system in copy.deepcopy(report["systems"]).items()}

    with pytest.raises(ValueError, match="no system in common"):
        compare(run[0], changed(run[0], tmp_path / "a", rename))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        compare(tmp_path / "nowhere", run[0])


def test_figures_of_another_format_are_not_compared(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    def older(report: dict[str, Any]) -> None:
        report["schema"] -= 1

    with pytest.raises(ValueError, match=r"is a report of format 2 and .* of format 3"):
        compare(changed(run[0], tmp_path / "a", older), run[0])


@pytest.mark.parametrize("text", ['{"system": "dense", ', '{"a": 1}', "[]", "3"])
def test_damaged_answers_are_named_by_file_and_line(
    run: tuple[Path, dict[str, Any]], tmp_path: Path, text: str
) -> None:
    damaged = changed(run[0], tmp_path / "a", lambda report: None)
    with (damaged / "predictions.jsonl").open("a") as file:
        file.write(text)
    lines = len((damaged / "predictions.jsonl").read_text().splitlines())
    with pytest.raises(ValueError, match=rf"predictions\.jsonl, line {lines}, is not an answer"):
        compare(damaged, run[0])


@pytest.mark.parametrize(
    "report",
    [
        "[]",
        '{"systems": {"dense": {}}, "data": {"fingerprint": 1}, "roles": {"reference": "dense"}, "model": {}}',
        '{"systems": {}, "data": {}, "roles": {}}',
        '{"systems": 3, "data": 3, "roles": 3, "model": 3}',
    ],
)
def test_what_is_no_report_is_said(run: tuple[Path, dict[str, Any]], tmp_path: Path, report: str) -> None:
    (tmp_path / "report.json").write_text(report)
    with pytest.raises(ValueError, match=r"report\.json is not a report"):
        compare(tmp_path, run[0])


@pytest.mark.parametrize("cost", ["nan", "inf", "-1"])
def test_a_cost_that_lets_everything_or_nothing_pass_is_refused(
    run: tuple[Path, dict[str, Any]], cost: str
) -> None:
    with pytest.raises(SystemExit, match=r"--cost=.* must be finite and not negative"):
        main([str(run[0]), str(run[0]), f"--cost={cost}"])


def test_answers_that_cannot_be_paired_are_said(
    run: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: Any
) -> None:
    assert not notes(run[0], run[0])
    some = changed(run[0], tmp_path / "a", lambda report: None)
    lines = (some / "predictions.jsonl").read_text().splitlines(keepends=True)
    (some / "predictions.jsonl").write_text("".join(lines[1:]))  # the dense base's first
    (remark,) = notes(some, run[0])
    assert remark.startswith("The answers of Dense base are not in predictions.jsonl beside both reports")


def test_a_long_name_in_a_legend_is_cut_to_the_figure_and_whole_under_a_pointer() -> None:
    name, detail = "VisiPruner (boundary=20, layer_threshold=0.998, tokens_threshold=0.7)", "107.6 a layer"
    long, short = ({"name": one} for one in (name, "FastV"))
    drawn = svg.legend([(0, long), (1, short)], lambda system: detail)
    texts = [element for element in ElementTree.fromstring(f"<svg>{drawn}</svg>").iter("text")]
    cut = texts[0].findtext("title"), texts[0].find("title").tail  # type: ignore[union-attr]
    assert cut[0] == name and cut[1].endswith("…") and name.startswith(cut[1][:-1])
    assert 34 + svg.LETTER * (len(cut[1]) + 2 + len(detail)) <= svg.WIDTH + svg.LETTER
    assert texts[1].text == "FastV" and texts[1].find("title") is None
