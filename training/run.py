"""One training run, from a composed configuration to the report."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import set_seed

from latefusion.data.bad_rows import SKIPPED_FILE, skipped
from latefusion.data.load import check_questions, evaluation_questions
from latefusion.data.samples import Refused, sentence
from latefusion.data.streaming import MARKS, Stream
from latefusion.models.policies.configured import evaluates
from latefusion.models.student.build import Student
from latefusion.models.student.entry import entry_of
from latefusion.recipes.launcher import local_world_size, rank
from latefusion.recipes.schema import Config, Tune
from latefusion.training.assemble import (
    base_of,
    dtype_of,
    examples,
    guarded,
    objective_of,
    packing,
    samples,
    student_of,
    training_collator,
)
from latefusion.training.calibrate import settle_entry
from latefusion.training.checkpoints import CannotSave, discard_after, step_of
from latefusion.training.describe import describe, first_samples
from latefusion.training.model_card import model_card
from latefusion.training.nonfinite import NonFinite
from latefusion.training.offline import Stale
from latefusion.training.preflight import checked
from latefusion.training.prepare import settle_schedule
from latefusion.training.resumed import CONFIG
from latefusion.training.rows import check_rows
from latefusion.training.run_folder import claimed, leave_mark
from latefusion.training.signals import PREEMPTED, Preempted
from latefusion.training.teacher import check_models


def run(cfg: DictConfig) -> None:
    """Check what a composed configuration says, and train; see `train`."""
    train(cfg, *checked(cfg))


def train(cfg: DictConfig, config: Config, resumed: Path | None) -> None:
    """Train, save to `output_dir`, evaluate; what cannot work ends in one sentence before any compute.

    Args:
        cfg: the composed configuration, written beside the student.
        config, resumed: what `preflight.checked` made of it.

    Raises:
        SystemExit: with such a sentence; with `guard.PREEMPTED` if a signal stopped the run after a checkpoint.
    """
    started = time.perf_counter()
    with ExitStack() as held:
        try:
            engine: ModuleType = import_module(f"latefusion.training.engines.{config.engine.trainer.value}")
            check_models(config)
            dataset = samples(config.data)
            begins = first_samples(dataset)
            check_rows(config, dataset, begins, cache=config.kl.cache)
            check_evaluation(config)
            held.enter_context(claimed(config.output_dir))
            settle_threads(config)
            settle_schedule(config, cfg, resumed)
            settle_entry(config, lambda: base_of(config), lambda: examples(config, dataset), resumed)
            set_seed(config.train.seed)
            context = engine.prepare(config, dtype=dtype_of(config))
            student = student_of(config)
            objective = objective_of(config, student)
            clear(config, resumed)
            if isinstance(dataset, Stream):
                dataset.marks = Path(config.output_dir) / MARKS
            guard = guarded(config, training_collator(config, student), dataset, folder=config.output_dir)
            some = guard(begins)
            collator = packing(config, student, guard)
        except (ValueError, FileNotFoundError) as error:
            raise SystemExit(f"error: {error}") from None
        first = rank() == 0
        if first:
            OmegaConf.save(cfg, Path(config.output_dir) / CONFIG, resolve=True)
            print(describe(config, student, some, objective.other), flush=True)
        try:
            main = engine.fit(config, context, student, dataset, collator, objective, resumed)
        except (Refused, Stale) as error:
            raise SystemExit(f"error: {sentence(error)}") from None
        except (CannotSave, NonFinite) as error:
            raise SystemExit(f"error: {error}") from error.__cause__
        except Preempted as stop:
            if first:
                leave_mark(config.output_dir, stop.step)
                print(f"{stop}; go on with resume=true.", flush=True)
            raise SystemExit(PREEMPTED) from None
        if main:
            print(
                f"Trained in {time.perf_counter() - started:.0f} s; the student is in {config.output_dir}.",
                flush=True,
            )
            if left_out := skipped(config.output_dir):
                file = Path(config.output_dir) / SKIPPED_FILE
                print(f"{left_out} row(s) could not be used and were left out: {file} says why.", flush=True)
            evaluate(config)
            write_card(config, student)


def clear(config: Config, resumed: Path | None) -> None:
    """Take out of the output folder what a run left there that this one does over."""
    if rank() == 0:
        discard_after(config.output_dir, 0 if resumed is None else step_of(resumed))
        if resumed is None:
            for name in (SKIPPED_FILE, MARKS):
                (Path(config.output_dir) / name).unlink(missing_ok=True)


def settle_threads(config: Config) -> None:
    if not torch.cuda.is_available():
        processes = local_world_size()
        torch.set_num_threads(config.train.threads or max(1, len(os.sched_getaffinity(0)) // processes))


def evaluate(config: Config) -> dict[str, Any] | None:
    """Compare the saved student with its dense base and the pruned base; writes the report."""
    if not config.eval.enabled:
        return None
    if config.tune is Tune.full:
        print("No evaluation: all weights have changed, so the dense base is not at hand to compare with.")
        return None
    if evaluation_questions(config) is None:
        print(
            "No evaluation: data.eval_path names no data set of questions and answers. To ask your own: "
            f"python eval/evaluate.py checkpoint={config.output_dir} data=QUESTIONS.jsonl (docs/evaluation.md)."
        )
        return None
    from latefusion.eval.evaluate import evaluate_checkpoint

    asked = config.eval
    return evaluate_checkpoint(
        config.output_dir,
        split=asked.split,
        samples=asked.samples,
        output=config.output_dir,
        batch_size=asked.batch_size,
    )


def write_card(config: Config, student: Student) -> None:
    """Say in the student's folder what it is, in the place of PEFT's empty template."""
    if config.tune is not Tune.full:
        entry, folder = entry_of(student.model) is not None, config.output_dir
        (Path(folder) / "README.md").write_text(model_card(folder, folder=folder, merged=False, entry=entry))


def check_evaluation(config: Config) -> None:
    """Raise, before training, if the questions that the run ends with are not there or are none."""
    if not evaluates(config):
        return
    try:
        check_questions(evaluation_questions(config))
    except (ValueError, FileNotFoundError) as error:
        where = config.data.eval_path or config.data.source.value
        raise ValueError(
            f"the evaluation on {where} after training cannot be: {str(error).rstrip('.')}; mend data.eval_path or "
            "eval.split, or train with eval.enabled=false."
        ) from None
