"""The schedule that a configuration states; `training/settle.py` puts a profile's into it."""

from __future__ import annotations

from latefusion.models.schedule import VisionSchedule
from latefusion.training.config import Config, ScheduleConfig


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
            "enter": config.enter or 0,
            "exit": config.exit,
            "keep": config.keep,
            "cross": config.cross,
            "positions": config.positions.value,
        }
    )


def check_known(config: Config) -> None:
    """Raise ValueError if nobody has said where vision tokens enter: a model that the recipes know nothing of."""
    asked = config.schedule
    if asked.enter is None and asked.cross is None:
        raise ValueError(
            f"nothing is known of where model.path={config.model.path} fuses: say schedule.enter=N and "
            "schedule.exit=N, or schedule=auto to have it profiled first (recipe=dense: every layer sees vision)."
        )
