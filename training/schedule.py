"""Which schedule a run trains under: the configured one, a profile's, or that of a profile made now."""

from __future__ import annotations

import os
from pathlib import Path

from omegaconf import DictConfig

from latefusion.models.schedule import VisionSchedule
from latefusion.training.config import Config, ScheduleConfig

PROFILE = "profile"  # in the run's folder


def schedule_of(config: ScheduleConfig) -> VisionSchedule:
    """Raises ValueError if its values contradict each other."""
    if config.cross is not None and not isinstance(config.cross, list):
        raise ValueError(f"schedule.cross={config.cross} must be a list of layers: schedule.cross=[8,12].")
    if config.cross is not None and not config.cross:
        raise ValueError(
            "schedule.cross=[] names no layer; say which layers of this model read vision tokens: model.cross=[8,12]."
        )
    return VisionSchedule.from_dict(
        {
            "enter": config.enter,
            "exit": config.exit,
            "keep": config.keep,
            "cross": config.cross,
            "positions": config.positions.value,
        }
    )


def settle_schedule(config: Config, cfg: DictConfig) -> None:
    """Put the profile's schedule, if `schedule.profile` or `schedule=auto` asks for one, into both configurations.

    Raises:
        ValueError, FileNotFoundError: there is no such profile, or it cannot be made here.
    """
    asked = config.schedule
    if asked.auto and asked.profile is None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "schedule=auto profiles in one process; run `python eval/profile.py` first and name its folder: "
                "schedule.profile=FOLDER."
            )
        asked.profile = str(Path(config.output_dir) / PROFILE)
        profile(config)
    if asked.profile is None:
        return
    from latefusion.eval.profiling.files import read_schedule

    found = read_schedule(asked.profile)
    asked.enter, asked.exit, asked.keep = found.enter, found.exit, dict(found.keep)
    for name in ("profile", "enter", "exit", "keep"):
        cfg.schedule[name] = getattr(asked, name)


def profile(config: Config) -> None:
    """Profile the run's model on its data; goes on where an earlier one stopped."""
    from latefusion.eval.profiling.command import Arguments, run

    asked = config.schedule
    run(
        Arguments(
            samples=asked.samples,
            bound=asked.bound,
            budget=asked.budget,
            images=config.entry.images,
            output=asked.profile,
            dtype=config.train.dtype,
            seed=config.train.seed,
        ),
        config,
    )
