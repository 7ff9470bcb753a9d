"""Train a late-fusion model and evaluate it.

    accelerate launch training/train.py recipe=late_fusion model=embedded data=scenes engine=accelerate

Recipes, models, data and engines are the YAML files in `recipes/`; `recipes/schema.py` describes every key.
"""

from __future__ import annotations

import os
import sys
import warnings

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads starve what else runs
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a profile begins with memory already held

import hydra
from omegaconf import DictConfig

from latefusion.recipes.compose import compose_tree
from latefusion.training.preflight import checked

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # PEFT's business with transformers
warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")  # ours starts there


@hydra.main(version_base="1.3", config_path="../recipes", config_name="config")
def main(cfg: DictConfig) -> None:
    config, resumed = checked(cfg)

    from latefusion.training.run import train  # torch and all that: seconds, which no refusal has to wait for

    train(cfg, config, resumed)


if __name__ == "__main__":
    try:
        compose_tree([argument for argument in sys.argv[1:] if not argument.startswith("-")])
    except ValueError as error:
        sys.exit(f"error: {error}")
    main()
