"""Whole late-fusion checkpoints: a model type of their own, so that no program runs one dense without a word.

`config.json` says `"model_type": "latefusion"` and which type the base has, and prefixes the architecture's name. In
memory the model and its configuration are the base's, as everything in transformers that asks for a type expects; only
what is written differs (`WrittenAsLateFusion`).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from latefusion.models.locate import SCHEDULE_KEY, check_is_model, check_schedule_in, read_config
from latefusion.models.schedule import VisionSchedule

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, ProcessorMixin

MODEL_TYPE = "latefusion"
BASE_TYPE = "base_model_type"  # in config.json: the type of the model that was trained
PREFIX = "LateFusion"  # before the base's names of classes
ENTRY_KEY = "vision_entry"  # in config.json the entry adapter's sizes; before the names of its tensors
LOOSE_ENTRY = f"{ENTRY_KEY}.safetensors"  # where checkpoints of an earlier format keep the entry adapter
CODE = "latefusion_type.py"  # what trust_remote_code runs
CODE_TEXT = f'''"""The model type of this checkpoint; needs `pip install latefusion`."""

from {__name__} import LateFusionConfig
'''


class WrittenAsLateFusion:
    """A mixin for the configuration class of a base: `config.json` is written with the model type `latefusion`."""

    def to_json_string(self, use_diff: bool = True) -> str:
        """The configuration as `config.json` holds it."""
        values = json.loads(super().to_json_string(use_diff))  # type: ignore[misc]
        values[BASE_TYPE], values["model_type"] = values["model_type"], MODEL_TYPE
        names = values.get("architectures") or ()
        values["architectures"] = [PREFIX + name.removeprefix(PREFIX) for name in names]
        values["auto_map"] = {"AutoConfig": f"{Path(CODE).stem}.{LateFusionConfig.__name__}"}
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: str | Path, **settings: Any) -> None:
        """Write `config.json`, and beside it the file that loads the package for those who trust the checkpoint."""
        super().save_pretrained(save_directory, **settings)  # type: ignore[misc]
        (Path(save_directory) / CODE).write_text(CODE_TEXT)


class LateFusionConfig(PreTrainedConfig):
    """What transformers finds under the type `latefusion`; it makes a configuration of the base's class."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **settings: Any) -> Any:
        """The configuration in a checkpoint's `config.json`, and its model made known to transformers.

        Raises:
            ValueError: it has no schedule, or its base is not an image-text model that this transformers has.
        """
        from transformers import AutoModelForImageTextToText  # lazy: brings torch

        values = {name: value for name, value in config_dict.items() if name != "auto_map"}
        schedule, base = values.get(SCHEDULE_KEY), values.pop(BASE_TYPE, None)
        if schedule is None:
            raise ValueError(f"a checkpoint of type {MODEL_TYPE} needs a {SCHEDULE_KEY} in its config.json.")
        VisionSchedule.from_dict(schedule)
        if base not in CONFIG_MAPPING:
            raise ValueError(
                f"the base of this student is of type {base!r}, which this transformers does not have."
            )
        stock: Any = CONFIG_MAPPING[base]
        kind = written_config(stock)
        AutoModelForImageTextToText.register(kind, model_class(kind), exist_ok=True)
        return kind.from_dict({**values, "model_type": base}, **settings)


@cache
def written_config(stock: Any) -> Any:
    """The configuration class `stock`, written as `latefusion`."""
    if issubclass(stock, WrittenAsLateFusion):
        return stock
    return type(PREFIX + stock.__name__, (WrittenAsLateFusion, stock), {"__module__": __name__})


def __getattr__(name: str) -> Any:
    """Find the classes of `written_config` by name: an engine sends configurations between processes."""
    import transformers

    stock = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if isinstance(stock, type) and issubclass(stock, PreTrainedConfig):
        kind: Any = stock
        return written_config(kind)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def model_class(config: Any) -> Any:
    """The class that loads a checkpoint with a configuration of this class of `written_config`.

    Raises:
        ValueError: it is not that of an image-text model.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    base = config.__bases__[1]
    if base not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(f"{base.model_type} is not an image-text model.")
    stock: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[base]
    # transformers looks for a family's helpers and for its names of weights by module and by name
    return type(stock.__name__, (_Loaded, stock), {"config_class": config, "__module__": stock.__module__})


class _Loaded:
    """Mixed into the base's model class to load: with the entry adapter, and with the schedule attached."""

    _keep_in_fp32_modules_strict = frozenset({ENTRY_KEY})

    def __init__(self, config: Any, *args: Any, **settings: Any):
        from latefusion.models.student.entry import install_entry

        super().__init__(config, *args, **settings)  # type: ignore[call-arg]
        if sizes := getattr(config, ENTRY_KEY, None):
            install_entry(self, **sizes)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(
        cls, path: Any, *args: Any, output_loading_info: bool = False, **settings: Any
    ) -> Any:
        """Load a checkpoint as transformers does, and attach its schedule.

        Raises:
            ValueError: the entry adapter's weights are not there.
        """
        from latefusion.models.attach import attach

        model, info = super().from_pretrained(path, *args, output_loading_info=True, **settings)  # type: ignore[misc]
        model.__class__ = cls.__bases__[1]
        lost = [name for name in info["missing_keys"] if name.startswith(f"{ENTRY_KEY}.")]
        if lost and (Path(path) / LOOSE_ENTRY).is_file():
            load_entry(model, path)
        elif lost:
            raise ValueError(_without_entry(path, getattr(model.config, ENTRY_KEY), None))
        attach(model, VisionSchedule.from_dict(getattr(model.config, SCHEDULE_KEY)))
        return (model, info) if output_loading_info else model


def record(model: PreTrainedModel, schedule: VisionSchedule) -> None:
    """Write schedule and entry adapter's sizes into the model's configuration, which is saved as `latefusion` now."""
    from latefusion.models.student.entry import entry_of

    entry: Any = entry_of(model)
    setattr(model.config, SCHEDULE_KEY, schedule.to_dict())
    setattr(model.config, ENTRY_KEY, None if entry is None else entry.sizes())
    kind: Any = type(model.config)
    model.config.__class__ = written_config(kind)


def forget(model: PreTrainedModel) -> None:
    """Take back what `record` wrote, and the entry adapter: what is saved now is a stock checkpoint."""
    for name in (SCHEDULE_KEY, ENTRY_KEY):
        if hasattr(model.config, name):
            delattr(model.config, name)
    if isinstance(model.config, WrittenAsLateFusion):
        model.config.__class__ = type(model.config).__bases__[1]
    model._modules.pop(ENTRY_KEY, None)


def load_whole(folder: Path, *, dtype: torch.dtype) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a whole checkpoint with its schedule attached, and its processor.

    Raises:
        FileNotFoundError: it is not a late-fusion model, or its weights or its processor cannot be read.
        ValueError: its files contradict each other.
    """
    from latefusion.models.base_model import load_processor, read_weights

    values = read_config(folder / "config.json")
    check_is_model(values, folder, "in latefusion.load(PATH)")
    check_schedule_in(values, folder)
    if values.get("model_type") != MODEL_TYPE:  # of an earlier format
        values[BASE_TYPE] = values.get("model_type")
    values[ENTRY_KEY] = _entry_sizes(folder, values.get(ENTRY_KEY))
    config = LateFusionConfig.from_dict(values)
    processor = load_processor(str(folder))
    kind: Any = type(config)
    return read_weights(model_class(kind), str(folder), dtype=dtype, config=config), processor


def load_entry(model: PreTrainedModel, folder: str | Path) -> None:
    """Load the weights of the model's entry adapter, if it has one, from a whole checkpoint."""
    from latefusion.models.student.entry import entry_of

    entry = entry_of(model)
    if entry is not None:
        entry.load_state_dict(_entry_weights(Path(folder)))


def _entry_sizes(folder: Path, sizes: Any) -> dict[str, Any] | None:
    """The sizes of the entry adapter in a checkpoint's files, once it is sure that they are those in `config.json`.

    Raises:
        ValueError: the configuration and the weights do not agree whether there is one, and of which sizes.
    """
    from latefusion.models.student.entry import entry_sizes

    shapes = {name: weight.shape for name, weight in _entry_weights(folder).items()}
    saved = entry_sizes(shapes) if shapes else None
    if sizes is not None and sizes != saved:
        raise ValueError(_without_entry(folder, sizes, saved))
    return saved


def _without_entry(folder: Any, sizes: Any, saved: dict[str, Any] | None) -> str:
    state = (
        f"holds one with {saved}" if saved else "lacks its weights: transformers alone drops them as it loads"
    )
    return (
        f"the student at {folder} needs its entry adapter ({sizes}), but the checkpoint {state}; use the folder that "
        "training/export.py or training wrote."
    )


def _entry_weights(folder: Path) -> dict[str, Tensor]:
    """The entry adapter's tensors; those of an earlier format have a file of their own."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    if (folder / LOOSE_ENTRY).is_file():
        return load_file(folder / LOOSE_ENTRY)
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            names = [name for name in weights.keys() if name.startswith(f"{ENTRY_KEY}.")]  # noqa: SIM118
            tensors.update({name.removeprefix(f"{ENTRY_KEY}."): weights.get_tensor(name) for name in names})
    return tensors
