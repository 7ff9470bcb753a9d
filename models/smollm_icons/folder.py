"""Where the assembled base is kept, and whether it can be assembled; without torch."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path

from latefusion.models.smollm_icons import WEIGHTS
from latefusion.models.smollm_icons.packages import PACKAGES, check_packages

LAYERS = 30  # decoder layers of SmolLM2-135M
CODE = ("assembly.py", "tower.py")  # what the assembled files follow from, beside weights and packages


def check_parts(weights: Path = WEIGHTS) -> None:
    """Raise FileNotFoundError, in one sentence, if the base is not assembled and cannot be."""
    if not (weights / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no weights in {weights}; check out models/smollm_icons/weights, or train them with "
            "`python -m latefusion.training.smollm_icons.train_base`."
        )
    check_packages()


def assembled_folder(weights: Path = WEIGHTS) -> Path:
    """The folder of the assembled base, there or not; its name changes with the weights, the packages and the code."""
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    file = weights / "model.safetensors"
    return cached / "latefusion" / f"smollm_icons-{_digest(file, file.stat().st_mtime_ns)}"


@cache
def _digest(file: Path, changed: int) -> str:
    """Hash of a weights file, the packages and the code; `changed` is when the file last was."""
    digest = hashlib.blake2b(file.read_bytes(), digest_size=6)
    digest.update(repr(sorted(PACKAGES.values())).encode())
    for name in CODE:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()
