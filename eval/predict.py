"""Ask every system the same questions and keep one record an answer."""

from __future__ import annotations

from dataclasses import dataclass

from latefusion.models.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class System:
    """One thing to compare: the model at hand under a policy, with its trained adapters on or off.

    Attributes:
        name: what tables and figures call it.
        policy: which vision tokens each layer sees (`VisionSchedule()` is dense).
        adapters: LoRA and entry adapter active (the student) or disabled (the base).
    """

    name: str
    policy: Policy
    adapters: bool = False
