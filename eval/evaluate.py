"""Compare a checkpoint with its dense base and the pruned baseline on the same questions.

    python eval/evaluate.py checkpoint=outputs/late_fusion split=test samples=300 output=outputs/evaluation
    python eval/evaluate.py checkpoint=outputs/late_fusion policies=[fastv,pyramiddrop] tasks=[gqa,pope]
    python eval/evaluate.py model=embedded policies=[visipruner,fastv] data=my.jsonl
    torchrun --standalone --nproc_per_node 2 eval/evaluate.py checkpoint=outputs/late_fusion tasks=[vqav2]

Started again after an interruption, it goes on where it stopped. A training run calls `evaluate_checkpoint` at its end.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads starve what else runs
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a profile begins with memory already held

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from latefusion.data.local_files import check_questions_file
from latefusion.models.folder_contents import EVALUATION, MODEL, REPORT, RUN, RUN_CONFIG, check_free
from latefusion.models.locate import SCHEDULE_KEY, check_base, check_student
from latefusion.models.policies import recipe_of
from latefusion.recipes.compose import check_words, parse_words, stored_values
from latefusion.recipes.launcher import GOES_ON, local_world_size, run_to_exit, world_size
from latefusion.recipes.named_models import named_model
from latefusion.recipes.printable import error_line
from latefusion.recipes.schema import Config, DataConfig
from latefusion.training.run_folder import check_unfinished, check_writable, claimed

if TYPE_CHECKING:
    from latefusion.eval.comparison.settings import Settings
    from latefusion.eval.ledger import Processes
    from latefusion.eval.tasks.base import Task


@dataclass
class Arguments:
    """The command line of this script, as `key=value`.

    Attributes:
        checkpoint: folder that `training/train.py` wrote; or model: a base alone (a name in recipes/model, a
            folder or a hub id).
        checkpoints: further folders to compare; those of one base share its weights in memory.
        policies: further rows, the base under policies of recipes/policy/: `[fastv, {vtw: {layer: 16}}]`; `visipruner`
            begins from the thresholds of the model's recipe, or of the checkpoint's run.
        tasks: benchmarks (see docs/evaluation.md); none: the questions of the checkpoint's own run, else `scenes`
            (`icons` for model=smollm_icons).
        data: a file of {"image", "question", "answers"}, or of conversations, to ask instead (docs/evaluation.md).
        data_dir: folder with a folder of files for each benchmark.
        sources: folder or hub id of single benchmarks: `sources.pope=lmms-lab/POPE`.
        split: of the questions; none: each benchmark's usual one.
        samples: how many questions of each task; none: all.
        max_frames: the most frames shown of a video of `data`; none: as the checkpoint was trained, else 16.
        output: folder for the report; none: `evaluation_<what>` in the checkpoint's folder.
        overwrite: replace the report in it.
        batch_size: questions a batch.
        controls: add rows without the image and with random tokens at each method's budget.
        batches, lengths: batch sizes and text lengths (tokens) that time is measured against.
        reference: an earlier report.json, whose dense row has to be reproduced before anything else is asked.
    """

    checkpoint: str | None = None
    model: str | None = None
    checkpoints: list[str] = field(default_factory=list)
    policies: list[Any] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    data: str | None = None
    data_dir: str = "benchmarks"
    sources: dict[str, str] = field(default_factory=dict)
    split: str | None = None
    samples: int | None = None
    max_frames: int | None = None
    output: str | None = None
    overwrite: bool = False
    batch_size: int = 96
    controls: bool = True
    batches: list[int] = field(default_factory=lambda: [1, 8])
    lengths: list[int] = field(default_factory=lambda: [16, 64, 256])
    reference: str | None = None


def evaluate(arguments: Arguments, processes: Processes | None = None) -> dict[str, Any] | None:
    """Answer the questions with every system, measure costs and write the report.

    Args:
        processes: those that share the questions; None: this one alone.

    Returns:
        What `report.json` holds; None for processes that are not the main one.

    Raises:
        FileNotFoundError: a model, checkpoint, data set or file is not there.
        ValueError: arguments contradict each other, or data cannot be used.
    """
    from latefusion.eval.comparison.run import run_comparison  # lazy: keeps argument errors fast
    from latefusion.eval.ledger import Processes

    config, stored = check(arguments)
    return run_comparison(settings_of(arguments, config, stored, processes or Processes()))


def evaluate_checkpoint(
    checkpoint: str | Path,
    *,
    split: str = "test",
    samples: int | None = None,
    output: str | Path | None = None,
    batch_size: int = 96,
) -> dict[str, Any] | None:
    """Compare a trained student with its dense base and the pruned base, as its own run configured them.

    Args: see `Arguments`.
    """
    return evaluate(
        Arguments(
            checkpoint=str(checkpoint),
            split=split,
            samples=samples,
            output=None if output is None else str(output),
            batch_size=batch_size,
            controls=False,
            batches=[],
            lengths=[],
        )
    )


def check(arguments: Arguments) -> tuple[Config | None, Mapping[str, Any] | None]:
    """Check the arguments, and read what they name: the checkpoint's configuration and the report to reproduce.

    Raises:
        FileNotFoundError: a checkpoint, policy, file or folder is not there.
        ValueError: arguments contradict each other.
    """
    check_arguments(arguments)
    base = None if arguments.model is None else named_model(arguments.model)[0]
    for entry in arguments.policies:
        recipe_of(entry if isinstance(entry, str) else next(iter(entry)))
    if base is not None:
        check_base(base)
    if arguments.data is not None:
        check_questions_file(arguments.data)
    check_writable(output_of(arguments), key="output")
    check_free(output_of(arguments), fix="choose another output=FOLDER", own=[MODEL, RUN, EVALUATION])
    config = None if arguments.checkpoint is None else config_of(arguments.checkpoint)
    for folder in filter(None, [arguments.checkpoint, *arguments.checkpoints]):
        check_student(folder)
    return config, None if arguments.reference is None else read_report(arguments.reference)


def check_arguments(arguments: Arguments) -> None:
    """Raise ValueError if arguments contradict each other."""
    if (arguments.checkpoint is None) == (arguments.model is None):
        raise ValueError("name either a trained checkpoint=FOLDER or a base model=PATH.")
    others = [entry for entry in arguments.policies if entry != "dense"]
    if arguments.model is not None and not (others or arguments.checkpoints):
        raise ValueError(
            f"model={arguments.model} alone, which is the dense row, has nothing to be compared with; add "
            "policies=[visipruner]."
        )
    if arguments.data is not None and arguments.tasks:
        raise ValueError("data=FILE and tasks=[...] exclude each other; choose one.")
    if arguments.data is not None and arguments.split is not None:
        raise ValueError(
            f"split={arguments.split} would not be read: data=FILE is asked whole; leave it out."
        )
    if arguments.data is None and arguments.max_frames is not None:
        raise ValueError(
            f"max_frames={arguments.max_frames} would not be read: it is for the videos of data=FILE."
        )
    for task in arguments.sources:
        if task not in arguments.tasks:
            raise ValueError(f"sources.{task} would not be read: add tasks=[{task}], or leave it out.")
    for entry in arguments.policies:
        changed = isinstance(entry, dict) and len(entry) == 1
        if not isinstance(entry, str) and not (
            changed and isinstance(next(iter(entry.values())), dict | None)
        ):
            raise ValueError(
                f"policies={entry} is neither a name nor {{NAME: {{ARGUMENT: VALUE}}}}; say policies=[fastv] or "
                "'policies=[{vtw: {layer: 8}}]'."
            )
    for name in ("samples", "batch_size", "max_frames"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ValueError(f"{name}={getattr(arguments, name)} must be at least 1.")
    for name in ("batches", "lengths"):
        if any(n < 1 for n in getattr(arguments, name)):
            raise ValueError(f"{name}={getattr(arguments, name)} must be at least 1 each.")


def config_of(checkpoint: str | Path) -> Config:
    """Read the configuration of the run that wrote a checkpoint.

    Raises:
        FileNotFoundError: the folder or its configuration is not there.
        ValueError: the file is not a training configuration.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {checkpoint}; name one that training/train.py wrote: checkpoint=FOLDER."
        )
    if not (folder / RUN_CONFIG).is_file():
        exported = (folder / f"{SCHEDULE_KEY}.json").is_file()
        raise FileNotFoundError(
            f"{checkpoint} has no {RUN_CONFIG}, which says what the student was trained on and what its baseline is; "
            + (
                f"compare an exported student by model=BASE checkpoints=[{checkpoint}]."
                if exported
                else "name a folder that training/train.py wrote."
            )
        )
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), stored_values(folder / RUN_CONFIG))
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except (OmegaConfBaseException, ValueError) as error:
        raise ValueError(
            f"{folder / RUN_CONFIG} is not a training configuration ({str(error).splitlines()[0]}); name a folder that "
            "training/train.py wrote."
        ) from None


def read_report(path: str | Path) -> Mapping[str, Any]:
    """Read a `report.json`, or the one in a folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a report.
    """
    file = Path(path) / REPORT if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no report at {path}; name a report.json that eval/evaluate.py wrote.")
    try:
        report = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(
            f"{file} is not JSON ({error}); name a report.json that eval/evaluate.py wrote."
        ) from None
    if not _is_report(report):
        raise ValueError(f"{file} is not a report; name a report.json that eval/evaluate.py wrote.")
    return report


def _is_report(report: Any) -> bool:
    """Whether a JSON value has what every report has."""
    try:
        whole = "reference" in report["roles"] and "fingerprint" in report["data"] and "model" in report
        return whole and all({"name", "accuracy"} <= set(system) for system in report["systems"].values())
    except (KeyError, TypeError, AttributeError):
        return False


def settings_of(
    arguments: Arguments,
    config: Config | None,
    stored: Mapping[str, Any] | None,
    processes: Processes,
) -> Settings:
    """Load the models and the questions.

    Args:
        config: of the checkpoint; None: a base alone is evaluated.
        stored: the report to reproduce.
    """
    import torch  # lazy: keeps argument errors fast
    from peft import PeftModel

    from latefusion.eval.comparison.settings import Settings
    from latefusion.eval.comparison.systems import Students, System, further, policies_of
    from latefusion.models.attach import attach
    from latefusion.models.base_model import compute_dtype, load_base, twin
    from latefusion.models.fingerprint import model_fingerprint
    from latefusion.models.policies.configured import visipruner
    from latefusion.models.schedule import VisionSchedule

    base_path, recipe = "", {}
    if arguments.model is not None:
        base_path, recipe = named_model(arguments.model)
    if config is None:
        policies = policies_of(arguments.policies, recipe.get("visipruner", {}))
    else:  # whose baseline is `visipruner` already
        others = [entry for entry in arguments.policies if entry != "visipruner"]
        policies = policies_of(others, vars(config.model.visipruner))
    tasks = tasks_of(arguments, config)
    student_system: System | None
    systems: dict[str, System] = {"dense": System(name="Dense base", policy=VisionSchedule())}
    if config is not None:
        assert arguments.checkpoint is not None
        students = Students()
        student = students.load(arguments.checkpoint)
        model, processor, attachment = student.model, student.processor, student.attachment
        source = model_fingerprint(arguments.checkpoint)
        if isinstance(model, PeftModel):
            base_path = str(model.peft_config["default"].base_model_name_or_path)
            student_system = System(name=config.name, policy=student.schedule, adapters=True, source=source)
        else:  # all weights were trained, or adapters merged into them: the base is another model
            base_path = config.model.path
            model = students.base(base_path)
            attachment = attach(model, VisionSchedule())
            student_system = System(name=config.name, policy=student.schedule, student=student, source=source)
        systems["pruned"] = System(name="VisiPruner", policy=visipruner(config.model.visipruner))
        systems |= policies
        title = config.name
    else:
        assert arguments.model is not None
        student_system, title = None, Path(arguments.model).name
        base, processor = load_base(base_path, dtype=compute_dtype())
        students, model = Students({base_path: base}), twin(base)
        attachment = attach(model, VisionSchedule())
        systems |= {key: system for key, system in policies.items() if key != "dense"}
    if torch.cuda.is_available():
        model.cuda()
    name = "" if student_system is None else student_system.name
    systems |= further(students, arguments.checkpoints, processor, taken=name)
    if student_system is not None:
        systems["student"] = student_system
    compared = [key for key in systems if key != "dense"] or ["dense"]
    return Settings(
        model=model,
        processor=processor,
        attachment=attachment,
        systems=systems,
        tasks=tasks,
        output=output_of(arguments),
        title=title,
        checkpoint=arguments.checkpoint,
        baseline="pruned" if config is not None else compared[0],
        candidate="student" if config is not None else compared[-1],
        batch_size=arguments.batch_size,
        batches=arguments.batches,
        lengths=arguments.lengths,
        controls=arguments.controls,
        stored=stored,
        processes=processes,
        seed=None if config is None else config.train.seed,
        note="" if config is None else note_on(config, str(arguments.checkpoint)),
        base=model_fingerprint(base_path),
    )


def output_of(arguments: Arguments) -> Path:
    """The folder for the report."""
    if arguments.output is not None:
        return Path(arguments.output)
    questions = Path(arguments.data).stem if arguments.data else "_".join(arguments.tasks)
    return Path(arguments.checkpoint or "outputs") / f"evaluation_{questions or arguments.split or 'test'}"


def note_on(config: Config, checkpoint: str) -> str:
    """How the checkpoint was trained, and what its run decided about its teacher, for the report."""
    from latefusion.training.describe import teacher_in_words  # lazy: keeps argument errors fast
    from latefusion.training.trust_record import read

    train, decision = config.train, read(checkpoint)
    how = f"{train.steps} steps of {train.batch_size} x {train.accumulation} samples a device, seed {train.seed}"
    who = teacher_in_words(config) if decision is None or decision.trust == "all" else "no teacher"
    return f"{how}, {who}{f'. {decision}' if decision else ''}"


def tasks_of(arguments: Arguments, config: Config | None) -> list[Task]:
    """The questions: a user's, benchmarks, or those of the checkpoint's own run."""
    from latefusion.data.load import evaluation_questions  # lazy: keeps argument errors fast
    from latefusion.data.question_sets import usual_set
    from latefusion.eval.tasks import load_task
    from latefusion.eval.tasks.base import Task
    from latefusion.eval.tasks.exact import questions_of_file

    if arguments.data is not None:
        trained = (config.data if config is not None else DataConfig).max_frames
        tasks = [questions_of_file(arguments.data, max_frames=arguments.max_frames or trained)]
    elif arguments.tasks or config is None:
        home = os.path.join(".", arguments.data_dir)  # what begins with a full stop is no hub id
        names = arguments.tasks or [usual_set(arguments.model or "")]
        places = {name: arguments.sources.get(name, f"{home}/{name}") for name in names}
        tasks = [load_task(name, where, arguments.split) for name, where in places.items()]
    else:
        config.eval.split, config.eval.samples = arguments.split or "test", arguments.samples
        rows = evaluation_questions(config)
        if rows is None:
            raise ValueError(
                f"{arguments.checkpoint} was trained on data without questions to evaluate on; name them with "
                "tasks=[...] or data=FILE."
            )
        name = config.data.source.value
        return [Task(name=name, rows=rows, split=config.eval.split, source=config.data.eval_path or name)]
    return [sampled(task, arguments.samples) for task in tasks]


def sampled(task: Task, samples: int | None) -> Task:
    """A task with `samples` of its questions, drawn; None: all."""
    if samples is None or samples >= len(task.rows):
        return task
    return replace(task, rows=task.rows.shuffle(seed=0).select(range(samples)))


def processes_here() -> Processes:
    """The processes that `torchrun` or `accelerate launch` started, or this one alone.

    Raises:
        ValueError: a machine has more of them than GPUs, and GPUs.
    """
    from latefusion.eval.ledger import Processes

    if world_size() == 1:
        return Processes()
    import torch  # lazy: keeps argument errors fast
    from accelerate import PartialState

    here, gpus = local_world_size(), torch.cuda.device_count()
    if 0 < gpus < here:
        raise ValueError(f"{here} processes were started for {gpus} GPU(s); start at most one for each.")

    # The fast wait for the slow
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=12))
    return Processes(rank=state.process_index, count=state.num_processes, wait=state.wait_for_everyone)


def main(words: Sequence[str]) -> None:
    """Run from the command line; what cannot work ends in one sentence."""
    words = check_words(words, Arguments, str(__doc__))
    try:
        arguments = parse_words(words, Arguments)
        check_unfinished(output_of(arguments), REPORT, overwrite=arguments.overwrite)
        check(arguments)  # before the processes are joined
        with claimed(output_of(arguments), key="output"):
            processes = processes_here()
            evaluate(arguments, processes)
            processes.wait()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(error_line(error))


if __name__ == "__main__":
    run_to_exit(lambda: main(sys.argv[1:]), interrupted=GOES_ON)
