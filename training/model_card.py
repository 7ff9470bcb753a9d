"""The model card of an exported student: what it is, what it was trained on and how, what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from latefusion.models.schedule import VisionSchedule

METRICS = ("report.json", "results.json")

_TEXT = """---
base_model: {base}
library_name: transformers
pipeline_tag: image-text-to-text
tags: [latefusion, vision-token-pruning]
---

# {name}

A late-fusion student of `{base}`, trained with latefusion: its vision tokens {band}.
{kind}

```python
{use}
```

## Schedule

```json
{schedule}
```

Layers count from 0. Before `enter` and from `exit` on no vision token is computed; `keep` says how many of the best are
left from a layer on.

## Training

| what | value |
| --- | --- |
{training}

## Metrics

{metrics}
"""

MERGED = """A plain Hugging Face checkpoint. `AutoModelForImageTextToText` loads it and runs it *dense*: every layer
sees every vision token, which is not what it was trained for. `latefusion.load` attaches the schedule{entry}."""
ADAPTER = (
    "This folder holds the adapters alone; `latefusion.load` puts them on the base and attaches the schedule."
)
USE = """import latefusion as lf

model, processor = lf.load("{folder}")"""


def model_card(checkpoint: str | Path, *, folder: str, merged: bool, entry: bool) -> str:
    """The card of the student at `checkpoint`, as Markdown.

    Args:
        folder: that the user loads.
        merged: whether it holds a plain checkpoint, or adapters.
        entry: whether an entry adapter belongs to it.
    """
    path = Path(checkpoint)
    schedule = VisionSchedule.load(path)
    config: Any = (
        OmegaConf.load(path / "config.yaml") if (path / "config.yaml").is_file() else OmegaConf.create()
    )
    if schedule.cross:
        layers = ", ".join(map(str, schedule.cross))
        band = f"stay what the projector made them, and text reads them in the layers {layers} only"
    else:
        exit_layer = "the last layer" if schedule.exit is None else f"layer {schedule.exit - 1}"
        band = f"are computed from layer {schedule.enter} to {exit_layer} only"
    kind = MERGED.format(entry=" and the entry adapter beside it" if entry else "") if merged else ADAPTER
    return _TEXT.format(
        name=OmegaConf.select(config, "name") or path.name,
        base=OmegaConf.select(config, "model.path") or "unknown",
        band=band,
        kind=kind,
        use=USE.format(folder=folder),
        schedule=json.dumps(schedule.to_dict(), indent=2),
        training="\n".join(f"| {what} | {value} |" for what, value in _training(config)),
        metrics=_metrics(path),
    )


def _training(config: DictConfig) -> list[tuple[str, Any]]:
    """What a reader wants to know of the run, from its own configuration."""
    wanted = {
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
        "batch size a device": "train.batch_size",
        "accumulation": "train.accumulation",
        "peak learning rate": "train.learning_rate",
        "seed": "train.seed",
    }
    found = [(what, OmegaConf.select(config, key)) for what, key in wanted.items()]
    return [(what, value) for what, value in found if value is not None and value != []]


def _metrics(path: Path) -> str:
    file = next((path / name for name in METRICS if (path / name).is_file()), None)
    if file is None:
        return "None were measured."
    results = json.loads(file.read_text())
    lines = ["| system | accuracy (95% interval) | decoder FLOPs, of dense |", "| --- | ---: | ---: |"]
    for system in results["systems"].values():
        overall = system["accuracy"]["overall"]
        shown = f"{overall['value']:.1%} ({overall['low']:.1%} to {overall['high']:.1%})"
        lines.append(f"| {system['name']} | {shown} | {system['flops']['ratio']:.0%} |")
    return "\n".join(lines)
