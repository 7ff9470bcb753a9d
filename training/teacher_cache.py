"""The folder of a teacher's answers (`kl.cache`): who taught, and what a run that reads them must have alike.

Without torch; `offline.py` writes and reads the answers themselves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latefusion.models.folder_contents import TEACHER
from latefusion.models.policies.configured import teacher
from latefusion.models.policies.visipruner.settings import VisiPruner
from latefusion.recipes.schema import QUESTION_SETS, Config

IN_WORDS = {  # facts whose values say nothing to a reader
    "weights": "other weights",
    "processor": "another processor (image settings, chat template or tokenizer)",
}


class Stale(ValueError):
    """The cache was written with another teacher, prompt, tokenizer or image."""


def facts_of(config: Config) -> dict[str, Any]:
    """What must be the same when answers are written and when they are read, as far as the configuration says it."""
    model, kl, data = config.model, config.kl, config.data
    facts: dict[str, Any] = {
        "model": model.path if kl.model is None else kl.model,
        "teacher": config.teacher.value,
        "kl.temperature": kl.temperature,
        "data.isolate": data.isolate,
    }
    policy = teacher(config)
    if isinstance(policy, VisiPruner):
        facts |= {f"visipruner.{name}": _plain(value) for name, value in vars(policy).items()}
    if data.source in QUESTION_SETS:  # the same samples may have other answers
        facts |= {"data.source": data.source.value, "data.seed": data.seed}
        facts |= {"data.noise": data.noise, "data.turns": data.turns}
    return facts


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def facts_in(folder: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What `teacher.json` of a cache says, which must agree with these facts.

    Raises:
        FileNotFoundError: there is no such cache.
        Stale: it holds other answers than these facts ask for.
        ValueError: the file is damaged.
    """
    try:
        written = json.loads((Path(folder) / TEACHER).read_text())
        complete = isinstance(written, dict) and "files" in written
    except FileNotFoundError:
        raise no_cache(folder) from None
    except (ValueError, OSError):
        complete = False
    if not complete:
        raise ValueError(f"{Path(folder) / TEACHER} is damaged; {again_with(folder)}.")
    for key, value in facts.items():
        before = written.get(key)
        if before != value:
            with_what = f"{key}={before}, but this run has {value}"
            if key in IN_WORDS:
                with_what = f"{IN_WORDS[key]} than this run's ({before}, not {value})"
            raise Stale(
                f"the teacher's answers in {folder} were written with {with_what}; {again_with(folder)}."
            )
    return written


def holds_answers(cache: str | Path) -> bool:
    """Whether a `kl.cache` is complete and not empty."""
    try:
        return bool(json.loads((Path(cache) / TEACHER).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def no_cache(folder: str) -> FileNotFoundError:
    """The error of a run whose `kl.cache` was not written, or not to its end."""
    return FileNotFoundError(f"no teacher's answers in kl.cache={folder}; {again_with(folder)}.")


def again_with(folder: str) -> str:
    """How to write a `kl.cache` again."""
    over = " overwrite=true" if holds_answers(folder) else ""
    return f"write it with python training/teach.py kl.cache={folder}{over} and this run's other options"
