"""The schedules in a profile's folder, read without torch; models/profile_folder.py reads its calibrated entry."""

from __future__ import annotations

from pathlib import Path

import yaml

from latefusion.models.schedule import VisionSchedule

PROFILE_FILE = "profile.json"  # every number
SCHEDULE_FILE = "schedule.yaml"
CROSS_FILE = "cross.yaml"  # layers that read frozen vision tokens


def read_schedule(path: str | Path) -> VisionSchedule:
    """The schedule of a profile: its folder, or its `schedule.yaml` or `profile.json`.

    Raises:
        FileNotFoundError, ValueError: it is not a profile, in one sentence.
    """
    file = Path(path) / SCHEDULE_FILE if Path(path).is_dir() else Path(path)
    if file.name == PROFILE_FILE:
        file = file.with_name(SCHEDULE_FILE)
    if not file.is_file():
        raise FileNotFoundError(
            f"no profile at {path}: it has no {SCHEDULE_FILE}; name the folder that eval/profile_model.py wrote: "
            "schedule.profile=FOLDER."
        )
    schedule = _read(file)
    if schedule.cross is not None:
        raise ValueError(
            f"{file} names layers that read frozen vision tokens (cross), which recipe=cross_only trains; use that, or "
            "name the profile's folder."
        )
    return schedule


def read_cross(path: str | Path) -> VisionSchedule:
    """The schedule of frozen vision tokens of a profile that was made with `cross=true`.

    Args:
        path: the folder, or a file in it.

    Raises:
        FileNotFoundError, ValueError: it has none, in one sentence.
    """
    folder = Path(path).parent if Path(path).is_file() else Path(path)
    read_schedule(folder)  # a profile at all
    file = folder / CROSS_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"the profile in {folder} did not look for the layers that read frozen vision tokens; make it again with "
            "cross=true, or give them without a profile: model.cross=[8,12]."
        )
    schedule = _read(file)
    if not schedule.cross:
        raise ValueError(
            f"{file} names no layer that reads (cross); make the profile again with cross=true and overwrite=true."
        )
    if schedule.keep or schedule.freeze_prefix:
        extra = "keep" if schedule.keep else "freeze_prefix"
        raise ValueError(
            f"{file} has {extra}, and a run takes the layers alone (cross) from there; leave {extra} out."
        )
    return schedule


def _read(file: Path) -> VisionSchedule:
    try:
        values = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = str(error).splitlines()[0].strip()
        raise ValueError(f"{file} is not a schedule in YAML ({reason}); profile the model again.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds no schedule; it should have enter, exit and keep, or cross.")
    try:
        return VisionSchedule.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{file} holds no schedule: {error}") from None
