"""The table of the icons students: cells merged by arm, paired on questions, intervals over questions and seeds."""

import argparse
import json
from math import isclose

import pytest

from latefusion.eval.bench import icons_students as bench
from latefusion.eval.bench.icons_students import ARMS, TESTS, clusters, label, mean_over_seeds, merged
from latefusion.recipes.compose import compose_config


def system(outcomes: str, flops: float) -> dict:
    boards = [i % 2 == 0 and i > 0 for i in range(len(outcomes))]
    return {
        "right": dict.fromkeys(TESTS, outcomes),
        "boards": dict.fromkeys(TESTS, "".join(str(int(board)) for board in boards)),
        "flops": flops,
        "prefill_flops": flops + 10,
    }


def write(folder, arm, seed, systems, **more):
    cell = {
        "arm": arm,
        "seed": seed,
        "share": 1.0,
        "noise": 0.0,
        "transfer": False,
        "device": "cpu",
        "steps": 2,
    }
    (folder / f"{arm}_{seed}_{more.get('noise', 0)}.json").write_text(
        json.dumps(cell | {"batch": 1, "systems": systems} | more)
    )


@pytest.fixture
def cells(tmp_path):
    write(tmp_path, "base", 0, {"dense": system("1111", 90.0), "pruned": system("1101", 40.0)})
    for seed, dense, student in ((0, "1110", "1100"), (1, "1111", "1111"), (2, "1011", "0011")):
        write(tmp_path, "dense", seed, {"student": system(dense, 90.0)})
        write(tmp_path, "late_fusion", seed, {"student": system(student, 40.0)})
    write(tmp_path, "late_fusion_no_teacher", 1, {"student": system("1101", 40.0)})
    write(tmp_path, "late_fusion", 0, {"student": system("1000", 40.0)}, noise=0.2)
    return tmp_path


def test_rows_have_means_over_seeds_and_differences_on_the_same_questions(cells):
    rows = {label(row): row for row in merged(cells)["rows"]}
    assert set(rows) == {
        *("base, dense", "base, pruned", "dense", "late_fusion", "late_fusion, 20% of the answers wrong"),
        "late_fusion_no_teacher",
    }
    student = rows["late_fusion"]["tests"]["test"]
    assert student["by_seed"] == {0: 50.0, 1: 100.0, 2: 50.0}
    gaps = student["against_dense"]["by_seed"]
    assert [gaps[seed]["difference"]["value"] for seed in (0, 1, 2)] == [-0.25, 0.0, -0.25]
    assert isclose(student["against_dense"]["mean"], -50 / 3)
    assert student["against_dense"]["low"] < -50 / 3 < student["against_dense"]["high"]
    of_base = student["against_base"]["by_seed"]  # the base answers all four
    assert [of_base[seed]["difference"]["value"] for seed in (0, 1, 2)] == [-0.5, 0.0, -0.5]
    pruned, base = (rows[f"base, {name}"]["tests"]["test"]["against_base"] for name in ("pruned", "dense"))
    assert pruned["mean"] == -25.0 and base["mean"] is None
    taught = student["against_untaught"]["by_seed"]
    assert list(taught) == [1] and taught[1]["difference"]["value"] == 0.25
    assert rows["dense"]["tests"]["test"]["against_untaught"]["by_seed"] == {}
    assert rows["late_fusion"]["flops"] == 40 / 90
    assert rows["late_fusion"]["prefill_flops"] == 50 / 100
    assert rows["dense"]["tests"]["test"]["against_dense"]["mean"] is None
    assert rows["late_fusion, 20% of the answers wrong"]["tests"]["test"]["against_dense"]["mean"] is None


@pytest.mark.parametrize(
    ("steps", "share", "shown"), [(100, 1.0, "400"), (300, 1.0, "400, 3 times"), (100, 0.1, "40, 10 times")]
)
def test_boards_and_how_often_they_are_trained_on(steps, share, shown):
    assert bench.passes({"steps": steps, "batch": 4, "share": share, "train_boards": 400}) == shown


def test_one_seed_has_its_interval_over_questions_in_the_table(cells):
    (cells / "dense_1_0.json").unlink()
    (cells / "dense_2_0.json").unlink()
    table = {line[0]: line for line in bench.lines(merged(cells))}
    assert table["late_fusion"][1] == "3"
    assert table["late_fusion"][6].startswith("-25.0 (")
    assert table["dense"][6] == table["base, dense"][6] == table["base, dense"][5] == ""
    assert table["base, pruned"][5].startswith("-25.0 (")
    assert table["dense"][1] == "1" and table["dense"][2].startswith("75.0 (")  # over its questions
    text = bench.markdown(merged(cells))
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_seeds_that_agree_do_not_make_the_questions_certain(tmp_path):
    for seed in (0, 1):
        write(tmp_path, "dense", seed, {"student": system("11101111", 90.0)})
        write(tmp_path, "late_fusion", seed, {"student": system("11001111", 40.0)})
    (dense, student) = sorted(merged(tmp_path)["rows"], key=label)
    (alone,) = {label(row): row for row in merged_seed(tmp_path)}.values()
    accuracy, gap = student["tests"]["test"], student["tests"]["test"]["against_dense"]
    assert accuracy["low"] == alone["tests"]["test"]["low"] < 60 and accuracy["high"] > 90
    assert gap["low"] < -20 and gap["high"] > 0 and isclose(gap["mean"], -12.5)
    assert dense["tests"]["test"]["against_dense"]["mean"] is None


def merged_seed(folder):
    """The rows of late_fusion's first seed alone."""
    one = folder / "one"
    one.mkdir()
    (one / "cell.json").write_text((folder / "late_fusion_0_0.json").read_text())
    return merged(one)["rows"]


def test_t_interval_over_seeds():
    interval = mean_over_seeds([1.0, 2.0, 3.0])
    assert isclose(interval["high"] - 2.0, 4.302652729911275 / 3**0.5)
    assert mean_over_seeds([1.0]) == {"mean": 1.0, "low": None, "high": None}


def test_questions_of_one_picture_are_a_cluster():
    assert clusters(system("101010", 1.0), "test") == [0, 0, 1, 1, 2, 2]


def test_an_empty_folder_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="no cell in"):
        merged(tmp_path)


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "base"])
def test_every_arm_is_a_run_of_this_base(arm):
    config = compose_config([f"model={bench.MODEL}", *ARMS[arm], "train.trackers=[]"])
    assert config.model.path == bench.MODEL


def test_an_offline_arm_writes_the_answers_that_it_trains_on(tmp_path):
    """In the same run, but for the cache; no other arm has one."""
    args = argparse.Namespace(steps=1, batch=2, seed=3, noise=0.2, settings=[], arm="late_fusion_offline")
    teach, train = bench.commands(tmp_path / "boards", args, ARMS[args.arm])
    assert (
        (teach[2:], train[2:]) == (train[2:], teach[2:]) and "teach.py" in teach[1] and "train.py" in train[1]
    )
    config = compose_config(teach[2:])
    assert config.kl.cache == str(tmp_path / "boards_answers") and config.data.noise == 0.2
    args.arm = "late_fusion_eighth"
    ((_, script, *words),) = bench.commands(tmp_path / "boards", args, ARMS[args.arm])
    config = compose_config(words)
    assert "train.py" in script and config.kl.cache is None and config.kl.share == 0.125
