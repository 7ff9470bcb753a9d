"""Peak memory of a method is its own: exact in tensors, and free of the process's history in resident pages."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from helpers import evaluated_student
from transformers import DynamicCache

from latefusion.eval import memory
from latefusion.eval.report import tables

CPU = torch.device("cpu")
MB = 1_000_000


def test_a_view_in_the_cache_costs_what_it_keeps_alive() -> None:
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    assert memory.kv_cache_bytes(cache) == 2 * 24 * 4
    cache.layers[0].keys = torch.zeros(1, 2, 100, 4)[:, :, :3]
    assert memory.kv_cache_bytes(cache) == 24 * 4 + 800 * 4


def test_peak_memory_is_the_highest_point_and_not_the_sum() -> None:
    kept = torch.zeros(1000)

    def work() -> torch.Tensor:
        a = torch.zeros(100_000)  # 400 kB
        b = a + 1  # 800 kB
        del a
        c = b.double()  # 400 + 800 kB
        del b
        return kept + c[:1000]

    assert memory.peak_bytes(work, CPU) == pytest.approx(1_200_000, rel=0.01)


def resident(work: Any) -> float:
    peak = memory.whole_peak_bytes(work, CPU)
    assert peak is not None
    return peak / MB


def test_resident_peak_is_this_work_s_and_not_the_history() -> None:
    """After a method of 200 MB, and one that leaves 80 MB of free fragments, a small one is as small as before."""
    held: list[np.ndarray] = []

    def large() -> None:
        torch.ones(50_000_000)

    def fragments() -> None:
        pieces = [np.ones(2000) for _ in range(5000)]  # 16 kB each: too small for pages of their own
        held.extend(pieces[::50])  # so that the heap cannot shrink from its end

    def small() -> None:
        torch.ones(10)

    resident(small)
    first = resident(small)
    assert resident(large) == pytest.approx(first + 200, abs=20)
    assert resident(fragments) == pytest.approx(first + 80, abs=20)
    gc.collect()
    assert resident(small) == pytest.approx(first, abs=20)


def test_where_the_kernel_keeps_no_record_nothing_is_claimed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "nowhere" / "clear_refs")
    assert memory.whole_peak_bytes(lambda: None, CPU) is None


def test_every_timed_method_has_its_peak_in_report_and_table() -> None:
    _, results = evaluated_student.full_run()
    weights = results["model"]["weight_bytes"]
    for system in results["systems"].values():
        assert system["control"] or system["peak_bytes"]["mean"] > weights
    assert "peak memory" in [row.label for row in tables.rows(results)]
    assert "resident memory (VmHWM)" in (evaluated_student.full_run()[0] / "report.html").read_text()
