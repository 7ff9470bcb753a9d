"""What `eval/generate.py` does once it is known that it can: the question, the answers, what each policy saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.table import Table

from latefusion.data.prompts import prompt_inputs
from latefusion.data.scenes import load_scenes
from latefusion.eval.memory import kv_cache_bytes
from latefusion.models.attach import attach
from latefusion.models.base_model import compute_dtype, load_base
from latefusion.models.explain import explain
from latefusion.models.policies import named
from latefusion.models.policies.base import Policy
from latefusion.models.schedule import VisionSchedule

if TYPE_CHECKING:
    from latefusion.eval.generate import Arguments


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
