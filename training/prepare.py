"""A profile's schedule, or that of a profile made now, put in the place of the configured one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from latefusion.models.profile_folder import SCHEDULE, read_schedule
from latefusion.models.schedule import VisionSchedule
from latefusion.recipes.schema import Config
from latefusion.training.first import first_says

PROFILE = "profile"  # in the run's folder


def settle_schedule(config: Config, cfg: DictConfig, resumed: Path | None = None) -> None:
    """Put the profile's schedule, if `schedule.profile` or `schedule=auto` asks for one, into both configurations.

    Of several processes the first profiles, and all read what it wrote.

    Args:
        resumed: the checkpoint that the run goes on from; its profile is read, not made again.

    Raises:
        ValueError, FileNotFoundError: there is no such profile, or it cannot be made here.
    """
    asked = config.schedule
    wanted = None
    if asked.auto and asked.profile is None:
        folder = Path(config.output_dir) / PROFILE
        asked.profile = str(folder)

        def settled() -> dict[str, Any]:
            if resumed is None or not (folder / SCHEDULE).is_file():
                profile(config)
            return read_schedule(folder).to_dict()

        wanted = first_says("schedule", settled)
    if asked.profile is None:
        return
    found = schedule_at(asked.profile, wanted)
    asked.enter, asked.exit, asked.keep = found.enter, found.exit, dict(found.keep)
    for name in ("profile", "enter", "exit", "keep"):
        cfg.schedule[name] = getattr(asked, name)


def schedule_at(folder: str, wanted: dict[str, Any] | None) -> VisionSchedule:
    """The schedule of a profile; `wanted`: what the first process read there, if it made it."""
    try:
        found = read_schedule(folder)
    except FileNotFoundError:
        if wanted is None:
            raise
        found = None
    if wanted is not None and (found is None or found.to_dict() != wanted):
        raise ValueError(
            f"{folder} does not hold the schedule that the first process wrote there; choose an output_dir=FOLDER that "
            "all machines share."
        )
    assert found is not None
    return found


def profile(config: Config) -> None:
    """Profile the run's model on its data; goes on where an earlier one stopped."""
    from latefusion.eval.profile_model import Arguments, run

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
