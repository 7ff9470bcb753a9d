"""Checkpoints that are either whole or absent: written aside, sealed with a list of their files, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

STAGING = ".saving"
SEAL = "files.json"


class CannotSave(RuntimeError):
    """A checkpoint could not be written; the earlier ones are whole."""


def folder_of(output_dir: str | Path, step: int) -> Path:
    return Path(output_dir) / f"checkpoint-{step}"


def step_of(checkpoint: str | Path) -> int:
    return int(Path(checkpoint).name.rpartition("-")[2])


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    folders = [p for p in Path(output_dir).glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    return sorted(folders, key=step_of)


@contextmanager
def writing(
    output_dir: str | Path, step: int, *, samples: int, keep: int, main: bool, barrier: Callable[[], None]
) -> Iterator[Path]:
    """Write the checkpoint of a step into the folder it yields; it is renamed once all processes are done.

    A run that dies at any moment leaves the earlier checkpoints as they were.

    Args:
        samples: per step; a resumed run must take the same number.
        keep: number of the newest checkpoints that stay.
        main: whether this process renames and removes; the others only write into the folder.
        barrier: waits for all processes.

    Yields:
        A folder on a file system that all processes share.

    Raises:
        CannotSave: the disk is full, the folder is not writable, ...
    """
    with _aside(output_dir, f"checkpoint-{step}", main=main, barrier=barrier) as folder:
        yield folder
        barrier()
        if main:
            seal(folder, step, samples)
            replace(folder, folder_of(output_dir, step))
            for old in checkpoints(output_dir)[:-keep]:
                shutil.rmtree(old)


@contextmanager
def writing_result(output_dir: str | Path, *, main: bool, barrier: Callable[[], None]) -> Iterator[Path]:
    """Write the trained student into the folder it yields; its files then move to `output_dir` one by one.

    Raises:
        CannotSave: the disk is full, the folder is not writable, ...
    """
    with _aside(output_dir, "result", main=main, barrier=barrier) as folder:
        yield folder
        barrier()
        if main:
            for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                target = Path(output_dir) / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)


@contextmanager
def _aside(output_dir: str | Path, name: str, *, main: bool, barrier: Callable[[], None]) -> Iterator[Path]:
    staging = Path(output_dir) / STAGING
    try:
        if main:
            shutil.rmtree(staging, ignore_errors=True)
            (staging / name).mkdir(parents=True)
        barrier()
        if not (staging / name).is_dir():
            raise OSError(
                "another process does not see what the first one made there: all nodes must share it"
            )
        yield staging / name
        if main:
            shutil.rmtree(staging)
        barrier()
    except Exception as error:  # OSError, RuntimeError of torch.save, SafetensorError, ...
        shutil.rmtree(staging, ignore_errors=True)  # it may be what fills the disk
        last = checkpoints(output_dir)
        rest = f"go on from {last[-1].name} with resume=true" if last else "start again"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CannotSave(
            f"{name} could not be written to {output_dir} ({reason}); mend that, then {rest}."
        ) from error


def seal(folder: Path, step: int, samples: int) -> None:
    """Write a list of the folder's files, with sizes and SHA-256, into it, and flush all of it to the disk."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest(path)}
    with (folder / SEAL).open("w") as file:
        json.dump({"step": step, "samples_a_step": samples, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def replace(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`, replacing a folder of that name."""
    if target.exists():
        target.rename(folder.with_name("replaced"))
    folder.rename(target)
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(checkpoint: Path) -> str | None:
    """Say what is wrong with a checkpoint; None if it is as it was written."""
    try:
        sealed = json.loads((checkpoint / SEAL).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"has no readable {SEAL}"
    for name, listed in sealed.items():
        path = checkpoint / name
        if not path.is_file():
            return f"lacks {name}"
        if path.stat().st_size != listed["bytes"]:
            return f"holds {path.stat().st_size} of the {listed['bytes']} bytes of {name}"
        if digest(path) != listed["sha256"]:
            return f"holds a changed {name}"
    return None


def find(output_dir: str | Path, resume: bool | int, *, samples: int) -> Path:
    """The checkpoint to go on from, which is whole: the newest (`resume=True`) or that of a step.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is damaged, or its run had another number of samples per step.
    """
    existing = checkpoints(output_dir)
    if not existing:
        raise FileNotFoundError(
            f"resume={_yaml(resume)} finds no checkpoint in {output_dir}; start the run without it."
        )
    checkpoint = existing[-1] if resume is True else folder_of(output_dir, resume)
    if checkpoint not in existing:
        steps = ", ".join(str(step_of(p)) for p in existing)
        raise FileNotFoundError(
            f"resume={resume} finds no {checkpoint.name} in {output_dir}; there are steps {steps}."
        )
    fault = damage(checkpoint)
    if fault is not None:
        before = [p for p in existing if step_of(p) < step_of(checkpoint) and damage(p) is None]
        offer = (
            f"the one before is whole: resume={step_of(before[-1])}"
            if before
            else "no earlier one is whole: start again with overwrite=true"
        )
        raise ValueError(f"{checkpoint} is damaged: it {fault}; {offer}.")
    trained = json.loads((checkpoint / SEAL).read_text())["samples_a_step"]
    if trained != samples:
        raise ValueError(
            f"{checkpoint} was trained on {trained} samples a step, but this run would take {samples}; choose "
            f"train.batch_size and train.accumulation whose product, times the number of processes, is {trained}."
        )
    return checkpoint


def check_length(checkpoint: Path, steps: int) -> None:
    """Raise ValueError if a run of so many steps would go on from a checkpoint past its end."""
    if step_of(checkpoint) > steps:
        raise ValueError(
            f"{checkpoint} is past the last step of this run, train.steps={steps}; choose at least "
            f"{step_of(checkpoint)} steps, or go on from an earlier one with resume=STEP."
        )


def discard_after(output_dir: str | Path, step: int) -> None:
    """Remove the checkpoints of later steps, and files that a killed run left half written."""
    shutil.rmtree(Path(output_dir) / STAGING, ignore_errors=True)
    for checkpoint in checkpoints(output_dir):
        if step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)


def _yaml(value: bool | int) -> str:
    return str(value).lower()
