"""Every command and every snippet of README.md runs."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from latefusion.eval.bench import icons_maps, icons_schedules, icons_students, threshold_holds
from latefusion.eval.report import tables
from latefusion.eval.report.__main__ import insert

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
QUICK = ["train.steps=2", "train.batch_size=2", "train.save_every=1", "data.scenes=4"]
QUICK_EVALUATION = ["eval.split=validation", "eval.samples=8"]
SCRIPTS = {  # what makes each of them quick
    "python eval/evaluate.py ": ["samples=8", "output=evaluation"],
    "python eval/generate.py ": [],
    "python eval/calibrate.py ": ["samples=8", "confirm=8", "boundaries=[7]", "output=calibration"],
    "python eval/profile_model.py ": ["samples=8", "confirm=8", "images=40", "output=profile"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = "".join(blocks("bash")).splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def execute(snippet: str) -> None:
    exec(compile(snippet, "README.md", "exec"), {"__name__": "__readme__"})


def test_the_snippet_on_a_model_that_one_has() -> None:
    """With what `pip install latefusion` alone brings."""
    missing = "import sys; sys.modules.update(dict.fromkeys(['datasets', 'peft', 'hydra', 'omegaconf', 'accelerate']))"
    words = [sys.executable, "-c", f"{missing}\n{blocks('python')[0]}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-2000:]
    question = done.stdout.splitlines()[0]
    assert re.fullmatch(r"[\w ,']+\? [\w ]+", question), question  # and its answer, without the prompt
    assert "TraceRecord(fusion_layer=" in done.stdout


def test_make_train_and_make_test_do_what_readme_says() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert {"make train", "make real"} <= set(commands()) and "`make test`" in README
    assert re.search(
        r"^train:.*\n\t.*accelerate launch training/train\.py recipe=late_fusion$", makefile, re.MULTILINE
    )
    assert re.search(r"^test:.*\n\t.*pytest", makefile, re.MULTILINE)


def results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / f"docs/results/{name}.json").read_text())


def test_the_tables_are_what_the_script_makes_of_their_files() -> None:
    """`python -m latefusion.eval.report docs/results/... --readme README.md` changes nothing."""
    run = results("make_train")
    assert insert(README, "results", f"{tables.markdown(run)}\n{tables.headline(run)}\n") == README
    longer = [results(f"longer_seed{seed}") for seed in (0, 1, 2)]
    assert insert(README, "seeds", tables.seeds(longer)) == README
    page, runs = (
        (ROOT / "docs/models.md").read_text(),
        [results(f"cross_only_seed{seed}") for seed in (0, 1, 2)],
    )
    assert insert(page, "cross_only", tables.seeds(runs)) == page


def test_the_table_of_thresholds_is_that_of_its_file() -> None:
    page = (ROOT / "docs/inference.md").read_text()
    table = threshold_holds.markdown(results("threshold_holds"))
    assert insert(page, "threshold_holds", table + "\n\n") == page


def test_the_tables_of_the_second_base_are_those_of_their_files() -> None:
    page, students = (ROOT / "docs/evidence.md").read_text(), results("icons_students")
    assert insert(page, "students", icons_students.markdown(students) + "\n") == page
    more = icons_students.merged(ROOT / "docs/results/icons_students")
    assert insert(page, "students_of_more_boards", icons_students.markdown(more) + "\n") == page
    schedules = icons_schedules.markdown(results("icons_schedules"))
    assert insert(page, "schedules", schedules + "\n") == page
    assert insert(page, "maps", icons_maps.markdown(results("icons_maps")) + "\n") == page
    (table,) = re.findall(r"<!-- icons -->\n(.*?)<!-- /icons -->", README, flags=re.DOTALL)
    rows = {row["arm"]: row for row in students["rows"]}
    rows |= {"more boards": next(row for row in more["rows"] if row.get("train_boards") == 2400)}
    arms = ("base, dense", "base, pruned", "base, profiled", "late_fusion_no_teacher", "more boards")
    for arm, line in zip(arms, table.splitlines()[2:], strict=True):
        test, row = rows[arm]["tests"]["test"], rows[arm]
        right = f"{test['mean']:.1f} ({test['low']:.1f}–{test['high']:.1f})"
        assert line.endswith(f"| {right} | {row['prefill_flops']:.0%} |")
    (table,) = re.findall(r"<!-- methods -->\n(.*?)<!-- /methods -->", page, flags=re.DOTALL)
    methods = results("icons_methods")["systems"].values()
    for system, line in zip(methods, table.splitlines()[2:], strict=True):
        accuracy = system["accuracy"]["overall"]
        value, low, high = (f"{100 * accuracy[key]:.1f}" for key in ("value", "low", "high"))
        assert f"| {value} ({low}–{high}) |" in line
        assert line.endswith(f"| {system['flops']['ratio']:.0%} | {system['prefill_flops']['ratio']:.0%} |")


def test_the_recipe_is_that_of_the_tables() -> None:
    """Whoever changes the recipe measures it again."""
    systems = results("make_train")["systems"]
    recipe = OmegaConf.load(ROOT / "recipes/model/embedded.yaml").model
    policy = systems["student"]["policy"]
    assert (policy["enter"], policy["exit"]) == (recipe.schedule.enter, recipe.schedule.exit)
    assert {int(layer): k for layer, k in policy["keep"].items()} == dict(recipe.schedule.keep)
    for name, value in recipe.visipruner.items():
        assert systems["pruned"]["policy"][name] == value


def test_every_command_is_known() -> None:
    """A command of another kind needs a test of its own."""
    for command in commands():
        assert command.startswith(("make ", "accelerate launch training/train.py ", *SCRIPTS)), command


def run(command: str, folder: Path, extra: list[str]) -> subprocess.CompletedProcess[str]:
    """A command of README in `folder`, with the repository's scripts and a few further arguments."""
    words = [str(ROOT / word) if word.endswith(".py") else word for word in shlex.split(command)]
    head = {
        "accelerate": [sys.executable, "-m", "accelerate.commands.launch"],
        "python": [sys.executable],
    }[words[0]]
    rest = words[2:] if words[0] == "accelerate" else words[1:]
    return subprocess.run([*head, *rest, *extra], cwd=folder, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_every_command_and_what_follows_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for command in commands():
        if command.startswith("make "):
            continue
        if command.startswith("python "):
            (extra,) = (more for start, more in SCRIPTS.items() if command.startswith(start))
            done = run(command, tmp_path, extra)
        elif "llava_1_5_7b" in command:
            done = run(command, tmp_path, [])
            assert done.returncode != 0 and re.search(
                r"^error: .*llava-hf/llava-1\.5-7b-hf.*\.$", done.stderr, re.M
            )
            continue
        else:
            more = ["train.steps=3"] if "resume=true" in command else []
            done = run(command, tmp_path, [*QUICK, *QUICK_EVALUATION, *more])
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
    assert (tmp_path / "outputs/late_fusion/report.html").is_file()
    assert (tmp_path / "evaluation/report.json").is_file()
    assert (tmp_path / "calibration/calibration.json").is_file()
    assert (tmp_path / "profile/schedule.yaml").is_file()
    monkeypatch.chdir(tmp_path)
    execute(blocks("python")[1])
    assert (tmp_path / "outputs/merged/config.json").is_file()
