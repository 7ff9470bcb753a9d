"""The default base model: a small LLaVA that answers questions about `scenes`, trained by `train_base.py`."""

from __future__ import annotations

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from latefusion.models.locate import EMBEDDED_WEIGHTS

WEIGHTS = EMBEDDED_WEIGHTS


def load_base(dtype: torch.dtype | None = None) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The trained base and its processor; `dtype` None keeps the bfloat16 of the file."""
    if not (WEIGHTS / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no weights in {WEIGHTS}; check out models/embedded/weights, or train them with "
            "`python -m latefusion.training.embedded.train_base`"
        )
    model = LlavaForConditionalGeneration.from_pretrained(WEIGHTS, dtype=dtype or torch.bfloat16)
    return model.eval(), AutoProcessor.from_pretrained(WEIGHTS)
