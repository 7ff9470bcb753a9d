"""Find VisiPruner's boundary, thresholds and stages for a model that the paper never saw.

    python eval/calibrate.py model=embedded data=scenes kl=0.02
    python eval/calibrate.py model=HUB_ID data=FOLDER_OR_HUB_ID split=train samples=128 kl=0.02

Asks the dense model N unlabelled prompts, tries all settings on its answers (eval/thresholds/replay.py: for the price
of a few prefills), and takes the one of least decoder FLOPs whose KL(dense || pruned) stays under the bound. All
settings run on a trial, and go on until they are surely above the bound, or much dearer than need be. Writes
policy.yaml, which `policy=FILE` takes wherever a policy is named, calibration.json with every setting, and table.md.
Run again with the same arguments, it goes on where it was interrupted.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from rich.console import Console

from latefusion.data.places import check_dataset
from latefusion.models.locate import check_base
from latefusion.recipes.compose import check_words, parse_words


@dataclass
class Arguments:
    """The command line of this script, as `key=value`.

    Attributes:
        model: embedded, a folder or a hub id.
        data: scenes, or a folder or hub id of a data set with the columns messages and images.
        split: of the data; samples: how many prompts, drawn by `seed`; null: all.
        kl: the bound, in nats: mean over prompts of KL(dense || pruned) per token of the dense answer.
        boundaries, layer_thresholds, tokens_thresholds, stages: what to try; null: every layer; a scale of the
            model's own norms, read off the trial. The shallow rule saves no FLOPs of its own, so only
            `stages=[[middle,deep],[shallow,middle,deep]]` tries it too.
        exit_threshold, exit_patience, sink_rule: as `VisiPruner` has them, not searched.
        max_new_tokens: longest answer.
        batch_size: prompts a forward.
        output: folder for the results.
    """

    model: str = "embedded"
    data: str = "scenes"
    split: str = "validation"
    samples: int | None = None
    seed: int = 0
    kl: float = 0.02
    boundaries: list[int] | None = None
    layer_thresholds: list[float] = field(
        default_factory=lambda: [0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998]
    )
    tokens_thresholds: list[float] | None = None
    stages: list[list[str]] = field(default_factory=lambda: [["middle", "deep"]])
    exit_threshold: float = 0.999
    exit_patience: int = 2
    sink_rule: str = "first"
    max_new_tokens: int = 16
    batch_size: int = 32
    output: str = "outputs/calibration"


def calibrate(asked: Arguments, console: Console) -> dict[str, Any]:
    """Try all settings and write the results; returns what `calibration.json` holds.

    Raises:
        ValueError: an argument is out of its range, there is no prompt with an image, or no setting stays
            under the bound.
        FileNotFoundError: the model or the data is not there.
    """
    check(asked)

    from latefusion.eval.thresholds.run import (
        calibrated,  # torch and all that, which no refusal has to wait for
    )

    return calibrated(asked, console)


def check(asked: Arguments) -> None:
    """Raise before anything is loaded if an argument cannot work."""
    for name in ("kl", "batch_size", "max_new_tokens"):
        if not getattr(asked, name) > 0:
            raise ValueError(f"{name}={getattr(asked, name)} must be positive.")
    if asked.samples is not None and asked.samples < 1:
        raise ValueError(f"samples={asked.samples} must be at least 1.")
    for name in ("boundaries", "layer_thresholds", "tokens_thresholds", "stages"):
        if getattr(asked, name) == []:
            raise ValueError(f"{name}=[] leaves nothing to try; name at least one value.")
    for stages in asked.stages:
        if "middle" not in stages:
            raise ValueError(f"stages={stages} saves nothing without 'middle'; add it.")
    check_base(asked.model)
    if asked.data != "scenes":
        check_dataset(asked.data, key="data")


def main(arguments: list[str]) -> None:
    """Run from the command line; what cannot work ends in one sentence."""
    words = check_words(arguments, Arguments, str(__doc__))
    try:
        calibrate(parse_words(words, Arguments), Console())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
