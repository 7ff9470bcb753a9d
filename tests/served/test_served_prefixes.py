"""Prefix caching: requests share the blocks before their first image, and nothing behind it."""

import numpy as np
import pytest
from helpers.served_bases import base
from helpers.served_models import (
    BOS,
    Request,
    engine,
    in_transformers,
    in_vllm,
    save_student,
    words,
    worst_difference,
)

from latefusion.models.schedule import VisionSchedule

TOLERANCE, BLOCK = 2e-4, 32
HEAD = 70  # text tokens before the image: two blocks, and a part of the third
SCHEDULES = {"band": VisionSchedule(enter=4, exit=11), "cross": VisionSchedule(cross=[4, 5, 8, 10])}


def questions_about_one_image(embedded):
    """Questions 0, 1, 0 about one image, behind the same text; then the text alone, which goes on as question 1."""
    rng = np.random.default_rng(5)
    head = [BOS, *words(embedded, rng, HEAD - 1)]
    questions = [words(embedded, rng, 40) for _ in range(2)]
    about = [
        Request(embedded, [*head, embedded.image, *questions[i]], [embedded.picture(0)]) for i in (0, 1, 0)
    ]
    return [*about, Request(embedded, [*head, *questions[1]])]


def one_by_one(llm, batch):
    return [in_vllm(llm, [request], 6)[0] for request in batch]


@pytest.fixture(scope="module")
def embedded():
    return base("embedded")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_another_question_about_an_image_reads_nothing_of_the_first(schedule, embedded, tmp_path):
    batch = questions_about_one_image(embedded)
    folder = save_student(tmp_path, SCHEDULES[schedule], base("embedded"), entry=True)
    with engine(folder) as llm:
        served = one_by_one(llm, batch)
        two, single = sampled(llm, batch[0], 2), [sampled(llm, batch[0], 1, seed)[0] for seed in (7, 8)]
    reference = in_transformers(folder, batch, 6)
    assert [answer.ids for answer in served] == [answer.ids for answer in reference]
    assert worst_difference(served, reference) < TOLERANCE
    assert [answer.cached for answer in served] == [0, *[HEAD // BLOCK * BLOCK] * 3]
    assert two == single and two[0] != two[1]  # two answers to one request share no block of its image


def sampled(llm, request, n, seed=7):
    """`n` sampled answers; vLLM gives the second the next seed."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=2.0, seed=seed, n=n, max_tokens=40, min_tokens=40)
    (output,) = llm.generate([request.prompt], parameters, use_tqdm=False)
    return [list(one.token_ids) for one in output.outputs]


def test_without_the_limit_the_third_answer_is_wrong(embedded, tmp_path, monkeypatch):
    """What vLLM's own manager does: blocks of an image are found again, with another question's keys in them."""
    from latefusion.serving.blocks import LateFusionManager

    monkeypatch.delattr(LateFusionManager, "cache_blocks")
    batch = questions_about_one_image(embedded)
    folder = save_student(tmp_path, SCHEDULES["band"], base("embedded"), entry=True)
    with engine(folder) as llm:
        served = one_by_one(llm, batch[:3])
    reference = in_transformers(folder, batch[:3], 6)
    assert worst_difference(served[:1], reference[:1]) < TOLERANCE
    assert worst_difference(served[1:], reference[1:]) > 0.1
