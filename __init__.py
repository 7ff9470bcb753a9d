"""latefusion: multimodal LLMs whose vision tokens enter only the middle layers and leave early."""

from latefusion.models.attach import attach, attached
from latefusion.models.build import load, merge
from latefusion.models.policies.visipruner import VisiPruner
from latefusion.models.schedule import VisionSchedule

__all__ = ["VisiPruner", "VisionSchedule", "attach", "attached", "load", "merge"]
__version__ = "0.1.0"
