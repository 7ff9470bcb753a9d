"""Recorded runs of HiDrop (EIT-NLP/HiDrop at fb79d6c8) and ViCA (EIT-NLP/ViCA at 1ca09b9), and ours on the same inputs.

    python tests/helpers/published_runs.py [docs/results/published_runs.json]

prints the largest differences of each folder and attention. The recordings are not part of this repository:
LATEFUSION_PARITY_DIR names their folder (default `../shared/parity` beside the repository).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

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
ATTENTIONS = ("sdpa", "eager")


def tagged(tag: str) -> list[str]:
    """The cases with this tag."""
    return [name for name, case in CASES.items() if tag in case["tags"]]


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


def inference_errors(name: str, attention: str) -> dict[str, float]:
    """Largest differences to a recorded prefill and six decode steps; raises AssertionError where a count differs."""
    run = Case(name, attention)
    ids, logits, trace = run.generated(schedule(run.case))
    assert ids == run.case["generated_ids"]
    if "kept_indices" in run.case:
        assert trace.tokens == run.case["layer_input_len"]
        last = run.case["kept_indices"].get(str(max(map(int, run.case["keep"]), default=-1)))
        assert trace.kept == last
    return {
        "prefill logits": (logits[0] - run.golden["prefill_logits"]).abs().max().item(),
        "decode logits": (logits[1:] - run.golden["decode_logits"]).abs().max().item(),
    }


def training_errors(name: str, attention: str) -> dict[str, float]:
    """Largest differences to a recorded forward and backward pass."""
    run = Case(name, attention)
    labels, embeds = run.inputs["labels"], run.embeds.clone().requires_grad_()
    rows = run.case.get("ranking_rows", [run.case["seq_len"] - 1])
    queries = torch.tensor(rows, dtype=torch.long)[None]  # [1, Q]
    with attach(run.model, schedule(run.case), vision_mask=run.vision) as att, att.queries(queries):
        logits = run.model(inputs_embeds=embeds).logits
    learnt = labels[0, 1:] != -100
    if run.case["loss"] is None:
        text = ~run.vision[0]
        return {"logits without an answer": (logits[0, text] - run.golden["logits"]).abs().max().item()}
    loss = torch.nn.functional.cross_entropy(logits[0, :-1][learnt], labels[0, 1:][learnt])
    loss.backward()
    assert embeds.grad is not None
    gradients = [(embeds.grad[0] - run.golden["grad_embeds"]).abs().max().item()]
    weights = dict(run.model.model.named_parameters())
    for key, golden in run.golden.items():
        if key.startswith("grad.layers."):
            layer, projection = key.removeprefix("grad.layers.").split(".")
            gradient = weights[f"layers.{layer}.self_attn.{projection}.weight"].grad
            gradients.append((golden if gradient is None else gradient - golden).abs().max().item())
    assert len(gradients) > 1
    return {"loss": abs(loss.item() - run.case["loss"]), "gradients": max(gradients)}


def worst() -> dict[str, Any]:
    """The largest difference of each kind, by folder and attention, and the number of runs compared."""
    result: dict[str, Any] = {}
    for tag, errors in (("core", inference_errors), ("train", training_errors)):
        for name in tagged(tag):
            for attention in ATTENTIONS:
                entry = result.setdefault(CASES[name]["folder"].name, {}).setdefault(attention, {"runs": 0})
                entry["runs"] += 1
                for kind, error in errors(name, attention).items():
                    entry[kind] = max(entry.get(kind, 0.0), error)
    return result


if __name__ == "__main__":
    text = json.dumps({"torch": torch.__version__, "worst": worst()}, indent=1)
    print(text)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text + "\n")
