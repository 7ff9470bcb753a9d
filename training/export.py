"""Write a trained student as a folder to use or to publish.

    python training/export.py checkpoint=outputs/late_fusion output=outputs/merged merge=true push_to_hub=me/late-fusion

With `merge=true` stock `AutoModelForImageTextToText` loads the folder; `latefusion.load` runs it under its schedule.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from latefusion.models.locate import ADAPTER_CONFIG, check_base_of
from latefusion.recipes.compose import check_words, parse_words
from latefusion.recipes.schema import Dtype
from latefusion.training.run_folder import check_writable


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


def check(arguments: Arguments) -> None:
    """Raise before anything is loaded if this export cannot work.

    Raises:
        FileNotFoundError: the checkpoint holds no student, or its base is not there.
        ValueError: it needs no export; or the output is taken, or cannot be written.
    """
    source, target = Path(arguments.checkpoint), Path(arguments.output)
    if not (source / ADAPTER_CONFIG).is_file() and (source / "config.json").is_file():
        raise ValueError(
            f"{source} is a plain checkpoint already (all its weights were trained, or adapters merged into them): use "
            f"it as it is, or publish it with `hf upload NAME {source}`."
        )
    if not (source / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(
            f"no student at {source}: it has no {ADAPTER_CONFIG}; name a folder that training wrote."
        )
    if any((target / name).exists() for name in ("config.json", ADAPTER_CONFIG)):
        raise ValueError(f"{target} holds a model already; choose another output=FOLDER.")
    check_writable(target, key="output")
    check_base_of(source)


def main(arguments: list[str]) -> None:
    """Run from the command line; what cannot work ends in one sentence."""
    words = check_words(arguments or ["?"], Arguments, str(__doc__))  # nothing said asks what could be
    try:
        asked = parse_words(words, Arguments)
        check(asked)

        from latefusion.training.publish import export  # torch and all that, which no refusal has to wait for

        print(export(asked))
    except (ValueError, OSError) as error:  # also a full disk
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
