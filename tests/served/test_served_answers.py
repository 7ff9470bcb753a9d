"""Served answers are those of the executor: seven requests in one batch, in every kind of schedule and chunk."""

import numpy as np
import pytest
from helpers.served_models import (
    BOS,
    IMAGE,
    Request,
    engine,
    in_transformers,
    in_vllm,
    picture,
    requests,
    save_student,
    words,
    worst_difference,
)

from latefusion.models.schedule import VisionSchedule

TOLERANCE = 2e-4
BAND, CROSS = VisionSchedule(enter=4, exit=11), VisionSchedule(cross=[4, 5, 8, 10])


def compare(folder, steps=8, **settings):
    batch = requests()
    with engine(folder, **settings) as llm:
        served = in_vllm(llm, batch, steps)
    reference = in_transformers(folder, batch, steps)
    assert [answer.ids for answer in served] == [answer.ids for answer in reference]
    worst = worst_difference(served, reference)
    print(f"worst difference {worst:.1e}")
    assert worst < TOLERANCE


@pytest.mark.parametrize("budget", [512, 40])
@pytest.mark.parametrize(
    ("schedule", "entry"),
    [(BAND, True), (CROSS, True)],
    ids=["band", "cross"],
)
def test_a_batch_is_answered_as_by_the_executor(schedule, entry, budget, tmp_path):
    """With 40 tokens a step, prompts come in chunks, and whole steps hold no text."""
    compare(save_student(tmp_path, schedule, entry), max_num_batched_tokens=budget)


@pytest.mark.parametrize("edges", [(0, 11), (5, None)], ids=str)
def test_a_band_may_begin_or_end_with_the_decoder(edges, tmp_path):
    enter, end = edges
    compare(save_student(tmp_path, VisionSchedule(enter=enter, exit=end)), max_num_batched_tokens=100)


def test_blind_layers_alone_are_served(tmp_path):
    """`cross=[]`: no layer reads vision tokens."""
    compare(save_student(tmp_path, VisionSchedule(cross=[])), max_num_batched_tokens=100)


@pytest.mark.parametrize("schedule", [BAND, CROSS], ids=["band", "cross"])
def test_a_request_that_was_preempted_goes_on_as_if_it_had_not_been(schedule, tmp_path, monkeypatch):
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
    compare(save_student(tmp_path, schedule, entry=True), steps=16, num_gpu_blocks_override=18)
    assert preempted


def test_the_comparison_can_fail(tmp_path):
    """Against the dense model's answers."""
    folder, batch = save_student(tmp_path, BAND, entry=True), requests()
    with engine(folder) as llm:
        served = in_vllm(llm, batch, 4)
    dense = in_transformers(folder, batch, 4, dense=True)
    assert [answer.ids for answer in served] != [answer.ids for answer in dense]
    text_alone = [i for i, request in enumerate(batch) if not request.images]
    assert all(served[i].ids == dense[i].ids for i in text_alone)


def questions_about_one_image(folder):
    """Answers to questions 0, 1, 0, one after the other, behind more system text than a block holds."""
    rng = np.random.default_rng(5)
    head, questions = [BOS, *words(rng, 8)], [words(rng, 40) for _ in range(2)]
    batch = [Request([*head, IMAGE, *questions[i]], [picture(0)]) for i in (0, 1, 0)]
    with engine(folder, enable_prefix_caching=True) as llm:
        served = [in_vllm(llm, [request], 6)[0] for request in batch]
    return served, in_transformers(folder, batch, 6)


def test_another_question_about_an_image_reads_nothing_of_the_first(tmp_path, monkeypatch):
    """Prefix caching would have it read the first one's keys: the guard removed, the third answer is wrong."""
    folder = save_student(tmp_path, BAND, entry=True)
    served, reference = questions_about_one_image(folder)
    assert [answer.ids for answer in served] == [answer.ids for answer in reference]
    assert worst_difference(served, reference) < TOLERANCE

    from latefusion.serving.llava import LateFusionLlavaForConditionalGeneration as Model
    from latefusion.serving.plugin import Defaults

    def unguarded(config):
        config.model_config.enforce_eager = True

    original = Model.__init__

    def init(self, *, vllm_config, prefix=""):
        vllm_config.cache_config.enable_prefix_caching = False
        original(self, vllm_config=vllm_config, prefix=prefix)
        vllm_config.cache_config.enable_prefix_caching = True

    monkeypatch.setattr(Defaults, "verify_and_update_config", staticmethod(unguarded))
    monkeypatch.setattr(Model, "__init__", init)
    served, _ = questions_about_one_image(folder)
    assert worst_difference(served[:1], reference[:1]) < TOLERANCE
    assert worst_difference(served, reference) > 0.1
