"""Write the model card of an exported student: what it is, what it was trained on and how, what was measured."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from latefusion.data.escape import markdown
from latefusion.models.schedule import VisionSchedule
from latefusion.recipes.compose import stored_values
from latefusion.training.trust_record import read

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

Layers count from 0. {layers}; `keep` says how many of the best are left from a layer on.

## Training

| what | value |
| --- | --- |
{training}

## Metrics

{metrics}
"""

MERGED = """One checkpoint, its adapters merged, of the model type `latefusion`: `latefusion.load` runs it under its
schedule{entry}, as `AutoModelForImageTextToText` does once `latefusion` is imported or with `trust_remote_code=True`,
and vLLM with `pip install 'latefusion[vllm]'`. Programs that do not know the type refuse it."""
PLAIN = """A stock checkpoint of its weights alone: it has neither the schedule that it was trained under{without}.
**Every program runs it dense**: every layer sees every vision token, which it was not trained for. {accuracy}"""
ADAPTER = (
    "This folder holds the adapters alone; `latefusion.load` puts them on the base and attaches the schedule."
)
USE = """import latefusion as lf

model, processor = lf.load({folder})"""
USE_PLAIN = """from transformers import AutoModelForImageTextToText, AutoProcessor

model, processor = (kind.from_pretrained({folder}) for kind in (AutoModelForImageTextToText, AutoProcessor))"""
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
    "share of the steps with a teacher": "kl.share",
    "KL temperature": "kl.temperature",
    "steps": "train.steps",
    "epochs": "train.epochs",
    "batch size a device": "train.batch_size",
    "accumulation": "train.accumulation",
    "peak learning rate": "train.learning_rate",
    "seed": "train.seed",
}


class Form(Enum):
    """What the folder holds: adapters, one checkpoint of type `latefusion`, or one of the base's type."""

    adapters = "adapters"
    merged = "merged"
    plain = "plain"


def model_card(checkpoint: str | Path, *, folder: str, form: Form, entry: bool) -> str:
    """The card of the student at `checkpoint`, as Markdown.

    Args:
        folder: what the user gives to `latefusion.load`.
        entry: the student has an entry adapter.
    """
    path = Path(checkpoint)
    schedule = VisionSchedule.load(path)
    config = stored_values(path / "config.yaml") if (path / "config.yaml").is_file() else OmegaConf.create()
    if schedule.cross is not None:
        reading = ", ".join(map(str, schedule.cross))
        readers = f"in the layers {reading} only" if reading else "in no layer"
        band = f"stay what the projector made them, and text reads them {readers}"
        layers = "No layer computes vision tokens, and those in `cross` read them"
    else:
        layers = "No vision token is computed before `enter` and from `exit` on"
        exit_layer = "the last layer" if schedule.exit is None else f"layer {schedule.exit - 1}"
        band = f"are computed from layer {schedule.enter} to {exit_layer} only"
    kind = {Form.adapters: ADAPTER, Form.merged: MERGED, Form.plain: PLAIN}[form].format(
        entry=" and with its entry adapter" if entry else "",
        without=" nor its entry adapter" if entry else "",
        accuracy=without_schedule(path, folder),
    )
    base = str(OmegaConf.select(config, "model.path") or "unknown")
    return _TEXT.format(
        name=markdown(OmegaConf.select(config, "name") or path.name),
        base=json.dumps(base),
        base_name=markdown(base),
        band=band,
        layers=layers,
        kind=kind,
        use=(USE_PLAIN if form is Form.plain else USE).format(folder=json.dumps(folder)),
        schedule=json.dumps(schedule.to_dict(), indent=2),
        training="\n".join(f"| {what} | {markdown(value)} |" for what, value in _training(config, path)),
        metrics=_metrics(path),
    )


def without_schedule(checkpoint: str | Path, folder: str) -> str:
    """Say how accurate the student is without its schedule, by the run's evaluation, or how to measure it."""
    for system in _systems(Path(checkpoint)):
        try:
            policy = dict(system["policy"])
            kind = policy.pop("type")
            dense = kind == "VisionSchedule" and VisionSchedule.from_dict(policy) == VisionSchedule()
            if dense and system["adapters"]:
                return f"Its accuracy without the schedule is {_accuracy(system)}."
        except (KeyError, TypeError, AttributeError, ValueError):
            continue
    return (
        "Its accuracy without the schedule was not measured: "
        f"`python eval/evaluate.py model={folder} policies=[fastv] data=...` does so."
    )


def _training(config: DictConfig, path: Path) -> list[tuple[str, Any]]:
    """What a reader wants to know of the run, from what it saved: its configuration and what it decided."""
    rows = [(what, OmegaConf.select(config, key)) for what, key in TRAINING.items()]
    rows.append(("trust in the teacher", read(path)))
    return [(what, value) for what, value in rows if value is not None and value != []]


def _metrics(path: Path) -> str:
    if not any((path / name).is_file() for name in METRICS):
        return "None were measured."
    lines = [
        "| system | accuracy (95% interval) | FLOPs of dense: decoder (whole prefill) |",
        "| --- | ---: | ---: |",
    ]
    try:
        for system in _systems(path):
            flops = f"{system['flops']['ratio']:.0%}"
            if "prefill_flops" in system:
                flops += f" ({system['prefill_flops']['ratio']:.0%})"
            lines.append(f"| {markdown(system['name'])} | {_accuracy(system)} | {flops} |")
    except (KeyError, TypeError, AttributeError, ValueError):
        lines = []
    return (
        "\n".join(lines)
        if len(lines) > 2
        else "The file beside the weights is not a report of an evaluation."
    )


def _systems(path: Path) -> list[Any]:
    """What the run's evaluation measured; empty: nothing."""
    file = next((path / name for name in METRICS if (path / name).is_file()), None)
    try:
        return [] if file is None else list(json.loads(file.read_text())["systems"].values())
    except (KeyError, TypeError, AttributeError, ValueError):
        return []


def _accuracy(system: Any) -> str:
    overall = system["accuracy"]["overall"]
    return f"{overall['value']:.1%} ({overall['low']:.1%} to {overall['high']:.1%})"
