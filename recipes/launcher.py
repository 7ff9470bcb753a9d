"""This process's place in its run, from the environment that every launcher sets. Without torch."""

from __future__ import annotations

import os


def rank() -> int:
    """This process's number in the run; 0 is the one that writes."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """How many processes the run has, as the launcher says; 1 without a launcher."""
    return launched() or 1


def launched() -> int | None:
    """How many processes a launcher has started as one run; None: no launcher says."""
    number = os.environ.get("WORLD_SIZE")
    return None if number is None else int(number)


def local_world_size() -> int:
    """Processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
