"""Saved, loaded, merged, loaded, saved and loaded again: the same logits, in every family and variant of LoRA."""

import json
import sys
import warnings

import huggingface_hub
import pytest
import torch
from helpers.families import FAMILIES, build, prompt
from helpers.tiny_base import shake
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, ProcessorMixin

from latefusion.models import base_model as base
from latefusion.models.attach import attach, attached
from latefusion.models.locate import check_base
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.build import build_student
from latefusion.models.student.entry import entry_of
from latefusion.models.student.save import (
    LOOSE_ENTRY,
    load,
    load_student,
    merge,
    merge_adapters,
    save_student,
)

PLAIN, RS, DORA = {}, {"rslora": True}, {"dora": True}
SCHEDULE = VisionSchedule(enter=2, exit=5, keep={4: 2})
PROJECTOR = {"internvl": "multi_modal_projector", "smolvlm": "connector"}


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs, use_cache=False).logits


class StandIn(ProcessorMixin):
    """These models are given token ids and pixels."""

    def __init__(self):
        pass

    def save_pretrained(self, folder):
        pass


VARIANTS = pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("llava", DORA),
        pytest.param("llava_next", RS, marks=pytest.mark.slow),
        pytest.param("llava_onevision", PLAIN, marks=pytest.mark.slow),
        pytest.param("qwen2_5_vl", DORA, marks=pytest.mark.slow),
        pytest.param("qwen3_vl", RS, marks=pytest.mark.slow),
        pytest.param("internvl", PLAIN, marks=pytest.mark.slow),
        ("smolvlm", DORA),
        ("gemma3", RS),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value), "lora"),
)


@pytest.fixture
def stand_in(monkeypatch):
    processor = StandIn()
    monkeypatch.setattr(base.AutoProcessor, "from_pretrained", lambda path, **settings: processor)
    return processor


def fresh(family):
    return prompt(family, ["tt I ttt", "t I t I tt"], side="right")


def saved_student(family, variant, folder, stand_in):
    """A shaken student of the family in `folder / "adapter"`, and its logits on `fresh(family)`."""
    build(family).save_pretrained(folder / "base")
    student = build_student(
        base.load_base(str(folder / "base"), dtype=torch.float32)[0],
        stand_in,
        base=str(folder / "base"),
        schedule=SCHEDULE,
        rank=2,
        alpha=4,
        dropout=0.0,
        layers=[2, 3, 4],
        entry_rank=2,
        train=[PROJECTOR[family]] if family in PROJECTOR else [],
        **variant,
    )
    untrained = logits(student.model, fresh(family))
    shake(student, 0.1)
    expected = logits(student.model, fresh(family))
    real = fresh(family)["attention_mask"].bool()
    assert (expected - untrained)[real].abs().max() > 1e-2
    save_student(student, folder / "adapter")
    return expected, real


@VARIANTS
def test_a_student_keeps_its_logits_through_every_form(family, variant, tmp_path, stand_in):
    expected, real = saved_student(family, variant, tmp_path, stand_in)
    loaded, _ = load(tmp_path / "adapter", dtype=torch.float32, merge=False)
    assert torch.equal(logits(loaded, fresh(family)), expected)
    merge(tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    folder, folders = tmp_path / "adapter", [tmp_path / name for name in ("merged", "again", "and again")]
    for following in folders:  # the adapters merged as they are loaded, merged on disk, saved by stock saving
        model, _ = load(folder, dtype=torch.float32)
        assert not isinstance(model, PeftModel) and not any("lora" in name for name in model.state_dict())
        assert attached(model).policy == SCHEDULE and entry_of(model) is not None
        torch.testing.assert_close(logits(model, fresh(family))[real], expected[real], rtol=1e-5, atol=1e-5)
        if not following.exists():
            model.save_pretrained(following)
        assert [file.name for file in following.glob("*.safetensors")] == ["model.safetensors"]
        folder = following


@VARIANTS
def test_a_student_that_lost_its_entry_adapter_is_refused(family, variant, tmp_path, stand_in):
    """Merged, loaded and saved by transformers alone: the schedule is still there, the entry adapter is not."""
    saved_student(family, variant, tmp_path, stand_in)
    merge(tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    with pytest.raises(
        ValueError, match=r"saved with an entry adapter.*load the folder with latefusion\.load"
    ):
        attach(stock, SCHEDULE)
    with attach(stock, VisionSchedule()) as dense, pytest.raises(ValueError, match="saved with an entry"):
        dense.using(SCHEDULE).__enter__()
    stock.save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match=r"needs its entry adapter .* but the checkpoint lacks its weights"):
        load(tmp_path / "stock", dtype=torch.float32)


def merged_llava(folder, stand_in):
    expected, real = saved_student("llava", PLAIN, folder, stand_in)
    merge(folder / "adapter", folder / "merged", dtype=torch.float32)
    return folder / "merged", expected[real], real


def edit(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_folders_of_the_earlier_format_still_load(tmp_path, stand_in):
    """The entry adapter in a file of its own, and its sizes nowhere."""
    folder, expected, real = merged_llava(tmp_path, stand_in)
    weights = load_file(folder / "model.safetensors")
    entry = {name: weights.pop(name) for name in list(weights) if name.startswith("vision_entry.")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save_file({name.removeprefix("vision_entry."): w for name, w in entry.items()}, folder / LOOSE_ENTRY)
    config = json.loads((folder / "config.json").read_text())
    del config["vision_entry"]
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = load(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(model, fresh("llava"))[real], expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "now")
    saved = json.loads((tmp_path / "now" / "config.json").read_text())
    assert saved["vision_entry"] == {"rank": 2, "places": 0}  # from now on it cannot get lost without a word


@pytest.mark.parametrize("sizes", [{"rank": 10**9, "places": 0}, {"rank": 2, "places": 4}, "2", [2]])
def test_sizes_that_are_not_the_weights_are_refused(sizes, tmp_path, stand_in):
    folder, _, _ = merged_llava(tmp_path, stand_in)
    edit(folder / "config.json", vision_entry=sizes)
    with pytest.raises(ValueError, match="the checkpoint holds one with"):
        load(folder, dtype=torch.float32)


def test_adapters_without_the_entry_that_they_trained_are_refused(tmp_path, stand_in):
    """As PEFT leaves them where the model had no such module."""
    saved_student("llava", PLAIN, tmp_path, stand_in)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: w for name, w in load_file(file).items() if "vision_entry" not in name}, file)
    with pytest.raises(
        ValueError, match=r"was trained with an entry adapter, but adapter_model\.safetensors"
    ):
        load(tmp_path / "adapter", dtype=torch.float32)


@pytest.mark.parametrize(
    "settings",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
        {"peft_type": "PROMPT_TUNING"},
        {"layer_replication": [[0, 4], [2, 5]]},
        {"base_model_name_or_path": None},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_adapter_settings_are_data(settings, tmp_path, stand_in):
    """PEFT imports the module that `megatron_core` names."""
    saved_student("llava", PLAIN, tmp_path, stand_in)
    edit(tmp_path / "adapter" / "adapter_config.json", **settings)
    with pytest.raises(ValueError, match=r"adapter_config\.json (sets|describes|is not)"):
        load(tmp_path / "adapter", dtype=torch.float32)
    assert "antigravity" not in sys.modules


def test_a_student_is_not_a_base(tmp_path, stand_in):
    """As one it would run dense, without its entry adapter."""
    folder, _, _ = merged_llava(tmp_path, stand_in)
    for refuses in (check_base, lambda path: base.load_base(path, dtype=torch.float32)):
        with pytest.raises(
            ValueError, match=r"is a trained student, not a base: load it with latefusion\.load"
        ):
            refuses(str(folder))


def test_what_bfloat16_rounds_away_is_said(tmp_path, stand_in):
    """Small changes vanish in 8 bits; larger ones are kept."""
    saved_student("llava", PLAIN, tmp_path, stand_in)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load(tmp_path / "adapter", dtype=torch.float32)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: w * (1e-4 if "lora_B" in name else 1) for name, w in weights.items()}, file)
    with pytest.warns(
        UserWarning, match=r"into bfloat16 rounds away \d\d% of what they changed; load it with dtype"
    ):
        load(tmp_path / "adapter", dtype=torch.bfloat16)
    student = load_student(tmp_path / "adapter", dtype=torch.float32)
    assert merge_adapters(student).lost == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_keeps_the_logits_of_every_family(family, stand_in):
    number = FAMILIES.index(family)
    student = build_student(
        build(family),
        stand_in,
        base="",
        schedule=SCHEDULE,
        rank=2,
        alpha=4,
        dropout=0.0,
        entry_rank=2,
        **(PLAIN, RS, DORA)[number % 3],
    )
    shake(student, 0.1)
    expected = logits(student.model, fresh(family))
    done = merge_adapters(student)
    assert done.lost == 0 and done.changed > 6
    assert not torch.allclose(
        logits(done.model, fresh(family)), expected, atol=1e-2
    )  # dense without its policy
    with attach(done.model, SCHEDULE):
        real = fresh(family)["attention_mask"].bool()
        torch.testing.assert_close(
            logits(done.model, fresh(family))[real], expected[real], rtol=1e-5, atol=1e-5
        )


def test_code_that_comes_with_a_folder_is_not_run(tmp_path, stand_in):
    folder, _, _ = merged_llava(tmp_path, stand_in)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    names = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor")
    edit(folder / "config.json", auto_map={name: "evil.Evil" for name in names})
    load(folder, dtype=torch.float32)
    edit(folder / "config.json", model_type="unheard_of")
    with pytest.raises(ValueError):
        load(folder, dtype=torch.float32)
    assert not (tmp_path / "ran").exists()


def test_a_published_student_loads_by_its_hub_id(tmp_path, stand_in, monkeypatch):
    """As its model card says."""
    folder, expected, real = merged_llava(tmp_path, stand_in)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", {"me/student": str(folder)}.__getitem__)
    model, _ = load("me/student", dtype=torch.float32)
    torch.testing.assert_close(logits(model, fresh("llava"))[real], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(FileNotFoundError, match=r"no student at me/other: .* cannot be downloaded"):
        load("me/other")
