"""What a run can be refused for without torch: its values, and what must be on the disk or must not. Half a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from omegaconf import DictConfig

from latefusion.data.local_files import check_local_files
from latefusion.models.locate import ADAPTER_CONFIG, check_base, check_four_bits, known_layers
from latefusion.models.policies.configured import check_depths, check_known, schedule_of
from latefusion.recipes.check import check_config
from latefusion.recipes.launcher import rank, world_size
from latefusion.recipes.schema import Config, Tune
from latefusion.training.checkpoints import checkpoints, find
from latefusion.training.resumed import check_unchanged
from latefusion.training.run_folder import check_launch, check_unclaimed, check_writable

Found = TypeVar("Found")


def checked(cfg: DictConfig) -> tuple[Config, Path | None]:
    """The composed configuration of a run that may begin, and the checkpoint that it goes on from, if any.

    Raises:
        SystemExit: it cannot work; in one sentence.
    """

    def checks(config: Config) -> Path | None:
        resumed = check(config)
        notes = [] if resumed is None else check_unchanged(cfg, config.output_dir)
        if notes and rank() == 0:
            print("\n".join(notes), flush=True)
        return resumed

    return _in_a_sentence(cfg, checks)


def checked_teaching(cfg: DictConfig) -> Config:
    """The composed configuration of a pass of `training/teach.py` that may begin; raises as `checked` does."""
    return _in_a_sentence(cfg, check_teaching)[0]


def _in_a_sentence(cfg: DictConfig, checks: Callable[[Config], Found]) -> tuple[Config, Found]:
    try:
        config = check_config(cfg)
        return config, checks(config)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None


def check(config: Config) -> Path | None:
    """Raise before anything is loaded if this run cannot work.

    Returns:
        The checkpoint to go on from, if any.

    Raises:
        ValueError, FileNotFoundError: in one sentence.
    """
    check_launch(config.engine.processes)
    check_inputs(config)
    if not config.schedule.auto and config.schedule.profile is None:
        check_known(config)
    if config.init is not None:
        check_init(config, config.init)
    return check_output(config)


def check_teaching(config: Config) -> None:
    """The same of a pass that writes `kl.cache`."""
    if config.kl.cache is None:
        raise ValueError("kl.cache is not set; name the folder to write with kl.cache=FOLDER.")
    if config.data.streaming:
        raise ValueError("a stream has no end at which all of it is taught; use data.streaming=false.")
    check_launch(config.engine.processes)
    check_inputs(config)
    check_writable(config.kl.cache, key="kl.cache")


def check_inputs(config: Config) -> None:
    """Models and data are there; schedule and thresholds can be, and fit as many layers as the models say they have.

    A model that leaves its depth to its class, or lies on the hub, is asked again when transformers is there.
    """
    path, other = config.model.path, config.kl.model
    if config.model.load_in_4bit:
        check_four_bits(path)
    check_base(path)
    if other is not None:
        check_base(other, fix="with kl.model=PATH")
    check_local_files(config.data)
    asked = config.schedule
    if asked.profile is not None and not Path(asked.profile).exists() and not asked.auto:
        raise FileNotFoundError(
            f"no profile at {asked.profile}; name the folder that eval/profile_model.py wrote: schedule.profile=FOLDER."
        )
    schedule_of(asked)
    teachers = None if other is None else known_layers(other, config.kl.revision)
    check_depths(config, known_layers(path, config.model.revision), teachers)


def check_init(config: Config, folder: str) -> None:
    """The student to start from is there, of this run's base, and this run trains the projector if that one did."""
    file = Path(folder) / ADAPTER_CONFIG
    if not file.is_file():
        raise FileNotFoundError(
            f"no student at {folder}: it has no {ADAPTER_CONFIG}; name a folder with init=FOLDER."
        )
    earlier = json.loads(file.read_text())
    if (base := earlier["base_model_name_or_path"]) != config.model.path:
        raise ValueError(
            f"the student at {folder} is of the base {base}, but model.path={config.model.path}; name that one, or, if "
            f"it only moved, say so as base_model_name_or_path in {file}."
        )
    projector = config.model.projector
    trains = config.lora.train_projector or config.tune is not Tune.lora
    if projector is not None and projector in (earlier["modules_to_save"] or ()) and not trains:
        raise ValueError(
            f"the student at {folder} trained {projector}, which this one does not; set lora.train_projector=true."
        )


def check_output(config: Config) -> Path | None:
    """The output folder is this run's to write; the checkpoint in it to go on from, if any."""
    output, train = Path(config.output_dir), config.train
    check_writable(output)
    check_unclaimed(output)
    if config.resume is not False:
        samples = train.batch_size * train.accumulation * world_size()
        return find(output, config.resume, samples=samples)
    written = any(
        (output / name).exists() for name in (ADAPTER_CONFIG, "config.json")
    )  # adapters, or all weights
    if not config.overwrite and (written or checkpoints(output)):
        raise ValueError(
            f"{output} holds a run already; continue it with resume=true, replace it with overwrite=true, "
            "or choose another output_dir=FOLDER."
        )
    return None
