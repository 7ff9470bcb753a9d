"""Served answers are those of the executor: seven requests in one batch, in every kind of schedule and chunk."""

import pytest
from helpers.served_bases import base
from helpers.served_models import (
    engine,
    in_transformers,
    in_vllm,
    requests,
    save_student,
    worst_difference,
)

from latefusion.models.schedule import VisionSchedule

TOLERANCE = 2e-4
BAND, CROSS = VisionSchedule(enter=4, exit=11), VisionSchedule(cross=[4, 5, 8, 10])
SHALLOW = {"band": VisionSchedule(enter=2, exit=4), "cross": VisionSchedule(cross=[1, 3, 4])}  # of 6 layers


@pytest.fixture
def compare(tmp_path, note):
    """Asks a student in vLLM and in transformers, and compares the answers."""

    def run(schedule, name="embedded", entry=False, steps=8, later_rank=None, **settings):
        served_base = base(name)
        folder, batch = (
            save_student(tmp_path, schedule, served_base, entry, later_rank),
            requests(served_base),
        )
        with engine(folder, **settings) as llm:
            served = in_vllm(llm, batch, steps)
        reference = in_transformers(folder, batch, steps)
        assert [answer.ids for answer in served] == [answer.ids for answer in reference]
        worst = worst_difference(served, reference)
        note(worst)
        assert worst < TOLERANCE

    return run


@pytest.mark.parametrize("budget", [512, 40])
@pytest.mark.parametrize(
    ("schedule", "later_rank"),
    [(BAND, None), (CROSS, None), (CROSS, 5)],
    ids=["band", "cross", "cross, moved on by maps of a low rank"],
)
def test_a_batch_is_answered_as_by_the_executor(schedule, later_rank, budget, compare):
    """With 40 tokens a step, prompts come in chunks, and whole steps hold no text."""
    compare(schedule, entry=True, later_rank=later_rank, max_num_batched_tokens=budget)


@pytest.mark.parametrize("schedule", SHALLOW)
@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen2_5_vl"])
def test_other_decoders_answer_as_in_the_executor(name, schedule, compare):
    """LLaVA with Mistral behind CLIP and with Qwen2 behind SigLIP; Qwen2.5-VL with images of different sizes."""
    budget = {"band": 100, "cross": 40}[schedule]
    compare(SHALLOW[schedule], name, entry=True, max_num_batched_tokens=budget)


def test_two_processes_share_the_heads(compare, monkeypatch):
    """Tensor parallelism: rows of a step are the same in both. Triton's interpreter stops vLLM's compiled embedding."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    compare(SHALLOW["cross"], "qwen2", True, max_num_batched_tokens=100, tensor_parallel_size=2)


@pytest.mark.parametrize("edges", [(0, 11), (5, None)], ids=str)
def test_a_band_may_begin_or_end_with_the_decoder(edges, compare):
    enter, end = edges
    compare(VisionSchedule(enter=enter, exit=end), max_num_batched_tokens=100)


def test_blind_layers_alone_are_served(compare):
    """`cross=[]`: no layer reads vision tokens."""
    compare(VisionSchedule(cross=[]), max_num_batched_tokens=100)


@pytest.mark.parametrize("schedule", [BAND, CROSS], ids=["band", "cross"])
def test_a_request_that_was_preempted_goes_on_as_if_it_had_not_been(schedule, compare, monkeypatch):
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted = []
    original = Scheduler._preempt_request
    monkeypatch.setattr(
        Scheduler,
        "_preempt_request",
        lambda self, request, *more, **named: (
            preempted.append(request.request_id) or original(self, request, *more, **named)
        ),
    )
    compare(schedule, entry=True, steps=16, num_gpu_blocks_override=18)
    assert preempted


def test_the_comparison_can_fail(tmp_path):
    """Against the dense model's answers."""
    embedded = base("embedded")
    folder, batch = save_student(tmp_path, BAND, embedded, entry=True), requests(embedded)
    with engine(folder) as llm:
        served = in_vllm(llm, batch, 4)
    dense = in_transformers(folder, batch, 4, dense=True)
    assert [answer.ids for answer in served] != [answer.ids for answer in dense]
    text_alone = [i for i, request in enumerate(batch) if not request.images]
    assert all(served[i].ids == dense[i].ids for i in text_alone)
