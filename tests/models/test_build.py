"""Student assembly, and what is saved of it: save -> load -> merge -> load keeps the logits."""

import json
from copy import deepcopy

import pytest
import torch
from helpers.forwards import prompts_as_asked
from helpers.tiny_base import (
    BAND,
    SMALL,
    configured,
    shake,
    student_inputs,
    student_logits,
    tiny_base,
    tiny_student,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, LlavaConfig

from latefusion.data import sources
from latefusion.models.attach import attach
from latefusion.models.base_model import load_base
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.build import Lora, build_student, decoder_linears
from latefusion.models.student.entry import EntryAdapter, entry_of, install_entry
from latefusion.models.student.restore import load
from latefusion.models.student.save import load_student, merge, save_student
from latefusion.training import assemble


@pytest.fixture(scope="module")
def samples():
    rows = sources.scenes("validation", n_scenes=1)
    return [rows[i] for i in range(4)]


def test_entry_adapter_is_the_identity_until_trained_in_any_dtype():
    entry = EntryAdapter(hidden_size=8, rank=2)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 5, 8).to(dtype)
        assert torch.equal(entry(x), x) and entry(x).dtype == dtype
    entry(x).sum().backward()
    assert entry.scale.grad.abs().min() > 0 and entry.up.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("places", "later", "later_rank"),
    [(0, (), None), (7, (), None), (7, (4, 6), None), (7, (4, 6), 5)],
    ids=["low-rank", "calibrated", "at later layers too", "there of a low rank"],
)
def test_entry_flops_are_those_of_its_matrix_products(places, later, later_rank):
    entry = EntryAdapter(hidden_size=24, rank=3, places=places, later=later, later_rank=later_rank)
    rows = torch.randn(2, 7, 24)
    order = torch.arange(7).expand(2, -1) if places else None
    with FlopCounterMode(display=False) as counter:
        entry(rows, order)
        for layer in later:
            entry(rows, order, layer)
    assert entry.flops(14) == counter.get_total_flops()


def test_entry_is_found_in_the_plain_and_in_the_wrapped_model():
    model, _ = tiny_base()
    assert entry_of(model) is None
    entry = install_entry(model, 3)
    assert entry_of(model) is entry
    with pytest.raises(ValueError, match="already has an entry adapter"):
        install_entry(model, 3)
    with pytest.raises(ValueError, match="entry rank -1"):
        install_entry(tiny_base()[0], -1)
    _, student = tiny_student()
    assert entry_of(student.model) is student.model.get_base_model().vision_entry


def test_lora_is_on_the_decoder_and_nowhere_else():
    _, student = tiny_student()
    adapted = {n for n, p in student.model.named_parameters() if p.requires_grad and "lora" in n}
    assert len(adapted) == 6 * 7 * 2 and all(".language_model.layers." in n for n in adapted)
    assert {p.dtype for p in student.model.parameters() if p.requires_grad} == {torch.float32}
    _, student = tiny_student("lora.targets=[q_proj,v_proj]")
    adapted = {n for n, p in student.model.named_parameters() if p.requires_grad and "lora" in n}
    assert len(adapted) == 6 * 2 * 2
    with pytest.raises(
        ValueError, match=r"lora.targets names 'query', but .* are down_proj, gate_proj, k_proj, o_"
    ):
        decoder_linears(tiny_base()[0], ["query"])


def test_a_schedule_that_sees_vision_from_the_start_has_no_entry_adapter():
    _, student = tiny_student("schedule.enter=0")
    assert entry_of(student.model) is None
    _, student = tiny_student("entry.rank=0", "entry.init=identity")
    assert entry_of(student.model) is None


def test_a_schedule_beyond_the_model_is_refused():
    with pytest.raises(ValueError, match="exit names layer 9, but the decoder has layers 0 to 5"):
        tiny_student("schedule.exit=9")


@pytest.mark.parametrize("projector", [False, True])
def test_save_load_merge_load_keeps_the_logits(tmp_path, base, samples, projector):
    options = (f"model.path={base}", "model.attention=sdpa", f"lora.train_projector={str(projector).lower()}")
    config = configured(*BAND, *SMALL, *options)
    student = assemble.student_of(config)
    shake(student, 0.1)
    inputs = student_inputs(student, samples)
    expected = student_logits(student.model, inputs)
    schedule = student.schedule

    save_student(student, tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(base)
    model, processor = load(tmp_path / "adapter", dtype=torch.float32, merge=False)
    assert torch.equal(student_logits(model, inputs), expected)
    assert processor.chat_template == student.processor.chat_template

    merge(tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    saved = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert saved["vision_schedule"] == schedule.to_dict()
    assert saved["architectures"] == ["LateFusionLlavaForConditionalGeneration"]
    assert (saved["model_type"], saved["base_model_type"]) == ("latefusion", "llava")
    merged, _ = load(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(student_logits(merged, inputs), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(student_logits(assemble.student_of(config).model, inputs), expected, rtol=1e-2)

    assert saved["vision_entry"] == {"rank": 4, "places": 0}
    assert {file.name for file in (tmp_path / "merged").glob("*.safetensors")} == {"model.safetensors"}
    merge(tmp_path / "adapter", tmp_path / "plain", dtype=torch.float32, plain=True)
    plain, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert (
        not info["missing_keys"] and not info["unexpected_keys"]
    )  # a stock checkpoint, dense until attached
    plain.add_module("vision_entry", entry_of(merged))
    with attach(plain, schedule):
        torch.testing.assert_close(
            student_logits(plain, inputs), student_logits(merged, inputs), rtol=0, atol=0
        )


@pytest.mark.parametrize("merged", [True, False])
def test_a_projector_that_trained_in_float32_runs_in_a_bfloat16_model(tmp_path, base, samples, merged):
    options = (f"model.path={base}", "lora.train_projector=true")
    student = assemble.student_of(configured(*BAND, *SMALL, *options))
    shake(student, 0.01)
    inputs = student_inputs(student, samples)
    expected = student_logits(student.model, inputs)
    save_student(student, tmp_path)
    model, _ = load(tmp_path, dtype=torch.bfloat16, merge=merged)
    inputs = {
        name: value.to(model.dtype if value.is_floating_point() else None) for name, value in inputs.items()
    }
    difference = student_logits(model, inputs).float() - expected
    assert difference.abs().mean() < 0.05 * expected.abs().mean()


def test_a_loaded_student_generates_under_its_schedule(tmp_path, base, samples):
    student = assemble.student_of(configured(*BAND, *SMALL, f"model.path={base}"))
    save_student(student, tmp_path)
    loaded = load_student(tmp_path, dtype=torch.float32)
    loaded.model.generate(**student_inputs(loaded, samples[:1]), max_new_tokens=2)
    text = loaded.attachment.trace[0].tokens[0]
    assert loaded.attachment.trace[0].tokens == [text, text, text + 4, text + 4, text + 2, text]


def test_what_is_not_there_is_one_sentence(tmp_path, base, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no model at .*neither adapter_config.json nor config.json"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no vision schedule"):
        load(base)
    with pytest.raises(FileNotFoundError, match=r"no model at .*model\.path="):
        load_base(str(tmp_path), dtype=torch.float32)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no student at .* it has no vision_schedule\.json"):
        load(tmp_path)

    def unreachable(self, repo, **kwargs):
        raise ConnectionError("no route to the hub\nand more")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    with pytest.raises(FileNotFoundError) as error:
        load_base("someone/llava-never-cached", dtype=torch.float32)
    assert "\n" not in str(error.value) and "(no route to the hub)" in str(error.value)
    assert "hf download someone/llava-never-cached" in str(error.value)


def test_llava_7b_builds_on_the_meta_device_with_its_published_band():
    config = configured(
        "model=llava_1_5_7b", "recipe=late_fusion_pyramid", "data=llava_mix665k", "engine=deepspeed_zero3"
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(LlavaConfig(), dtype=torch.bfloat16)
        _, processor = tiny_base()
        student = assemble.student_from(config, model, processor)
    tokens = student.schedule.vision_tokens(32, 576)
    assert sum(tokens) / 32 == pytest.approx(64, abs=0.5)
    trainable, total = student.model.get_nb_trainable_parameters()
    assert 7.0e9 < total < 7.2e9 and 20e6 < trainable < 21e6
    assert isinstance(student.schedule, VisionSchedule) and entry_of(student.model) is not None


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_base_that_is_used_twice_is_refused():
    model, processor = tiny_base()
    options = {"base": "x", "schedule": VisionSchedule(enter=1), "lora": Lora(rank=2, alpha=2)}
    build_student(model, processor, **options)
    with pytest.raises(ValueError):
        build_student(model, processor, **options)


# ---------------------------------------------------------------- what is frozen stays in eval mode


def noisy_base():
    """A base whose vision tower has dropout and batch norm."""
    model, processor = tiny_base()
    tower = model.model.vision_tower
    tower.noise = torch.nn.Sequential(torch.nn.BatchNorm2d(32), torch.nn.Dropout(0.5)).eval()
    tower.embeddings.patch_embedding.register_forward_hook(lambda conv, inputs, output: tower.noise(output))
    return model, processor


@pytest.mark.parametrize(
    "options",
    [(), ("lora.train_projector=true",), ("tune=align",), ("tune=full", "teacher=none")],
    ids=["lora", "projector", "align", "full"],
)
def test_a_frozen_tower_stays_in_eval_mode_when_the_student_trains(samples, options):
    config = configured(*BAND, *SMALL, "lora.dropout=0.0", *options)
    student = assemble.student_from(config, *noisy_base())
    tower = student.attachment.model.model.vision_tower
    inputs = student_inputs(student, samples)
    expected = student_logits(student.model, inputs)
    before = {name: value.clone() for name, value in tower.noise.state_dict().items()}
    for model in (student.model, deepcopy(student.model)):
        model.train()
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, expected)
    assert all(torch.equal(value, before[name]) for name, value in tower.noise.state_dict().items())
    decoder = student.attachment.decoder
    assert decoder.training and all(layer.training for layer in decoder.layers)
    assert student.model.train(False) is student.model and not decoder.training


def test_a_projector_trains_as_a_whole():
    """Its dropout too, which has no weights."""
    model, processor = noisy_base()
    projector = model.model.multi_modal_projector
    projector.dropout = torch.nn.Dropout(0.5)
    config = configured(*BAND, *SMALL, "lora.train_projector=true")
    student = assemble.student_from(config, model, processor)
    student.model.train()
    copy = student.attachment.model.model.multi_modal_projector.modules_to_save["default"]
    assert all(module.training for module in copy.modules())


def test_a_student_whose_adapters_stay_apart_goes_on_training(tmp_path, base, samples):
    student = assemble.student_of(configured(*BAND, *SMALL, f"model.path={base}"))
    save_student(student, tmp_path)
    model, _ = load(tmp_path, dtype=torch.float32, merge=False)
    learns = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert learns == {name for name, weight in student.model.named_parameters() if weight.requires_grad}
    model.train()
    assert not any(module.training for module in model.get_base_model().model.vision_tower.modules())
    inputs = student_inputs(student, samples)
    with prompts_as_asked(model, inputs):
        model(**inputs).logits.sum().backward()
    entry = entry_of(model).modules_to_save["default"]
    assert entry.scale.grad.abs().max() > 0
    assert not any(weight.requires_grad for weight in load_student(tmp_path).model.parameters())
