"""Compare a checkpoint with its dense base and the pruned baseline on the same questions.

    python eval/evaluate.py checkpoint=outputs/late_fusion split=test samples=300 output=outputs/evaluation

`training/train.py` calls `evaluate_run` at its end.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console

from latefusion.eval import efficiency, metrics
from latefusion.eval.predict import Answer, System, answer_questions, check, progress_bar, prompt_inputs
from latefusion.eval.report.page import write_report
from latefusion.eval.report.tables import print_table

__all__ = ["System", "evaluate_run"]

SCHEMA = 1
NEW_TOKENS = 9  # generated while timing: the first and eight further ones
VERSIONS = ("latefusion", "torch", "transformers", "peft", "datasets", "numpy", "scipy")


def evaluate_run(
    *,
    model: Any,
    processor: Any,
    attachment: Any,
    systems: dict[str, System],
    dataset: Dataset,
    output_dir: str | Path,
    title: str,
    split: str = "test",
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
        dataset: rows of `load_scenes` (`image`) or of `data/sources.py` (`messages`, `images`), both with `id`,
            `question`, `answer`, `type`, `scene`.
        output_dir: made if missing.
        title: heading of the report, such as the recipe's name.
        split: what the report calls the dataset's part.
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
    for role, key in (("reference", reference), ("baseline", baseline), ("candidate", candidate)):
        if key not in systems:
            raise ValueError(f"{role}={key!r} names no system; choose one of {', '.join(systems)}.")
    check(model, systems, dataset)
    started = time.perf_counter()
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    common = {"model": model, "attachment": attachment, "systems": systems}
    was_training = model.training
    model.eval()
    try:
        answers = answer_questions(**common, processor=processor, dataset=dataset, batch_size=batch_size)
        costs = _measure(**common, processor=processor, dataset=dataset, reference=reference,
                         n_prompts=latency_prompts, repeats=latency_repeats)  # fmt: skip
    finally:
        model.train(was_training)
    results = {
        "schema": SCHEMA,
        "title": title,
        "note": note,
        "checkpoint": str(checkpoint or output_dir),
        "roles": {"reference": reference, "baseline": baseline, "candidate": candidate},
        "data": _describe_data(dataset, split),
        "model": _describe_model(model, answers[reference]),
        "systems": _describe_systems(model, systems, answers, costs, reference),
        "paired": {
            key: asdict(_paired(answers[candidate], answers[key], seed)) for key in systems if key != candidate
        },
        "settings": {
            "decoding": "greedy",
            "batch_size": batch_size,
            "latency_prompts": min(latency_prompts, len(dataset)),
            "latency_repeats": latency_repeats,
            "latency_new_tokens": NEW_TOKENS,
            "bootstrap_resamples": metrics.RESAMPLES,
            "seed": seed,
        },
        "environment": _environment(model, time.perf_counter() - started),
    }
    (folder / "results.json").write_text(json.dumps(_plain(results), indent=2, allow_nan=False) + "\n")
    with (folder / "predictions.jsonl").open("w") as lines:
        for key in systems:
            lines.writelines(json.dumps(answer.to_dict()) + "\n" for answer in answers[key])
    write_report(folder / "report.html", results, dataset, answers)
    print_table(results)
    return results


def _measure(
    *, processor: Any, dataset: Dataset, n_prompts: int, repeats: int, **common: Any
) -> dict[str, efficiency.Cost]:
    """Costs at batch 1 on prompts spread evenly over the dataset."""
    n = min(n_prompts, len(dataset))
    prompts = [
        prompt_inputs(common["model"], processor, [dataset[i * len(dataset) // n]]) for i in range(n)
    ]
    with progress_bar() as progress:
        task = progress.add_task("Latency, memory", total=n * (repeats + 1))
        return efficiency.measure(
            **common,
            prompts=prompts,
            repeats=repeats,
            new_tokens=NEW_TOKENS,
            advance=lambda: progress.advance(task),
        )


def _describe_systems(
    model: Any,
    systems: dict[str, System],
    answers: dict[str, list[Answer]],
    costs: dict[str, efficiency.Cost],
    reference: str,
) -> dict[str, Any]:
    compute = {key: efficiency.compute(model.config, answers[key]) for key in systems}
    base, base_cost = compute[reference], costs[reference]
    return {
        key: {
            "name": system.name,
            "policy": {"type": type(system.policy).__name__, **vars(system.policy)},
            "adapters": system.adapters,
            "accuracy": _accuracies(answers[key]),
            "flops": _ratio(compute[key].flops, base.flops),
            "vision_tokens": {
                "per_layer": compute[key].vision_tokens,
                **_ratio(fmean(compute[key].vision_tokens), fmean(base.vision_tokens)),
            },
            "ttft": asdict(costs[key].ttft),
            "tpot": asdict(costs[key].tpot),
            "kv_bytes": _ratio(costs[key].kv_bytes, base_cost.kv_bytes),
            "working_bytes": _ratio(costs[key].working_bytes, base_cost.working_bytes),
        }
        for key, system in systems.items()
    }


def _accuracies(answers: Sequence[Answer]) -> dict[str, Any]:
    def score(chosen: Sequence[Answer]) -> dict[str, Any]:
        return asdict(metrics.accuracy([a.correct for a in chosen], [a.scene for a in chosen]))

    types = sorted({answer.type for answer in answers})
    return {
        "overall": score(answers),
        "types": {name: score([a for a in answers if a.type == name]) for name in types},
    }


def _paired(first: Sequence[Answer], second: Sequence[Answer], seed: int) -> metrics.Paired:
    scenes = [answer.scene for answer in first]
    return metrics.paired([a.correct for a in first], [a.correct for a in second], scenes, seed=seed)


def _ratio(value: float, base: float) -> dict[str, float]:
    return {"mean": value, "ratio": value / base if base else float("nan")}


def _describe_data(dataset: Dataset, split: str) -> dict[str, Any]:
    dataset = dataset.with_format(None)
    digest = hashlib.sha256()
    for row in zip(dataset["id"], dataset["question"], dataset["answer"], strict=True):
        digest.update(repr(row).encode())
    return {
        "split": split,
        "questions": len(dataset),
        "scenes": len(set(dataset["scene"])),
        "types": dict(sorted(Counter(dataset["type"]).items())),
        "fingerprint": digest.hexdigest()[:16],
    }


def _describe_model(model: Any, answers: Sequence[Answer]) -> dict[str, Any]:
    return {
        "architecture": (model.config.architectures or [type(model).__name__])[0],
        "layers": len(answers[0].tokens),
        "vision_tokens": max(answers[0].vision_tokens),
        "text_tokens": fmean(answer.text_tokens for answer in answers),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weight_bytes": efficiency.weight_bytes(model),
    }


def _environment(model: Any, seconds: float) -> dict[str, Any]:
    device = model.device
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": device.type,
        "hardware": hardware,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS},
        "seconds": round(seconds, 1),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: not-a-number becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value
