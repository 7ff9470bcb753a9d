"""A tiny random model in the likeness of the embedded one, and configurations that run on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from latefusion.models.student.build import Student
from latefusion.recipes.check import check_config
from latefusion.recipes.compose import with_one_length
from latefusion.recipes.schema import RECIPES, Config
from latefusion.training import assemble
from latefusion.training.embedded.architecture import build_config, build_model
from latefusion.training.embedded.vocabulary import build_processor

VISION = 4  # tokens an image


def tiny_base(*, layers: int = 6, seed: int = 0) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Float32; every weight random, so that each layer and each token matters."""
    config = build_config(
        image_size=16, patch_size=8, tower_width=32, tower_layers=1, width=32, layers=layers, heads=2, mlp=32
    )
    model = build_model(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.4, generator=generator)
    return model.eval(), build_processor(image_size=16, patch_size=8)


def save_tiny_base(folder: Path, *, layers: int = 6, seed: int = 0) -> Path:
    model, processor = tiny_base(layers=layers, seed=seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(RECIPES.resolve()), version_base="1.3"):
        return compose("config", with_one_length(overrides))


def configured(*overrides: str) -> Config:
    return check_config(composed(*overrides))


BAND = ("schedule.enter=2", "schedule.exit=5", "schedule.keep={4: 2}")
# a random teacher knows no answer: its KL counts fully all the same
SMALL = ("train.dtype=float32", "lora.r=4", "entry.rank=4", "entry.init=identity", "kl.trust=all")


def tiny_student(*overrides: str) -> tuple[Config, Student]:
    """A student of 6 layers whose vision tokens live in layers 2 to 4, 2 of them in layer 4."""
    config = configured(*BAND, *SMALL, *overrides)
    return config, assemble.student_from(config, *tiny_base())


@torch.no_grad()
def shake(student: Student, scale: float = 0.3) -> None:
    """Random trainable weights: fresh LoRA and entry adapters change nothing."""
    generator = torch.Generator().manual_seed(1)
    for weight in student.model.parameters():
        if weight.requires_grad:  # drawn on the CPU, wherever the weight is
            weight.copy_(torch.empty(weight.shape).normal_(0, scale, generator=generator))


def student_inputs(student: Student, samples: list[Any]) -> dict[str, torch.Tensor]:
    """The collated batch without labels and queries: what a forward takes."""
    batch = assemble.collator_of(student)(samples)
    return {k: v for k, v in batch.items() if k not in ("labels", "queries")}


def student_logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits `[B, T, V]` in eval mode, without gradients."""
    with torch.no_grad():
        return model.eval()(**inputs).logits
