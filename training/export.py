"""Write a trained student as a folder to use or to publish.

    python training/export.py checkpoint=outputs/late_fusion output=outputs/merged merge=true push_to_hub=me/late-fusion

With `merge=true` the adapters are added to the weights, in a checkpoint of a model type of its own: `latefusion.load`
and vLLM run it under its schedule, and what does not know the type refuses it. `merge=plain` writes a checkpoint of
the base's type, without its schedule: everything loads it, and runs it dense.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from latefusion.models.folder_contents import check_free
from latefusion.models.locate import ADAPTER_CONFIG, check_base_of, check_not_whole
from latefusion.recipes.compose import check_words, parse_words
from latefusion.recipes.launcher import run_to_exit
from latefusion.recipes.printable import error_line
from latefusion.recipes.schema import Dtype
from latefusion.training.run_folder import check_writable

PLAIN = "plain"


@dataclass
class Arguments:
    """Keys of the command line.

    Attributes:
        checkpoint: folder that `training/train.py` wrote.
        output: folder to write; must not hold a model, nor what another command wrote.
        merge: `true`: one checkpoint with the adapters merged; `plain`: the same as a stock checkpoint that runs
            dense; `false`: the adapters alone.
        dtype: of the merged weights; `auto`: bfloat16 if the hardware computes in it, else float32. Adapters alone stay
            as they were trained.
        push_to_hub: name of the repository to upload the folder to, created if it does not exist; None: no upload.
        private: create the repository as a private one.
    """

    checkpoint: str = MISSING
    output: str = MISSING
    merge: Any = False
    dtype: Dtype = Dtype.auto
    push_to_hub: str | None = None
    private: bool = True


def check(arguments: Arguments) -> None:
    """Raise before anything is loaded if this export cannot work.

    Raises:
        FileNotFoundError: the checkpoint holds no student, or its base is not there.
        ValueError: the checkpoint is whole already; the output holds something, or cannot be written; or a setting
            would not be read.
    """
    source, target = Path(arguments.checkpoint), Path(arguments.output)
    if arguments.merge not in (True, False, PLAIN):
        raise ValueError(f"merge={arguments.merge} does not exist; choose one of true, {PLAIN}, false.")
    check_not_whole(source)
    if not (source / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(
            f"no student at {source}: it has no {ADAPTER_CONFIG}; name a folder that training wrote."
        )
    if arguments.merge is False and arguments.dtype is not Dtype.auto:
        raise ValueError(
            f"dtype={arguments.dtype.value} would not be read: adapters alone stay as they were trained; add "
            "merge=true, or leave it out."
        )
    if not arguments.private and arguments.push_to_hub is None:
        raise ValueError("private=false would not be read: nothing is published; add push_to_hub=NAME.")
    check_writable(target, key="output")
    check_free(target, fix="choose another output=FOLDER")
    check_base_of(source)


def export(arguments: Arguments) -> str:
    """Write the folder, publish it if `push_to_hub` says so, and return what happened in a sentence.

    Raises:
        FileNotFoundError: the student's base is not there.
        ValueError: merging would change nothing; or the hub does not take the folder.
    """
    import torch  # lazy: keeps argument errors fast
    from huggingface_hub import HfApi

    from latefusion.models.student.save import copy_adapters, has_entry, merge
    from latefusion.training.model_card import Form, model_card, without_schedule

    source, target = Path(arguments.checkpoint), Path(arguments.output)
    api, name = HfApi(), arguments.push_to_hub
    if name is not None:  # before the work: there may be no network, no token, no such place
        with _in_a_sentence(f"{name} cannot be published to, and nothing is written"):
            api.create_repo(name, private=arguments.private, exist_ok=True)
    dtype = None if arguments.dtype is Dtype.auto else getattr(torch, arguments.dtype.value)
    if arguments.merge:
        merged = merge(source, target, dtype=dtype, plain=arguments.merge == PLAIN)
        summary = f"{merged.changed} of {merged.total} tensors of the base have changed."
        if merged.lost > 0:
            summary += f" Rounding took away {merged.lost:.0%} of what the adapters changed."
    else:
        copy_adapters(source, target)
        summary = "The folder holds adapters, to be put on the base."
    folder = arguments.push_to_hub or str(target)
    if arguments.merge == PLAIN:
        summary += f" {without_schedule(source, folder)}"
    form = {True: Form.merged, False: Form.adapters, PLAIN: Form.plain}[arguments.merge]
    card = model_card(source, folder=folder, form=form, entry=has_entry(source))
    (target / "README.md").write_text(card)
    if name is not None:
        with _in_a_sentence(f"{target} is written, but was not published to {name}"):
            address = api.upload_folder(repo_id=name, folder_path=str(target))
        summary += f" Published: {address}"
    return f"{target} is written. {summary}"


@contextmanager
def _in_a_sentence(what: str) -> Iterator[None]:
    """Raise whatever fails on the way to the hub as a ValueError of one sentence."""
    try:
        yield
    except Exception as error:  # every way a network, a hub or a name can fail
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"{what} ({reason}); see to the network and to `hf auth login`, or name another place with "
            "push_to_hub=NAME."
        ) from None


def main(arguments: list[str]) -> None:
    """Run from the command line; an export that cannot work stops with a one-line error."""
    words = check_words(arguments, Arguments, str(__doc__))
    try:
        chosen = parse_words(words, Arguments)
        check(chosen)
        print(export(chosen))
    except (ValueError, OSError) as error:  # also a full disk
        sys.exit(error_line(error))


if __name__ == "__main__":
    run_to_exit(lambda: main(sys.argv[1:]))
