"""The policies of the student and the teacher, as a training configuration states them; no torch needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from latefusion.models.policies.visipruner.settings import VisiPruner
from latefusion.models.profile_schedule import read_cross, read_schedule
from latefusion.models.schedule import VisionSchedule, check_depth
from latefusion.recipes.schema import (
    QUESTION_SETS,
    Config,
    RunScheduleConfig,
    ScheduleConfig,
    Teacher,
    Tune,
    VisiPrunerConfig,
)

if TYPE_CHECKING:
    from latefusion.models.policies.base import Policy


def schedule_of(config: ScheduleConfig) -> VisionSchedule:
    """The schedule that a configuration states; ValueError if its values contradict each other."""
    if config.cross is not None and not (
        isinstance(config.cross, list) and all(isinstance(layer, int) for layer in config.cross)
    ):
        raise ValueError(f"schedule.cross={config.cross} must be a list of layers: schedule.cross=[8,12].")
    if config.cross is not None and not config.cross:
        raise ValueError(
            "schedule.cross=[] names no layer; say which layers of this model read vision tokens: model.cross=[8,12]."
        )
    if config.keep is not None and not _says_how_many(config.keep):
        raise ValueError(
            f"schedule.keep={config.keep} must say how many tokens stay from which layer on: "
            "'schedule.keep={12: 64, 16: 8}'."
        )
    return VisionSchedule.from_dict(
        {
            "enter": config.enter or 0,
            "exit": config.exit,
            "keep": config.keep,
            "cross": config.cross,
            "ranking": config.ranking,
            "freeze_prefix": config.freeze_prefix,
        }
    )


def profiled(options: RunScheduleConfig, folder: str | Path) -> VisionSchedule:
    """The schedule that a run takes from a profile: that of frozen vision tokens if its recipe freezes them.

    Raises:
        FileNotFoundError, ValueError: the profile has none, in one sentence.
    """
    return read_schedule(folder) if options.cross is None else read_cross(folder)


def take(options: RunScheduleConfig, schedule: VisionSchedule) -> list[str]:
    """Put the schedule of a profile into the configuration; returns the names of the keys that now have its values."""
    if options.cross is not None:
        options.cross = list(schedule.cross or ())
        return ["cross"]
    options.enter, options.exit, options.keep = schedule.enter, schedule.exit, dict(schedule.keep)
    options.ranking = schedule.ranking  # the rule that the keeps were measured under
    return ["enter", "exit", "keep", "ranking"]


def is_known(options: RunScheduleConfig) -> bool:
    """Whether the configuration has the run's schedule: not before `schedule=auto` has made its profile."""
    return options.profile is not None or not options.auto


def _says_how_many(keep: Any) -> bool:
    if not isinstance(keep, dict):
        return False
    return all(isinstance(k, int) and str(layer).isdigit() for layer, k in keep.items())


def visipruner(config: VisiPrunerConfig) -> VisiPruner:
    """The thresholds that a configuration states."""
    return VisiPruner(**{**vars(config), "stages": tuple(config.stages)})


def teacher(config: Config) -> Policy | None:
    """The policy that the teacher runs under."""
    if config.teacher is Teacher.none:
        return None
    thresholds = config.model.visipruner if config.kl.model is None else config.kl.visipruner
    return VisionSchedule() if config.teacher is Teacher.dense else visipruner(thresholds)


def check_schedule_set(config: Config) -> None:
    """Raise ValueError if the recipe does not say where vision tokens enter (a model without a recipe)."""
    schedule = config.schedule
    if schedule.enter is None and schedule.cross is None:
        raise ValueError(
            f"no recipe says where model.path={config.model.path} fuses: set schedule.enter=N and schedule.exit=N, or "
            "schedule=auto to have it profiled first (recipe=dense: every layer sees vision)."
        )


def check_ends(config: Config, num_layers: int) -> None:
    """Raise ValueError if the schedule begins or ends beyond the decoder's layers, whatever else is wrong with it."""
    try:
        for name in ("enter", "exit"):
            check_depth(name, getattr(config.schedule, name), num_layers)
    except ValueError as error:
        raise _does_not_fit(config, error) from None


def check_layers(config: Config, num_layers: int) -> None:
    """Raise ValueError if the schedule does not fit a decoder with this number of layers."""
    try:
        schedule_of(config.schedule).validate(num_layers)
    except ValueError as error:
        raise _does_not_fit(config, error) from None


def _does_not_fit(config: Config, error: ValueError) -> ValueError:
    path, profile = config.model.path, config.schedule.profile
    if profile is not None:
        return ValueError(f"the profile in {profile} is not of model.path={path}: {error}")
    return ValueError(f"the schedule of model.path={path} does not fit: {error}")


def check_depths(config: Config, layers: int | None, teachers: int | None) -> None:
    """Raise ValueError if the schedule or the thresholds are for a deeper model.

    Args:
        layers: decoder layers of the model; None if unknown (yet).
        teachers: decoder layers of `kl.model`; None if unknown (yet), or without one.
    """
    thresholds = visipruner(config.model.visipruner)
    policy = teacher(config) if teaches(config) else None
    if layers is not None:
        if is_known(config.schedule):
            check_layers(config, layers)
        if policy is not None and config.kl.model is None:
            policy.validate(layers)
        if evaluates(config):
            thresholds.validate(layers)
    if policy is not None and teachers is not None:
        try:
            policy.validate(teachers)
        except ValueError as error:
            raise ValueError(f"kl.model={config.kl.model} cannot run under its policy: {error}") from None


def teaches(config: Config) -> bool:
    """Whether the run distils: it has a teacher, and `kl.weight` is not 0."""
    return config.teacher is not Teacher.none and config.kl.weight > 0


def evaluates(config: Config) -> bool:
    """Whether the run ends with an evaluation, which compares the student with the base under VisiPruner."""
    has_questions = config.data.eval_path is not None or config.data.source in QUESTION_SETS
    return config.eval.enabled and config.tune is not Tune.full and has_questions
