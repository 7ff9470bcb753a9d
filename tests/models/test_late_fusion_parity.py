"""Schedules against recorded runs of HiDrop (EIT-NLP/HiDrop at fb79d6c8) and ViCA (EIT-NLP/ViCA at 1ca09b9).

The recordings are not part of this repository: LATEFUSION_PARITY_DIR names their folder (default
`../shared/parity` beside the repository). Without it the tests are skipped; in CI (`CI=true`) that fails.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from latefusion.models.attach import attach
from latefusion.models.schedule import VisionSchedule

ROOT = Path(__file__).resolve().parents[2]
PARITY = Path(os.environ.get("LATEFUSION_PARITY_DIR", ROOT.parent / "shared" / "parity"))
INDICES = [index for name in ("hidrop", "vica") if (index := PARITY / name / "index.json").exists()]
CASES = {
    case["id"]: {**case, "folder": index.parent}
    for index in INDICES
    for case in json.loads(index.read_text())["cases"]
}
TOLERANCE = 1e-4


def tagged(tag: str) -> list[str]:
    return [name for name, case in CASES.items() if tag in case["tags"]]


def test_recordings_are_there() -> None:
    if CASES:
        return
    message = f"no recorded runs in {PARITY}; name their folder in LATEFUSION_PARITY_DIR."
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


def schedule(case: dict[str, Any]) -> VisionSchedule:
    if "reading_layers" in case:
        return VisionSchedule(cross=case["reading_layers"], freeze_prefix=case["model_size"] == "7b")
    keep = {int(layer): k for layer, k in case["keep"].items()}
    return VisionSchedule(enter=case["enter"], exit=case["exit"], keep=keep, ranking="hidrop")


class Case:
    """One recorded case: the model, its inputs, what is vision, and the golden tensors."""

    def __init__(self, name: str, attention: str):
        self.case = case = CASES[name]
        folder = case["folder"]
        config = LlamaConfig(**case["llama_config"], eos_token_id=None, attn_implementation=attention)
        self.model = LlamaForCausalLM(config).eval()
        self.model.load_state_dict(load_file(folder / case["weights"]), strict=True)
        self.inputs = load_file(folder / case["inputs"])
        self.embeds = self.inputs["inputs_embeds"]
        self.golden = load_file(folder / case["file"])
        kinds = [kind == "image" for kind, length in case["layout"] for _ in range(length)]
        self.vision = torch.tensor(kinds)[None]  # bool [1, N]

    def generated(self, policy: VisionSchedule) -> tuple[list[int], Tensor, Any]:
        """The greedy ids, the logits `[7, V]` after prefill and each decode step, and the trace."""
        steps: list[Tensor] = []
        with attach(self.model, policy, vision_mask=self.vision) as att, torch.no_grad():
            out = self.model(inputs_embeds=self.embeds, use_cache=True)
            trace = att.trace[0]
            for _ in range(6):
                steps.append(out.logits[0, -1])
                token = steps[-1].argmax()[None, None]
                out = self.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits[0, -1])
        return [int(logits.argmax()) for logits in steps], torch.stack(steps), trace


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", tagged("core"))
def test_prefill_and_decode(name: str, attention: str) -> None:
    run = Case(name, attention)
    ids, logits, trace = run.generated(schedule(run.case))
    golden = torch.cat([run.golden["prefill_logits"][None], run.golden["decode_logits"]])
    assert ids == run.case["generated_ids"]
    assert (logits - golden).abs().max() < TOLERANCE
    if "kept_indices" in run.case:
        assert trace.tokens == run.case["layer_input_len"]
        last = run.case["kept_indices"].get(str(max(map(int, run.case["keep"]), default=-1)))
        assert trace.kept == last


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", tagged("train"))
def test_training_loss_and_gradients(name: str, attention: str) -> None:
    run = Case(name, attention)
    labels, embeds = run.inputs["labels"], run.embeds.clone().requires_grad_()
    rows = run.case.get("ranking_rows", [run.case["seq_len"] - 1])
    queries = torch.tensor(rows, dtype=torch.long)[None]  # [1, Q]
    with attach(run.model, schedule(run.case), vision_mask=run.vision) as att, att.queries(queries):
        logits = run.model(inputs_embeds=embeds).logits
    learnt = labels[0, 1:] != -100
    if run.case["loss"] is None:
        text = ~run.vision[0]
        assert (logits[0, text] - run.golden["logits"]).abs().max() < TOLERANCE
        return
    loss = torch.nn.functional.cross_entropy(logits[0, :-1][learnt], labels[0, 1:][learnt])
    assert abs(loss.item() - run.case["loss"]) < TOLERANCE
    loss.backward()
    assert (embeds.grad[0] - run.golden["grad_embeds"]).abs().max() < TOLERANCE
    weights = dict(run.model.model.named_parameters())
    compared = 0
    for name, golden in run.golden.items():
        if name.startswith("grad.layers."):
            layer, projection = name.removeprefix("grad.layers.").split(".")
            gradient = weights[f"layers.{layer}.self_attn.{projection}.weight"].grad
            gradient = torch.zeros_like(golden) if gradient is None else gradient
            assert (gradient - golden).abs().max() < TOLERANCE
            compared += 1
    assert compared


# ---------------------------------------------------------------- corners of the official code: what ours does there


@pytest.mark.parametrize("name", ["h09_two_images", "c11_13b_two_images"])
def test_every_image_is_scheduled(name: str) -> None:
    """The official code schedules the first image alone, and the second runs through every layer like text."""
    if name not in CASES:
        pytest.skip("no recorded runs")
    run = Case(name, "sdpa")
    policy = schedule(run.case)
    _, logits, trace = run.generated(policy)
    layers, both = run.case["llama_config"]["num_hidden_layers"], int(run.vision.sum())
    assert trace.vision == policy.vision_tokens(layers, both)
    assert (logits[0] - run.golden["prefill_logits"]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["h01_text_only", "c12_13b_text_only"])
def test_a_prompt_without_an_image_is_the_stock_models(name: str) -> None:
    """ViCA's masked path drops the attention output of the whole prompt there, its accelerated path fails."""
    if name not in CASES:
        pytest.skip("no recorded runs")
    run = Case(name, "sdpa")
    with torch.no_grad():
        stock = run.model(inputs_embeds=run.embeds).logits[0, -1]
    assert torch.equal(run.generated(schedule(run.case))[1][0], stock)


@pytest.mark.parametrize("name", ["c13_3b_flash", "c14_13b_flash"])
def test_one_rule_whatever_the_kernel(name: str) -> None:
    """The official accelerated path under flash attention runs by another rule than the weights were trained with."""
    if name not in CASES:
        pytest.skip("no recorded runs")
    runs = [Case(name, attention) for attention in ("sdpa", "eager")]
    ours = [run.generated(schedule(run.case))[1] for run in runs]
    assert (ours[0] - ours[1]).abs().max() < TOLERANCE
    assert (ours[0][0] - runs[0].golden["prefill_logits"]).abs().max() > 0.1
