"""Peak memory of one piece of work: what it needs beyond the weights, and what the whole process comes to meanwhile."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Cache

from latefusion.models.executor.recurrence import STATES

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def kv_cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that really are in the cache, and of the states of layers that run a recurrence.

    Storages are counted once and whole, so a view of a longer tensor costs what it keeps alive.
    """
    storages = {}
    for layer in cache.layers:
        tensors = [getattr(layer, name, None) for name in ("keys", "values")]
        tensors += [state for name in STATES for state in getattr(layer, name, {}).values()]
        for tensor in tensors:
            if tensor is not None:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Most tensor memory alive at once while `work` runs, beyond what was alive before.

    On CUDA the caching allocator's own peak. On a CPU torch's profiler records every allocation and release of its
    CPU allocator, and this is the highest point of their running sum: exact, and free of what allocators keep back.
    Scratch inside maths libraries is not seen.
    """
    if device.type == "cuda":
        return _cuda_peak(work, device)[0]
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes over the progress bar
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [e["args"] for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    running_sum = np.cumsum([0] + [change["Bytes"] for change in sorted(changes, key=lambda c: c["Ev Idx"])])
    return int(running_sum.max())


def whole_peak_bytes(work: Callable[[], Any], device: torch.device) -> int | None:
    """Most memory that all there is comes to while `work` runs: weights, libraries, everything.

    On CUDA what the caching allocator has handed out. On a CPU the process's resident memory (RSS): before `work`,
    pages that earlier work left free go back to the system and the kernel's record of the peak (VmHWM) is reset, so
    that it is this work's own and not the process's history. None where the kernel offers neither (Linux alone does).
    """
    if device.type == "cuda":
        return _cuda_peak(work, device)[1]
    gc.collect()
    if not _forget_peak():
        return None
    work()
    return 1024 * next(
        int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")
    )


def _cuda_peak(work: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """The allocator's peak while `work` runs: beyond what was there, and in all."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    return peak - before, peak


def _forget_peak() -> bool:
    """Give free pages back and make the current resident memory the peak; False where that cannot be."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        CLEAR.write_text("5")  # proc(5): resets the peak to what is resident now
    except (OSError, AttributeError):  # another system, another C library, or not allowed
        return False
    return True
