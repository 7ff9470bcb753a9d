"""The models that recipes/model names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from latefusion.recipes.hints import did_you_mean
from latefusion.recipes.schema import RECIPES


def named_model(name: str) -> tuple[str, dict[str, Any]]:
    """The folder or hub id of a model by its name in recipes/model, and its recipe; `name` itself if it is a path.

    Raises:
        ValueError: it is neither, or its recipe leaves the path to the user.
    """
    names = sorted(file.stem for file in (RECIPES / "model").glob("*.yaml"))
    if name not in names:
        if "/" in name or Path(name).exists():
            return name, {}
        raise ValueError(
            f"model={name} does not exist{did_you_mean(name, names)}; model can be {', '.join(names)}, a folder or a "
            "hub id."
        )
    recipe: Any = OmegaConf.load(RECIPES / "model" / f"{name}.yaml")
    recipe = recipe.model if "model" in recipe else recipe
    if OmegaConf.is_missing(recipe, "path"):
        raise ValueError(f"model={name} names no model; name its folder or hub id: model=HUB_ID_OR_FOLDER.")
    values: Any = OmegaConf.to_container(recipe)
    return recipe.path, values
