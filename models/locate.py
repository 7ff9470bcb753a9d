"""Where a model is: whether its weights can be found, said without loading them or torch."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub

EMBEDDED = "embedded"
EMBEDDED_WEIGHTS = Path(__file__).parent / EMBEDDED / "weights"
ADAPTER_CONFIG = "adapter_config.json"  # what PEFT writes into a student's folder


def check_base(path: str, fix: str = "with model.path=PATH") -> None:
    """Raise FileNotFoundError, in one sentence, where `load_base` cannot find the weights of `path`.

    Args:
        fix: how another can be named.
    """
    if path == EMBEDDED or (Path(path) / "config.json").is_file():
        return
    if Path(path).exists():
        raise FileNotFoundError(
            f"no model at {path}: it has no config.json; name the folder that holds it, or a hub id, {fix}."
        )
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        home = " (the shell did not expand ~; write $HOME)" if path.startswith("~") else ""
        raise FileNotFoundError(
            f"no model at {path}: there is no such folder{home}; name one, or a hub id, {fix}."
        )
    if isinstance(huggingface_hub.try_to_load_from_cache(path, "config.json"), str):
        return
    try:
        huggingface_hub.HfApi().model_info(path, timeout=10)
    except Exception as error:  # every way a network, a hub or a name can fail
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"the weights of {path} are not on this machine and cannot be downloaded ({reason}); name a folder or hub "
            f"id {fix}, or run `hf download {path}` where there is a network."
        ) from None


def check_base_of(student: str | Path) -> str:
    """The base that a student's adapters are for, where it can be found; raises as `check_base` does."""
    file = Path(student) / ADAPTER_CONFIG
    base = json.loads(file.read_text())["base_model_name_or_path"]
    check_base(base, fix=f"as base_model_name_or_path in {file}")
    return base


def known_layers(path: str, revision: str | None = None) -> int | None:
    """Decoder layers of a model, as its config.json states them; None: it leaves them to its class, or is not here.

    Raises:
        ValueError: the file is no JSON.
    """
    file: object = EMBEDDED_WEIGHTS / "config.json" if path == EMBEDDED else Path(path) / "config.json"
    if path != EMBEDDED and not Path(path).is_dir():
        file = huggingface_hub.try_to_load_from_cache(path, "config.json", revision=revision)
    if not isinstance(file, str | Path):
        return None
    try:
        said = json.loads(Path(file).read_text())
        return said.get("text_config", said).get("num_hidden_layers")
    except (ValueError, AttributeError):
        raise ValueError(
            f"{file} is no model's configuration; name another folder or hub id with model.path=..., or "
            "download it again."
        ) from None


def check_four_bits(path: str) -> None:
    """Raise ValueError, in one sentence, where the weights of `path` cannot be held in 4 bits."""
    if path == EMBEDDED:
        raise ValueError("model.load_in_4bit=true is for large models; model=embedded has 5 million weights.")
    if find_spec("bitsandbytes") is None:
        raise ValueError("model.load_in_4bit=true needs bitsandbytes: pip install bitsandbytes.")
