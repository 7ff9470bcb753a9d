"""What `training/export.py` does once it is known that it can."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import HfApi

from latefusion.models.student.entry import entry_of
from latefusion.models.student.save import ENTRY_WEIGHTS, load_student, merge, save_student
from latefusion.recipes.schema import Dtype
from latefusion.training.model_card import model_card

if TYPE_CHECKING:
    from latefusion.training.export import Arguments


def export(arguments: Arguments) -> str:
    """Write the folder, which `export.check` has seen, and publish it if asked to; what happened, in words.

    Raises:
        FileNotFoundError: the student's base is not there.
        ValueError: merging would change nothing.
    """
    source, target = Path(arguments.checkpoint), Path(arguments.output)
    dtype = None if arguments.dtype is Dtype.auto else getattr(torch, arguments.dtype.value)
    if arguments.merge:
        changed, total = merge(source, target, dtype=dtype)
        entry = (target / ENTRY_WEIGHTS).is_file()
        done = f"{changed} of {total} tensors of the base have changed."
    else:
        student = load_student(source, dtype=dtype)
        target.mkdir(parents=True, exist_ok=True)
        save_student(student, target)
        entry, done = entry_of(student.model) is not None, "Adapters, to be put on the base."
    name = arguments.push_to_hub or str(target)
    (target / "README.md").write_text(model_card(source, folder=name, merged=arguments.merge, entry=entry))
    if arguments.push_to_hub is not None:
        api = HfApi()
        api.create_repo(arguments.push_to_hub, private=arguments.private, exist_ok=True)
        where = api.upload_folder(repo_id=arguments.push_to_hub, folder_path=str(target))
        done += f" Published: {where}"
    return f"{target} is written. {done}"
