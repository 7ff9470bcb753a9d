"""Work of the first process that the others wait for, before the engine has joined them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch.distributed as dist

from latefusion.recipes.launcher import world_size

PAUSE = 0.2  # seconds between two looks


def first_says(what: str, work: Callable[[], Any]) -> Any:
    """What `work` returns in the process of rank 0, in every process of the launch; called there alone.

    The others wait as long as it takes: they look into the launcher's key-value store, where no collective can time
    out. An error of the first is raised in all.

    Args:
        what: a name for it, used once in a launch.
        work: returns what JSON can hold.

    Raises:
        ValueError: `work` raised it, or FileNotFoundError.
    """
    world = world_size()
    if world == 1:
        return work()
    meeting, rank = _rendezvous()
    store = dist.PrefixStore(what, meeting)
    if rank == 0:
        try:
            said = {"value": work()}
        except (ValueError, FileNotFoundError) as error:
            _say(store, world, {"error": str(error)})
            raise
        _say(store, world, said)
        return said["value"]
    while not store.check(["said"]):
        time.sleep(PAUSE)
    said = json.loads(store.get("said"))
    store.add("heard", 1)
    if "error" in said:
        raise ValueError(said["error"])
    return said["value"]


@cache
def _rendezvous() -> tuple[dist.Store, int]:
    """Kept: where no launcher holds the store, the first process does, and an engine will share it later."""
    store, rank, _ = next(dist.rendezvous("env://"))
    return dist.PrefixStore("latefusion/first", store), rank


def _say(store: dist.Store, world: int, said: dict[str, Any]) -> None:
    """A process that ends at once may take the store with it, so it stays until all have heard."""
    store.set("said", json.dumps(said))
    while store.add("heard", 0) < world - 1:
        time.sleep(PAUSE)
