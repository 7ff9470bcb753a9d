"""latefusion: multimodal LLMs whose vision tokens enter only the middle layers and leave early."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from latefusion.models.student.registration import announce

if TYPE_CHECKING:
    from latefusion.models.attach import attach, attached
    from latefusion.models.explain import explain
    from latefusion.models.policies.visipruner.settings import VisiPruner
    from latefusion.models.schedule import VisionSchedule
    from latefusion.models.student.restore import load
    from latefusion.models.student.save import merge

__all__ = ["VisiPruner", "VisionSchedule", "attach", "attached", "explain", "load", "merge"]
__version__ = "0.1.0"

_HOME = {
    "VisiPruner": "latefusion.models.policies.visipruner",
    "VisionSchedule": "latefusion.models.schedule",
    "attach": "latefusion.models.attach",
    "attached": "latefusion.models.attach",
    "explain": "latefusion.models.explain",
    "load": "latefusion.models.student.restore",
    "merge": "latefusion.models.student.save",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: a command line that only explains a typo does without torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'latefusion' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


announce()  # AutoModelForImageTextToText then loads whole late-fusion checkpoints, with their schedule
