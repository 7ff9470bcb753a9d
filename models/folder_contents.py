"""What a folder holds, by its files: no command writes into a folder of another. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from latefusion.models.locate import ADAPTER_CONFIG
from latefusion.models.profile_schedule import PROFILE_FILE, SCHEDULE_FILE

RUN_CONFIG = "config.yaml"  # of a training run, as it was composed
TEACHER = "teacher.json"  # who wrote a teacher's answers
POLICY = "policy.yaml"  # what a calibration chose
REPORT = "report.json"  # of an evaluation

MODEL, RUN, ANSWERS = "a model", "a run", "a teacher's answers"
PROFILE, THRESHOLDS, EVALUATION = "a profile", "calibrated thresholds", "an evaluation"
FILES = {  # patterns
    MODEL: ("config.json", ADAPTER_CONFIG),
    RUN: (RUN_CONFIG,),
    ANSWERS: (TEACHER, "teacher-*-of-*"),
    PROFILE: (PROFILE_FILE, SCHEDULE_FILE),
    THRESHOLDS: (POLICY,),
    EVALUATION: (REPORT,),
}


def check_free(folder: str | Path, fix: str, own: Sequence[str] = ()) -> None:
    """Raise ValueError if a folder is a file, or holds what the caller would damage or mix with its own.

    Args:
        fix: how to name another folder.
        own: of `FILES`, what the caller writes itself and checks itself.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{folder} is a file; {fix}.")
    for what, patterns in FILES.items():
        if what not in own and any(file for pattern in patterns for file in path.glob(pattern)):
            raise ValueError(f"{folder} holds {what} already; {fix}.")
