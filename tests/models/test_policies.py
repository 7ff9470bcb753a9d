"""Policies by name: every recipe builds, also through Hydra; a wrong name or argument is one sentence."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.families import LAYERS, MIXED, build, close, prompt, text_tokens, vision_tokens
from helpers.oracle import masked
from hydra.utils import instantiate
from omegaconf import OmegaConf

from latefusion.models.attach import attach
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


# ---------------------------------------------------------------- the example of docs/inference.md


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that the first Python block under "A policy of your own" makes."""
    page = (RECIPES.parents[1] / "docs" / "inference.md").read_text()
    code = page.split("### A policy of your own")[1].split("```python\n")[1].split("```")[0]
    module = ModuleType("my_policies")
    monkeypatch.setitem(sys.modules, "my_policies", module)
    exec(code, vars(module))
    return module


def test_the_example_keeps_every_second_token(example: Any, tmp_path: Path) -> None:
    (tmp_path / "every_second.yaml").write_text("_target_: my_policies.EverySecond\nlayer: 4\n")
    policy = named(str(tmp_path / "every_second.yaml"), layer=2)
    assert policy == example.EverySecond(layer=2)
    model, inputs = build("llava"), prompt("llava", MIXED)
    vision, text = vision_tokens(inputs), text_tokens(inputs)
    second = torch.zeros_like(vision)
    for b, row in enumerate(vision.tolist()):
        second[b, [i for i, sees in enumerate(row) if sees][::2]] = True
    seen = [vision] * 2 + [second] * (LAYERS - 2)
    with torch.no_grad():
        with masked(model, vision, seen, padding=inputs["attention_mask"]):
            expected = model(**inputs, use_cache=False).logits[text]
        with attach(model, policy) as attachment:
            assert close(model(**inputs).logits[text], expected)
            assert [record.vision for record in attachment.trace] == [
                [n, n] + [n // 2] * (LAYERS - 2) for n in (4, 0, 8)
            ]
        with pytest.raises(ValueError, match=r"^layer=6 must be one of the decoder's layers 0 to 5\.$"):
            attach(model, example.EverySecond(layer=6))


# ---------------------------------------------------------------- a policy file is data


@pytest.mark.parametrize(
    "text",
    [
        "_target_: subprocess.Popen\nargs: [touch, {mark}]\n",
        "_target_: os.system\ncommand: touch {mark}\n",
        "_target_: builtins.exec\n_args_: [\"open('{mark}', 'w')\"]\n",
        "_target_: hydra.utils.instantiate\nconfig: {{_target_: os.mkdir, path: {mark}}}\n",
        "_target_: latefusion.models.attach.attach\nmodel: 1\n",
        "_target_: torch.nn.Linear\nin_features: 1\n",
        "_target_: a_package_that_is_not_here.Policy\n",
        "_target_: 3\n",
        "layer: 3\n",
        "- _target_: latefusion.models.policies.fastv.FastV\n",
        "",
    ],
)
def test_a_policy_file_runs_no_code(text: str, tmp_path: Path) -> None:
    file, mark = tmp_path / "policy.yaml", tmp_path / "mark"
    file.write_text(text.format(mark=mark))
    with pytest.raises(ValueError, match=r"^policy ") as error:
        named(str(file))
    assert "\n" not in str(error.value) and not mark.exists()


WRONG_FILES = {
    "a Latin-1 byte": (b"_target_: {}\nlayer: 2 # \xe9\n", "is not YAML .'utf-8' codec can't decode"),
    "a tag": (
        b"_target_: {}\nlayer: !!python/name:os.system\n",
        "is not YAML .could not determine a constructor",
    ),
    "a broken list": (b"_target_: {}\nlayer: [1\n", "is not YAML"),
    "deep nesting": (b"[" * 5000, "is not YAML"),
    "a key misspelt": (b"_target_: {}\nlayr: 2\n", "has no 'layr' .did you mean layer"),
    "a key that is a number": (b"_target_: {}\n1: 2\n", "has no '1'"),
    "half a layer": (b"_target_: {}\nlayer: 2.5\n", "layer has 2.5 where a whole number must be"),
    "a layer in words": (b"_target_: {}\nlayer: two\n", "layer has 'two' where a whole number must be"),
    "no layer": (b"_target_: {}\nlayer: null\n", "layer has None where a whole number must be"),
    "a flag for a layer": (b"_target_: {}\nlayer: true\n", "layer has True where a whole number must be"),
    "an interpolation": (b"_target_: {}\nlayer: ${oc.env:HOME}\n", r"layer has '\$.*' where a whole number"),
    "a list for a share": (
        b"_target_: {}\nkeep_ratio: [1]\n",
        r"keep_ratio has \[1\] where a number must be",
    ),
}


@pytest.mark.parametrize("case", WRONG_FILES)
@pytest.mark.parametrize("target", ["fastv.FastV", "random.Random"])
def test_what_is_wrong_in_a_policy_file_is_a_sentence(target: str, case: str, tmp_path: Path) -> None:
    content, sentence = WRONG_FILES[case]
    file = tmp_path / "policy.yaml"
    file.write_bytes(content.replace(b"{}", f"latefusion.models.policies.{target}".encode()))
    with pytest.raises(ValueError, match=sentence):
        named(str(file))


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        (lambda: VTW(layer=2.5), "layer has 2.5 where a whole number"),
        (lambda: PyramidDrop(keep_ratios=3), "keep_ratios=3 must map layers to shares"),
        (lambda: PyramidDrop(keep_ratios={"a": 0.5}), "keep_ratios has 'a' where a whole number"),
        (lambda: DivPrune(keep_ratio=None), "keep_ratio has None where a number"),
        (lambda: VisiPruner(boundary=1.5), "boundary has 1.5 where a whole number"),
        (lambda: VisiPruner(layer_threshold="x"), "layer_threshold has 'x' where a number"),
        (lambda: VisiPruner(stages="deep"), "stages='deep' must be a list of"),
        (lambda: VisionSchedule(keep=[4, 8]), r"keep=\[4, 8\] must map layers"),
        (lambda: VisionSchedule(cross=3), "cross=3 must list layers"),
        (lambda: VisionSchedule(cross=[1], freeze_prefix="no"), "freeze_prefix='no' must be true or false"),
    ],
)
def test_an_argument_of_another_type_is_a_sentence(policy: Any, sentence: str) -> None:
    """Half a layer would never come, and the policy prune nothing without a word."""
    with pytest.raises(ValueError, match=sentence):
        policy()


def test_a_schedule_saved_by_an_editor_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    VisionSchedule(enter=2).save(tmp_path)
    file = tmp_path / "vision_schedule.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert VisionSchedule.load(tmp_path) == VisionSchedule(enter=2)
    file.write_text("[" * 5000)
    with pytest.raises(ValueError, match=r"vision_schedule.json is damaged"):
        VisionSchedule.load(tmp_path)


def test_a_policy_file_shows_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "secret")
    (tmp_path / "policy.yaml").write_text(
        "_target_: latefusion.models.policies.visipruner.VisiPruner\nsink_rule: ${oc.env:TOKEN}\n"
    )
    with pytest.raises(ValueError, match="sink_rule=") as error:
        named(str(tmp_path / "policy.yaml"))
    assert "secret" not in str(error.value)
