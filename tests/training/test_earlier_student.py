"""`init=FOLDER`: a run starts from a student only if it has a place for all that the student trained."""

import json

import numpy as np
import pytest
from helpers.tiny_base import configured
from safetensors.numpy import save_file

from latefusion.training import preflight


def earlier_student(folder, weights=(), schedule="{}", **about):
    """The files of a student of `embedded` that a run may start from; `weights`: shapes by name."""
    usual = {"base_model_name_or_path": "embedded", "modules_to_save": None, "r": 16, "lora_alpha": 32}
    (folder / "adapter_config.json").write_text(json.dumps({**usual, **about}))
    (folder / "vision_schedule.json").write_text(schedule)
    tensors = {f"base_model.model.{name}": np.zeros(shape) for name, shape in dict(weights).items()}
    save_file(tensors, folder / "adapter_model.safetensors")


def test_a_student_to_start_from_is_of_this_base_and_its_projector_trains_on(tmp_path):
    init, trained = f"init={tmp_path}", ["multi_modal_projector", "vision_entry"]
    earlier_student(tmp_path, modules_to_save=trained)
    with pytest.raises(
        ValueError, match=r"trained multi_modal_projector, .*; set lora\.train_projector=true\.$"
    ):
        preflight.check(configured(init))
    preflight.check(configured(init, "lora.train_projector=true", "output_dir=nowhere"))
    earlier_student(tmp_path, modules_to_save=trained, base_model_name_or_path="a/b")
    with pytest.raises(
        ValueError, match=r"has the base a/b, but model\.path=embedded; name that base, or, if it"
    ):
        preflight.check(configured(init, "lora.train_projector=true"))
    for name in ("vision_schedule.json", "adapter_model.safetensors"):
        earlier_student(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"^no student at {tmp_path}: it has no {name}; name a"):
            preflight.check(configured(init))


LAYER_9 = "model.language_model.layers.9"
ADAPTED = {
    f"{LAYER_9}.self_attn.q_proj.lora_A.weight": [16, 2],
    f"{LAYER_9}.mlp.up_proj.lora_B.weight": [2, 16],
}
ENTRY = {"vision_entry.down.weight": [16, 2]}


@pytest.mark.parametrize(
    ("words", "about", "weights", "sentence"),
    [
        (
            ["lora.alpha=64"],
            {},
            ADAPTED,
            r"was trained with lora\.alpha=32, but this run has 64; set lora\.alpha=32\.$",
        ),
        (["lora.r=8"], {}, ADAPTED, r"was trained with lora\.r=16, but this run has 8; set lora\.r=16\.$"),
        (
            [],
            {"use_rslora": True},
            ADAPTED,
            r"was trained with lora\.variant=rslora, but this run has lora; set",
        ),
        (["tune=align"], {}, ADAPTED, r"trained LoRA, which tune=align has not; set tune=lora\.$"),
        (
            ["entry.rank=8"],
            {},
            ENTRY,
            r"an entry adapter of rank 16, .* 8; set entry\.rank=16\.$",
        ),
        (
            [],
            {},
            {"vision_entry.scale": [2]},
            r"an entry adapter of rank 0, .* rank 16; set entry\.kind=scale\.$",
        ),
        (
            ["recipe=cross_only", "schedule.cross=[2,4,5]"],
            {},
            {
                **ENTRY,
                "vision_entry.start.later.3.bias": [4, 2],
                "vision_entry.start.later.5.bias": [4, 2],
            },
            r"maps of frozen vision tokens to layers \[3, 5\], which this run does not read; set schedule\.cross=\[2,",
        ),
        (
            ["entry.kind=none"],
            {},
            ENTRY,
            r"has an entry adapter, .* set entry\.kind=low_rank entry\.rank=16\.$",
        ),
        (
            ["entry.rank=0", "entry.init=identity"],
            {},
            ENTRY,
            r"an entry adapter, which this run has not; set",
        ),
        (["recipe=dense"], {}, ENTRY, r"an entry adapter, which stands at no .* \(it enters at layer 2\)\.$"),
        (
            ["lora.targets=[q_proj,v_proj]"],
            {},
            ADAPTED,
            r"LoRA in up_proj, where lora\.targets=\[q_proj,v_proj\] .* set lora\.targets=\[q_proj,up_proj\], or leave",
        ),
        (
            ["lora.layers=busy", "schedule.exit=8", "schedule.keep={}"],
            {},
            ADAPTED,
            r"LoRA in layers 9, which see no vision tokens in this run, .* set lora\.layers=all, or the schedule",
        ),
    ],
)
def test_a_student_to_start_from_has_this_run_s_sizes(tmp_path, words, about, weights, sentence):
    """Another alpha would load, and scale all that the student has learnt."""
    earlier_student(tmp_path, weights, '{"enter": 2, "exit": 6, "cross": [2, 3, 5]}', **about)
    init = (f"init={tmp_path}", f"output_dir={tmp_path / 'out'}")
    with pytest.raises(ValueError, match=rf"^the student at {tmp_path} .*{sentence}"):
        preflight.check(configured(*init, *words))
    if "tune=align" in words:
        earlier_student(tmp_path)
        preflight.check(configured(*init, *words))


@pytest.mark.parametrize(
    "words",
    [["lora.targets=[q_proj,up_proj,v_proj]"], ["lora.layers=busy", "schedule.exit=10"], ["lora.layers=all"]],
)
def test_a_student_to_start_from_may_have_less_lora(tmp_path, words):
    earlier_student(tmp_path, ADAPTED)
    preflight.check(configured(f"init={tmp_path}", f"output_dir={tmp_path / 'out'}", *words))
