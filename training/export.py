"""Write a trained student as a folder to use or to publish.

    python training/export.py checkpoint=outputs/late_fusion output=outputs/merged merge=true push_to_hub=me/late-fusion

With `merge=true` stock `AutoModelForImageTextToText` loads the folder; `latefusion.load` runs it under its schedule.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from latefusion.models.entry import entry_of
from latefusion.models.saved import ADAPTER_CONFIG, ENTRY_WEIGHTS, load_student, merge, save_student
from latefusion.training.card import model_card
from latefusion.training.config import Dtype


@dataclass
class Arguments:
    """What can be exported and how.

    Attributes:
        checkpoint: folder of `training/train.py`.
        output: folder to write; must not hold a model.
        merge: one plain checkpoint; else adapters, to be put on the base.
        dtype: of the merged weights; `auto`: bfloat16 where the hardware computes in it, else float32.
        push_to_hub: a repository's name, to be made if need be and filled with the folder; None: no.
        private: whether a new repository is.
    """

    checkpoint: str = MISSING
    output: str = MISSING
    merge: bool = False
    dtype: Dtype = Dtype.auto
    push_to_hub: str | None = None
    private: bool = True


def export(arguments: Arguments) -> str:
    """Write the folder and publish it if asked to; what happened, in words.

    Raises:
        FileNotFoundError: the checkpoint holds no student.
        ValueError: the output is taken, or merging would change nothing.
    """
    source, target = Path(arguments.checkpoint), Path(arguments.output)
    if any((target / name).exists() for name in ("config.json", ADAPTER_CONFIG)):
        raise ValueError(f"{target} holds a model already; choose another output=FOLDER.")

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


def main(arguments: list[str]) -> None:
    """Run from the command line; what cannot work ends in one sentence."""
    if not arguments or any("=" not in argument for argument in arguments):
        sys.exit(f"{__doc__}\n{Arguments.__doc__}")
    try:
        chosen = OmegaConf.merge(OmegaConf.structured(Arguments), OmegaConf.from_cli(arguments))
        missing = sorted(OmegaConf.missing_keys(chosen))
        if missing:
            sys.exit(f"error: {missing[0]} is not set; add {missing[0]}=FOLDER.")
        print(export(OmegaConf.to_object(chosen)))  # type: ignore[arg-type]
    except OmegaConfBaseException as error:
        keys = ", ".join(Arguments.__dataclass_fields__)
        sys.exit(f"error: {str(error).splitlines()[0]}; the keys are {keys}.")
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    if not torch.cuda.is_available():  # saving imports an installed DeepSpeed, which would guess, and warn
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main(sys.argv[1:])
