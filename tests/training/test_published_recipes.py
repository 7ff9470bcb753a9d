"""HiDrop's and ViCA's recipes: the published numbers, trained through the real entry point on a shrunk model."""

from dataclasses import replace

import pytest
from helpers.quick_runs import QUICK, run_config
from helpers.tiny_base import SMALL, composed, save_tiny_base

from latefusion import VisionSchedule, load
from latefusion.models.policies.configured import schedule_of
from latefusion.models.student.save import load_student
from latefusion.recipes.compose import compose_config
from latefusion.recipes.schema import RECIPES

BAND = {"enter": 8, "exit": 24, "ranking": "hidrop"}
PUBLISHED = {
    "hidrop_tok48": VisionSchedule(**BAND, keep={10: 87, 14: 10, 16: 5, 18: 1}),
    "hidrop_tok64": VisionSchedule(**BAND, keep={10: 215, 14: 10, 16: 5, 18: 1}),
    "hidrop_tok80": VisionSchedule(**BAND, keep={10: 453, 13: 10, 16: 5, 19: 1}),
    "vica_7b": VisionSchedule(cross=[0, 1, 7, 8, 9, 10, 11, 14], freeze_prefix=True),
    "vica_13b": VisionSchedule(cross=[0, 6, 8, 9, 10, 13, 14, 16]),
    "vica_3b": VisionSchedule(cross=[0, 1, 14, 15, 18, 19, 21, 22, 23]),
}
LAYERS = 26


def test_every_published_recipe_is_here() -> None:
    assert set(PUBLISHED) == {
        path.stem for path in (RECIPES / "recipe").glob("*.yaml") if path.stem.startswith(("hidrop", "vica"))
    }


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_the_numbers_are_the_published_ones(recipe: str) -> None:
    config = compose_config([f"recipe={recipe}", *(["model.path=x/y"] if recipe == "vica_3b" else [])])
    assert schedule_of(config.schedule) == PUBLISHED[recipe]
    size = {"vica_13b": "13b", "vica_3b": "x/y"}.get(recipe, "7b")
    assert size in config.model.path
    text = (RECIPES / "recipe" / f"{recipe}.yaml").read_text()
    assert ("2602.23699" in text and "fb79d6c8" in text) or ("2602.07574" in text and "1ca09b9" in text)


@pytest.mark.parametrize(
    "recipe", ["hidrop_tok48", "vica_7b", pytest.param("vica_13b", marks=pytest.mark.slow)]
)
def test_it_trains_and_its_student_loads(tmp_path, recipe: str) -> None:
    """With as few tokens as a picture of this base has: 87 of 4 are refused."""
    base = save_tiny_base(tmp_path / "base", layers=LAYERS)
    output = tmp_path / "out"
    options = (*QUICK, *SMALL, f"model.path={base}", "data=scenes", f"output_dir={output}")
    schedule = PUBLISHED[recipe]
    if schedule.keep:
        with pytest.raises(
            SystemExit, match=r"keep=\{10: 87\} is more than the 4 vision tokens of a picture"
        ):
            run_config(composed(f"recipe={recipe}", *options))
        schedule = replace(schedule, keep={10: 4, 14: 3, 16: 2, 18: 1})
        options = (*options, f"schedule.keep={dict(schedule.keep)}")
    run_config(composed(f"recipe={recipe}", *options))
    assert load_student(output).schedule == schedule
    assert load(output)[0].config.get_text_config().num_hidden_layers == LAYERS


@pytest.mark.parametrize("engine", ["deepspeed_zero3", "fsdp2"])
def test_weights_in_shards_are_refused_early(engine: str) -> None:
    with pytest.raises(ValueError, match=r"^schedule\.ranking=hidrop looks into a layer.*deepspeed_zero2"):
        compose_config(["recipe=hidrop_tok48", f"engine={engine}"])
