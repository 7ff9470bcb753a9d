"""Checks of a run that need no torch: values, and what must or must not be on the disk. They take half a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from latefusion.data.local_files import check_local_files
from latefusion.models.folder_contents import ANSWERS, EVALUATION, MODEL, RUN, RUN_CONFIG, TEACHER, check_free
from latefusion.models.locate import (
    ADAPTER_CONFIG,
    check_base,
    check_four_bits,
    decoder_layers,
)
from latefusion.models.policies.configured import (
    check_depths,
    check_ends,
    check_schedule_set,
    is_known,
    profiled,
    schedule_of,
    take,
)
from latefusion.recipes.check import check_config
from latefusion.recipes.compose import stored_values
from latefusion.recipes.launcher import rank, world_size
from latefusion.recipes.printable import error_line
from latefusion.recipes.schema import Config
from latefusion.training.checkpoints import check_length, checkpoints, find
from latefusion.training.earlier_student import check_earlier
from latefusion.training.run_folder import check_launch, check_unclaimed, check_unfinished, check_writable
from latefusion.training.teacher_cache import facts_in, facts_of, holds_answers

Result = TypeVar("Result")

PROFILE_FOLDER = "profile"  # in the folder of a run: the profile of schedule=auto
MAY_CHANGE = {  # when a run goes on: where and how fast it computes, what it logs, how long it goes on
    *("resume", "overwrite", "output_dir", "name", "engine.processes", "kl.cache", "data.eval_path"),
    *("train.steps", "train.epochs", "train.threads", "train.workers", "train.prefetch", "train.trackers"),
    *("train.log_every", "train.save_every", "train.keep_checkpoints", "train.on_nonfinite"),
    *(
        "train.gradient_checkpointing",
        "train.batch_size",
        "train.accumulation",
    ),  # `find` checks the product of two
}
PLACES = (
    "model.path",
    "kl.model",
    "data.path",
    "data.images",
    "init",
)  # may have moved, with the same content
DICTIONARIES = ("keep", "cross", "processor", "visipruner")  # compared as a whole


def checked(cfg: DictConfig) -> tuple[Config, Path | None]:
    """Check the composed configuration of a run.

    Returns:
        The configuration, and the checkpoint to go on from, if any.

    Raises:
        SystemExit: the run cannot work; the message is one sentence.
    """

    def checks(config: Config) -> Path | None:
        resumed = check(config)
        notes = [] if resumed is None else check_unchanged(cfg, config)
        if notes and rank() == 0:
            print("\n".join(notes), flush=True)
        return resumed

    return _in_a_sentence(cfg, checks)


def checked_teaching(cfg: DictConfig) -> Config:
    """Check the composed configuration of `training/teach.py`; raises as `checked` does."""
    return _in_a_sentence(cfg, check_teaching)[0]


def _in_a_sentence(cfg: DictConfig, checks: Callable[[Config], Result]) -> tuple[Config, Result]:
    try:
        config = check_config(cfg)
        return config, checks(config)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(error_line(error)) from None


def check(config: Config) -> Path | None:
    """Check a run before anything is loaded.

    Returns:
        The checkpoint to go on from, if any.

    Raises:
        ValueError, FileNotFoundError: the run cannot work; the message is one sentence.
    """
    check_launch(config.engine.processes)
    check_inputs(config)
    if config.data.streaming and config.train.steps is None:
        raise ValueError(
            "data.streaming=true reads rows without counting them, so epochs have no length; say train.steps=N."
        )
    if not config.schedule.auto and config.schedule.profile is None:
        check_schedule_set(config)
    if config.kl.cache is not None:
        facts_in(config.kl.cache, facts_of(config))
    if config.init is not None:
        check_earlier(config, config.init)
    return check_output(config)


def check_teaching(config: Config) -> None:
    """Check a pass that writes `kl.cache`, as `check` does a run."""
    if config.kl.cache is None:
        raise ValueError("kl.cache is not set; name the folder to write with kl.cache=FOLDER.")
    if config.data.streaming:
        raise ValueError(
            "data.streaming=true has no end at which every sample is answered; use data.streaming=false."
        )
    check_launch(config.engine.processes)
    check_inputs(config)
    check_writable(config.kl.cache, key="kl.cache")
    check_free(config.kl.cache, fix="choose another kl.cache=FOLDER", own=[ANSWERS])
    if config.resume is not False:
        raise ValueError(
            f"resume={str(config.resume).lower()} would not be read: answers are written in one go; leave it out."
        )
    if holds_answers(config.kl.cache):
        check_unfinished(config.kl.cache, TEACHER, overwrite=config.overwrite, key="kl.cache")


def check_inputs(config: Config) -> None:
    """Check that models and data exist, and that schedule and thresholds fit the models' depths.

    The schedule of a profile that is there is put into the configuration. A model whose config.json does not state its
    depth, or one on the hub, is checked again with transformers.
    """
    path, other = config.model.path, config.kl.model
    if config.model.load_in_4bit:
        check_four_bits(path)
    check_base(path)
    if other is not None:
        check_base(other, fix="with kl.model=PATH")
    check_local_files(config.data)
    schedule = config.schedule
    if schedule.profile is not None:
        take(schedule, profiled(schedule, schedule.profile))
    layers = decoder_layers(path, config.model.revision)
    if is_known(schedule):
        if layers is not None:
            check_ends(config, layers)
        schedule_of(schedule)
    teachers = None if other is None else decoder_layers(other, config.kl.revision)
    check_depths(config, layers, teachers)


def check_output(config: Config) -> Path | None:
    """Check that this run may write its output folder; returns the checkpoint to go on from, if any."""
    output, train = Path(config.output_dir), config.train
    check_writable(output)
    check_unclaimed(output)
    check_free(output, fix="choose another output_dir=FOLDER", own=[MODEL, RUN, EVALUATION])
    if config.resume is not False:
        samples = train.batch_size * train.accumulation * world_size()
        checkpoint = find(output, config.resume, samples=samples)
        if train.steps is not None:
            check_length(checkpoint, train.steps)
        return checkpoint
    written = any(
        (output / name).exists() for name in (ADAPTER_CONFIG, "config.json")
    )  # adapters, or all weights
    if not config.overwrite and (written or checkpoints(output)):
        raise ValueError(
            f"{output} holds a run already; continue it with resume=true, replace it with overwrite=true, "
            "or choose another output_dir=FOLDER."
        )
    return None


def check_unchanged(cfg: DictConfig, config: Config) -> list[str]:
    """Compare the configuration with that of the run in the output folder, if there is one.

    Args:
        cfg, config: as composed, and as `check` has left it.

    Returns:
        Lines to print, about paths that have changed.

    Raises:
        ValueError: another setting has changed, so that the checkpoints would not load, or another run would go on.
    """
    output_dir = config.output_dir
    file = Path(output_dir) / RUN_CONFIG
    if not file.is_file():
        return []
    before = dict(_leaves(OmegaConf.to_container(stored_values(file), resolve=True)))
    now = dict(_leaves(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)))
    now |= _profiled_now(config)
    skip = {*MAY_CHANGE, "schedule.profile"}
    changed = [
        key
        for key in before.keys() & now.keys()
        if before[key] != now[key] and key not in skip and not key.startswith("eval.")
    ]
    wrong = sorted(key for key in changed if key not in PLACES)
    if wrong:
        changes = ", ".join(f"{key}={now[key]} (it had {before[key]})" for key in wrong[:4])
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(
            f"{output_dir} holds a run with other settings: {changes}{more}; resume it with its own, "
            f"as {file} has them, or start a new run in another output_dir=FOLDER."
        )
    return [
        f"note: goes on with {key}={now[key]}, where the run had {before[key]}; the same must lie there."
        for key in sorted(changed)
    ]


def _profiled_now(config: Config) -> dict[str, Any]:
    """The values that a run takes from its profile, by their keys, as the profile has them today."""
    options = replace(config.schedule)
    if not is_known(options):
        options.profile = str(Path(config.output_dir) / PROFILE_FOLDER)
    if options.profile is None:
        return {}
    return {
        f"schedule.{name}": getattr(options, name)
        for name in take(options, profiled(options, options.profile))
    }


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nested dictionary, by their dotted keys."""
    for name, value in node.items():
        if isinstance(value, Mapping) and name not in DICTIONARIES:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
