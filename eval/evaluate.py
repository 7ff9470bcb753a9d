"""Compare a checkpoint with its dense base and the pruned baseline on the same questions.

    python eval/evaluate.py checkpoint=outputs/late_fusion split=test samples=300 output=outputs/evaluation
    python eval/evaluate.py checkpoint=outputs/late_fusion policies=[fastv,pyramiddrop] tasks=[gqa,pope]
    python eval/evaluate.py model=embedded policies=[visipruner,fastv] data=my.jsonl
    accelerate launch eval/evaluate.py checkpoint=outputs/late_fusion tasks=[vqav2]

Started again after an interruption, it goes on where it stopped. `training/train.py` calls `evaluate_checkpoint` at its
end.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads starve what else runs
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a profile begins with memory already held

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from latefusion.models.locate import check_base
from latefusion.models.policies import recipe_of
from latefusion.recipes.compose import check_words, parse_words
from latefusion.recipes.launcher import world_size
from latefusion.recipes.schema import Config

if TYPE_CHECKING:
    from latefusion.eval.ledger import Processes

CONFIG = "config.yaml"


@dataclass
class Arguments:
    """The command line of this script, as `key=value`.

    Attributes:
        checkpoint: folder that `training/train.py` wrote; or model: a base alone (`embedded`, a hub id, a folder).
        checkpoints: further folders to compare; those of one base share its weights in memory.
        policies: further rows, the base under policies of recipes/policy/: `[fastv, {vtw: {layer: 16}}]`.
        tasks: benchmarks (see docs/evaluation.md); none: the questions the checkpoint was trained for, else `scenes`.
        data: a JSONL file of {"image", "question", "answers"} to ask instead.
        data_dir: folder with a folder of files for each benchmark.
        sources: folder or hub id of single benchmarks: `sources.pope=lmms-lab/POPE`.
        split: of the questions; none: each benchmark's usual one.
        samples: how many questions of each task; none: all.
        output: folder for the report; none: `evaluation_<what>` in the checkpoint's folder.
        batch_size: questions a batch.
        controls: add rows without the image and with random tokens at each method's budget.
        batches, lengths: batch sizes and text lengths (tokens) that time is measured against.
        reference: an earlier report.json, whose dense row has to be reproduced before anything else is asked.
        seed: of the bootstrap.
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
    output: str | None = None
    batch_size: int = 96
    controls: bool = True
    batches: list[int] = field(default_factory=lambda: [1, 4, 16])
    lengths: list[int] = field(default_factory=lambda: [16, 64, 256])
    reference: str | None = None
    seed: int = 0


def evaluate_checkpoint(
    checkpoint: str | Path,
    *,
    split: str = "test",
    samples: int | None = None,
    output: str | Path | None = None,
    batch_size: int = 96,
) -> dict[str, Any] | None:
    """A trained student against its dense base and the pruned base, as its own run configured them; no more rows.

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


def evaluate(chosen: Arguments, processes: Processes | None = None) -> dict[str, Any] | None:
    """What the command line asks for.

    Raises:
        FileNotFoundError: a model, checkpoint, data set or file is not there.
        ValueError: arguments contradict each other, or data cannot be used.
    """
    config, stored = checked(chosen)

    from latefusion.eval.comparison.settings import (
        compared,  # torch and all that, which no refusal has to wait for
    )

    return compared(chosen, config, stored, processes)


def checked(chosen: Arguments) -> tuple[Config | None, Mapping[str, Any] | None]:
    """The configuration that the checkpoint was trained with, and the report to reproduce; of those that are named.

    Raises:
        FileNotFoundError: a checkpoint, policy, file or folder is not there.
        ValueError: arguments contradict each other.
    """
    check_arguments(chosen)
    for entry in chosen.policies:
        recipe_of(entry if isinstance(entry, str) else next(iter(entry)))
    if chosen.model is not None:
        check_base(chosen.model)
    config = None if chosen.checkpoint is None else config_of(chosen.checkpoint)
    return config, None if chosen.reference is None else read_report(chosen.reference)


def check_arguments(chosen: Arguments) -> None:
    if (chosen.checkpoint is None) == (chosen.model is None):
        raise ValueError("name either a trained checkpoint=FOLDER or a base model=PATH.")
    if chosen.model is not None and not (chosen.policies or chosen.checkpoints):
        raise ValueError(
            f"model={chosen.model} alone has nothing to be compared with; add policies=[visipruner]."
        )
    if chosen.data is not None and chosen.tasks:
        raise ValueError("data=FILE and tasks=[...] exclude each other; choose one.")
    for name in ("samples", "batch_size"):
        if getattr(chosen, name) is not None and getattr(chosen, name) < 1:
            raise ValueError(f"{name}={getattr(chosen, name)} must be at least 1.")
    for name in ("batches", "lengths"):
        if any(n < 1 for n in getattr(chosen, name)):
            raise ValueError(f"{name}={getattr(chosen, name)} must be at least 1 each.")


def config_of(checkpoint: str | Path) -> Config:
    """The configuration of the run that wrote a checkpoint.

    Raises:
        FileNotFoundError: the folder or its configuration is not there.
        ValueError: the configuration is none of a run.
    """
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
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(folder / CONFIG))
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ValueError(
            f"{folder / CONFIG} is no configuration of a run ({str(error).splitlines()[0]}); name a folder that "
            "training/train.py wrote."
        ) from None


def read_report(path: str | Path) -> Mapping[str, Any]:
    """A `report.json`, or the one in a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    file = Path(path) / "report.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no report at {path}; name a report.json that eval/evaluate.py wrote.")
    return json.loads(file.read_text())


def processes_here() -> Processes:
    """The processes that `accelerate launch` started, or this one alone."""
    if world_size() == 1:
        from latefusion.eval.ledger import Processes

        return Processes()
    import torch
    from accelerate import PartialState

    from latefusion.eval.ledger import Processes

    # The fast wait for the slow
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=12))
    return Processes(rank=state.process_index, count=state.num_processes, wait=state.wait_for_everyone)


def main(arguments: Sequence[str]) -> None:
    """Run from the command line; what cannot work ends in one sentence."""
    words = check_words(arguments or ["?"], Arguments, str(__doc__))  # nothing said asks what could be
    try:
        chosen = parse_words(words, Arguments)
        checked(chosen)  # before the processes are joined
        processes = processes_here()
        evaluate(chosen, processes)
        processes.wait()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
