"""Write the teacher's answers to the training set, once, for training without a teacher in the loop.

    python training/teach.py recipe=late_fusion kl.cache=teacher_cache
    accelerate launch training/train.py recipe=late_fusion kl.cache=teacher_cache

It takes the options of `training/train.py`. Of those, the teacher, the data and what tokenizes it must be the same in
training, or training says what differs. Several processes (torchrun) share the samples.
"""

from __future__ import annotations

import os
import sys

import hydra
from omegaconf import DictConfig

from latefusion.recipes.compose import compose_tree
from latefusion.training.preflight import checked_teaching


@hydra.main(version_base="1.3", config_path="../recipes", config_name="config")
def main(cfg: DictConfig) -> None:
    config = checked_teaching(cfg)

    from latefusion.training.teaching import (
        answer,  # torch and all that: seconds, which no refusal has to wait for
    )

    answer(config)


if __name__ == "__main__":
    try:
        compose_tree([argument for argument in sys.argv[1:] if not argument.startswith("-")])
    except ValueError as error:
        sys.exit(f"error: {error}")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
