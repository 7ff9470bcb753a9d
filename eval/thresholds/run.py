"""What `eval/calibrate.py` does once it is known that it can: prompts, model, search, results."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from latefusion.eval.thresholds import choose as chosen
from latefusion.eval.thresholds.prefills import policy_of, settings
from latefusion.eval.thresholds.questions import read
from latefusion.eval.thresholds.search import Search
from latefusion.models.attach import attach
from latefusion.models.base_model import compute_dtype, load_base
from latefusion.models.schedule import VisionSchedule

if TYPE_CHECKING:
    from latefusion.eval.calibrate import Arguments


def calibrated(asked: Arguments, console: Console) -> dict[str, Any]:
    """Try all settings and write the results; see `calibrate.calibrate`."""
    for setting in settings(asked, asked.boundaries or [0], asked.tokens_thresholds or [0.0]):
        policy_of(setting, asked)  # raises for what cannot be
    rows = read(asked)
    for remark in rows.remarks:
        console.print(remark)
    model, processor = load_base(asked.model, dtype=compute_dtype())
    if torch.cuda.is_available():
        model.cuda()  # type: ignore[arg-type]
    started = time.perf_counter()
    with attach(model, VisionSchedule()) as attachment:
        search = Search(asked, attachment, processor, rows)
        console.print(search.cost(), highlight=False)
        results = search.run()
    results["seconds"] = time.perf_counter() - started
    return chosen.write(results, Path(asked.output), console)
