"""The layers in which text has to read frozen vision tokens: the sets tried, the choice, and what reads it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.planted_models import BOUND, measurer, planted, planted_batch
from helpers.quick_runs import QUICK, run_config
from helpers.tiny_base import SMALL, composed, save_tiny_base

from latefusion.data.prompt_batches import counts
from latefusion.eval import profile_model
from latefusion.eval.fusion.decide import Goal
from latefusion.eval.fusion.reading_layers import by_need, nested_sets, to_confirm
from latefusion.eval.fusion.run import layers_in_words
from latefusion.eval.fusion.study import Study
from latefusion.eval.fusion.summary import cross_yaml
from latefusion.models.attach import attach
from latefusion.models.profile_schedule import read_cross, read_schedule
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.entry_fit import fit_entry

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_layers_are_given_up_in_the_order_of_what_each_costs_alone() -> None:
    effects: dict[str, Any] = {
        "prefix 1": {"kl": [9.0, 9.0, 9.0]},  # layer 0 goes first: where it reads, nothing is calibrated
        "single 1": {"kl": [0.1, None, 0.3]},
        "single 2": {"kl": [None, 0.0, 0.1]},  # of those measured
        "single 3": {"kl": [1e-4, 1e-4, 8.0]},  # one sample does not make a layer needed
        "suffix 4": {"kl": [0.2, 0.2, 0.2]},
    }
    assert by_need(effects, 5) == [0, 2, 3, 1, 4]


@pytest.mark.parametrize("layers", [1, 2, 6, 30, 48])
def test_sets_are_nested_from_one_layer_to_all(layers: int) -> None:
    order = [(7 * i) % layers for i in range(layers)] if layers % 7 else list(range(layers))
    sets = nested_sets(order)
    assert sets[0] == (order[-1],) and sets[-1] == tuple(range(layers))
    for small, large in pairwise(sets):
        assert set(small) < set(large) and len(large) <= max(len(small) + 1, 1.25 * len(small) + 1)
    assert all(list(read) == sorted(read) for read in sets)


def test_other_prompts_are_asked_about_the_set_that_the_samples_allow_and_its_neighbours() -> None:
    sets = [tuple(range(n)) for n in range(1, 11)]
    small = [0.01, 0, 0, 0, 0, 0]
    assert to_confirm(sets, [9, 1, 0.04, 0.01, *small], 0.1) == sets[1:7]
    assert to_confirm(sets, [*small, 0, 0, 0, 0], 0.1) == sets[:6]
    assert to_confirm(sets, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0], 0.1) == sets[4:]
    dear = [
        9,
        2,
        0.23,
        0.2,
        0.22,
        0.21,
        0.3,
        0.21,
        0.2,
        0,
    ]  # all without the first layer, for one sample's sake
    assert to_confirm(sets, dear, 0.1) == sets[1:7]
    assert to_confirm(sets[:1], [0], 0.1) == sets[:1]


@pytest.mark.parametrize(("p", "q"), [(1, 4), (2, 3), (1, 6)])
def test_the_layers_that_a_planted_model_reads_in_are_chosen(p: int, q: int, tmp_path: Path) -> None:
    model = planted("llava", p, q)
    with attach(model, VisionSchedule()) as attachment:
        batch, other = planted_batch(model), planted_batch(model, seed=5)
        study = Study(
            made := measurer(model, attachment, [batch], tmp_path / "measured.jsonl"),
            measurer(model, attachment, [other], tmp_path / "confirmed.jsonl"),
            Goal(bound=BOUND, cross=True),
            True,
            *counts(made.groups),
        )
        reading = study.run(lambda a: fit_entry(attachment, [(batch.fresh(), batch.vision)], a))["reading"]
    assert reading["layers"] == list(range(p, q)) and reading["limit"] <= BOUND and reading["accuracy"] == 1.0
    assert "the fewest layers with an upper limit" in reading["why"]
    smaller = [one for one in reading["confirmed"] if len(one["layers"]) < q - p]
    assert all(one["limit"] > BOUND for one in smaller) and bool(smaller) == (q - p > 1)
    (tmp_path / "schedule.yaml").write_text("enter: 0\nexit: null\nkeep: {}\n")
    (tmp_path / "cross.yaml").write_text(cross_yaml(reading))
    assert read_cross(tmp_path) == VisionSchedule(cross=tuple(range(p, q)))


def test_where_no_set_holds_the_lowest_limit_is_taken_and_said(tmp_path: Path) -> None:
    class Limits(Study):
        def _read(self, layers: Any, effect: Any) -> dict[str, Any]:
            return super()._read(layers, effect) | {"limit": 9.0 - len(layers)}

    model = planted("llava", 1, 4)
    with attach(model, VisionSchedule()) as attachment:
        batch = planted_batch(model)
        made = measurer(model, attachment, [batch], tmp_path / "measured.jsonl")
        study = Limits(made, None, Goal(bound=BOUND, cross=True), True, *counts(made.groups))
        reading = study._reading(made.knock_outs())
    assert reading["layers"] == reading["confirmed"][-1]["layers"]
    assert reading["why"].startswith("the lowest upper limit, as no set of layers that was tried")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"), layers=6)


@pytest.fixture(scope="module")
def profiled(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    words = [f"model={base}", "data=scenes", "samples=4", "confirm=4", "images=16", "dtype=float32"]
    result = profile_model.run(*profile_model.parse([*words, f"output={folder}", "bound=0.02", "cross=true"]))
    return folder, result


def train(base: Path, output: Path, *words: str) -> Path:
    """One step of a model whose reading layers no recipe knows."""
    settings = (*QUICK, *SMALL, "train.steps=1", "model=other", f"model.path={base}", f"output_dir={output}")
    run_config(composed(*settings, "model.visipruner.boundary=1", "recipe=cross_only", *words))
    return output


def test_a_student_of_frozen_tokens_takes_the_layers_of_a_profile(base, profiled, tmp_path) -> None:
    folder, result = profiled
    layers = result["reading"]["layers"]
    assert yaml.safe_load((folder / "cross.yaml").read_text())["cross"] == layers
    output = train(base, tmp_path / "run", f"schedule.profile={folder}")
    assert json.loads((output / "vision_schedule.json").read_text())["cross"] == layers
    held = yaml.safe_load((output / "config.yaml").read_text())["schedule"]
    assert held["cross"] == layers and held["profile"] == str(folder)


def test_a_run_of_frozen_tokens_profiles_their_layers_first(base, tmp_path) -> None:
    words = ("schedule=auto", "schedule.samples=4", "schedule.confirm=4", "schedule.bound=0.02")
    output = train(base, tmp_path, *words, "entry.images=16")
    trained = json.loads((output / "vision_schedule.json").read_text())
    assert trained == read_cross(output / "profile").to_dict() and trained["cross"]
    modified = (output / "profile" / "cross.yaml").stat().st_mtime_ns
    train(base, tmp_path, *words, "entry.images=16", "train.steps=2", "resume=true")
    assert (output / "profile" / "cross.yaml").stat().st_mtime_ns == modified


def test_a_profile_without_these_layers_is_refused_for_frozen_tokens(base, profiled, tmp_path) -> None:
    folder, _ = profiled
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "schedule.yaml").write_text((folder / "schedule.yaml").read_text())
    with pytest.raises(SystemExit, match=r"error: the profile in .* make it again with cross=true, or give"):
        train(base, tmp_path / "run", f"schedule.profile={tmp_path / 'p'}")
    assert read_schedule(tmp_path / "p") == read_schedule(folder)


def test_one_layer_is_no_plural() -> None:
    assert [layers_in_words(layers) for layers in ([8], [2, 8])] == ["layer 8", "layers 2, 8"]


def test_without_the_wish_no_layers_are_looked_for(base, profiled, tmp_path) -> None:
    """A profile that replaces one leaves none of its layers behind."""
    folder, _ = profiled
    words = [f"model={base}", "data=scenes", "samples=4", "confirm=4", "images=16", "dtype=float32"]
    (tmp_path / "cross.yaml").write_text((folder / "cross.yaml").read_text())
    result = profile_model.run(*profile_model.parse([*words, f"output={tmp_path}", "bound=0.02"]))
    assert result["reading"] is None and not (tmp_path / "cross.yaml").exists()
    assert 'id="reading"' not in (tmp_path / "report.html").read_text()
