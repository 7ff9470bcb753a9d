"""The frozen vision tower during training: no engine switches on its dropout, for student or teacher."""

import json

import pytest
from helpers.quick_runs import run_config
from helpers.tiny_base import BAND, SMALL, composed, save_tiny_base

from latefusion.training.objective import Objective


@pytest.mark.parametrize("engine", ["accelerate", "lightning"])
def test_a_tower_with_dropout_stays_in_eval_mode(engine, tmp_path, monkeypatch, recwarn):
    base = save_tiny_base(tmp_path / "base")
    settings = json.loads((base / "config.json").read_text())
    settings["vision_config"]["attention_dropout"] = 0.5
    (base / "config.json").write_text(json.dumps(settings))
    modes = []
    call = Objective.__call__

    def watched(objective, forward, batch, **options):
        inner = objective.attachment.model
        tower = [module.training for module in inner.model.vision_tower.modules()]
        modes.append((any(tower), inner.get_decoder().layers[0].training))
        return call(objective, forward, batch, **options)

    monkeypatch.setattr(Objective, "__call__", watched)
    options = (
        "train.threads=1",
        "train.steps=2",
        "train.batch_size=2",
        "data.scenes=2",
        "eval.enabled=false",
    )
    paths = (f"engine={engine}", f"model.path={base}", f"output_dir={tmp_path / 'run'}")
    run_config(composed(*BAND, *SMALL, *options, "model.visipruner.boundary=1", *paths))
    assert modes == [(False, True)] * 2
    assert not [warning for warning in recwarn if "eval mode" in str(warning.message)]
