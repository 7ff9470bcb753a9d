"""latefusion: multimodal LLMs whose vision tokens enter only the middle layers and leave early."""

from latefusion.models.schedule import VisionSchedule

__all__ = ["VisionSchedule"]
__version__ = "0.1.0"
