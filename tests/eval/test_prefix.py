"""Layers that several policies compute alike run once, and nothing else changes."""

from collections import Counter
from dataclasses import asdict

import pytest
import torch
from transformers import DynamicCache

from latefusion.data.prompts import prompt_inputs
from latefusion.data.scenes import load_scenes
from latefusion.eval.comparison.answers import answer_questions
from latefusion.eval.comparison.prefix import SharedPrefix
from latefusion.eval.comparison.systems import System
from latefusion.eval.tasks.base import Task
from latefusion.models.attach import attach
from latefusion.models.base_model import load_base
from latefusion.models.inputs import encode_images, fresh_inputs
from latefusion.models.policies import named
from latefusion.models.policies.visipruner.settings import VisiPruner
from latefusion.models.schedule import VisionSchedule

POLICIES = {
    "dense": VisionSchedule(),
    "pruned": VisiPruner(boundary=7, layer_threshold=0.9998, tokens_threshold=0.7, stages=("middle", "deep")),
    "shallow": VisiPruner(boundary=3, layer_threshold=0.9998, tokens_threshold=0.7),
    "fastv": named("fastv", layer=3),
    "pyramiddrop": named("pyramiddrop", keep_ratios={4: 0.5, 8: 0.25}),
    "vtw": named("vtw", layer=9),
    "divprune": named("divprune"),
    "keep": VisionSchedule(exit=11, keep={6: 72, 8: 24}),
    "hidrop": VisionSchedule(exit=11, keep={6: 72, 8: 24}, ranking="hidrop"),
    "cross": VisionSchedule(cross=(2, 4, 6)),
    "random": named("random", layer=5),
}
SHARED = {  # layers that a policy takes over from those asked before it
    "dense": 0,
    "pruned": 8,  # it looks at the layers behind its boundary
    "shallow": 0,  # it changes layer 0
    "fastv": 2,
    "pyramiddrop": 3,
    "vtw": 9,
    "divprune": 0,
    "random": 5,
}


@pytest.fixture(scope="module")
def base():
    model, processor = load_base("embedded", dtype=torch.float32)
    with attach(model, VisionSchedule()) as attachment:
        yield model, processor, attachment


@pytest.fixture
def computed(base):
    """How often each layer's attention ran."""
    counts = Counter()
    handles = [
        layer.self_attn.register_forward_pre_hook(lambda module, args, i=i: counts.update([i]))
        for i, layer in enumerate(base[2].layers)
    ]
    yield counts
    for handle in handles:
        handle.remove()


@torch.no_grad()
def prefill(base, policy, inputs):
    """Logits, states and the cache of a forward under a policy."""
    model, _, attachment = base
    cache = DynamicCache(config=model.config)
    with attachment.using(policy):
        out = model(**fresh_inputs(inputs), past_key_values=cache)
        more = model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=cache)
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return [out.logits, more.logits, *held], [asdict(record) for record in attachment.trace]


def test_logits_caches_and_traces_are_equal_bit_for_bit(base, computed):
    """Against each policy alone; prompts of unequal length, so that rows are padded."""
    model, processor, attachment = base
    rows = load_scenes("test", 3)
    lengths = [len(text) for text in rows["question"]]
    chosen = [lengths.index(min(lengths)), lengths.index(max(lengths)), 0]
    inputs = encode_images(model, prompt_inputs(model, processor, [rows[i] for i in chosen]))
    alone = {key: prefill(base, policy, inputs) for key, policy in POLICIES.items()}
    prefix = SharedPrefix(attachment)
    ran = {}
    with prefix.shared():
        for key, policy in POLICIES.items():
            computed.clear()
            tensors, trace = prefill(base, policy, inputs)
            ran[key] = sum(computed.values())
            assert all(torch.equal(*pair) for pair in zip(tensors, alone[key][0], strict=True)), key
            assert trace == alone[key][1], key
    layers = len(attachment.layers)
    assert {key: 2 * layers - ran[key] for key in SHARED} == SHARED
    assert all(layer.forward.stock.__func__ is type(layer).forward for layer in attachment.layers)


def test_answers_are_those_of_each_system_alone(base):
    model, processor, attachment = base
    questions = load_scenes("test", 1)
    questions = questions.select(range(4))
    systems = {
        key: System(name=key, policy=POLICIES[key]) for key in ("dense", "pruned", "pyramiddrop", "keep")
    }

    def ask(chosen):
        return answer_questions(
            model=model,
            processor=processor,
            attachment=attachment,
            systems=chosen,
            task=Task(name="scenes", rows=questions, split="test"),
            batch_size=3,
        )

    together = ask(systems)
    for key, system in systems.items():
        assert together[key] == ask({key: system})[key], key


def test_other_prompts_and_changed_states_are_computed(base, computed):
    """A state that the model changed in place, as Qwen3-VL does between layers, is not handed out again."""
    model, processor, attachment = base
    rows = load_scenes("test", 2)
    first, second = (
        encode_images(model, prompt_inputs(model, processor, [rows[i]])) for i in (0, len(rows) - 1)
    )
    prefix = SharedPrefix(attachment)
    with prefix.shared():
        prefill(base, VisionSchedule(), first)
        computed.clear()
        prefill(base, VisionSchedule(), second)
        assert sum(computed.values()) == 2 * len(attachment.layers)
        prefix.steps[3].after.add_(1)
        computed.clear()
        tensors, _ = prefill(base, VisionSchedule(), first)
    assert [computed[i] for i in (2, 3, 4)] == [1, 2, 2]
    expected, _ = prefill(base, VisionSchedule(), first)
    assert all(torch.equal(*pair) for pair in zip(tensors, expected, strict=True))


def test_only_what_fits_is_kept(base, computed):
    model, processor, attachment = base
    inputs = encode_images(model, prompt_inputs(model, processor, [load_scenes("test", 1)[0]]))
    prefix = SharedPrefix(attachment)
    with prefix.shared():
        prefill(base, VisionSchedule(), inputs)
    step = prefix.steps[0]
    bytes_of_one = sum(t.numel() * t.element_size() for t in (step.after, step.keys, step.values))
    prefix = SharedPrefix(attachment, limit=3 * bytes_of_one)
    with prefix.shared():
        prefill(base, VisionSchedule(), inputs)
        assert sorted(prefix.steps) == [0, 1, 2]
        computed.clear()
        prefill(base, VisionSchedule(), inputs)
    assert [computed[i] for i in range(4)] == [1, 1, 1, 2]
