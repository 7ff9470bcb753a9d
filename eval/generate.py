"""Ask a model about an image under one or several policies; print the answers and what each policy saved.

    python eval/generate.py model=embedded image=photo.png prompt="what is at the top left?" policy=visipruner
    python eval/generate.py policy=dense,visipruner,fastv fastv.layer=4 picture=kept.svg

Without an image it takes a scene of the test split, and its question.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.table import Table

from latefusion.data.scenes import load_scenes
from latefusion.eval.arguments import wrong
from latefusion.eval.memory import kv_cache_bytes
from latefusion.eval.predict import prompt_inputs
from latefusion.models.attach import attach
from latefusion.models.base import check_base, compute_dtype, load_base
from latefusion.models.explain import explain
from latefusion.models.policies import RECIPES, named
from latefusion.models.policies.base import Policy
from latefusion.models.schedule import VisionSchedule


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
    try:
        if any("=" not in argument for argument in arguments):
            sys.exit(f"{__doc__}\n{Arguments.__doc__}")
        given = OmegaConf.from_cli(arguments)
        names = [name.strip() for name in str(given.get("policy", Arguments.policy)).split(",")]
        changes = {name: given.pop(name) for name in names if isinstance(given.get(name), DictConfig)}
        asked: Arguments = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Arguments), given))  # type: ignore[assignment]
        path, calibrated = known(asked.model)
        policies = {name: policy(name, changes.get(name), calibrated) for name in names}
        check_base(path)
        row = question(asked)
        answer(asked, path, row, policies, Console())
    except OmegaConfBaseException as error:
        sys.exit(f"error: {wrong(error, list(Arguments.__dataclass_fields__))}")
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


def known(model: str) -> tuple[str, dict[str, Any]]:
    """Where the model is, and VisiPruner's arguments for it as far as its recipe knows them."""
    file = RECIPES.parent / "model" / f"{model}.yaml"
    if not file.is_file():
        return model, {}
    recipe: Any = OmegaConf.load(file)
    recipe = recipe.model if "model" in recipe else recipe
    return recipe.path, OmegaConf.to_container(recipe.get("visipruner", OmegaConf.create()))  # type: ignore[return-value]


def policy(name: str, changes: DictConfig | None, calibrated: dict[str, Any]) -> Policy:
    """A policy by name; `visipruner` with the values that were calibrated for the model."""
    arguments: Any = {} if changes is None else OmegaConf.to_container(changes)
    return named(name, **(calibrated | arguments if name == "visipruner" else arguments))


def question(asked: Arguments) -> dict[str, Any]:
    """The prompt as a row of `messages` and `images`."""
    if asked.image is None:
        row = load_scenes("test", n_scenes=1)[0]
        images, text = [row["image"]], asked.prompt or row["question"]
    else:
        images, text = [opened(name.strip()) for name in asked.image.split(",")], asked.prompt
        if not text:
            raise ValueError('prompt is not set; add prompt="YOUR QUESTION".')
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}], "images": images, "question": text}


def opened(name: str) -> Image.Image:
    try:
        return Image.open(name).convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"no image at {name}; name a file with image=FILE.") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name} is no image that can be read; convert it to PNG or JPEG.") from None


@torch.no_grad()
def answer(
    asked: Arguments, path: str, row: dict[str, Any], policies: dict[str, Policy], console: Console
) -> None:
    model: Any
    model, processor = load_base(path, dtype=compute_dtype())
    if torch.cuda.is_available():
        model.cuda()
    for one in policies.values():
        one.validate(model.config.get_text_config().num_hidden_layers)
    inputs = prompt_inputs(model, processor, [row])
    table = Table(title=f"{asked.model}: {row['question']}", title_justify="left")
    for name in ("policy", "answer"):
        table.add_column(name)
    for name in ("vision\na layer", "FLOPs\nsaved", "attention\nsaved", "after\nfusion", "KV cache"):
        table.add_column(name, justify="right", no_wrap=True)
    told = {}
    with attach(model, VisionSchedule()) as attachment:
        for name, one in policies.items():
            with attachment.using(one):
                out = model.generate(
                    **inputs,
                    max_new_tokens=asked.max_new_tokens,
                    do_sample=False,
                    return_dict_in_generate=True,
                )
                text = processor.decode(
                    out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
                )
                found = explain(model, inputs)
            sample, cost = found.samples[0], found.samples[0].account
            table.add_row(
                Path(name).name,
                text.strip(),
                f"{cost.vision / len(sample.record.tokens):.1f} of {sample.record.n_vision}",
                f"{cost.flops_saved:.1%}",
                f"{cost.attention_saved:.1%}",
                f"{cost.attention_saved_after:.1%}",
                f"{kv_cache_bytes(out.past_key_values) / 1e6:.2f} MB",
            )
            told[name] = found
    console.print(table)
    for name, found in told.items():
        console.print(f"[bold]{Path(name).name}[/bold] {found}", highlight=False, soft_wrap=True)
    if asked.picture is not None:
        found.save(asked.picture)
        console.print(f"Picture of {name}: {asked.picture}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main(sys.argv[1:])
