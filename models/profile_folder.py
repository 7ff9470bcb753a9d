"""The files of a profile's folder that training reads: the schedule and the calibrated entry."""

from __future__ import annotations

from pathlib import Path

import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from latefusion.models.locate import PROFILE_SCHEDULE
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.entry import CalibratedEntry, start_sizes

PROFILE_FILE, SCHEDULE_FILE, ENTRY_FILE = "profile.json", PROFILE_SCHEDULE, "entry.safetensors"
CROSS_FILE = "cross.yaml"  # of frozen vision tokens


def read_schedule(path: str | Path) -> VisionSchedule:
    """The schedule of a profile: its folder, or its `schedule.yaml` or `profile.json`.

    Raises:
        FileNotFoundError, ValueError: it is not a profile, in one sentence.
    """
    file = Path(path) / SCHEDULE_FILE if Path(path).is_dir() else Path(path)
    if file.name == PROFILE_FILE:
        file = file.with_name(SCHEDULE_FILE)
    if not file.is_file():
        raise FileNotFoundError(
            f"no {SCHEDULE_FILE} at {path}; name the folder that eval/profile_model.py wrote: schedule.profile=FOLDER."
        )
    try:
        values = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = str(error).splitlines()[0].strip()
        raise ValueError(f"{file} is not a schedule in YAML ({reason}); profile the model again.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds no schedule; it should have enter, exit and keep.")
    return VisionSchedule.from_dict(values)


def read_cross(path: str | Path) -> VisionSchedule:
    """The schedule of frozen vision tokens of a profile that was made with `cross=true`.

    Args:
        path: the folder, or a file in it.

    Raises:
        FileNotFoundError, ValueError: it has none, in one sentence.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    read_schedule(folder)  # a profile at all
    if not (folder / CROSS_FILE).is_file():
        raise FileNotFoundError(
            f"the profile in {folder} did not look for the layers that read frozen vision tokens; make it again with "
            "cross=true, or give them without a profile: model.cross=[8,12]."
        )
    return read_schedule(folder / CROSS_FILE)


def write_entry(folder: Path, entry: CalibratedEntry, weights: str, processor: str) -> None:
    """Under its name only when it is whole.

    Args:
        weights, processor: fingerprints of the model and of the processor that it was fitted with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{ENTRY_FILE}.unfinished"
    values = {name: weight.contiguous().cpu() for name, weight in entry.state_dict().items()}
    save_file(values, unfinished, metadata={"weights": weights, "processor": processor})
    unfinished.replace(folder / ENTRY_FILE)


def read_entry(path: str | Path, weights: str, processor: str | None = None) -> CalibratedEntry | None:
    """The calibrated entry of a profile, None if it has none.

    Args:
        weights: fingerprint of the model that it is for.
        processor: fingerprint of the processor; None: it is not compared.

    Raises:
        ValueError: it was fitted to other weights or with another processor, or is damaged.
    """
    file = (Path(path) if Path(path).is_dir() else Path(path).parent) / ENTRY_FILE
    if not file.is_file():
        return None
    damaged = ValueError(
        f"the entry in {file} is damaged; profile the model again, or use entry.init=identity."
    )
    try:
        with safe_open(file, "pt") as weights_file:
            metadata = weights_file.metadata() or {}
    except SafetensorError:
        raise damaged from None
    fitted, prepared = metadata.get("weights"), metadata.get("processor")
    if fitted and fitted != weights:
        raise ValueError(
            f"the entry in {file} was fitted to other weights than this model's ({fitted}, not {weights}); profile "
            "this model, or use entry.init=identity."
        )
    if prepared and processor is not None and prepared != processor:
        raise ValueError(
            f"the entry in {file} was fitted with another processor than this run's (image settings, chat template or "
            "tokenizer); profile the model again, or use entry.init=identity."
        )
    values = load_file(file)
    try:
        _, width = values["bias"].shape
        sizes = start_sizes({name: weight.shape for name, weight in values.items()})
        entry = CalibratedEntry(hidden_size=width, **sizes)
        entry.load_state_dict(values)
    except (KeyError, IndexError, ValueError, RuntimeError):  # other names, dimensions or shapes
        raise damaged from None
    return entry
