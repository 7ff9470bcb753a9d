"""What `results.json` holds, part by part: every number of the report and where it comes from."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset

from latefusion.eval import efficiency, metrics
from latefusion.eval.predict import Answer, System

VERSIONS = ("latefusion", "torch", "transformers", "peft", "datasets", "numpy", "scipy")


def describe_systems(
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


def compare(first: Sequence[Answer], second: Sequence[Answer], seed: int) -> metrics.Paired:
    scenes = [answer.scene for answer in first]
    return metrics.paired([a.correct for a in first], [a.correct for a in second], scenes, seed=seed)


def _ratio(value: float, base: float) -> dict[str, float]:
    return {"mean": value, "ratio": value / base if base else float("nan")}


def describe_data(dataset: Dataset, split: str) -> dict[str, Any]:
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


def describe_model(model: Any, answers: Sequence[Answer]) -> dict[str, Any]:
    return {
        "architecture": (model.config.architectures or [type(model).__name__])[0],
        "layers": len(answers[0].tokens),
        "vision_tokens": max(answers[0].vision_tokens),
        "text_tokens": fmean(answer.text_tokens for answer in answers),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weight_bytes": efficiency.weight_bytes(model),
    }


def describe_environment(model: Any, seconds: float) -> dict[str, Any]:
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


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: not-a-number becomes null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value
