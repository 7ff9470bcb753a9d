"""Compare a checkpoint with its dense base and the pruned baseline on the same questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latefusion.eval.predict import System

__all__ = ["System", "evaluate_run"]


def evaluate_run(
    *,
    model: Any,
    processor: Any,
    attachment: Any,
    systems: dict[str, System],
    dataset: Any,
    output_dir: str | Path,
    title: str,
    checkpoint: str | Path | None = None,
    reference: str = "dense",
    baseline: str = "pruned",
    candidate: str = "student",
    batch_size: int = 96,
    latency_prompts: int = 8,
    latency_repeats: int = 3,
    seed: int = 0,
    note: str = "",
) -> dict[str, Any]:
    """Evaluate `systems` on `dataset`, print the table and write the report.

    Writes into `output_dir`: `results.json` (every number), `predictions.jsonl` (one line a question and system),
    `report.html`. The model is put into eval mode and given back in the mode it came in.

    Args:
        model: Hugging Face image-text-to-text model, PEFT-wrapped if a system has `adapters=True`.
        processor: its processor; prompts are made with its chat template, padded on the left.
        attachment: what `attach(model, ...)` returned; each system runs under `attachment.using(system.policy)`.
        systems: by key, in the order of the table, such as
            `{"dense": System(name="Dense base", policy=VisionSchedule()),
            "pruned": System(name="VisiPruner", policy=VisiPruner(...)),
            "student": System(name="Late fusion", policy=schedule, adapters=True)}`.
        dataset: rows of `load_scenes`: `id`, `image`, `question`, `answer`, `type`, `scene`.
        output_dir: made if missing.
        title: heading of the report, such as the recipe's name.
        checkpoint: where the student was saved, named in the report's "use it next"; None: `output_dir`.
        reference, baseline, candidate: keys of the system that ratios refer to, of the one to beat, and of the
            one that the headline speaks of.
        batch_size: questions a batch (accuracy only; latency is measured at batch 1).
        latency_prompts, latency_repeats: prompts that latency and memory are measured on, and rounds over them.
        seed: of the bootstrap.
        note: free text on how the checkpoint was made (steps, time), shown in the report.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: a key names no system, the dataset is empty, or adapters are asked of a model without them.
    """
    raise NotImplementedError("evaluation is being written.")
