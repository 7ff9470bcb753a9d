"""The model card of the shipped weights, written from the record of their training and nothing else."""

from __future__ import annotations

from typing import Any

_TEXT = """---
license: apache-2.0
pipeline_tag: image-text-to-text
library_name: transformers
---

# The embedded base of latefusion

A small LLaVA ({parameters:.1f}M parameters, {megabytes:.1f} MB in bfloat16) that answers questions about
`scenes` (`data/scenes.py`): 96 x 96 images of coloured shapes and a sign. It exists so that latefusion
can be tried, tested and measured on a laptop; it knows nothing else. 144 vision tokens stand against
about 14 of text.

This card and `record.json` were written by `training/embedded/train_base.py`, the only source of these
weights.

## Accuracy on test

{scenes} unseen scenes of each of {seeds} data seeds; percent of questions whose whole answer is right
under greedy decoding, with 95% intervals (Wilson, questions taken as independent). *Blind*: a decoder of
the same size and initialisation, trained on the same questions without vision. *Table*: each question's
most frequent answer in train, a question new to it counts as wrong. (In `open`, blind greedy decoding starts
with the most frequent first word, "a", and so misses the most frequent answer, "nothing".)

{accuracy}

Asked one by one through the saved files, the stock processor and stock `generate`:
{generate[accuracy]}% of {generate[questions]} questions of validation are right, and
{generate[agreement_with_packed]}% of these verdicts equal those of the packed evaluation behind the table.

Reading is closed-set: every word and number of the signs occurs in train, in other scenes.

## How it was trained

From nothing, seed 0, {threads} thread; bfloat16 weights with float32 masters, Muon for matrices, Adam for
the rest. The stages are explained in `training/embedded/stages.py`; scenes of train only. In stage `see`
every third scene has four or more of one colour or shape, since these counts are rare and learned last.

{stages}

Versions: {versions}.

## What shapes where it fuses

A study of *where* this model fuses vision into text should know what put it there:

- a **grounding loss** while training reads from the input of layer 6 which cells a phrase speaks of, so
  phrases are looked up by layer 6; its head is dropped afterwards;
- a **previous-token head** is written into head 0 of layers 0 and 1 at initialisation, so these layers
  bind words;
- the decoder first learned on **pseudo-vision** (sums of its own word embeddings and place tables), and
  the tower was fitted to it: vision tokens arrive already in the decoder's language;
- residual branches start at zero (but the previous-token head), and training is short: a layer that was
  not needed stayed near the identity.

## Use

```python
import torch
from latefusion.models.base_model import load_base

model, processor = load_base("embedded", dtype=torch.bfloat16)
```

Stock `AutoModelForImageTextToText` and `AutoProcessor` load this folder, too.
"""


def model_card(record: dict[str, Any]) -> str:
    seeds = record["test"]["base"]["by_seed"]
    lines = [
        f"| type | questions | base | 95% | {' | '.join(f'seed {s}' for s in seeds)} | blind | 95% | table |",
        "| --- " * (7 + len(seeds)) + "|",
    ]
    pooled = {name: record["test"][name]["pooled"] for name in ("base", "blind", "table")}
    for kind, base in pooled["base"].items():
        by_seed = " | ".join(f"{seeds[s][kind]['accuracy']:.1f}" for s in seeds)
        blind = pooled["blind"][kind]
        lines.append(
            f"| {kind} | {base['questions']} | **{base['accuracy']:.1f}** | "
            f"{base['low']:.1f} - {base['high']:.1f} | {by_seed} | "
            f"{blind['accuracy']:.1f} | {blind['low']:.1f} - {blind['high']:.1f} | "
            f"{pooled['table'][kind]['accuracy']:.1f} |"
        )
    stages = [
        "| stage | steps x scenes | peak learning rate | decay | grounding loss | CPU seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, stage in record["stages"].items():
        stages.append(
            f"| {name} | {stage['steps']} x {stage['scenes']} | {stage['lr']:g} | "
            f"last {100 * stage['decay']:.0f}% | {stage['grounding'] or '-'} | {stage['cpu_seconds']} |"
        )
    return _TEXT.format(
        parameters=record["parameters"] / 1e6,
        megabytes=record["bytes"] / 1e6,
        scenes=record["test_scenes"],
        seeds=len(seeds),
        accuracy="\n".join(lines),
        stages="\n".join(stages),
        generate=record["generate"],
        threads=record["threads"],
        versions=", ".join(f"{name} {number}" for name, number in record["versions"].items()),
    )
