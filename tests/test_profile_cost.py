"""What a profile costs, in FLOPs and bytes that torch counts, against a prefill of the same prompts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from families import LAYERS, shared
from planted import planted
from test_profile_causal import batch_of
from test_profile_planted import BOUND
from test_profile_planted import batch_of as planted_batch
from torch.utils.flop_counter import FlopCounterMode

from latefusion.eval.memory import peak_bytes
from latefusion.eval.profiling.causal import Runner, knock_outs
from latefusion.eval.profiling.continued import Continued
from latefusion.eval.profiling.cost import expected
from latefusion.eval.profiling.ledger import Ledger
from latefusion.eval.profiling.measure import Measurer
from latefusion.eval.profiling.study import Study, Wishes
from latefusion.models.attach import attach
from latefusion.models.calibration import fit_entry
from latefusion.models.flops import layer_flops
from latefusion.models.schedule import VisionSchedule

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
PROMPTS = [  # mostly vision, as in any MLLM
    ("llava", "t IIIIIIII tttt"),
    ("llava", "t IIII t IIII tttt"),  # what cannot be continued
    ("qwen3_vl", "tItItItIt tttt"),
    ("gemma3", "t I tttt"),
    ("gemma3", "t IIIIIIII tttt"),  # longer than the window of its local attention
    ("paligemma", "IIIIIIII tttt"),
]


@pytest.mark.parametrize(("family", "row"), PROMPTS)
def test_knock_outs_take_two_prefills_a_layer_and_the_memory_of_one(family: str, row: str) -> None:
    """At most 2 L + 3 prefills for L layers, and at most 1.3 times what a prefill holds."""
    model, batch = shared(family), batch_of(family, [row] * 2)

    def prefill() -> Any:
        with torch.no_grad():
            return model(**batch.fresh(), use_cache=True, logits_to_keep=batch.columns)

    wanted, cpu = knock_outs(LAYERS), torch.device("cpu")
    with attach(model, VisionSchedule()) as attachment:
        runner = Runner(model, attachment, batch)
        with FlopCounterMode(display=False) as one:
            prefill()
        with FlopCounterMode(display=False) as every:
            runner.effects(wanted)
        assert every.get_total_flops() <= (2 * LAYERS + 3) * one.get_total_flops()
        announced = expected(
            model.config, *batch.counts, continued=isinstance(runner.way()[-1], Continued)
        ).knock_outs
        assert every.get_total_flops() <= 1.08 * announced * one.get_total_flops()
        assert peak_bytes(lambda: runner.effects(wanted), cpu) <= 1.3 * peak_bytes(prefill, cpu)


@pytest.mark.parametrize(("family", "row"), [("gemma3", "t I tttt"), ("paligemma", "IIII tttt")])
def test_layers_are_computed_as_often_as_their_knock_outs_need(family: str, row: str) -> None:
    """Counted layer by layer: layer i belongs to the ways that part at or before it."""
    model, batch, calls = shared(family), batch_of(family, [row] * 2), Counter()
    mlps = [layer.mlp.register_forward_hook(lambda m, a, out, i=i: calls.update({i: out.shape[1]}))
            for i, layer in enumerate(model.get_decoder().layers)]  # fmt: skip
    length = batch.labels.shape[1]
    with attach(model, VisionSchedule()) as attachment:
        Runner(model, attachment, batch).effects(knock_outs(LAYERS))
    for handle in mlps:
        handle.remove()
    for i, tokens in calls.items():
        assert tokens <= length * (5 * i + 6), i
    assert calls[0] < 6 * length


def test_the_number_that_is_announced_grows_by_two_a_layer() -> None:
    """For 5 to 20% text: 2 L prefills and a constant; where text is most of a prompt, up to 2.5 L."""
    config = shared("llava").config.get_text_config()
    layers = config.num_hidden_layers
    try:
        for text in (30, 60, 120):
            for follows in (True, False):
                costs = {}
                for config.num_hidden_layers in (16, 32, 64):
                    costs[config.num_hidden_layers] = expected(config, text, 600, continued=follows).total
                share = layer_flops(config, text) / layer_flops(config, text + 600)
                assert (costs[64] - costs[32]) / 32 <= (2 if follows else 2 + share / 2 + 1e-9)
                assert costs[32] <= 2 * 32 + 32
    finally:
        config.num_hidden_layers = layers


def test_the_cost_that_is_announced_is_an_upper_bound_for_what_is_measured(tmp_path: Path) -> None:
    model = planted("llava", 1, 5)
    batch = planted_batch(model, images=8)
    with attach(model, VisionSchedule()) as attachment:
        runner = Runner(model, attachment, batch)
        with FlopCounterMode(display=False) as one:
            runner.answers(VisionSchedule())
        with FlopCounterMode(display=False) as all_of_it:
            sources = [(tuple(range(batch.size)), lambda: batch)]
            measurer = Measurer(model, attachment, sources, Ledger(tmp_path / "m.jsonl", {}))
            Study(measurer, Wishes(bound=BOUND), True, *batch.counts).run(
                lambda enter: fit_entry(attachment, [(batch.fresh(), batch.vision)], enter)
            )
    announced = expected(model.config, *batch.counts, continued=True).total
    assert all_of_it.get_total_flops() <= 1.05 * announced * one.get_total_flops()
    assert announced <= 2 * 6 + 22
