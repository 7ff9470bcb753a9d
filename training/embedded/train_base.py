"""Train the embedded base from nothing: `python -m latefusion.training.embedded.train_base`.

About 25 minutes of one CPU core. Stages `tower`, `decoder` and `blind` do not depend on each other: two
processes may run `--stages decoder` and `--stages tower blind` at once, then `--stages align see record`.
Interrupted, the same command goes on where the last checkpoint was written. Stage `record` writes the
weights, the processor, `record.json` and the model card (README.md) to `--output`.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import LlavaConfig

from latefusion.models.locate import EMBEDDED_WEIGHTS
from latefusion.training.embedded import batched_attention as attention
from latefusion.training.embedded.architecture import build_config, build_model
from latefusion.training.embedded.optimiser import MuonAdam
from latefusion.training.embedded.record import write_record
from latefusion.training.embedded.stages import LOSSES, STAGES, Learner, Stage

SEED = 0
THREADS = 1
NEEDS: dict[str, tuple[str, ...]] = {
    "tower": (),
    "decoder": (),
    "align": ("tower", "decoder"),
    "see": ("align",),
    "blind": (),
    "record": ("see",),
}


def build_learner(config: LlavaConfig | None = None, *, compiled: bool = True) -> Learner:
    """The model and its throw-away parts, bfloat16, before any training."""
    torch.manual_seed(SEED)
    model = build_model(config or build_config(), seed=SEED)
    model.set_attn_implementation(attention.NAME)
    learner = Learner(model).bfloat16()
    if compiled:
        torch._dynamo.config.recompile_limit = 64
        torch._inductor.config.compile_threads = 1
        for layer in [*model.model.language_model.layers, *model.model.vision_tower.encoder.layers]:
            layer.forward = torch.compile(layer.forward, dynamic=False)
    return learner


def run_stage(
    learner: Learner,
    stage: Stage,
    folder: Path,
    *,
    stop_after: int | None = None,
    checkpoint_every: int = 100,
    report: Callable[[int, dict[str, float]], None] = lambda step, numbers: None,
) -> float:
    """Train one stage, from its last checkpoint if there is one; returns the CPU seconds it took in all.

    Writes `folder/<stage>.pt` (resumable state, then the finished one). `stop_after` ends early, after a
    checkpoint.
    """
    learner.requires_grad_(False)
    for module in learner.trained_in(stage.name):
        module.requires_grad_(True)
    optimiser = MuonAdam(learner.named_parameters(), lr=stage.lr)
    path, done, spent = folder / f"{stage.name}.pt", 0, 0.0
    if path.is_file():
        state = torch.load(path, weights_only=True)
        done, spent = state["done"], state["cpu_seconds"]
        learner.load_state_dict(state["learner"])
        if done < stage.steps:
            optimiser.load_state_dict(state["optimiser"])

    start = time.process_time()
    last = min(stage.steps, stop_after or stage.steps)
    for step in range(done, last):
        loss, numbers = LOSSES[stage.name](learner, stage, step)
        loss.backward()
        optimiser.step(stage.factor(step))
        report(step, numbers)
        if (step + 1) % checkpoint_every == 0 or step + 1 == last:
            state = {
                "done": step + 1,
                "cpu_seconds": spent + time.process_time() - start,
                "learner": learner.state_dict(),
            }
            if step + 1 < stage.steps:
                state["optimiser"] = optimiser.state_dict()
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
    return spent + time.process_time() - start


def load_finished(learner: Learner, names: tuple[str, ...], folder: Path) -> None:
    """Load finished stages into the learner: the first one whole, of the others the modules that they trained."""
    for order, name in enumerate(names):
        path = folder / f"{name}.pt"
        state = torch.load(path, weights_only=True) if path.is_file() else None
        if state is None or state["done"] < STAGES[name].steps:
            raise FileNotFoundError(
                f"stage {name} is not finished in {folder}; run it first with --stages {name}"
            )
        trained = {p for module in learner.trained_in(name) for p in module.parameters()}
        for key, parameter in learner.named_parameters():
            if order == 0 or parameter in trained:
                parameter.data.copy_(state["learner"][key])


def tune_allocator() -> None:
    """Keep freed memory instead of handing it back to the system at every step (glibc only)."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1), (-2, 256 * 2**20)):
            libc.mallopt(option, value)  # arenas, mmap, trim threshold, top pad


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/embedded_base"), help="checkpoints and logs"
    )
    parser.add_argument(
        "--output", type=Path, default=EMBEDDED_WEIGHTS, help="where weights, processor, record and card go"
    )
    parser.add_argument("--stages", nargs="+", choices=list(NEEDS), default=list(NEEDS))
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    tune_allocator()
    arguments.work.mkdir(parents=True, exist_ok=True)
    for name in arguments.stages:
        learner = build_learner(compiled=name != "record")
        load_finished(learner, NEEDS[name], arguments.work)
        if name == "record":
            blind = build_learner(compiled=False)
            load_finished(blind, ("blind",), arguments.work)
            seconds = {
                stage: torch.load(arguments.work / f"{stage}.pt", weights_only=True)["cpu_seconds"]
                for stage in STAGES
            }
            write_record(learner.eval(), blind.eval(), cpu_seconds=seconds, folder=arguments.output)
        else:
            _run_with_progress(learner, STAGES[name], arguments.work)


def _run_with_progress(learner: Learner, stage: Stage, folder: Path) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(stage.name, total=stage.steps)

        def report(step: int, numbers: dict[str, float]) -> None:
            line = ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())
            progress.update(task, completed=step + 1, description=f"{stage.name}: {line}")
            if (step + 1) % 25 == 0:
                progress.console.print(
                    f"{stage.name} {step + 1}/{stage.steps}: {line}, CPU {time.process_time():.0f} s"
                )

        seconds = run_stage(learner, stage, folder, report=report)
        progress.console.print(f"{stage.name}: done in {seconds:.0f} CPU seconds")


if __name__ == "__main__":
    main()
