"""What `report.json` holds, part by part: every number of the report and where it comes from."""

from __future__ import annotations

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

from latefusion.eval import metrics
from latefusion.eval.comparison import cost as efficiency
from latefusion.eval.comparison.settings import Settings
from latefusion.eval.comparison.systems import System, entry_adapter, model_of
from latefusion.eval.metrics import normalise
from latefusion.eval.tasks.base import Answer, Task
from latefusion.models.fingerprint import fingerprint, processor_fingerprint, rows_fingerprint
from latefusion.models.flops import head_flops

VERSIONS = ("latefusion", "torch", "transformers", "peft", "datasets", "numpy", "scipy")


def describe_answers(
    settings: Settings,
    systems: dict[str, System],
    answers: dict[str, list[Answer]],
    costs: dict[str, efficiency.Cost],
    vision_flops: float | None,
) -> dict[str, Any]:
    """Scores and costs of every system, and every system paired with the candidate and with the reference.

    Args:
        vision_flops: of vision tower and projector for a prompt; None: unknown.
    """
    units = {key: units_of(settings.tasks, of_system) for key, of_system in answers.items()}
    candidate, reference = settings.candidate, settings.reference
    return {
        "systems": describe_systems(settings, systems, answers, units, costs, vision_flops),
        "paired": {key: compare(units[candidate], units[key]) for key in systems if key != candidate},
        "against": {key: compare(units[key], units[reference]) for key in systems if key != reference},
    }


def units_of(tasks: Sequence[Task], answers: Sequence[Answer]) -> list[Answer]:
    """The unit that each row counts for: all rotations of a question are one unit."""
    return [unit for task in tasks for unit in task.units([a for a in answers if a.task == task.name])]


def describe_systems(
    settings: Settings,
    systems: dict[str, System],
    answers: dict[str, list[Answer]],
    units: dict[str, list[Answer]],
    costs: dict[str, efficiency.Cost],
    vision_flops: float | None,
) -> dict[str, Any]:
    """Every system's scores and costs; what was not measured for it (a control's times) is left out."""
    model = settings.model
    compute = {
        key: efficiency.compute(
            model_of(model, system).config, answers[key], system.policy, entry_adapter(model, system)
        )
        for key, system in systems.items()
    }
    base = compute[settings.reference]
    return {
        key: {
            **system.describe(),
            "accuracy": accuracies(units[key]),
            "tasks": {task.name: _task_scores(task, answers[key], units[key]) for task in settings.tasks},
            "flops": _ratio(compute[key].flops, base.flops),
            **_prefill(model, compute[key].flops, base.flops, vision_flops, system.blind),
            "vision_macs": _ratio(compute[key].vision_macs, base.vision_macs),
            "vision_attention": _ratio(compute[key].attention_pairs, base.attention_pairs),
            "vision_tokens": {
                "per_layer": compute[key].vision_tokens,
                **_ratio(fmean(compute[key].vision_tokens), fmean(base.vision_tokens)),
            },
            **(_costs(costs[key], costs[settings.reference]) if key in costs else {}),
        }
        for key, system in systems.items()
    }


def _prefill(
    model: Any, decoder: float, reference: float, vision: float | None, blind: bool
) -> dict[str, Any]:
    """FLOPs of the whole prefill: decoder, vision tower and projector, and the head for one token."""
    if vision is None:
        return {}
    head = head_flops(model.config, 1)
    return {"prefill_flops": _ratio(decoder + (0 if blind else vision) + head, reference + vision + head)}


def _costs(cost: efficiency.Cost, base: efficiency.Cost) -> dict[str, Any]:
    reported = {}  # by some devices and systems
    if cost.joules is not None and base.joules is not None:
        reported["joules"] = _ratio(cost.joules, base.joules)
    if cost.peak_bytes is not None and base.peak_bytes is not None:
        reported["peak_bytes"] = _ratio(cost.peak_bytes, base.peak_bytes)
    return {
        "ttft": asdict(cost.ttft),
        "tpot": asdict(cost.tpot),
        "kv_bytes": _ratio(cost.kv_bytes, base.kv_bytes),
        "working_bytes": _ratio(cost.working_bytes, base.working_bytes),
        **reported,
    }


def accuracies(units: Sequence[Answer]) -> dict[str, Any]:
    """Overall, and by question type; of several tasks the unweighted mean, and by task."""
    scores, clusters, names = _columns(units)
    return {
        "overall": asdict(metrics.mean_of_tasks(scores, clusters, names)),
        "types": {
            name: asdict(metrics.accuracy([u.score for u in chosen], [u.cluster for u in chosen]))
            for name, chosen in _by_type(units).items()
        },
    }


def _task_scores(task: Task, answers: Sequence[Answer], units: Sequence[Answer]) -> dict[str, Any]:
    of_task = [answer for answer in answers if answer.task == task.name]
    clusters = [answer.cluster for answer in of_task]
    measures = {name: (m, metrics.measure(m, clusters)) for name, m in task.measures(of_task).items()}
    return {
        "score": accuracies([unit for unit in units if unit.task == task.name]),
        "measures": {name: {**asdict(e), "most": m.most} for name, (m, e) in measures.items()},
    }


def compare(first: Sequence[Answer], second: Sequence[Answer]) -> dict[str, Any]:
    """The first against the second on the same questions, overall and by type, and how often their answers agree."""
    scores, clusters, names = _columns(first)
    others, _, _ = _columns(second)
    same = [normalise(a.prediction) == normalise(b.prediction) for a, b in zip(first, second, strict=True)]
    first_types, second_types = _by_type(first), _by_type(second)
    return {
        **asdict(metrics.paired(scores, others, clusters, tasks=names)),
        "agreement": asdict(metrics.accuracy(same, clusters)),
        "types": {
            name: asdict(
                metrics.paired(
                    [u.score for u in first_types[name]],
                    [u.score for u in second_types[name]],
                    [u.cluster for u in first_types[name]],
                )
            )
            for name in first_types
        },
    }


def _columns(units: Sequence[Answer]) -> tuple[list[float], list[str], list[str]]:
    return [u.score for u in units], [u.cluster for u in units], [u.task for u in units]


def _by_type(units: Sequence[Answer]) -> dict[str, list[Answer]]:
    """Questions of one type together; of several tasks, those of one task."""
    several = len({unit.task for unit in units}) > 1
    groups: dict[str, list[Answer]] = {}
    for unit in sorted(units, key=lambda u: "" if several else u.type):
        groups.setdefault(unit.task if several else unit.type, []).append(unit)
    return groups


def _ratio(value: float, base: float) -> dict[str, float]:
    return {"mean": value, "ratio": value / base if base else float("nan")}


def describe_data(tasks: Sequence[Task]) -> dict[str, Any]:
    """The questions, with a fingerprint of every row: text, right answers and the contents of images."""
    each = {}
    for task in tasks:
        rows = task.rows.with_format(None)
        each[task.name] = {
            "split": task.split,
            "source": task.source,
            "metric": task.metric,
            "ocr": task.ocr,
            "questions": len(rows),
            "scenes": len(set(clusters_of(task))),
            "types": dict(sorted(Counter(rows["type"]).items())),
            "max_new_tokens": task.max_new_tokens,
            "fingerprint": rows_fingerprint(task.rows),
        }
    if len(tasks) == 1:
        return {**next(iter(each.values())), "tasks": each}
    return {
        "split": "benchmark",
        "questions": sum(task["questions"] for task in each.values()),
        "scenes": len({cluster for task in tasks for cluster in clusters_of(task)}),
        "types": {name: task["questions"] for name, task in each.items()},
        "fingerprint": " ".join(task["fingerprint"] for task in each.values()),
        "tasks": each,
    }


def clusters_of(task: Task) -> Sequence[str]:
    """The cluster of each question of a task."""
    return task.clusters or [str(scene) for scene in task.rows.with_format(None)["scene"]]


def describe_identity(settings: Settings) -> dict[str, str]:
    """What the dense base's answers depend on, beside the questions."""
    return {
        "weights": settings.base,
        "processor": processor_fingerprint(settings.processor),
        "generation settings": fingerprint(generation_settings(settings.model)),
        "dtype": str(settings.model.dtype).removeprefix("torch."),
    }


def generation_settings(model: Any) -> dict[str, Any]:
    """The model's generation settings, without the version that wrote them."""
    values = model.generation_config.to_dict()
    return {name: plain(value) for name, value in values.items() if name != "transformers_version"}


def check_same(stored: Mapping[str, Any], data: Mapping[str, Any], identity: Mapping[str, str]) -> None:
    """Raise ValueError if a stored report has other questions, images or another dense base."""
    if stored["data"]["fingerprint"] != data["fingerprint"]:
        raise ValueError(
            "the reference has other questions, answers or images (fingerprint "
            f"{stored['data']['fingerprint']}, here {data['fingerprint']}); use the same tasks, split and samples."
        )
    before = stored["model"].get("identity", {})
    changed = [name for name in identity if before.get(name) != identity[name]]
    if changed:
        raise ValueError(
            f"the reference's dense base has other {', '.join(changed)}; use the model and processor of the reference."
        )


def check_reference(
    stored: Mapping[str, Any],
    answers: Sequence[Answer],
    tasks: Sequence[Task],
    tolerance: float,
) -> None:
    """Raise ValueError if this run's reference row is further from a stored one than `tolerance`.

    Args:
        stored: an earlier `report.json`; answers: of the reference system.
    """
    before = stored["systems"][stored["roles"]["reference"]]["accuracy"]
    now = accuracies(units_of(tasks, answers))
    pairs = {"overall": (before["overall"], now["overall"])} | {
        name: (before["types"][name], now["types"][name]) for name in (now["types"] if len(tasks) > 1 else ())
    }
    for name, (old, new) in pairs.items():
        if abs(old["value"] - new["value"]) > tolerance:
            raise ValueError(
                f"the dense row does not reproduce the reference: {100 * new['value']:.1f}% {name}, stored "
                f"{100 * old['value']:.1f}% (at most {100 * tolerance:g} points apart); find out why before comparing "
                "anything with it."
            )


def describe_model(model: Any, answers: Sequence[Answer]) -> dict[str, Any]:
    return {
        "architecture": (model.config.architectures or [type(model).__name__])[0],
        "layers": len(answers[0].tokens),
        "vision_tokens": max(answers[0].vision_tokens),
        "text_tokens": fmean(answer.text_tokens for answer in answers),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weight_bytes": efficiency.weight_bytes(model),
    }


def describe_environment(model: Any, seconds: float, processes: int, threads: int) -> dict[str, Any]:
    """The machine and the software; `threads`: of the process that measured costs."""
    device = model.device
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": device.type,
        "hardware": hardware,
        "processes": processes,
        "threads": threads,
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
