"""List every row that cannot be trained on, and why, before training.

    python data/validate.py data=llava_mix665k data.path=FILE data.images=FOLDER model=llava_1_5_7b

It takes what `training/train.py` takes; `train.workers=N` checks in N processes. Where the model's processor can be
loaded, its chat template, its limits and `data.max_length` are checked too. The exit code is 1 if a row is bad.
"""

from __future__ import annotations

import sys

from rich.console import Console

from latefusion.data.places import check_places
from latefusion.recipes.compose import compose_config
from latefusion.recipes.schema import Source


def main(overrides: list[str]) -> None:
    """Run from the command line; what cannot work ends in one sentence."""
    try:
        config = compose_config(overrides)
        if config.data.source is Source.scenes:
            raise ValueError(
                "scenes are rendered here and need no check; name data with data=dataset data.path=PATH."
            )
        check_places(config.data)

        from latefusion.data.findings import validate  # torch and all that, which no refusal has to wait for

        bad = validate(config, console=Console(stderr=True))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
