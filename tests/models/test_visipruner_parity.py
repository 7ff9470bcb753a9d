"""VisiPruner against recorded runs of its official code (EIT-NLP/VisiPruner at d778622).

The recordings are not part of this repository: LATEFUSION_PARITY_DIR names their folder (default
`../shared/parity` beside the repository). Without it the tests are skipped; in CI (`CI=true`) that fails.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from latefusion.models.attach import attach
from latefusion.models.policies.visipruner import decision as fusion
from latefusion.models.policies.visipruner.decision import removal_effect
from latefusion.models.policies.visipruner.settings import VisiPruner
from latefusion.models.schedule import VisionSchedule

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("LATEFUSION_PARITY_DIR", ROOT.parent / "shared" / "parity")) / "visipruner"
INDEX = FOLDER / "index.json"
CASES = {case["id"]: case for case in json.loads(INDEX.read_text())["cases"]} if INDEX.exists() else {}
CORE = [name for name, case in CASES.items() if "core" in case["tags"]]
TOLERANCE = 1e-4


def test_recordings_are_there() -> None:
    if CASES:
        return
    message = f"no recorded runs in {FOLDER}; name their parent folder in LATEFUSION_PARITY_DIR."
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


def policy(case: dict) -> VisiPruner | VisionSchedule:
    config = case["pruning_config"]
    if config is None:
        return VisionSchedule()
    thresholds = {name: config[name] for name in ("layer_threshold", "tokens_threshold") if name in config}
    return VisiPruner(
        boundary=config["shallow_mid_layer"],
        stages=tuple(config["mode"]),
        sink_rule={"7b": "first", "13b": "half"}[case["model_size"]],
        **thresholds,
    )


class Recorded:
    """One case run by us: generation, with all hidden states, cosines and norms on the way."""

    def __init__(self, case: dict, policy: VisiPruner | VisionSchedule, patch: pytest.MonkeyPatch):
        self.golden = load_file(FOLDER / case["file"])
        config = LlamaConfig(**case["llama_config"], eos_token_id=None)
        assert config.rope_parameters is not None
        assert config.rope_parameters["rope_theta"] == case["llama_config"]["rope_theta"]
        model = LlamaForCausalLM(config).eval()
        model.load_state_dict(load_file(FOLDER / case["weights"]), strict=True)
        embeds = load_file(FOLDER / case["inputs"])["inputs_embeds"]
        vision = torch.zeros(embeds.shape[:2], dtype=torch.bool)
        vision[:, case["image_start"] :][:, : case["num_vision_tokens"]] = True

        self.effects: list[tuple[Tensor, Tensor]] = []  # cosine and norm of each layer looked at, [1, 1, K]
        self.outputs: list[Tensor] = []  # what every layer computes in every forward, [1, n, H]
        self.final: list[Tensor] = []  # after the final norm, last token, [H]

        def spy(weights: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            self.effects.append(removal_effect(weights, value))
            return self.effects[-1]

        stock = LlamaDecoderLayer.forward

        @wraps(stock)
        def layer_forward(layer: LlamaDecoderLayer, *args: Any, **kwargs: Any) -> Tensor:
            self.outputs.append(
                stock(layer, *args, **kwargs)
            )  # behind the last layer all tokens are put back
            return self.outputs[-1]

        patch.setattr(fusion, "removal_effect", spy)
        patch.setattr(LlamaDecoderLayer, "forward", layer_forward)
        with attach(model, policy, vision_mask=vision) as att, torch.no_grad():
            model.model.norm.register_forward_hook(
                lambda module, args, output: self.final.append(output[0, -1])
            )
            generated = model.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
                max_new_tokens=7,
                do_sample=False,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
            self.trace = att.trace[0]
        self.ids = generated.sequences[0].tolist()
        self.logits = torch.stack(generated.logits)[:, 0]  # [7, V]
        self.kv_lengths = [layer.keys.shape[-2] for layer in generated.past_key_values.layers]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield monkeypatch
    torch.set_num_threads(threads)


def close(got: Tensor, golden: Tensor) -> None:
    torch.testing.assert_close(got, golden, rtol=0, atol=TOLERANCE)


def check_run(case: dict, run: Recorded) -> None:
    """All but the decisions: token counts, cache, ids exactly; logits and hidden states within 1e-4."""
    golden, layers = run.golden, case["llama_config"]["num_hidden_layers"]
    assert list(run.trace.tokens) == case["layer_input_len"]
    assert [output.shape[1] for output in run.outputs[:layers]] == case["layer_input_len"]
    assert run.kv_lengths == case["kv_len_decode"]
    assert run.ids == case["generated_ids"]
    close(run.logits[0], golden["prefill_logits"])
    close(run.logits[1:], golden["decode_logits"])
    close(torch.stack([output[0, -1] for output in run.outputs[:layers]]), golden["prefill_hidden"])
    close(
        torch.stack([output.square().mean().sqrt() for output in run.outputs[:layers]]),
        golden["prefill_hidden_rms"],
    )
    decoded = torch.stack([output[0, -1] for output in run.outputs[layers:]])
    close(decoded.view(golden["decode_hidden"].shape), golden["decode_hidden"])
    close(run.final[0], golden["prefill_final_hidden"])
    close(torch.stack(run.final[1:]), golden["decode_final_hidden"])
    for name, expected in golden.items():
        if name.startswith("full_hidden."):
            close(run.outputs[int(name.split(".")[1])][0], expected)


def check_decisions(case: dict, run: Recorded) -> None:
    """Fusion, kept tokens and exit exactly; the cosines and norms behind them within 1e-4."""
    golden, start, count = run.golden, case["image_start"], case["num_vision_tokens"]
    assert run.trace.fusion_layer == case["fusion_layer"]
    assert run.trace.exit_layer == case["exit_layer"]
    if case["pruning_config"] is None:
        return
    first = case["pruning_config"]["shallow_mid_layer"] + 1
    for name, expected in golden.items():
        kind, _, layer = name.partition(".")
        if kind not in ("select_cos", "select_l2", "exit_cos") or not len(expected):
            continue
        cosine, norm = run.effects[int(layer) - first]
        effect = norm if kind == "select_l2" else cosine
        close(effect[0, 0, start : start + (len(expected) if kind == "exit_cos" else count)], expected)


@pytest.mark.parametrize("name", CORE)
def test_core_case(name: str, quiet: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    run = Recorded(case, policy(case), quiet)
    check_run(case, run)
    check_decisions(case, run)
    kept = run.trace.kept
    assert (None if kept is None else list(kept)) == case["kept_indices"]


@pytest.mark.skipif(not CASES, reason="no recorded runs")
def test_fusion_in_the_last_layer_drops_nothing(quiet: pytest.MonkeyPatch) -> None:
    case = CASES["v13_fusion_last_layer"]
    run = Recorded(case, policy(case), quiet)
    check_run(case, run)
    check_decisions(case, run)
    norms = run.effects[-1][1][0, 0]
    critical = (norms > case["pruning_config"]["tokens_threshold"]).nonzero().flatten().tolist()
    vision = range(case["image_start"], case["image_start"] + case["num_vision_tokens"])
    assert [i for i in critical if i in vision] == case["kept_indices"]


@pytest.mark.skipif(not CASES, reason="no recorded runs")
def test_no_critical_token_drops_all(quiet: pytest.MonkeyPatch) -> None:
    case = CASES["v14_gqa_keep_zero"]
    run = Recorded(case, policy(case), quiet)
    check_run(case, run)
    check_decisions(case, run)
    assert list(run.trace.kept) == []
    assert len(run.effects) == len(case["select_checks"]), "with nothing kept there is nothing to look at"


@pytest.mark.skipif(not CASES, reason="no recorded runs")
def test_all_tokens_critical_still_exits(quiet: pytest.MonkeyPatch) -> None:
    """The official code never exits here, though it has counted to 2 after layer 14; we do, at layer 15."""
    case = CASES["v15_gqa_keep_all_no_exit"]
    run = Recorded(case, policy(case), quiet)
    layers, before = case["llama_config"]["num_hidden_layers"], 15
    assert run.trace.fusion_layer == case["fusion_layer"]
    assert list(run.trace.kept) == case["kept_indices"]
    assert run.trace.exit_layer == before
    text = case["seq_len"] - case["num_vision_tokens"]
    assert list(run.trace.tokens) == case["layer_input_len"][:before] + [text] * (layers - before)
    close(
        torch.stack([output[0, -1] for output in run.outputs[:before]]), run.golden["prefill_hidden"][:before]
    )


@pytest.mark.skipif(not CASES, reason="no recorded runs")
def test_deep_without_middle_is_an_error_here_and_dense_there(quiet: pytest.MonkeyPatch) -> None:
    case = CASES["v16_deep_alone"]
    with pytest.raises(ValueError, match="add 'middle'"):
        VisiPruner(stages=tuple(case["pruning_config"]["mode"]))
    check_run(case, Recorded(case, VisionSchedule(), quiet))
