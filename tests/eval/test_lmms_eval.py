"""The plugin, through lmms-eval's own command on a small local task. Needs the extra: `pytest -m extra`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from latefusion.data.scenes import load_scenes

pytestmark = pytest.mark.extra

SCENES = """
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_visual: !function small_scenes.visual
doc_to_target: answer
"""
METRIC = """
metric_list:
  - metric: {name}
    aggregation: mean
    higher_is_better: true
"""
TASK = (
    SCENES
    + """
task: small_scenes
output_type: generate_until
doc_to_text: question
generation_kwargs: {{max_new_tokens: 8, temperature: 0, until: ["\\n"]}}
"""
    + METRIC.format(name="exact_match")
    + """    ignore_case: true
"""
)
RANKED = (
    SCENES
    + """
task: ranked_scenes
output_type: multiple_choice
doc_to_text: question
doc_to_choice: !function small_scenes.choices
"""
    + METRIC.format(name="acc")
)
ROUNDS = (
    SCENES
    + """
task: scenes_in_rounds
output_type: generate_until_multi_round
doc_to_text: !function small_scenes.rounds
generation_kwargs: {{max_new_tokens: 8, temperature: 0, do_sample: false}}
process_results: !function small_scenes.both
lmms_eval_specific_kwargs: {{default: {{}}}}
"""
    + METRIC.format(name="both_right")
)
FUNCTIONS = """
def visual(document, settings=None):
    return [document['image'].convert('RGB')]

def choices(document):
    return sorted({document['answer'], 'yes', 'no', 'red', '3'})

def rounds(document, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    if round_idx is None:
        return document['question']
    if round_idx == 2:
        assert previous_round_info == 'one' and len(previous_output) == 2
        return None, None, True, previous_output, None
    return visual(document), document['question'], False, previous_output, 'one'

def both(document, results):
    (rounds,) = results
    assert len(rounds) == 2
    return {'both_right': float([text.strip() for text in rounds] == [document['answer']] * 2)}
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    load_scenes("test", 2).select(range(12)).to_parquet(folder / "questions.parquet")
    (folder / "small_scenes.py").write_text(FUNCTIONS)
    for name, text in (("small", TASK), ("ranked", RANKED), ("rounds", ROUNDS)):
        (folder / f"{name}.yaml").write_text(text.format(data=folder / "questions.parquet"))
    return folder


def score(
    task: Path,
    output: Path,
    model_args: str,
    *more: str,
    name: str = "small_scenes",
    metric: str = "exact_match",
) -> float:
    words = ["--model", "latefusion", "--model_args", model_args, "--tasks", name, *more]
    words += ["--include_path", str(task), "--batch_size", "5", "--output_path", str(output)]
    command = [sys.executable, "-m", "lmms_eval", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (results,) = output.rglob("*results.json")
    return json.loads(results.read_text())["results"][name][f"{metric},none"]


def test_a_base_under_a_policy(task: Path, tmp_path: Path) -> None:
    """The embedded base answers nearly everything; without vision it guesses."""
    dense = score(task, tmp_path / "dense", "pretrained=embedded,dtype=float32")
    assert dense >= 10 / 12
    assert (
        score(task, tmp_path / "random", "pretrained=embedded,policy=random,keep_ratio=0.02,dtype=float32")
        < dense
    )


def test_a_checkpoint_under_its_own_schedule(task: Path, tmp_path: Path) -> None:
    from helpers.tiny_base import save_tiny_base

    from latefusion.models.base_model import load_base
    from latefusion.models.schedule import VisionSchedule
    from latefusion.models.student.build import Lora, build_student
    from latefusion.models.student.save import save_student

    base = str(save_tiny_base(tmp_path / "base"))
    model, processor = load_base(base, dtype=torch.float32)
    schedule = VisionSchedule(enter=2, exit=5)
    student = build_student(
        model, processor, base=base, schedule=schedule, lora=Lora(rank=2, alpha=4), entry_rank=2
    )
    save_student(student, tmp_path / "student")
    assert score(task, tmp_path / "out", f"checkpoint={tmp_path / 'student'}") <= 1


def test_given_answers_are_ranked(task: Path, tmp_path: Path) -> None:
    """By lmms-eval's older interface, the only one that has such tasks."""
    ranked = {"name": "ranked_scenes", "metric": "acc"}
    dense = score(task, tmp_path / "dense", "pretrained=embedded,dtype=float32", "--force_simple", **ranked)
    assert dense >= 10 / 12
    blind = "pretrained=embedded,policy=random,keep_ratio=0.02,dtype=float32"
    assert score(task, tmp_path / "random", blind, "--force_simple", **ranked) < dense


@pytest.mark.parametrize("interface", [[], ["--force_simple"]])
def test_rounds_follow_each_other(task: Path, tmp_path: Path, interface: list[str]) -> None:
    rounds = {"name": "scenes_in_rounds", "metric": "both_right"}
    assert score(task, tmp_path, "pretrained=embedded,dtype=float32", *interface, **rounds) >= 10 / 12


class Fake:
    """Documents and requests as lmms-eval makes them, of the simple interface."""

    def __init__(self, kind: str, rows: list[dict[str, Any]]):
        from lmms_eval.api.instance import Instance

        self.rows, self.kind = rows, kind
        self.make = lambda arguments, i: Instance(
            request_type=kind, arguments=arguments, idx=i, metadata={"task": "t", "doc_id": i, "repeats": 1}
        )

    def with_answers(self, answers: list[tuple[int, str]]) -> list[Any]:
        return [
            self.make((self.rows[i]["question"], answer, lambda row: [row["image"]], i, "t", "test"), n)
            for n, (i, answer) in enumerate(answers)
        ]

    def with_stops(self, settings: dict[str, Any]) -> list[Any]:
        visual = lambda row: [row["image"]]  # noqa: E731
        return [
            self.make((row["question"], dict(settings), visual, i, "t", "test"), i)
            for i, row in enumerate(self.rows)
        ]


def plugin(base: Path, rows: list[dict[str, Any]], **more: Any) -> Any:
    from latefusion.eval.lmms_eval_plugin import LateFusionSimple

    model = LateFusionSimple(pretrained=str(base), dtype="float32", device="cpu", **more)
    model.task_dict = {"t": {"test": rows}}
    return model


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Questions of several lengths with pictures of the tiny model's size."""
    samples = [load_scenes("test", 2)[i] for i in range(5)]
    return [{**row, "image": row["image"].resize((16, 16))} for row in samples]


@torch.no_grad()
def step_by_step(model: Any, row: dict[str, Any], answer: str) -> tuple[float, bool]:
    """Feed an answer token by token to the model's cache, as it would decode; its mean loss, and is it greedy."""
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}]
    text = model.processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = model.processor(text=[text], images=[row["image"]], return_tensors="pt")
    ids = model.processor.tokenizer(answer, add_special_tokens=False).input_ids
    losses, greedy = [], True
    with model.attachment.using(model.system.policy):
        out = model.model(**inputs, use_cache=True)
        for token in ids:
            last = out.logits[0, -1].double()
            losses.append(float(torch.logsumexp(last, 0) - last[token]))
            greedy &= int(last.argmax()) == token
            out = model.model(
                input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True
            )
    return sum(losses) / len(losses), greedy


@pytest.mark.parametrize("policy", ["dense", "visipruner", "fastv"])
def test_given_answers_cost_what_decoding_them_costs(
    base: Path, rows: list[dict[str, Any]], policy: str
) -> None:
    more = {"boundary": 2} if policy == "visipruner" else {}
    model = plugin(base, rows, policy=policy, batch_size=4, **more)
    (greedy_text,) = {
        answer.text
        for answer in model.generate_until(Fake("generate_until", rows[:1]).with_stops({"max_new_tokens": 3}))
    }
    requests = [
        (0, greedy_text),
        (0, "red"),
        (1, "top left"),
        (2, "yes"),
        (3, "no no no"),
        (4, "3"),
        (4, "blue circle"),
    ]
    costs = model.loglikelihood(Fake("loglikelihood", rows).with_answers(requests))
    for (i, answer), (loss, greedy) in zip(requests, costs, strict=True):
        cost, is_greedy = step_by_step(model, rows[i], answer)
        assert loss == pytest.approx(cost, abs=1e-4) and greedy is is_greedy
    assert [*costs[0]][1] and not [*costs[4]][1]  # what the model says is greedy
    with pytest.raises(ValueError, match="has no token"):
        model.loglikelihood(Fake("loglikelihood", rows).with_answers([(0, "")]))


def test_an_answer_stops_where_a_text_stops_it(base: Path, rows: list[dict[str, Any]]) -> None:
    model = plugin(base, rows, batch_size=2)
    fake = Fake("generate_until", rows)
    free = model.generate_until(fake.with_stops({"max_new_tokens": 12}))
    words = [answer.text.split() for answer in free]
    stop = words[0][3]
    stopped = model.generate_until(fake.with_stops({"max_new_tokens": 12, "until": [f" {stop}"]}))
    for before, after in zip(free, stopped, strict=True):
        cut = before.text.partition(f" {stop}")[0].strip()
        assert after.text == cut
        if cut != before.text:
            assert after.token_counts.output_tokens < before.token_counts.output_tokens
    assert stopped[0].text == " ".join(words[0][:3]) or stop in words[0][:3]
