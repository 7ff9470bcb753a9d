"""Stage 2: LoRA and projector on boards. Words first, then few tokens, then all of them.

    python -m latefusion.training.smollm_icons.train_base --folder FOLDER          # and again after an interruption
    python -m latefusion.training.smollm_icons.train_base --folder OTHER --blind   # the control that sees no picture

FOLDER keeps features (1 GB), checkpoints and `run.json`, the record that the model card is written from. Every step
is seeded by its number, so an interrupted run goes on as if it had not been. `record.py` writes what ships.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from latefusion.models.smollm_icons import WEIGHTS
from latefusion.models.smollm_icons.packages import load_tokenizer
from latefusion.training.smollm_icons.accuracy import answer_boards, percent
from latefusion.training.smollm_icons.batch import Batch
from latefusion.training.smollm_icons.features import Composer, Features, squares_of
from latefusion.training.smollm_icons.fusion_stages import stage_profile
from latefusion.training.smollm_icons.learner import Learner, language_model
from latefusion.training.smollm_icons.measured import BOARDS, DATA_SEEDS, measure_part, parts_of
from latefusion.training.smollm_icons.projector import Projector, fit_projector, token_accuracy
from latefusion.training.smollm_icons.recipe import ROUNDS, Clock, Recipe
from latefusion.training.smollm_icons.steps import Steps
from latefusion.training.smollm_icons.targets import Targets
from latefusion.training.smollm_icons.weights import read_weights, save_weights


def shipped_state(folder: Path) -> dict[str, Any]:
    """The state of a run whose checkpoint is gone, from the weights that ship: all but the optimiser's."""
    record = json.loads((folder / "record.json").read_text())
    return {
        "learner": read_weights(folder),
        "optimizer": None,
        "step": record["steps_done"],
        "record": record,
    }


class Trainer:
    """A run: its folder, data, learner, optimiser and record."""

    def __init__(
        self, recipe: Recipe, folder: Path, features: Path, shipped: bool = False, device: str = "cpu",
        workers: int = 0,
    ) -> None:  # fmt: skip
        self.recipe, self.folder, self.device, self.workers = recipe, folder, device, workers
        folder.mkdir(parents=True, exist_ok=True)
        self.features = source = Features(features)
        squares = squares_of(source.sheets(recipe.sheets))
        self.composer = Composer(squares, source.boards("train", recipe.train_boards))
        self.tokens = self.composer.tokens.to(device)
        self.validation = source.boards("validation", recipe.measure_boards)
        model = language_model(recipe.untrained, recipe.seed, device)
        self.targets = Targets(model.get_input_embeddings().weight.detach().cpu(), load_tokenizer())
        self.record: dict[str, Any] = {
            "recipe": asdict(recipe),
            "rounds": ROUNDS,
            "device": "cpu" if device == "cpu" else torch.cuda.get_device_name(),
            "log": [],
            "cpu_seconds": {},
        }
        self.step = self.started = 0
        elapsed = 0.0
        state = self._saved(shipped)
        if state is None:
            projector, seconds = fit_projector(squares, self.targets, seed=recipe.seed, device=device)
            self.record["cpu_seconds"]["projector"] = round(seconds)
            self.record["projector"] = token_accuracy(projector, self.targets, self.validation)
            print("projector", self.record["projector"], f"{seconds:.0f} CPU seconds", flush=True)
        else:
            projector = Projector(self.targets.words.shape[1])
        self.learner = Learner(
            model, projector, blind=recipe.blind, freeze_language=recipe.freeze_language, untrained=recipe.untrained,
            seed=recipe.seed,
        )  # fmt: skip
        masters = [] if recipe.freeze_language else list(self.learner.masters.values())
        groups: list[dict[str, Any]] = [
            {"params": masters, "lr": recipe.learning_rate},
            {"params": list(projector.parameters()), "lr": recipe.projector_rate},
        ]
        groups = [group for group in groups if group["params"]]
        self.peaks: list[Any] = [group["lr"] for group in groups]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.98), fused=True)
        for master in masters:
            master.grad = torch.zeros_like(master)
        if state is not None:
            self.learner.load_state(state["learner"])
            self.step, self.record = state["step"], state["record"]
            if state["optimizer"] is None:
                self.started = self.step
            else:
                self.optimizer.load_state_dict(state["optimizer"])
                self.started, elapsed = state.get("started", 0), state.get("elapsed", 0)
            print(f"going on at step {self.step}", flush=True)
        if self.record.get("recipe") != asdict(recipe):  # the record lists changes of the recipe
            self.record.setdefault("changes", []).append({"step": self.step, **asdict(recipe)})
            self.record["recipe"] = asdict(recipe)
        self.clock = Clock(recipe, elapsed)

    def _saved(self, shipped: bool) -> dict[str, Any] | None:
        path = self.folder / "checkpoint.pt"
        if path.is_file():
            return torch.load(path, weights_only=True)
        return shipped_state(WEIGHTS) if shipped else None

    def fit_plan(self, seconds: float) -> None:
        """Stretch or squeeze the plan, from here on, to take this many seconds."""
        self.recipe.seconds = max(1.0, round(seconds, 1))
        self.record["recipe"] = asdict(self.recipe)
        self.clock = Clock(self.recipe)

    def save(self) -> None:
        """Write the checkpoint and the record, each in place of the last one at once."""
        self.record["steps_done"] = self.step
        state = {
            "learner": self.learner.state(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "started": self.started,
            "elapsed": self.clock.elapsed,
            "record": self.record,
        }
        torch.save(state, self.folder / "checkpoint.new")
        os.replace(self.folder / "checkpoint.new", self.folder / "checkpoint.pt")
        (self.folder / "run.json").write_text(json.dumps(self.record, indent=1) + "\n")

    def update(self, loss: torch.Tensor, position: float) -> None:
        loss.backward()
        learner = self.learner
        trained = [] if self.recipe.freeze_language else list(learner.trained)
        parameters = [learner.trained[name] for name in trained]
        masters = [learner.masters[name] for name in trained]
        if masters:
            torch._foreach_copy_([master.grad for master in masters], [p.grad for p in parameters])
        for parameter in parameters:
            parameter.grad = None
        rate = self.recipe.rate(position, self.step - self.started)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * rate
        projector = [p for p in learner.projector.parameters() if p.grad is not None]
        torch.nn.utils.clip_grad_norm_([*masters, *projector], 1.0)
        self.optimizer.step()
        learner.projector.zero_grad()
        if masters:
            with torch.no_grad():
                torch._foreach_copy_(parameters, masters)

    def batches(self) -> Iterable[tuple[float, Batch]]:
        """Where in the plan each step from here stands, and its batch."""
        steps = Steps(self.recipe, self.clock, self.composer, self.targets, self.learner.tokenizer)
        numbers = range(self.step, sys.maxsize if self.recipe.seconds else self.recipe.steps)
        return DataLoader(steps, batch_size=None, sampler=numbers, num_workers=self.workers)

    def run(self, until: float) -> None:
        """Train to the end of the recipe, or until the clock says `until`."""
        recipe = self.recipe
        average, began, began_wall = None, time.process_time(), time.time()
        seconds = self.record["cpu_seconds"]
        for position, batch in self.batches():
            if position >= recipe.steps or time.time() >= until:
                break
            phase = recipe.phase(position)
            loss = self.learner.loss(batch.to(self.device).with_features(self.tokens))
            self.update(loss, position)
            self.step += 1
            loss = loss.detach()
            average = loss if average is None else 0.97 * average + 0.03 * loss
            seconds[phase] = seconds.get(phase, 0) + time.process_time() - began
            began = time.process_time()
            if self.step % 50 == 0:
                wall = time.time() - began_wall
                print(f"{self.step} {phase} loss {average.item():.3f} wall {wall:.0f} s", flush=True)
            if self.step % recipe.measure_every == 0:
                self.measure(phase, average.item())
                seconds["measuring"] = seconds.get("measuring", 0) + time.process_time() - began
                began = time.process_time()
            if self.step % recipe.save_every == 0:
                self.save()
        if average is not None and (not self.record["log"] or self.record["log"][-1]["step"] != self.step):
            self.measure(phase, average.item())
        self.save()

    def measure(self, phase: str, loss: float) -> None:
        """A line of the record: accuracy on validation."""
        seconds = self.record["cpu_seconds"]
        entry = {
            "step": self.step,
            "phase": phase,
            "cpu_seconds": round(sum(s for name, s in seconds.items() if name != "measuring")),
            "loss": round(loss, 3),
            **percent(answer_boards(self.learner, self.validation, "validation")),
        }
        self.record["log"].append(entry)
        print(entry, flush=True)

    def finish(self, n_boards: int) -> None:
        """Write the weights as they would ship, and measure them: accuracy part by part, and where they fuse."""
        save_weights(self.learner, self.folder)
        self.learner.load_state(read_weights(self.folder))
        features = self.features
        parts = [f"test/{seed}" for seed in DATA_SEEDS] if self.recipe.blind else parts_of()
        if not self.recipe.blind:
            profile = stage_profile(self.learner, features, n_boards)
            (self.folder / "stages.json").write_text(json.dumps(profile) + "\n")
        for part in parts:
            measure_part(self.folder, self.step, part, lambda: self.learner, features, n_boards)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="checkpoints and run.json")
    parser.add_argument("--features", type=Path, help="cached features; default: FOLDER/features")
    parser.add_argument("--shipped", action="store_true", help="without a checkpoint, go on from weights/")
    parser.add_argument("--device", default="cpu", help="cpu, cuda")
    parser.add_argument("--workers", type=int, default=0, help="processes that put batches together")
    parser.add_argument(
        "--measure", action="store_true", help="write the weights and measure them at the end"
    )
    parser.add_argument(
        "--end-at", type=float, help="fit the plan to the time until then (seconds since 1970)"
    )
    parser.add_argument("--minutes", type=float, default=1e9, help="stop, resumable, after this time")
    for name, value in asdict(Recipe()).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=type(value), default=value)
    options = vars(parser.parse_args())
    folder, features, shipped = (options.pop(name) for name in ("folder", "features", "shipped"))
    device, workers, measure = (options.pop(name) for name in ("device", "workers", "measure"))
    until, end_at = time.time() + 60 * options.pop("minutes"), options.pop("end_at")
    torch.set_num_threads(1)
    trainer = Trainer(Recipe(**options), folder, features or folder / "features", shipped, device, workers)
    if end_at:
        trainer.fit_plan(end_at - time.time())
    trainer.run(until)
    if measure:
        trainer.finish(BOARDS)


if __name__ == "__main__":
    main()
