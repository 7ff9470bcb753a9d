"""Ask a model about an image under one or several policies; print the answers and what each policy saved.

    python eval/generate.py model=embedded image=photo.png prompt="what is at the top left?" policy=visipruner
    python eval/generate.py policy=dense,visipruner,fastv fastv.layer=4 picture=kept.svg

Without an image it takes a scene of the test split, and its question.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from latefusion.models.locate import check_base
from latefusion.models.policies import RECIPES, recipe_of
from latefusion.recipes.compose import check_words, parse_words


@dataclass
class Arguments:
    """The command line of this script, as `key=value`.

    Attributes:
        model: a name in recipes/model (which also knows VisiPruner's thresholds for it), a folder or a hub id.
        image: files, with commas between them.
        prompt: the question.
        policy: names in recipes/policy or YAML files, with commas between them; `NAME.argument=value` changes one.
        max_new_tokens: longest answer.
        picture: SVG file of what the last policy kept.
    """

    model: str = "embedded"
    image: str | None = None
    prompt: str | None = None
    policy: str = "dense,visipruner"
    max_new_tokens: int = 64
    picture: str | None = None


def main(arguments: list[str]) -> None:
    """Run from the command line; what cannot work ends in one sentence."""
    words = check_words(arguments, Arguments, str(__doc__))
    try:
        given = OmegaConf.from_cli(words)
        names = [name.strip() for name in str(given.get("policy", Arguments.policy)).split(",")]
        changes = {name: given.pop(name) for name in names if isinstance(given.get(name), DictConfig)}
        asked = parse_words(given, Arguments)
        path, calibrated = known(asked.model)
        for name in names:
            recipe_of(name)
        check_base(path)

        from latefusion.eval.answering import (  # torch, which no refusal has to wait for
            answer,
            policy,
            question,
        )

        policies = {name: policy(name, changes.get(name), calibrated) for name in names}
        answer(asked, path, question(asked), policies, Console())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


def known(model: str) -> tuple[str, dict[str, Any]]:
    """Where the model is, and VisiPruner's arguments for it as far as its recipe knows them."""
    file = RECIPES.parent / "model" / f"{model}.yaml"
    if not file.is_file():
        return model, {}
    recipe: Any = OmegaConf.load(file)
    recipe = recipe.model if "model" in recipe else recipe
    if OmegaConf.is_missing(recipe, "path"):
        raise ValueError(f"model={model} names no model; name its folder or hub id: model=HUB_ID_OR_FOLDER.")
    return recipe.path, OmegaConf.to_container(recipe.get("visipruner", OmegaConf.create()))  # type: ignore[return-value]


if __name__ == "__main__":
    main(sys.argv[1:])
