"""The log of a run, under any engine: progress on the console, and `metrics.jsonl`."""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from latefusion.recipes.launcher import world_size
from latefusion.recipes.schema import TRACKERS, Config
from latefusion.training.order import Order

METRICS = "metrics.jsonl"
REFRESH = 0.5  # seconds
WIDE = 130  # columns that name, bar and numbers need
# dense peak in FLOP/s, bfloat16 on tensor cores and float32 without them: data sheets, SXM if there are several
PEAK = {
    "B200": (2.25e15, 80e12),
    "GH200": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "A40": (150e12, 37.4e12),
    "L4": (121e12, 30.3e12),
    "4090": (165e12, 82.6e12),
}


def trackers(names: list[str], *, main: bool) -> list[str]:
    """The requested trackers that are installed; TensorBoard, the default, may be missing."""
    installed = [name for name in names if any(map(find_spec, TRACKERS[name]))]
    if main and installed != names:
        print(f"TensorBoard is not installed (pip install tensorboardX): {METRICS} holds the same numbers.")
    return installed


class Monitor:
    """Rates, the progress line and `metrics.jsonl` of one run, on its first process.

    Args:
        folder: of the run.
        name: shown before the bar.
        steps: of the whole run.
        first: steps that the resumed run had done; its log of later steps is removed.
        samples: samples per step, over all processes.
        dtype: of the computation; with the name of the device it gives the peak for MFU.
        main: this process prints and writes; the others only count.
    """

    @classmethod
    def of(cls, config: Config, order: Order, *, first: int, dtype: torch.dtype, main: bool) -> Monitor:
        """The monitor of a configured run."""
        return cls(
            config.output_dir,
            name=config.name,
            steps=order.steps,
            first=first,
            samples=order.size,
            dtype=dtype,
            main=main,
        )

    def __init__(
        self,
        folder: str | Path,
        *,
        name: str,
        steps: int,
        first: int,
        samples: int,
        dtype: torch.dtype,
        main: bool,
    ):
        self.steps, self.first, self.samples, self.main = steps, first, samples, main
        self.peak = peak_flops(dtype)
        self.last, self.since = first, time.perf_counter()
        self.begun = self.since
        self.shown = 0.0
        self.bar: Progress | None = None
        self.path = Path(folder) / METRICS
        if not main:
            return
        kept = []
        if first and self.path.is_file():
            kept = [line for line in self.path.read_text().splitlines() if _step(line) <= first]
        self.path.write_text("".join(f"{line}\n" for line in kept))
        if sys.stderr.isatty():
            console = Console(stderr=True)
            name_and_bar = (TextColumn("[bold]{task.description}"), BarColumn(bar_width=24))
            columns = name_and_bar if console.width >= WIDE else ()
            self.bar = Progress(
                *columns, TextColumn("{task.fields[text]}"), console=console, auto_refresh=False
            )
            self.bar.start()
            self.task = self.bar.add_task(name, total=steps, completed=first, text=f"{first}/{steps}")

    def step(self, done: int) -> None:
        """Move the bar, at most every `REFRESH` seconds."""
        if self.bar is not None and time.perf_counter() - self.shown > REFRESH:
            self.shown = time.perf_counter()
            self.bar.update(self.task, completed=done)
            self.bar.refresh()

    def rates(self, done: int, tokens: float, flops: float) -> dict[str, float]:
        """Speed since the last call, memory, and the seconds left.

        Args:
            done: steps done.
            tokens: real (not padding) tokens since the last call, over all processes.
            flops: computed since the last call.
        """
        now = time.perf_counter()
        seconds, steps = max(now - self.since, 1e-9), done - self.last
        self.since, self.last = now, done
        rates = {
            "tokens_per_second": tokens / seconds,
            "samples_per_second": steps * self.samples / seconds,
            "memory_gb": memory() / 1e9,
            "eta_seconds": (now - self.begun) / max(1, done - self.first) * (self.steps - done),
        }
        if self.peak is not None:
            rates["mfu"] = flops / seconds / (self.peak * world_size())
        return {key: _significant(value) for key, value in rates.items()}

    def log(self, done: int, values: dict[str, Any]) -> None:
        """Write a line of `metrics.jsonl` and, for a training step, of the console."""
        if not self.main:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": done, "time": round(time.time(), 3), **values}) + "\n")
        if "loss" not in values:
            return
        text = line(done, self.steps, values)
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.update(self.task, completed=done, text=text)
            self.bar.refresh()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def per_token(sums: dict[str, float]) -> dict[str, float]:
    """The means over label tokens that a run logs, from the sums of the objective's terms.

    Those of the teacher are over the tokens of steps that it ran in; without such a step there are none.
    """
    means = {"ce": sums["ce"] / sums["tokens"]}
    taught = sums.get("taught", sums["tokens"])  # without a teacher, kl is 0
    if taught:
        means["kl"] = sums["kl"] / taught
    if taught and "teacher_right" in sums:
        means["teacher_right"] = _significant(sums["teacher_right"] / taught)
    return means


def line(done: int, steps: int, values: dict[str, float]) -> str:
    """A log entry for the console."""
    parts = [f"{done:>{len(str(steps))}}/{steps}"]
    parts += [f"{_clock(values['eta_seconds'])} left"] if "eta_seconds" in values else []
    parts.append(f"loss {values['loss']:.4f}")
    parts += [f"{name} {values[name]:.4f}" for name in ("ce", "kl") if values.get(name)]
    parts += [f"teacher right {values['teacher_right']:.0%}"] if "teacher_right" in values else []
    if "tokens_per_second" in values:
        parts += [
            f"{_short(values['tokens_per_second'])} tokens/s",
            f"{_short(values['samples_per_second'])} samples/s",
            f"{values['memory_gb']:.1f} GB",
        ]
        parts += [f"MFU {values['mfu']:.0%}"] if "mfu" in values else []
    return "  ".join(parts)


def memory() -> int:
    """Peak memory in bytes: of tensors on the GPU, or of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_flops(dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of this GPU; None without a GPU or for an unknown one."""
    if not torch.cuda.is_available():
        return None
    words = re.split(r"[^A-Z0-9]+", torch.cuda.get_device_name().upper())  # an L40 is no L4
    for name, (bfloat16, float32) in PEAK.items():
        if name in words:
            tf32 = torch.get_float32_matmul_precision() != "highest"  # at half the speed of bfloat16
            return bfloat16 if dtype is torch.bfloat16 else bfloat16 / 2 if tf32 else float32
    return None


def _step(entry: str) -> int:
    try:
        return json.loads(entry)["step"]
    except (ValueError, KeyError):  # cut off by a kill
        return sys.maxsize


def _significant(value: float) -> float:
    return float(f"{value:.4g}")


def _short(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.3g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
