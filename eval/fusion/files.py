"""What a profile leaves behind: numbers as JSON and CSV, the schedule as YAML, the entry's weights."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from latefusion.models.profile_folder import ENTRY, PROFILE, SCHEDULE, write_entry
from latefusion.models.student.entry_fit import Calibration

if TYPE_CHECKING:
    from latefusion.eval.fusion.examples import View


def write(
    folder: Path,
    found: dict[str, Any],
    calibration: Calibration | None,
    samples: Sequence[dict[str, Any]],
    shown: Sequence[Sequence[View]],
) -> None:
    """Write everything, the report last; `shown`: the images of the first few samples."""
    from latefusion.eval.fusion.page import write_report  # drawing libraries: seconds

    (folder / PROFILE).write_text(json.dumps(found, indent=1, allow_nan=False, default=_plain) + "\n")
    (folder / SCHEDULE).write_text(schedule_yaml(found))
    (folder / ENTRY).unlink(missing_ok=True)
    if calibration is not None:
        write_entry(folder, calibration.entry, found["about"].get("weights", ""))
    tables(folder, found)
    write_report(folder, found, samples, shown)


def schedule_yaml(found: dict[str, Any]) -> str:
    """The schedule, as `recipe=late_fusion schedule.profile=FOLDER` reads it."""
    chosen = found["chosen"]
    keep = {int(layer): k for layer, k in chosen["schedule"]["keep"].items()}
    note = (
        f"# {chosen['flops']:.1%} of dense decoder FLOPs, KL {chosen['kl']:.4f} nats per answer token untrained"
        f"{' with the calibrated entry' if chosen['calibrated'] else ''}: {chosen['why']}.\n"
    )
    return note + yaml.safe_dump(
        {"enter": chosen["schedule"]["enter"], "exit": chosen["schedule"]["exit"], "keep": keep},
        sort_keys=False,
        default_flow_style=None,
    )


def tables(folder: Path, found: dict[str, Any]) -> None:
    """`layers.csv`, `schedules.csv`, `samples.csv`: every curve and point of the report."""
    kinds, layers = found["curves"], found["layers"]
    columns = ("kl", "low", "high", "accuracy")
    by_layer: list[dict[str, Any]] = [{"layer": layer} for layer in range(layers + 1)]
    for kind, rows in kinds.items():
        for row in rows:
            by_layer[int(row["layer"])] |= {f"{kind}_{c}": row[c] for c in columns if c in row}
    for name, rows in found["observed"].items():
        for layer, (q25, median, q75) in enumerate(rows):
            by_layer[layer] |= {f"{name}_q25": q25, name: median, f"{name}_q75": q75}
    for row in found["lenses"]["layers"]:
        by_layer[row["layer"]]["logit_lens_settled"] = row["settled"]
    _csv(folder / "layers.csv", by_layer)
    front = [(p["schedule"], p["calibrated"]) for p in found["front"]]
    _csv(
        folder / "schedules.csv",
        [
            {
                **p["schedule"],
                **{k: v for k, v in p.items() if k != "schedule"},
                "front": (p["schedule"], p["calibrated"]) in front,
            }
            for p in found["points"]
        ],
    )
    agreement = found["agreement"]
    _csv(
        folder / "samples.csv",
        [
            {"sample": i, "enter": a, "exit": b, "fusion_layer": f, "kl_chosen": kl}
            for i, (a, b, f, kl) in enumerate(
                zip(
                    agreement["enter"],
                    agreement["exit"],
                    agreement["fusion"],
                    found["kept"]["kl"],
                    strict=True,
                )
            )
        ],
    )


def _csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def _plain(value: Any) -> Any:
    return value.item()
