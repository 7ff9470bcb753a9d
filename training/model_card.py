"""Write the model card of an exported student: what it is, what it was trained on and how, what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from latefusion.models.schedule import VisionSchedule
from latefusion.recipes.compose import stored_values

METRICS = ("report.json", "results.json")

_TEXT = """---
base_model: {base}
library_name: transformers
pipeline_tag: image-text-to-text
tags: [latefusion, vision-token-pruning]
---

# {name}

A late-fusion student of {base_name}, trained with latefusion: its vision tokens {band}.
{kind}

```python
{use}
```

## Schedule

```json
{schedule}
```

Layers count from 0. No vision token is computed before `enter` and from `exit` on; `keep` says how many of the best
are left from a layer on.

## Training

| what | value |
| --- | --- |
{training}

## Metrics

{metrics}
"""

MERGED = """One checkpoint, its adapters merged. `latefusion.load` runs it under its schedule{entry}. Stock
`AutoModelForImageTextToText` loads it too, but runs it *dense*{without}: every layer sees every vision token, which it
was not trained for."""
ADAPTER = (
    "This folder holds the adapters alone; `latefusion.load` puts them on the base and attaches the schedule."
)
USE = """import latefusion as lf

model, processor = lf.load({folder})"""
TRAINING = {
    "data": "data.source",
    "data from": "data.path",
    "mixture": "data.parts",
    "split": "data.split",
    "teacher": "teacher",
    "teacher's model": "kl.model",
    "what trained": "tune",
    "LoRA rank": "lora.r",
    "KL weight": "kl.weight",
    "KL temperature": "kl.temperature",
    "steps": "train.steps",
    "epochs": "train.epochs",
    "batch size a device": "train.batch_size",
    "accumulation": "train.accumulation",
    "peak learning rate": "train.learning_rate",
    "seed": "train.seed",
}


def model_card(checkpoint: str | Path, *, folder: str, merged: bool, entry: bool) -> str:
    """The card of the student at `checkpoint`, as Markdown.

    Args:
        folder: what the user gives to `latefusion.load`.
        merged: it holds one checkpoint; else adapters.
        entry: the student has an entry adapter.
    """
    path = Path(checkpoint)
    schedule = VisionSchedule.load(path)
    config = stored_values(path / "config.yaml") if (path / "config.yaml").is_file() else OmegaConf.create()
    if schedule.cross is not None:
        layers = ", ".join(map(str, schedule.cross))
        readers = f"in the layers {layers} only" if layers else "in no layer"
        band = f"stay what the projector made them, and text reads them {readers}"
    else:
        exit_layer = "the last layer" if schedule.exit is None else f"layer {schedule.exit - 1}"
        band = f"are computed from layer {schedule.enter} to {exit_layer} only"
    parts = {"entry": " and with its entry adapter", "without": " and without its entry adapter"}
    kind = MERGED.format(**(parts if entry else dict.fromkeys(parts, ""))) if merged else ADAPTER
    base = str(OmegaConf.select(config, "model.path") or "unknown")
    return _TEXT.format(
        name=_cell(OmegaConf.select(config, "name") or path.name),
        base=json.dumps(base),
        base_name=_cell(base),
        band=band,
        kind=kind,
        use=USE.format(folder=json.dumps(folder)),
        schedule=json.dumps(schedule.to_dict(), indent=2),
        training="\n".join(f"| {what} | {_cell(value)} |" for what, value in _training(config)),
        metrics=_metrics(path),
    )


def _training(config: DictConfig) -> list[tuple[str, Any]]:
    """What a reader wants to know of the run, from the configuration that it saved."""
    rows = [(what, OmegaConf.select(config, key)) for what, key in TRAINING.items()]
    return [(what, value) for what, value in rows if value is not None and value != []]


def _metrics(path: Path) -> str:
    file = next((path / name for name in METRICS if (path / name).is_file()), None)
    if file is None:
        return "None were measured."
    lines = [
        "| system | accuracy (95% interval) | FLOPs of dense: decoder (whole prefill) |",
        "| --- | ---: | ---: |",
    ]
    try:
        for system in json.loads(file.read_text())["systems"].values():
            overall = system["accuracy"]["overall"]
            accuracy = f"{overall['value']:.1%} ({overall['low']:.1%} to {overall['high']:.1%})"
            flops = f"{system['flops']['ratio']:.0%}"
            if "prefill_flops" in system:
                flops += f" ({system['prefill_flops']['ratio']:.0%})"
            lines.append(f"| {_cell(system['name'])} | {accuracy} | {flops} |")
    except (KeyError, TypeError, AttributeError, ValueError):
        return f"{file.name} is not a report of an evaluation."
    return "\n".join(lines)


def _cell(value: Any) -> str:
    """A value as plain text in Markdown: no HTML, no link, no further cell or line."""
    text = " ".join(str(value).split())
    for mark in "\\`[]|":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
