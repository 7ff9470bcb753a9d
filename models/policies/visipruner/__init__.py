"""VisiPruner, in three parts: its settings, one prefill's decisions, and the shallow rule."""

from latefusion.models.policies.visipruner.settings import VisiPruner

__all__ = ["VisiPruner"]
