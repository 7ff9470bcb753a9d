"""Find a model's weights without loading them, and without torch."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub
from safetensors import SafetensorError, safe_open

from latefusion.models.smollm_icons import folder as smollm_icons

EMBEDDED = "embedded"
EMBEDDED_WEIGHTS = Path(__file__).parent / EMBEDDED / "weights"
SMOLLM_ICONS = "smollm_icons"
ADAPTER_CONFIG = "adapter_config.json"  # PEFT writes it into a student's folder
ADAPTER_WEIGHTS = "adapter_model.safetensors"  # beside it
ENTRY = "vision_entry"  # the entry adapter's name in a student's weights
WEIGHTS = ("*.safetensors", "*.bin")
SCHEDULE_KEY = "vision_schedule"  # in a merged student's config.json
BASE = "base_model_name_or_path"  # in it: the path or hub id of the base


def location(path: str) -> str | Path:
    """The folder or hub id that `path` names; `embedded` ships here, `smollm_icons` may not have been assembled yet."""
    if path == SMOLLM_ICONS:
        return smollm_icons.assembled_folder()
    return EMBEDDED_WEIGHTS if path == EMBEDDED else path


def readable(path: str) -> str | Path:
    """The folder or hub id of a model (`location`); assembles `smollm_icons` from its packages if needed.

    Raises:
        FileNotFoundError: a package of `smollm_icons` is missing.
    """
    if path == SMOLLM_ICONS:
        from latefusion.models.smollm_icons.assembly import assemble  # lazy: it needs torch

        return assemble()
    return location(path)


def check_base(path: str, fix: str = "with model.path=PATH") -> None:
    """Raise FileNotFoundError, in one sentence, if `load_base` would not find the weights of `path`.

    Args:
        fix: how the user names another model.
    """
    if not path.strip():
        raise FileNotFoundError(f"the model's name is empty; name a folder, or a hub id, {fix}.")
    if path == EMBEDDED and not (EMBEDDED_WEIGHTS / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no weights in {EMBEDDED_WEIGHTS}; check out models/embedded/weights, or train them with "
            "`python -m latefusion.training.embedded.train_base`."
        )
    if path == SMOLLM_ICONS:
        smollm_icons.check_parts()
        return
    folder = Path(location(path))
    config = folder / "config.json"
    if config.is_file():
        check_is_model(read_config(config), folder, fix)
        check_not_a_student(read_config(config), path)
        return
    if (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(student_as_base(path))
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
        raise FileNotFoundError(
            f"the weights of {path} are not on this machine and cannot be downloaded ({_first_line(error)}); name a "
            f"folder or hub id {fix}, or run `hf download {path}` where there is a network."
        ) from None


def check_is_model(config: dict[str, Any], folder: Path, fix: str) -> None:
    """Raise FileNotFoundError if a folder with a config.json holds no model: another project's, or without weights."""
    if not isinstance(config.get("model_type"), str):
        raise FileNotFoundError(
            f"no model at {folder}: its config.json names no model_type, so it is not a model's; name the folder that "
            f"holds one, or a hub id, {fix}."
        )
    if not any(file for pattern in WEIGHTS for file in folder.glob(pattern)):
        raise FileNotFoundError(
            f"no model at {folder}: it has a config.json but no weights (*.safetensors); download them there, or name "
            f"another folder, or a hub id, {fix}."
        )


def check_not_a_student(config: dict[str, Any], path: str) -> None:
    """Raise ValueError if a model's configuration is that of a student whose adapters were merged.

    As a base it would run dense and without its entry adapter, which it was not trained for.
    """
    if config.get(SCHEDULE_KEY) is not None:
        raise ValueError(student_as_base(path))


def student_as_base(path: str) -> str:
    """The sentence that refuses a trained student where a base is needed."""
    return (
        f"{path} is a trained student, not a base: load it with latefusion.load, evaluate it with "
        f"checkpoints=[{path}], and name the model that it was trained from as the base."
    )


def student_folder(path: str | Path) -> Path:
    """The local folder of a student: `path` itself, or the files of a hub id, downloaded if they are not here.

    Raises:
        FileNotFoundError: the hub id cannot be reached, or does not exist.
    """
    name = str(path)
    if Path(path).exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        return Path(path)
    try:
        return Path(huggingface_hub.snapshot_download(name))
    except Exception as error:  # every way a network, a hub or a name can fail
        raise FileNotFoundError(
            f"no student at {path}: there is no such folder, and it cannot be downloaded as a hub id "
            f"({_first_line(error)})."
        ) from None


def found_student(path: str | Path) -> Path:
    """The local folder of a student, with adapters or whole; `student_folder` says which names may be given.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = student_folder(path)
    if not any((folder / name).is_file() for name in (ADAPTER_CONFIG, "config.json")):
        raise FileNotFoundError(
            f"no model at {path}: it has neither {ADAPTER_CONFIG} nor config.json; name a folder that training wrote."
        )
    return folder


def check_student(path: str | Path) -> None:
    """Check that a student and, if it is adapters, its base can be found.

    Raises:
        FileNotFoundError: one of them cannot, or the model has no schedule.
        ValueError: its configuration is damaged.
    """
    folder = found_student(path)
    if (folder / ADAPTER_CONFIG).is_file():
        check_base_of(folder)
    else:
        check_schedule_in(read_config(folder / "config.json"), folder)


def check_schedule_in(config: dict[str, Any], folder: str | Path) -> None:
    """Raise FileNotFoundError if the configuration of a whole checkpoint has no schedule: it is no student's."""
    if config.get(SCHEDULE_KEY) is None:
        raise FileNotFoundError(
            f"the model at {folder} has no vision schedule; load it with transformers and attach one."
        )


def check_base_of(student: str | Path) -> str:
    """The base that a student's adapters belong to, once it is sure that it can be found.

    Raises:
        FileNotFoundError: it cannot.
        ValueError: the adapters' configuration is damaged.
    """
    base = adapter_settings(student)[BASE]
    check_base(base, fix=f"as {BASE} in {Path(student) / ADAPTER_CONFIG}")
    return base


def check_not_whole(folder: str | Path) -> None:
    """Raise ValueError if a folder holds a whole checkpoint, in which no adapters are left to merge."""
    if not (Path(folder) / ADAPTER_CONFIG).is_file() and (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"{folder} is a whole checkpoint already (all its weights were trained, or adapters were merged into "
            f"them): use it as it is, or publish it with `hf upload NAME {folder}`."
        )


def adapter_settings(student: str | Path) -> dict[str, Any]:
    """The adapter configuration in a student's folder, as plain values.

    Raises:
        ValueError: it is damaged, or names no base.
    """
    file = Path(student) / ADAPTER_CONFIG
    try:
        settings = json.loads(file.read_text())
        if isinstance(settings[BASE], str):
            return settings
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(
        f"{file} is not an adapter configuration with a {BASE}; name a folder that training wrote."
    )


def saved_shapes(student: str | Path) -> dict[str, list[int]]:
    """The shapes of a student's trained weights by name, read from the head of their file.

    Raises:
        FileNotFoundError: the folder has no such file.
        ValueError: it is damaged.
    """
    file = Path(student) / ADAPTER_WEIGHTS
    try:
        with safe_open(file, framework="numpy") as weights:
            return {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise FileNotFoundError(f"no student at {student}: it has no {file.name}.") from None
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); name another checkpoint.") from None


def entry_shapes(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """Of `saved_shapes` those of the entry adapter, by its own names."""
    return {name.partition(f"{ENTRY}.")[2]: shape for name, shape in shapes.items() if f"{ENTRY}." in name}


def decoder_layers(path: str, revision: str | None = None) -> int | None:
    """Number of decoder layers in a model's config.json; None if it is not stated there or the file is not here.

    Raises:
        ValueError: the file is not JSON.
    """
    if path == SMOLLM_ICONS:
        return smollm_icons.LAYERS
    file: object = Path(location(path)) / "config.json"
    if not Path(location(path)).is_dir():
        file = huggingface_hub.try_to_load_from_cache(path, "config.json", revision=revision)
    if not isinstance(file, str | Path):
        return None
    config = read_config(Path(file))
    text = config.get("text_config", config)
    return text.get("num_hidden_layers") if isinstance(text, dict) else None


def check_four_bits(path: str) -> None:
    """Raise ValueError, in one sentence, if the weights of `path` cannot be held in 4 bits."""
    if path in (EMBEDDED, SMOLLM_ICONS):
        raise ValueError(f"model.load_in_4bit=true is for large models; model={path} is small.")
    if find_spec("bitsandbytes") is None:
        raise ValueError("model.load_in_4bit=true needs bitsandbytes: pip install bitsandbytes.")


def read_config(file: Path) -> dict[str, Any]:
    """A model's config.json, as plain values.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        config = json.loads(file.read_text())
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ValueError(
            f"{file} is not a model configuration; name another folder or hub id with model.path=..., or download it "
            "again."
        )
    return config


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
