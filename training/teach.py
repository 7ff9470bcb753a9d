"""Write the teacher's answers to the training set, once, for training without a teacher in the loop.

    python training/teach.py recipe=late_fusion kl.cache=teacher_cache
    accelerate launch training/train.py recipe=late_fusion kl.cache=teacher_cache

It takes the options of `training/train.py`. The teacher, the data and what tokenizes it must be the same in training;
otherwise training says what differs. Several processes (torchrun) share the samples.
"""

from __future__ import annotations

import os
import sys
import warnings

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads starve other processes

import hydra
from omegaconf import DictConfig

from latefusion.recipes.compose import print_configuration, refuse_typos, with_one_length
from latefusion.recipes.launcher import run_to_exit
from latefusion.recipes.printable import error_line
from latefusion.training.preflight import checked_teaching
from latefusion.training.run_folder import claimed

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # between PEFT and transformers


@hydra.main(version_base="1.3", config_path="../recipes", config_name="config")
def main(cfg: DictConfig) -> None:
    config = checked_teaching(cfg)

    from latefusion.training.offline import write_answers  # lazy: keeps argument errors fast

    try:
        with claimed(config.kl.cache or "", key="kl.cache"):
            write_answers(config)
    except ValueError as error:  # another run writes there
        raise SystemExit(error_line(error)) from None


if __name__ == "__main__":
    refuse_typos(sys.argv[1:])
    print_configuration(sys.argv[1:])
    sys.argv[1:] = with_one_length(sys.argv[1:])
    run_to_exit(main)
