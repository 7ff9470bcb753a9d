"""Find VisiPruner's boundary, thresholds and stages for a model that the paper never saw.

    python eval/calibrate.py model=embedded data=scenes kl=0.02
    python eval/calibrate.py model=HUB_ID data=FOLDER_OR_HUB_ID split=train samples=128 kl=0.02

Asks the dense model unlabelled prompts, tries all settings on its answers (eval/thresholds/replay.py: for the price of
a few prefills), and looks for the one of least decoder FLOPs whose KL(dense || pruned) stays under the bound. All
settings run on a trial, and go on until they are surely above the bound, or much dearer than need be. Other prompts
accept it: there, the upper limit of its mean KL has to stay under the bound, or a dearer one is tried. Writes
policy.yaml, which `policy=FILE` takes wherever a policy is named, calibration.json with every setting, and table.md.
Run again with the same arguments, it goes on where it was interrupted.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from rich.console import Console

from latefusion.eval.thresholds.settings import Arguments, check, grid, policy_of
from latefusion.models.folder_contents import POLICY
from latefusion.recipes.compose import check_words, parse_words
from latefusion.recipes.launcher import GOES_ON, run_to_exit
from latefusion.recipes.named_models import named_model
from latefusion.recipes.printable import error_line
from latefusion.training.run_folder import check_unfinished, claimed


def calibrate(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Try all settings and write the results; returns what `calibration.json` holds.

    Raises:
        ValueError: an argument is out of its range, there is no prompt with an image, or no setting
            is accepted.
        FileNotFoundError: the model or the data is not there.
    """
    check(arguments)

    import torch  # lazy: keeps argument errors fast

    from latefusion.eval.thresholds import choose
    from latefusion.eval.thresholds.questions import read
    from latefusion.eval.thresholds.search import Search
    from latefusion.models.attach import attach
    from latefusion.models.base_model import compute_dtype, load_base
    from latefusion.models.schedule import VisionSchedule

    for setting in grid(arguments, arguments.boundaries or [0], arguments.tokens_thresholds or [0.0]):
        policy_of(setting, arguments)  # raises if it cannot be
    questions, others = read(arguments)
    for remark in questions.remarks:
        console.print(remark, markup=False)
    model, processor = load_base(arguments.model, dtype=compute_dtype())
    if torch.cuda.is_available():
        model.cuda()  # type: ignore[arg-type]
    started = time.perf_counter()
    with attach(model, VisionSchedule()) as attachment:
        search = Search(arguments, attachment, processor, questions, others)
        console.print(search.cost(), highlight=False)
        results = search.run()
    results["seconds"] = time.perf_counter() - started
    return choose.write(results, Path(arguments.output), console)


def main(words: list[str]) -> None:
    """Run from the command line; what cannot work ends in one sentence."""
    words = check_words(words, Arguments, str(__doc__))
    try:
        if not words:
            raise ValueError("name the model to calibrate for: model=embedded, say; --help lists the keys.")
        arguments = parse_words(words, Arguments)
        path, _ = named_model(arguments.model)
        arguments = replace(arguments, model=path)
        check_unfinished(arguments.output, POLICY, overwrite=arguments.overwrite)
        check(arguments)
        with claimed(arguments.output, key="output"):
            calibrate(arguments, Console())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(error_line(error))


if __name__ == "__main__":
    run_to_exit(lambda: main(sys.argv[1:]), interrupted=GOES_ON)
