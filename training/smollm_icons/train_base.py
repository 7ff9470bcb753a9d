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
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from latefusion.data.icons.board_questions import ask
from latefusion.data.icons.boards import SIDE, Board, draw_layout, split_layouts_of
from latefusion.models.smollm_icons import WEIGHTS
from latefusion.models.smollm_icons.packages import load_language_model, load_tokenizer
from latefusion.training.smollm_icons.accuracy import answer_boards, percent
from latefusion.training.smollm_icons.features import Composer, board_features, sheet_squares
from latefusion.training.smollm_icons.learner import Learner, tokens_that_matter
from latefusion.training.smollm_icons.projector import Projector, fit_projector, token_accuracy
from latefusion.training.smollm_icons.targets import Targets

ROUNDS = {  # of questions a board: more of what is learned last
    "existence": 2, "where": 2, "square": 2, "color": 4, "category": 2, "neighbor": 6, "relation": 4, "counting": 3,
}  # fmt: skip


@dataclass
class Recipe:
    """All numbers of the run."""

    seed: int = 0
    blind: bool = False
    word_steps: int = 500  # boards of word embeddings; windows grow from 2 x 2 squares to 6 x 6
    few_steps: int = 700  # composed pictures, the tokens of things and 12 others
    all_steps: int = 220  # all 144 tokens, half of the boards rendered whole
    decay_steps: int = 360  # the last ones: the rate falls linearly to 3%
    learning_rate: float = 1e-3
    projector_rate: float = 1e-4
    few_empty: int = 12
    train_boards: int = 400
    measure_every: int = 1000
    measure_boards: int = 20
    save_every: int = 50

    @property
    def steps(self) -> int:
        return self.word_steps + self.few_steps + self.all_steps

    def phase(self, step: int) -> str:
        if step < self.word_steps:
            return "words"
        return "few" if step < self.word_steps + self.few_steps else "all"

    def rate(self, step: int, started: int = 0) -> float:
        """Fraction of the peak learning rate; `started`: the step at which the optimiser was new."""
        return min(1, (step - started + 1) / 20) * max(0.03, min(1, (self.steps - step) / self.decay_steps))


def shipped_state(folder: Path) -> dict[str, Any]:
    """The state of a run whose checkpoint is gone, from the weights that ship: all but the optimiser's."""
    tensors = load_file(folder / "model.safetensors")
    parts: dict[str, dict[str, torch.Tensor]] = {"lora": {}, "projector": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor.float()
    record = json.loads((folder / "record.json").read_text())
    return {"learner": parts, "optimizer": None, "step": record["steps_done"], "record": record}


class Trainer:
    """A run: its folder, data, learner, optimiser and record."""

    def __init__(self, recipe: Recipe, folder: Path, features: Path, shipped: bool = False) -> None:
        self.recipe, self.folder = recipe, folder
        folder.mkdir(parents=True, exist_ok=True)
        squares = sheet_squares(features)
        self.composer = Composer(squares)
        self.train_boards = board_features(features, "train", recipe.train_boards)
        self.validation = board_features(features, "validation", recipe.measure_boards)
        embeddings = load_language_model().get_input_embeddings().weight.detach()
        self.targets = Targets(embeddings, load_tokenizer())
        self.record: dict[str, Any] = {
            "recipe": asdict(recipe),
            "rounds": ROUNDS,
            "log": [],
            "cpu_seconds": {},
        }
        self.step = self.started = 0
        state = self._saved(shipped)
        if state is None:
            projector, seconds = fit_projector(squares, self.targets, seed=recipe.seed)
            self.record["cpu_seconds"]["projector"] = round(seconds)
            self.record["projector"] = token_accuracy(projector, self.targets, self.validation)
            print("projector", self.record["projector"], f"{seconds:.0f} CPU seconds", flush=True)
        else:
            projector = Projector(self.targets.words.shape[1])
        self.learner = Learner(projector, blind=recipe.blind, seed=recipe.seed)
        groups: list[dict[str, Any]] = [
            {"params": list(self.learner.masters.values()), "lr": recipe.learning_rate},
            {"params": list(projector.parameters()), "lr": recipe.projector_rate},
        ]
        self.peaks: list[Any] = [group["lr"] for group in groups]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.98), fused=True)
        if state is not None:
            self.learner.load_state(state["learner"])
            self.step, self.record = state["step"], state["record"]
            if state["optimizer"] is None:
                self.started = self.step
            else:
                self.optimizer.load_state_dict(state["optimizer"])
                self.started = state.get("started", 0)
            print(f"going on at step {self.step}", flush=True)
        if self.record.get("recipe") != asdict(recipe):  # a recipe that was changed on the way is told
            self.record.setdefault("changes", []).append({"step": self.step, **asdict(recipe)})
            self.record["recipe"] = asdict(recipe)

    def _saved(self, shipped: bool) -> dict[str, Any] | None:
        path = self.folder / "checkpoint.pt"
        if path.is_file():
            return torch.load(path, weights_only=False)
        return shipped_state(WEIGHTS) if shipped else None

    def save(self) -> None:
        """Write the checkpoint and the record, each in place of the last one at once."""
        state = {
            "learner": self.learner.state(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "started": self.started,
            "record": self.record,
        }
        torch.save(state, self.folder / "checkpoint.new")
        os.replace(self.folder / "checkpoint.new", self.folder / "checkpoint.pt")
        (self.folder / "run.json").write_text(json.dumps(self.record, indent=1) + "\n")

    def draw(self, rng: random.Random) -> Board:
        """A board of train; at first the windows are small."""
        windows = min(SIDE, 2 + self.step * (SIDE - 1) // max(1, self.recipe.word_steps // 2))
        while True:
            board = draw_layout(rng, "train", rng.randint(2, windows) if windows < SIDE else None)
            if split_layouts_of(board) == "train":
                return board

    def loss(self) -> torch.Tensor:
        """The loss of this step's board, which depends on the step's number alone."""
        recipe, phase = self.recipe, self.recipe.phase(self.step)
        rng = random.Random(f"icons/train/{recipe.seed}/{self.step}")
        board, features = self.draw(rng), None
        if phase == "words":
            vision, places = self.targets.word_board(board, rng)
        else:
            if phase == "all" and self.step % 2:
                board, features = self.train_boards[rng.randrange(len(self.train_boards))]
            while features is None:
                features = self.composer.compose(board, rng)
                board = board if features is not None else self.draw(rng)
            places = list(range(144)) if phase == "all" else tokens_that_matter(board, rng, recipe.few_empty)
            vision = self.learner.see(features, places)
        return self.learner.loss(vision, places, ask(board, rng, ROUNDS))

    def update(self, loss: torch.Tensor) -> None:
        loss.backward()
        masters = self.learner.masters
        for name, parameter in self.learner.lora.items():
            masters[name].grad = parameter.grad.float() if parameter.grad is not None else None
            parameter.grad = None
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.recipe.rate(self.step, self.started)
        trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in self.learner.lora.items():
                parameter.copy_(masters[name])

    def run(self, until: float) -> None:
        """Train to the end of the recipe, or until the clock says `until`."""
        recipe = self.recipe
        average, began, began_wall = None, time.process_time(), time.time()
        seconds = self.record["cpu_seconds"]
        while self.step < recipe.steps and time.time() < until:
            phase = recipe.phase(self.step)
            loss = self.loss()
            self.update(loss)
            self.step += 1
            average = loss.item() if average is None else 0.97 * average + 0.03 * loss.item()
            seconds[phase] = seconds.get(phase, 0) + time.process_time() - began
            began = time.process_time()
            if self.step % 50 == 0:
                wall = time.time() - began_wall
                print(f"{self.step} {phase} loss {average:.3f} wall {wall:.0f} s", flush=True)
            if self.step % recipe.measure_every == 0 or self.step == recipe.steps:
                entry = {
                    "step": self.step,
                    "phase": phase,
                    "cpu_seconds": round(sum(s for name, s in seconds.items() if name != "measuring")),
                    "loss": round(average, 3),
                    **percent(answer_boards(self.learner, self.validation, "validation")),
                }
                self.record["log"].append(entry)
                print(entry, flush=True)
                seconds["measuring"] = seconds.get("measuring", 0) + time.process_time() - began
                began = time.process_time()
            if self.step % recipe.save_every == 0:
                self.save()
        self.save()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="checkpoints and run.json")
    parser.add_argument("--features", type=Path, help="cached features; default: FOLDER/features")
    parser.add_argument("--shipped", action="store_true", help="without a checkpoint, go on from weights/")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop, resumable, after this time")
    for name, value in asdict(Recipe()).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=type(value), default=value)
    options = vars(parser.parse_args())
    folder, features, shipped = (options.pop(name) for name in ("folder", "features", "shipped"))
    until = time.time() + 60 * options.pop("minutes")
    torch.set_num_threads(1)
    trainer = Trainer(Recipe(**options), folder, features or folder / "features", shipped)
    trainer.run(until)


if __name__ == "__main__":
    main()
