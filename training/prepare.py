"""What a run works out before its first step: identity, schedule, calibrated entry, number of steps, threads.

Each `settle_` function puts its result where the rest of the run reads it: into the configuration, or into the run's
folder.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from transformers import PreTrainedModel

from latefusion.data.bad_rows import Guard
from latefusion.data.collate import Collator
from latefusion.data.draw import NoImages, distinct_images
from latefusion.data.load import data_fingerprint
from latefusion.data.prompt_batches import batches
from latefusion.models.attach import attach
from latefusion.models.base_model import compute_dtype
from latefusion.models.fingerprint import model_fingerprint, model_identity, processor_fingerprint
from latefusion.models.locate import entry_shapes, saved_shapes
from latefusion.models.policies.configured import profiled, schedule_of, take
from latefusion.models.profile_folder import ENTRY_FILE, read_entry, write_entry
from latefusion.models.profile_schedule import PROFILE_FILE, SCHEDULE_FILE, read_schedule
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.entry import CalibratedEntry
from latefusion.models.student.entry_fit import MORE, fit_entry
from latefusion.models.student.save import has_entry, saved_start
from latefusion.recipes.launcher import local_world_size, rank, world_size
from latefusion.recipes.schema import Config, Dtype, EntryInit, EntryKind
from latefusion.training.earlier_student import later_maps
from latefusion.training.preflight import PROFILE_FOLDER

# keys of `eval/profile_model.py`, as its messages begin, and what a run calls them
KEYS_OF_PROFILE = {name: f"schedule.{name}" for name in ("samples", "confirm", "bound", "budget")} | {
    "images": "entry.images"
}
FITTED = "entry"  # the calibrated entry, in the run's folder
IMAGES_AT_ONCE = 32  # in a forward of the calibration
IDENTITY = "identity.json"  # hashes of what the run reads, in the run's folder
CHANGED = {  # what a resumed run says if a hash differs
    "data": "rows of its training set were lost, added, changed or reordered",
    "weights": "the weights at model.path have changed",
    "processor": "the processor of its model has changed",
    "dtype": "it computed in another dtype (train.dtype)",
    "teacher": "the weights at kl.model have changed",
}
PAUSE = 0.2  # seconds between two looks into the store


def dtype_of(config: Config) -> torch.dtype:
    """The dtype that the run computes in."""
    named = {Dtype.bfloat16: torch.bfloat16, Dtype.float32: torch.float32}
    return named.get(config.train.dtype) or compute_dtype()


def settle_threads(config: Config) -> None:
    """Set the number of CPU threads: `train.threads`, or an equal share of the cores for each local process."""
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(config.train.threads or max(1, cores // local_world_size()))


def settle_steps(config: Config, cfg: DictConfig, dataset: Any) -> None:
    """Put the number of steps into both configurations where `train.epochs` says how long the run is."""
    if config.train.steps is None:
        count_steps(config, dataset)
        cfg.train.steps, cfg.train.epochs = config.train.steps, None


def count_steps(config: Config, dataset: Any) -> None:
    """Set `train.steps` to what `train.epochs` take, if they say how long the run is."""
    train = config.train
    if train.steps is None:
        samples = train.batch_size * train.accumulation * world_size()
        assert train.epochs is not None
        train.steps = max(1, math.ceil(round(train.epochs * len(dataset) / samples, 6)))
        train.epochs = None


# --- what a resumed run must find again ---


def settle_identity(config: Config, processor: Any, dataset: Any, resumed: Path | None) -> dict[str, str]:
    """Hash data, model and processor of the run, and compare them with those that a resumed run began with.

    The first process does so; all others wait.

    Returns:
        The hashes, which the run writes to `IDENTITY` in its folder.

    Raises:
        ValueError: the run began with others.
    """
    file = Path(config.output_dir) / IDENTITY

    def check() -> dict[str, str]:
        identity = identity_of(config, processor, dataset)
        if resumed is not None and file.is_file():
            began = json.loads(file.read_text())
            changed = [CHANGED[name] for name in identity if began.get(name) != identity[name]]
            if changed:
                raise ValueError(
                    f"the run in {config.output_dir} cannot go on, since {' and '.join(changed)}; restore what it "
                    "began with, or start a new run in another output_dir=FOLDER."
                )
        elif resumed is not None:
            print(
                f"note: {file} is missing, so nobody checks that data and model are those the run began with."
            )
        return identity

    return from_first_process("identity", check)


def identity_of(config: Config, processor: Any, dataset: Any) -> dict[str, str]:
    """Hashes of all that a run reads: rows, weights, processor, and weights of another teacher; and its dtype."""
    model, kl = config.model, config.kl
    dtype = "nf4" if model.load_in_4bit else dtype_of(config)
    identity = {
        "data": data_fingerprint(dataset),
        **model_identity(model.path, model.revision, processor=processor, dtype=dtype),
    }
    if kl.model is not None:
        identity["teacher"] = model_fingerprint(kl.model, kl.revision)
    return identity


# --- the schedule of a profile ---


def settle_schedule(config: Config, cfg: DictConfig, resumed: Path | None = None) -> None:
    """Put the schedule of a profile into both configurations, if `schedule.profile` or `schedule=auto` asks for one.

    If the profile has to be made, the first process makes it and all others read it.

    Args:
        resumed: the checkpoint to go on from; its profile is read, not made again.

    Raises:
        ValueError, FileNotFoundError: there is no such profile, or it cannot be made.
    """
    options, written = config.schedule, None

    def read(folder: str | Path) -> VisionSchedule:
        return profiled(options, folder)

    if options.auto and options.profile is None:
        folder = Path(config.output_dir) / PROFILE_FOLDER
        options.profile = str(folder)

        def make() -> dict[str, Any]:
            if resumed is None or not (folder / SCHEDULE_FILE).is_file():
                profile(config)
            return read(folder).to_dict()

        written = from_first_process("schedule", make)
    if options.profile is None:
        return
    for name in ("profile", *take(options, schedule_at(options.profile, written, read))):
        cfg.schedule[name] = getattr(options, name)
    if rank() == 0 and (other := _profiled_weights(options.profile)) and other != _weights(config):
        print(
            f"note: the profile in {options.profile} is of other weights than those of model.path={config.model.path}.",
            flush=True,
        )


def _profiled_weights(path: str) -> str | None:
    """Fingerprint of the model that a profile is of; None: it does not say."""
    file = (Path(path) if Path(path).is_dir() else Path(path).parent) / PROFILE_FILE
    try:
        weights = json.loads(file.read_text())["about"]["weights"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(weights)


def schedule_at(
    folder: str,
    written: dict[str, Any] | None,
    read: Callable[[str], VisionSchedule] = read_schedule,
) -> VisionSchedule:
    """Read the schedule of a profile.

    Args:
        read: its schedule of a band, or that of frozen tokens.
        written: the schedule that the first process wrote there; None: the profile was there before.

    Raises:
        FileNotFoundError: there is no profile.
        ValueError: this process does not see what the first one wrote.
    """
    try:
        schedule = read(folder)
    except FileNotFoundError:
        if written is None:
            raise
        schedule = None
    if written is not None and (schedule is None or schedule.to_dict() != written):
        raise ValueError(
            f"{folder} does not hold the schedule that the first process wrote there; choose an output_dir=FOLDER that "
            "all machines share."
        )
    assert schedule is not None
    return schedule


def profile(config: Config) -> None:
    """Profile the run's model on its data; an interrupted profile goes on where it stopped."""
    from latefusion.eval.profile_model import Arguments, run  # lazy: the one import of a profile that goes up

    options = config.schedule
    arguments = Arguments(
        samples=options.samples,
        confirm=options.confirm,
        bound=options.bound,
        budget=options.budget,
        cross=options.cross is not None,
        images=config.entry.images,
        output=options.profile,
        dtype=config.train.dtype,
        seed=config.train.seed,
    )
    try:
        run(arguments, config)
    except ValueError as error:
        key = KEYS_OF_PROFILE.get(str(error).partition("=")[0])
        if key is None:
            raise
        raise ValueError(f"{key}={str(error).partition('=')[2]}") from None


# --- the calibrated entry ---


def settle_entry(
    config: Config,
    collator: Collator,
    load: Callable[[], PreTrainedModel],
    rows: Callable[[], Sequence[Any]],
    resumed: Path | None = None,
) -> None:
    """Write the map that the entry adapter starts from (`entry.init=calibrated`), unless a profile or `init` has it.

    The first process fits it on images of the training set, on a GPU if there is one; all others read it. This comes
    before the engine is prepared, since ZeRO-3 shards every model that is loaded later. The fit holds a whole model of
    its own.

    Args:
        collator: of the run.
        load: loads the base.
        rows: returns samples of the training set by index.
        resumed: the checkpoint to go on from; its entry is not fitted again.

    Raises:
        ValueError: the data has too few images for the fit, or a row among those with the first images cannot be used
            and must not be left out.
    """
    if not calibrated(config):
        return
    if config.init is not None and _entry_in_init(config):
        if rank() == 0:
            print(_entry_of_init(config, config.init), flush=True)
        return
    processor = processor_fingerprint(collator.processor)
    if _from_profile(config, processor) is not None:
        return
    folder = Path(config.output_dir) / FITTED

    def fit() -> str:
        if resumed is None or not (folder / ENTRY_FILE).is_file():
            try:
                write_entry(folder, _fit(config, collator, load(), rows()), _weights(config), processor)
            finally:
                torch.cuda.empty_cache()
        return str(folder)

    from_first_process("entry", fit)


def _entry_of_init(config: Config, folder: str) -> str:
    """The line about an entry adapter that the student to start from brings."""
    before, schedule = VisionSchedule.load(folder).enter, schedule_of(config.schedule)
    line = f"The entry adapter comes from init={folder}: nothing is calibrated."
    if before != schedule.enter:
        line += f" It was made for layer {before}, and enters at layer {schedule.enter} here."
    if (
        config.entry.later
        and len(schedule.cross or ()) > 1
        and not later_maps(entry_shapes(saved_shapes(folder)))
    ):
        line += " It has no maps to the layers that read later, so that frozen tokens stay the same there."
    return line


def calibrated(config: Config) -> bool:
    """Whether the entry adapter starts from a fitted map; never if vision tokens enter at the first layer."""
    entry = config.entry
    if entry.kind is EntryKind.none or entry.init is not EntryInit.calibrated:
        return False
    return schedule_of(config.schedule).enter > 0


def entry_start(config: Config) -> CalibratedEntry | None:
    """The map that `settle_entry` wrote or a profile has; None: the entry adapter starts as the identity.

    Where the student in `init` has an entry adapter, its sizes alone count: its weights come in later.

    Raises:
        FileNotFoundError: this process does not see what the first one wrote.
    """
    if config.init is not None and _entry_in_init(config):
        return saved_start(config.init)
    if not calibrated(config):
        return None
    folder = Path(config.output_dir) / FITTED
    entry = _from_profile(config) or read_entry(folder, _weights(config))
    if entry is None:
        raise FileNotFoundError(
            f"no calibrated entry in {folder}, where the first process wrote it; choose an output_dir=FOLDER that all "
            "machines share."
        )
    return entry


def _entry_in_init(config: Config) -> bool:
    """Whether the student to start from brings its own entry adapter, which was fitted or learnt already."""
    return config.init is not None and has_entry(config.init)


def _from_profile(config: Config, processor: str | None = None) -> CalibratedEntry | None:
    """Of a band; frozen tokens need maps to the layers that read them, which no profile has."""
    schedule = config.schedule
    if schedule.profile is None or schedule.cross is not None:
        return None
    return read_entry(schedule.profile, _weights(config), processor)


def _weights(config: Config) -> str:
    return model_fingerprint(config.model.path, config.model.revision)


def _fit(config: Config, collator: Collator, model: PreTrainedModel, rows: Sequence[Any]) -> CalibratedEntry:
    if torch.cuda.is_available() and not config.model.load_in_4bit:  # 4-bit weights are on the GPU already
        model.cuda()  # type: ignore[call-arg]
    plain = copy(collator)
    plain.isolate = None  # rows are cut after their first answer
    guard = Guard(
        plain, on_error=config.data.on_error, too_long=config.data.too_long, dataset=rows, folder=None
    )
    schedule = schedule_of(config.schedule)
    enter, later = schedule.enter, (schedule.cross or ())[1:] if config.entry.later else ()
    try:
        samples = distinct_images(rows, config.entry.images, guard.fits)
    except NoImages:
        raise ValueError(
            "entry.init=calibrated is fitted on images, and none of the training set's samples has one; use "
            "entry.init=identity."
        ) from None
    size = max(1, min(IMAGES_AT_ONCE, len(samples) // 4))  # the last batch tests the map of the others
    with attach(model, VisionSchedule()) as attachment:
        groups = batches(model, plain, samples, size)
        made = (group.make() for group in groups)
        calibration = fit_entry(
            attachment, ((batch.inputs, batch.vision) for batch in made), enter, later=later,
            later_rank=config.entry.later_rank,
        )  # fmt: skip
    calibration.check(len(samples), enter)
    poor = [str(layer) for layer, share in zip(later, calibration.later, strict=True) if share <= 0]
    if poor:
        raise ValueError(
            f"{len(samples)} images are too few to calibrate the maps to the layers that read later: on images they "
            f"were not fitted to, those to layers {', '.join(poor)} are no better than one constant a place; {MORE} or "
            "entry.later=false."
        )
    later_rank, numbers = calibration.entry.later_rank, calibration.entry.numbers()
    maps = "whole matrices" if later_rank is None else f"maps of rank {later_rank}"
    explained = (
        f"Entry calibrated on {len(samples)} images: fitted without the last {size}, it explains "
        f"{calibration.unseen:.1%} of the dense model's vision states at layer {enter} in those (the projector's "
        f"output as it is: {calibration.raw:.1%})"
    )
    if later:
        explained += (
            f", and at least {min(calibration.later):.1%} at the layers that read them later, by {maps} with "
            f"{numbers:,} numbers"
        )
    print(f"{explained}.", flush=True)
    return calibration.entry


# --- work of the first process, before the engine has joined the processes ---


def from_first_process(name: str, work: Callable[[], Any]) -> Any:
    """Run `work` in the process of rank 0 alone, and return its result in every process of the launch.

    The others wait as long as it takes. They look into the launcher's key-value store, where no collective can time
    out. An error of the first process is raised in all.

    Args:
        name: of this piece of work; used once per launch.
        work: returns a value that JSON can hold.

    Raises:
        ValueError: `work` raised it, or FileNotFoundError.
    """
    world = world_size()
    if world == 1:
        return work()
    meeting, rank = _store()
    store = dist.PrefixStore(name, meeting)
    if rank == 0:
        try:
            message = {"value": work()}
        except (ValueError, FileNotFoundError) as error:
            _send(store, world, {"error": str(error)})
            raise
        _send(store, world, message)
        return message["value"]
    while not store.check(["message"]):
        time.sleep(PAUSE)
    message = json.loads(store.get("message"))
    store.add("read", 1)
    if "error" in message:
        raise ValueError(message["error"])
    return message["value"]


@cache
def _store() -> tuple[dist.Store, int]:
    """The launcher's store, and this process's rank.

    Kept: if no launcher holds the store, the first process does, and an engine shares it later.
    """
    store, rank, _ = next(dist.rendezvous("env://"))
    return dist.PrefixStore("latefusion/first", store), rank


def _send(store: dist.Store, world: int, message: dict[str, Any]) -> None:
    """Send a message to all other processes and wait until they have read it: the store may end with this process."""
    store.set("message", json.dumps(message))
    while store.add("read", 0) < world - 1:
        time.sleep(PAUSE)
