"""The trained parts as a file: LoRA and projector in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from latefusion.training.smollm_icons.learner import Learner

WEIGHTS_FILE = "model.safetensors"


def save_weights(learner: Learner, folder: Path) -> None:
    """Write what was trained; nothing of a frozen language model."""
    folder.mkdir(parents=True, exist_ok=True)
    frozen = not any(p.requires_grad for p in learner.trained.values())
    tensors = {} if frozen else {f"lora.{name}": p for name, p in learner.masters.items()}
    tensors |= {f"projector.{name}": p for name, p in learner.projector.state_dict().items()}
    save_file(
        {name: p.detach().cpu().bfloat16().contiguous() for name, p in tensors.items()}, folder / WEIGHTS_FILE
    )


def read_weights(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Read the state that `Learner.load_state` takes."""
    parts: dict[str, dict[str, Any]] = {"lora": {}, "projector": {}}
    for name, tensor in load_file(folder / WEIGHTS_FILE).items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor.float()
    return parts
