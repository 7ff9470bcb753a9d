"""Policies by name: every recipe builds, also through Hydra; a wrong name or argument is one sentence."""

from __future__ import annotations

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from latefusion.models.policies import RECIPES, named, names
from latefusion.models.policies.divprune import DivPrune
from latefusion.models.policies.fastv import FastV
from latefusion.models.policies.pyramiddrop import PyramidDrop
from latefusion.models.policies.visipruner.settings import VisiPruner
from latefusion.models.policies.vtw import VTW
from latefusion.models.schedule import VisionSchedule


@pytest.mark.parametrize("name", names())
def test_every_recipe_builds(name: str) -> None:
    policy = named(name)
    policy.validate(40)
    assert policy == instantiate(OmegaConf.load(RECIPES / f"{name}.yaml"), _convert_="all")


def test_recipes_hold_the_papers_values() -> None:
    assert named("dense") == VisionSchedule()
    assert named("visipruner") == VisiPruner()
    assert named("visipruner_13b") == VisiPruner(sink_rule="half")
    assert named("fastv") == FastV() == FastV(layer=2, keep_ratio=0.5)
    assert named("vtw") == VTW() == VTW(layer=15)
    assert named("divprune") == DivPrune() == DivPrune(keep_ratio=0.098)
    stages = {8: 0.5, 16: 0.25, 24: 0.125}
    assert named("pyramiddrop") == PyramidDrop() == PyramidDrop(keep_ratios=stages)


def test_overrides_replace_single_arguments() -> None:
    assert named("visipruner", boundary=3, stages=["middle"]) == VisiPruner(boundary=3, stages=("middle",))
    assert named("dense", keep={3: 8}) == VisionSchedule(keep={3: 8})


@pytest.mark.parametrize(
    ("name", "overrides", "sentence"),
    [
        (
            "visiprunner",
            {},
            r"policy=visiprunner does not exist \(did you mean visipruner\?\); policy can be ",
        ),
        (
            "visipruner",
            {"boundry": 3},
            r"visipruner has no 'boundry' \(did you mean boundary\?\); it has bou",
        ),
        ("visipruner", {"boundary": -1}, "boundary=-1 must not be negative"),
    ],
)
def test_what_does_not_exist_is_a_sentence(name: str, overrides: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        named(name, **overrides)
    assert "\n" not in str(error.value)
