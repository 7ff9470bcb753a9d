"""Compare a checkpoint with its dense base and the pruned baseline on the same questions.

    python eval/evaluate.py checkpoint=outputs/late_fusion split=test samples=300 output=outputs/evaluation

`training/train.py` calls `evaluate_run` at its end.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from latefusion.eval import efficiency, metrics
from latefusion.eval import results as found
from latefusion.eval.predict import System, answer_questions, check, progress_bar, prompt_inputs
from latefusion.eval.report.page import write_report
from latefusion.eval.report.tables import print_table

__all__ = ["System", "evaluate_checkpoint", "evaluate_run"]

SCHEMA = 1  # of results.json; raise it when a key changes its meaning
NEW_TOKENS = 6  # generated while timing: the first and five further ones
CONFIG = "config.yaml"


def evaluate_run(
    *,
    model: Any,
    processor: Any,
    attachment: Any,
    systems: dict[str, System],
    dataset: Dataset,
    output_dir: str | Path,
    title: str,
    split: str | None = None,
    checkpoint: str | Path | None = None,
    reference: str = "dense",
    baseline: str = "pruned",
    candidate: str = "student",
    batch_size: int = 96,
    latency_prompts: int = 6,
    latency_repeats: int = 3,
    seed: int = 0,
    note: str = "",
) -> dict[str, Any]:
    """Evaluate `systems` on `dataset`, print the table and write the report.

    Writes into `output_dir`: `results.json` (every number), `predictions.jsonl` (one line a question and
    system), `report.html`. The model is put into eval mode and given back in the mode it came in.

    Args:
        model: Hugging Face image-text-to-text model, PEFT-wrapped if a system has `adapters=True`.
        processor: its processor; prompts are made with its chat template, padded on the left.
        attachment: what `attach(model, ...)` returned; each system runs under
            `attachment.using(system.policy)`.
        systems: by key, in the order of the table, such as
            `{"dense": System(name="Dense base", policy=VisionSchedule()),
            "pruned": System(name="VisiPruner", policy=VisiPruner(...)),
            "student": System(name="Late fusion", policy=schedule, adapters=True)}`.
        dataset: rows of `load_scenes` (`image`) or of `data/sources.py` (`messages`, `images`), both with
            `id`, `question`, `answer`, `type`, `scene`.
        output_dir: made if missing.
        title: heading of the report, such as the recipe's name.
        split: what the report calls the dataset's part; None: its own `split`.
        checkpoint: where the student was saved, named in the report's "use it next"; None: `output_dir`.
        reference, baseline, candidate: keys of the system that ratios refer to, of the one to beat, and of
            the one that the headline speaks of.
        batch_size: questions a batch (accuracy only; latency is measured at batch 1).
        latency_prompts, latency_repeats: prompts that latency and memory are measured on, and rounds over
            them.
        seed: of the bootstrap.
        note: free text on how the checkpoint was made (steps, time), shown in the report.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: a key names no system, the dataset is empty, or adapters are asked of a model without
            them.
    """
    for role, key in (("reference", reference), ("baseline", baseline), ("candidate", candidate)):
        if key not in systems:
            raise ValueError(f"{role}={key!r} names no system; choose one of {', '.join(systems)}.")
    check(model, systems, dataset)
    started = time.perf_counter()
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    common = {"model": model, "attachment": attachment, "systems": systems}
    was_training = model.training
    model.eval()
    try:
        answers = answer_questions(**common, processor=processor, dataset=dataset, batch_size=batch_size)
        prompts = [prompt_inputs(model, processor, [row]) for row in _spread(dataset, latency_prompts)]
        with progress_bar() as progress:
            task = progress.add_task("Latency, memory", total=len(prompts) * (latency_repeats + 1))
            costs = efficiency.measure(
                **common,
                prompts=prompts,
                reference=reference,
                repeats=latency_repeats,
                new_tokens=NEW_TOKENS,
                advance=lambda: progress.advance(task),
            )
        vision_seconds = efficiency.vision_seconds(model, prompts * latency_repeats)
    finally:
        model.train(was_training)
    results = {
        "schema": SCHEMA,
        "title": title,
        "note": note,
        "checkpoint": str(checkpoint or output_dir),
        "roles": {"reference": reference, "baseline": baseline, "candidate": candidate},
        "data": found.describe_data(dataset, str(split or dataset.split or "evaluation")),
        "model": found.describe_model(model, answers[reference]) | {"vision_seconds": vision_seconds},
        "systems": found.describe_systems(model, systems, answers, costs, reference),
        "paired": {
            key: asdict(found.compare(answers[candidate], answers[key], seed))
            for key in systems
            if key != candidate
        },
        "settings": {
            "decoding": "greedy",
            "batch_size": batch_size,
            "latency_prompts": len(prompts),
            "latency_repeats": latency_repeats,
            "latency_new_tokens": NEW_TOKENS,
            "bootstrap_resamples": metrics.RESAMPLES,
            "seed": seed,
        },
        "environment": found.describe_environment(model, time.perf_counter() - started),
    }
    (folder / "results.json").write_text(json.dumps(found.plain(results), indent=2, allow_nan=False) + "\n")
    with (folder / "predictions.jsonl").open("w") as lines:
        for key in systems:
            lines.writelines(json.dumps(answer.to_dict()) + "\n" for answer in answers[key])
    write_report(folder / "report.html", results, dataset, answers)
    print_table(results)
    return results


def _spread(dataset: Dataset, n: int) -> list[dict[str, Any]]:
    """`n` rows, or all if there are fewer, spread evenly over the dataset."""
    n = min(n, len(dataset))
    return [dataset[i * len(dataset) // n] for i in range(n)]


@dataclass
class Arguments:
    """The command line of this script, as `key=value`.

    Attributes:
        checkpoint: folder that `training/train.py` wrote.
        split: of the questions.
        samples: how many of them; null: the whole split.
        output: folder for the report; null: `evaluation_<split>` in the checkpoint's folder.
        batch_size: questions a batch.
    """

    checkpoint: str = MISSING
    split: str = "test"
    samples: int | None = None
    output: str | None = None
    batch_size: int = 96


def evaluate_checkpoint(
    checkpoint: str | Path,
    *,
    split: str = "test",
    samples: int | None = None,
    output: str | Path | None = None,
    batch_size: int = 96,
) -> dict[str, Any]:
    """Compare a trained student with its dense base and the pruned base, as its own run configured them.

    Args: see `Arguments`.

    Raises:
        FileNotFoundError: the folder holds no student, or not the configuration of its run.
        ValueError: the split does not exist, or the run's data has no questions to evaluate on.
    """
    from latefusion.models.build import load_student
    from latefusion.models.schedule import VisionSchedule
    from latefusion.training.config import Config
    from latefusion.training.run import questions_of, visipruner

    folder = Path(checkpoint)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {checkpoint}; name one that training/train.py wrote: checkpoint=FOLDER."
        )
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"{checkpoint} has no {CONFIG}, which says what the student was trained on and what its "
            "baseline is; name a folder that training/train.py wrote."
        )
    config = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(folder / CONFIG))
    config.eval.split, config.eval.samples = split, samples
    typed: Config = OmegaConf.to_object(config)  # type: ignore[assignment]
    questions = questions_of(typed)
    if questions is None:
        raise ValueError(
            f"{checkpoint} was trained on data without questions to evaluate on; set data.eval_path."
        )
    student = load_student(folder)
    if torch.cuda.is_available():
        student.model.cuda()
    return evaluate_run(
        model=student.model,
        processor=student.processor,
        attachment=student.attachment,
        systems={
            "dense": System(name="Dense base", policy=VisionSchedule()),
            "pruned": System(name="VisiPruner", policy=visipruner(typed.model.visipruner)),
            "student": System(name=typed.name, policy=student.schedule, adapters=True),
        },
        dataset=questions,
        output_dir=output or folder / f"evaluation_{split}",
        title=typed.name,
        split=split,
        checkpoint=checkpoint,
        batch_size=batch_size,
        seed=typed.train.seed,
        note=f"{typed.train.steps} steps of {typed.train.batch_size} x {typed.train.accumulation} samples a device, "
        f"seed {typed.train.seed}",
    )


def main(arguments: list[str]) -> None:
    """Run from the command line; what cannot work ends in one sentence."""
    try:
        if any("=" not in argument for argument in arguments) or not arguments:
            sys.exit(f"{__doc__}\n{Arguments.__doc__}")
        chosen = OmegaConf.merge(OmegaConf.structured(Arguments), OmegaConf.from_cli(arguments))
        evaluate_checkpoint(**OmegaConf.to_container(chosen, throw_on_missing=True))  # type: ignore[arg-type]
    except OmegaConfBaseException as error:
        keys = ", ".join(Arguments.__dataclass_fields__)
        sys.exit(f"error: {str(error).splitlines()[0]}; the keys are {keys}.")
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
