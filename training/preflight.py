"""What a run can be refused for without torch: its values, and what must be on the disk or must not. Half a second."""

from __future__ import annotations

import os
from pathlib import Path

from omegaconf import DictConfig

from latefusion.data.places import check_places
from latefusion.models.where import ADAPTER_CONFIG, check_base, check_four_bits
from latefusion.training.checkpoints import checkpoints, find
from latefusion.training.checks import read
from latefusion.training.claim import check_launch, check_unclaimed
from latefusion.training.config import Config
from latefusion.training.schedule import check_known, schedule_of


def checked(cfg: DictConfig) -> tuple[Config, Path | None]:
    """The composed configuration of a run that may begin, and the checkpoint that it goes on from, if any.

    Raises:
        SystemExit: it cannot work; in one sentence.
    """
    try:
        config = read(cfg)
        return config, check(config)
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
    check_schedule(config)
    if config.model.load_in_4bit:
        check_four_bits(config.model.path)
    check_base(config.model.path)
    if config.kl.model is not None:
        check_base(config.kl.model)
    check_places(config.data)
    if config.init is not None and not (Path(config.init) / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(
            f"no student at {config.init}: it has no {ADAPTER_CONFIG}; name a folder with init=FOLDER."
        )
    return check_output(config)


def check_schedule(config: Config) -> None:
    """The schedule that was asked for can be; whether it fits the model's depth is seen when that is read."""
    asked = config.schedule
    if asked.profile is not None and not Path(asked.profile).exists() and not asked.auto:
        raise FileNotFoundError(
            f"no profile at {asked.profile}; name the folder that eval/profile.py wrote: schedule.profile=FOLDER."
        )
    if not asked.auto and asked.profile is None:
        check_known(config)
    schedule_of(asked)


def check_output(config: Config) -> Path | None:
    """The output folder is this run's to write; the checkpoint in it to go on from, if any."""
    output, train = Path(config.output_dir), config.train
    check_unclaimed(output)
    if config.resume is not False:
        samples = train.batch_size * train.accumulation * int(os.environ.get("WORLD_SIZE", "1"))
        return find(output, config.resume, samples=samples)
    if not config.overwrite and ((output / ADAPTER_CONFIG).exists() or checkpoints(output)):
        raise ValueError(
            f"{output} holds a run already; continue it with resume=true, replace it with overwrite=true, "
            "or choose another output_dir=FOLDER."
        )
    return None
