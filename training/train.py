"""Train a late-fusion model and evaluate it.

    accelerate launch training/train.py recipe=late_fusion model=embedded data=scenes engine=accelerate

Recipes, models, data and engines are the YAML files in `recipes/`; `recipes/schema.py` describes every key.
"""

from __future__ import annotations

import os
import sys
import warnings

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads starve other processes
os.environ.setdefault(
    "TORCH_CPP_LOG_LEVEL", "ERROR"
)  # the evaluation's profiler warns about memory held before it began

import hydra
from omegaconf import DictConfig

from latefusion.recipes.compose import print_configuration, refuse_typos, with_one_length
from latefusion.recipes.launcher import run_to_exit
from latefusion.training.preflight import checked

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # between PEFT and transformers
warnings.filterwarnings(
    "ignore", message=".*your dataloader is not resumable"
)  # ours starts at the right step


@hydra.main(version_base="1.3", config_path="../recipes", config_name="config")
def main(cfg: DictConfig) -> None:
    config, resumed = checked(cfg)

    from latefusion.training.run import train  # lazy: keeps argument errors fast

    train(cfg, config, resumed)


if __name__ == "__main__":
    refuse_typos(sys.argv[1:])
    print_configuration(sys.argv[1:])
    sys.argv[1:] = with_one_length(sys.argv[1:])
    run_to_exit(main)
