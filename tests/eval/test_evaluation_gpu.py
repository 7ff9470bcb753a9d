"""What an evaluation measures on a CUDA device: times between events, and each method's own peak memory."""

from __future__ import annotations

import time

import pytest
import torch
from helpers import evaluated_student

from latefusion.data.prompts import prompt_inputs
from latefusion.eval import memory
from latefusion.eval.comparison import cost

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

MB = 1_000_000


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda")


def test_a_time_is_the_device_s_and_not_the_launch_s(cuda: torch.device) -> None:
    """A kernel that spins is launched at once, and runs for long; what ran before does not count."""
    cycles = 200_000_000

    def spin() -> None:
        torch.cuda._sleep(cycles)

    once = cost.seconds(spin, cuda)
    began = time.perf_counter()
    spin()
    launched = time.perf_counter() - began
    torch.cuda.synchronize()
    assert once > 10 * launched
    assert cost.seconds(lambda: (spin(), spin()), cuda) == pytest.approx(2 * once, rel=0.2)
    spin()
    assert cost.seconds(lambda: None, cuda) < 0.1 * once


def test_peak_memory_is_this_work_s_and_not_the_history(cuda: torch.device) -> None:
    kept = torch.ones(10 * MB, dtype=torch.uint8, device=cuda)

    def large() -> None:
        torch.ones(200 * MB, dtype=torch.uint8, device=cuda)

    def small() -> None:
        torch.ones(10, device=cuda)

    assert memory.peak_bytes(large, cuda) == pytest.approx(200 * MB, rel=0.02)
    assert memory.peak_bytes(small, cuda) < MB
    whole = memory.whole_peak_bytes(small, cuda)
    assert whole is not None and whole >= kept.numel()
    after = memory.whole_peak_bytes(large, cuda)
    assert after == pytest.approx(whole + 200 * MB, rel=0.02)
    assert memory.whole_peak_bytes(small, cuda) == whole


def test_an_answer_s_clock_starts_on_an_idle_device(cuda: torch.device) -> None:
    from latefusion.data.scenes import load_scenes

    model = evaluated_student.tiny_model().to(cuda)
    inputs = prompt_inputs(model, evaluated_student.processor(), [load_scenes("test", 1)[0]])
    cost.time_answer(model, inputs, 2)  # the first call compiles and allocates
    quick, _ = cost.time_answer(model, inputs, 2)
    torch.cuda._sleep(2_000_000_000)
    assert cost.time_answer(model, inputs, 2)[0] < quick + 0.5
