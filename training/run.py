"""One training run, from its configuration to the report."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import set_seed

from latefusion.data.bad_rows import SKIPPED_FILE, skipped
from latefusion.data.collate import collator_without_weights, is_ranked
from latefusion.data.load import check_questions, evaluation_questions, training_data
from latefusion.data.packing import Packed
from latefusion.data.samples import Refused, sentence
from latefusion.data.streaming import MARKS, Stream
from latefusion.models.folder_contents import RUN_CONFIG
from latefusion.models.inputs import PIXELS
from latefusion.models.policies.configured import evaluates, is_known, teaches
from latefusion.models.student.build import Student
from latefusion.models.student.entry import entry_of
from latefusion.recipes.launcher import rank
from latefusion.recipes.printable import error_line
from latefusion.recipes.schema import Config, Tune
from latefusion.training.assemble import (
    base_of,
    check_keep,
    dtype_of,
    first_samples,
    guarded,
    images_to_fit,
    objective_of,
    packing,
    student_of,
)
from latefusion.training.checkpoints import CannotSave, check_length, discard_after, step_of
from latefusion.training.describe import composed_tree, describe
from latefusion.training.earlier_student import check_earlier
from latefusion.training.model_card import Form, model_card
from latefusion.training.nonfinite import NonFinite
from latefusion.training.offline import Taught, no_answers, with_answers
from latefusion.training.prepare import (
    IDENTITY,
    settle_entry,
    settle_identity,
    settle_schedule,
    settle_steps,
    settle_threads,
)
from latefusion.training.run_folder import claimed, leave_mark, remove_mark
from latefusion.training.signals import PREEMPTED, Preempted
from latefusion.training.teacher import check_models
from latefusion.training.teacher_cache import Stale
from latefusion.training.trust import settle_trust
from latefusion.training.trust_record import FILE as TRUST_FILE


def train(cfg: DictConfig, config: Config, resumed: Path | None) -> None:
    """Train, save to `output_dir`, evaluate. A run that cannot work ends in one sentence before any compute.

    Args:
        cfg: the composed configuration, written beside the student.
        config, resumed: from `preflight.checked`.

    Raises:
        SystemExit: with such a sentence, or with `signals.PREEMPTED` if a signal stopped the run after a checkpoint.
    """
    started = time.perf_counter()
    first = rank() == 0
    with ExitStack() as held:
        try:
            engine: ModuleType = import_module(f"latefusion.training.engines.{config.engine.trainer.value}")
            check_models(config)
            dataset = training_data(config.data)
            plain = collator_without_weights(config, dtype=dtype_of(config))
            rows = None if isinstance(dataset, Stream) else len(dataset)
            collator = with_answers(config, plain, rows)
            beginning = first_samples(dataset)
            batch = guarded(config, collator, dataset)(beginning)
            most = int(torch.isin(batch["input_ids"], plain.vision_ids).sum(1).max())
            if is_known(config.schedule):
                check_keep(config, most)
            check_evaluation(config)
            held.enter_context(claimed(config.output_dir))
            remove_mark(config.output_dir)
            identity = settle_identity(config, plain.processor, dataset, resumed)
            settle_threads(config)
            settle_steps(config, cfg, dataset)
            if resumed is not None:
                check_length(resumed, config.train.total_steps)
            settle_schedule(config, cfg, resumed)
            if config.init is not None:
                check_earlier(config, config.init)  # under the schedule of a profile, too
            plain.ranked = is_ranked(config)  # a profile may have keeps where the recipe had none
            check_keep(config, most)
            if first:
                print(composed_tree(cfg), flush=True)
            load = cache(lambda: base_of(config)[0])  # a whole model, before an engine shards what is loaded
            settle_entry(config, plain, load, lambda: images_to_fit(config, dataset), resumed)
            offline = isinstance(collator, Taught)
            trust = settle_trust(config, collator, load, dataset, resumed, offline=offline)
            if not teaches(config):
                collator = plain
            elif config.kl.cache is not None and not offline:
                raise no_answers(config.kl.cache)
            load.cache_clear()
            set_seed(config.train.seed)
            context = engine.prepare(config, dtype=dtype_of(config))
            student = student_of(config)
            objective = objective_of(config, student)
            clear(config, resumed)
            if isinstance(dataset, Stream):
                dataset.marks = Path(config.output_dir) / MARKS
            guard = guarded(config, collator, dataset, folder=config.output_dir)
            batch = guard(beginning)
            batches = packing(config, student, guard)
        except (ValueError, FileNotFoundError) as error:
            raise SystemExit(error_line(error)) from None
        if first:
            if isinstance(batches, Packed) and not batches.pictures:
                print(
                    "data.pack=true packs only batches without images here (docs/data.md says where and why)."
                )
            OmegaConf.save(cfg, Path(config.output_dir) / RUN_CONFIG, resolve=True)
            (Path(config.output_dir) / IDENTITY).write_text(json.dumps(identity, indent=1) + "\n")
            alone = map(guarded(config, plain, dataset), ([sample] for sample in beginning))
            example = next((one for one in alone if any(name in one for name in PIXELS.values())), None)
            print(
                describe(config, student, beginning, batch, example, dataset, objective.kl.other), flush=True
            )
            if trust is not None:
                trust.write(config.output_dir)
                print(f"{trust}.", flush=True)
            if resumed is not None:
                print(
                    f"Going on from step {step_of(resumed)} of {config.train.total_steps} ({resumed}).",
                    flush=True,
                )
        began = time.perf_counter()
        try:
            main = engine.fit(config, context, student, dataset, batches, objective, resumed)
        except (Refused, Stale) as error:
            raise SystemExit(error_line(sentence(error))) from None
        except (CannotSave, NonFinite) as error:
            raise SystemExit(error_line(error)) from error.__cause__
        except Preempted as stop:
            if first:
                leave_mark(config.output_dir, stop.step)
                print(f"{stop}; go on with resume=true.", flush=True)
            raise SystemExit(PREEMPTED) from None
        ended = time.perf_counter()
        if main:
            print(
                f"Trained in {ended - began:.0f} s, after {began - started:.0f} s of preparation; the student is in "
                f"{config.output_dir}.",
                flush=True,
            )
            if left_out := skipped(config.output_dir):
                file = Path(config.output_dir) / SKIPPED_FILE
                print(f"{left_out} row(s) could not be used and were left out: {file} says why.", flush=True)
            evaluate(config)
            write_card(config, student)


def clear(config: Config, resumed: Path | None) -> None:
    """Remove from the output folder what this run writes again."""
    if rank() == 0:
        discard_after(config.output_dir, 0 if resumed is None else step_of(resumed))
        if resumed is None:
            for name in (SKIPPED_FILE, MARKS, TRUST_FILE):
                (Path(config.output_dir) / name).unlink(missing_ok=True)


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
    from latefusion.eval.evaluate import evaluate_checkpoint  # lazy: the one import of a run that goes up

    options = config.eval
    return evaluate_checkpoint(
        config.output_dir,
        split=options.split,
        samples=options.samples,
        output=config.output_dir,
        batch_size=options.batch_size,
    )


def write_card(config: Config, student: Student) -> None:
    """Write the model card into the student's folder, in the place of PEFT's empty template."""
    if config.tune is not Tune.full:
        entry, folder = entry_of(student.model) is not None, config.output_dir
        (Path(folder) / "README.md").write_text(
            model_card(folder, folder=folder, form=Form.adapters, entry=entry)
        )


def check_evaluation(config: Config) -> None:
    """Check, before training, that the questions of the evaluation at the end can be asked."""
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
