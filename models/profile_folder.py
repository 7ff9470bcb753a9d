"""The calibrated entry in a profile's folder; models/profile_schedule.py reads its schedules."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from latefusion.models.student.entry import CalibratedEntry, start_sizes

ENTRY_FILE = "entry.safetensors"


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
