"""Energy, where the device reports it: a counter of joules, or none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

POWERCAP = Path("/sys/class/powercap")  # Linux's running average power limit (RAPL)

Joules = Callable[[], float]


def joules_of(device: torch.device) -> Joules | None:
    """A function that returns the joules the device has used so far, or None where nobody can say.

    CUDA: NVML's total energy counter (Volta and later; needs the package `nvidia-ml-py`). CPU: the packages' RAPL
    counters, which many systems let only root read.
    """
    return _nvml(device) if device.type == "cuda" else _rapl(POWERCAP)


def _nvml(device: torch.device) -> Joules | None:
    try:
        import pynvml
    except ImportError:
        return None
    return _nvml_counter(pynvml, torch.cuda.get_device_properties(device).uuid)


def _nvml_counter(nvml: ModuleType, uuid: object) -> Joules | None:
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError:
        return None
    return lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000  # from millijoules


def _rapl(folder: Path) -> Joules | None:
    counters = sorted(folder.glob("intel-rapl:[0-9]*/energy_uj"))
    packages = [path for path in counters if path.parent.name.count(":") == 1]
    try:
        ranges = [int((path.parent / "max_energy_range_uj").read_text()) for path in packages]
        last = [int(path.read_text()) for path in packages]
    except OSError:
        return None
    if not packages:
        return None
    turns = [0] * len(packages)

    def joules() -> float:
        for i, path in enumerate(packages):
            now = int(path.read_text())
            turns[i] += now < last[i]  # the counter wraps around
            last[i] = now
        return sum(n * size + now for n, size, now in zip(turns, ranges, last, strict=True)) / 1e6

    return joules
