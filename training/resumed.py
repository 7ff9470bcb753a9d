"""Whether a run that goes on is the run that began: its configuration against the one it left. Without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from latefusion.recipes.compose import stored_values

CONFIG = "config.yaml"  # that a run leaves in its folder
FREE = {  # what may change: where and how fast it computes, what it says, how long it goes on
    *("resume", "overwrite", "output_dir", "name", "engine.processes", "kl.cache", "data.eval_path"),
    *("train.steps", "train.threads", "train.workers", "train.prefetch", "train.trackers", "train.log_every"),
    *("train.save_every", "train.keep_checkpoints", "train.on_nonfinite", "train.gradient_checkpointing"),
    *("train.batch_size", "train.accumulation"),  # their product is checked with the checkpoint
}
PLACES = ("model.path", "kl.model", "data.path", "data.images", "init")  # what lies there may have moved
WHOLE = ("keep", "cross", "processor", "visipruner")  # dictionaries that are values


def check_unchanged(cfg: DictConfig, output_dir: str | Path) -> list[str]:
    """Compare a run's configuration with that of the run in its folder, if that is there.

    Returns:
        Lines to print: of places that are others now.

    Raises:
        ValueError: something else is another, so that its checkpoints would not load, or another run go on.
    """
    file = Path(output_dir) / CONFIG
    if not file.is_file():
        return []
    before, now = (dict(_values(_plain(found))) for found in (stored_values(file), cfg))
    skip = {*FREE, "schedule.profile"}
    if now.get("schedule.auto") or now.get("schedule.profile") is not None:
        skip |= {"schedule.enter", "schedule.exit", "schedule.keep"}  # the profile's, which the run settled
    changed = [
        key
        for key in before.keys() & now.keys()
        if before[key] != now[key] and key not in skip and not key.startswith("eval.")
    ]
    wrong = sorted(key for key in changed if key not in PLACES)
    if wrong:
        said = ", ".join(f"{key}={now[key]} (it had {before[key]})" for key in wrong[:4])
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(
            f"{output_dir} holds a run with other settings: {said}{more}; resume it with its own, as {file} has them, "
            "or start anew in another output_dir=FOLDER."
        )
    return [
        f"note: goes on with {key}={now[key]}, where the run had {before[key]}; the same must lie there."
        for key in sorted(changed)
    ]


def _plain(cfg: Any) -> Any:
    return OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)


def _values(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves, by their dotted keys."""
    for name, value in node.items():
        if isinstance(value, Mapping) and name not in WHOLE:
            yield from _values(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
