"""Every shipped model configuration trains, through the real entry point, on a shrunk random model of its family."""

import json

import pytest
import torch
from helpers.data_rows import IMAGE_PART, turn, write_rows
from helpers.families import CONFIGS, build_from
from helpers.processors import PROCESSORS, STOP, processor, vision_id
from helpers.quick_runs import run_config
from helpers.tiny_base import composed
from omegaconf import OmegaConf
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from latefusion.models import base_model as base
from latefusion.models.policies.configured import schedule_of
from latefusion.models.student.save import load_student
from latefusion.recipes.check import check_config
from latefusion.recipes.schema import RECIPES, EntryConfig, LoraConfig, ModelConfig, Teacher, TrainConfig

FAMILY = {
    "llava_1_5_7b": "llava",
    "llava_next_mistral_7b": "llava_next",
    "llava_onevision_qwen2_7b": "llava_onevision",
    "qwen2_5_vl_3b": "qwen2_5_vl",
    "qwen3_vl_4b": "qwen3_vl",
    "internvl3_2b": "internvl",
    "smolvlm_2b": "smolvlm",
    "gemma3_4b": "gemma3",
    "embedded": "embedded",
    "smollm_icons": "llava",
    "llava_1_5_13b": "llava",
    "qwen2_5_vl_7b": "qwen2_5_vl",
    "internvl3_8b": "internvl",
}
SECOND = ("llava_1_5_13b", "qwen2_5_vl_7b", "internvl3_8b", "smollm_icons")  # other sizes of a family
LAYERS = {"smolvlm_2b": 24, "gemma3_4b": 34, "llava_1_5_13b": 40, "embedded": 14, "smollm_icons": 30}
LAYERS |= dict.fromkeys(("qwen2_5_vl_3b", "qwen3_vl_4b"), 36)
LAYERS |= dict.fromkeys(("llava_1_5_7b", "llava_next_mistral_7b"), 32)
LAYERS |= dict.fromkeys(("llava_onevision_qwen2_7b", "qwen2_5_vl_7b", "internvl3_2b", "internvl3_8b"), 28)


def test_every_configuration_has_a_family_here():
    shipped = {path.stem for path in (RECIPES / "model").glob("*.yaml")}
    assert set(FAMILY) == shipped - {"other"} == set(LAYERS)  # any other model has a test of its own below
    assert set(FAMILY.values()) == set(PROCESSORS)


def shrunk(family: str, layers: int) -> torch.nn.Module:
    """A random model of this many layers whose token ids are those of the family's tiny processor."""
    config = CONFIGS["llava" if family == "embedded" else family]()
    text, words = config.get_text_config(), processor(family).tokenizer
    text.num_hidden_layers = layers
    if family == "gemma3":
        text.layer_types = ["sliding_attention", "full_attention"] * (layers // 2)
    elif getattr(text, "layer_types", None):
        text.layer_types = ["full_attention"] * layers
    if family == "internvl":
        config.downsample_ratio = 1.0  # 4 vision tokens a tile
    config.image_token_id = vision_id(family)
    if family in ("llava_next", "llava_onevision"):
        config.image_grid_pinpoints = processor(family).image_processor.image_grid_pinpoints
    model = build_from(config)
    model.generation_config.eos_token_id = words.convert_tokens_to_ids(STOP[family])
    model.generation_config.suppress_tokens = None
    return model


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """What `load_base` finds: a family's shrunk model; a folder gives no processor without torchvision."""

    def put(family: str, layers: int) -> str:
        shrunk(family, layers).save_pretrained(tmp_path / "base")
        monkeypatch.setattr(base.AutoProcessor, "from_pretrained", lambda path, **settings: processor(family))
        monkeypatch.setattr(processor(family), "save_pretrained", lambda folder: None, raising=False)
        return str(tmp_path / "base")

    return put


def conversations(folder) -> str:
    for name, size in (("a.png", (40, 30)), ("b.png", (30, 50))):
        Image.new("RGB", size, (200, 0, 0)).save(folder / name)
    answer = turn("assistant", "red.")
    return write_rows(
        folder,
        {"messages": [turn("user", IMAGE_PART, "what color?"), answer], "images": ["a.png"]},
        {
            "messages": [turn("user", IMAGE_PART, "how many?", IMAGE_PART), turn("assistant", "2")],
            "images": ["a.png", "b.png"],
        },
        {"messages": [turn("user", "is it red?"), turn("assistant", "yes")]},
        {
            "messages": [turn("user", IMAGE_PART, "what color?"), answer, turn("user", "red?"), answer],
            "images": ["b.png"],
        },
        name="chat.jsonl",
    )


QUICK = (
    *("train.dtype=float32", "train.threads=1", "train.steps=1", "train.batch_size=4", "train.save_every=9"),
    *("lora.r=2", "lora.targets=[q_proj,v_proj]", "entry.rank=2", "train.trackers=[]", "entry.init=identity"),
)


def trained(model: str, base: str, folder, *overrides: str):
    settings = OmegaConf.create({"model": {"path": base, "processor": {}}})
    cfg = composed(f"model={model}", "data=dataset", f"data.path={conversations(folder)}", *QUICK, *overrides)
    cfg = OmegaConf.merge(cfg, settings, {"output_dir": str(folder / "out")})
    run_config(cfg)
    return load_student(folder / "out", dtype=torch.float32)


@pytest.mark.parametrize("model", FAMILY)
def test_the_layers_that_read_frozen_tokens_fit_the_model(model):
    config = check_config(composed(f"model={model}", "recipe=cross_only"))
    schedule = schedule_of(config.schedule)
    schedule.validate(16 if model == "embedded" else LAYERS[model])
    band = schedule_of(config.model.schedule)
    assert schedule.cross and schedule.exit <= band.exit
    if model not in ("llava_1_5_7b", "llava_1_5_13b", "smollm_icons"):  # by ViCA, and chosen on questions
        assert band.enter == schedule.enter


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llava_1_5_7b", "qwen3_vl_4b", "gemma3_4b", "qwen2_5_vl_3b"])
def test_frozen_tokens_train_in_the_families_that_are_different(hub, tmp_path, model, capsys):
    student = trained(model, hub(FAMILY[model], LAYERS[model]), tmp_path, "recipe=cross_only")
    assert list(student.schedule.cross) == composed(f"model={model}").model.cross
    assert "frozen: keys and values alone" in capsys.readouterr().out


@pytest.mark.parametrize(
    "model", [pytest.param(m, marks=pytest.mark.slow) if m in SECOND else m for m in FAMILY]
)
def test_every_model_trains_on_mixed_batches_with_its_projector(hub, tmp_path, model, capsys):
    """Several images, one and none in a batch; the projector and the blank image for batches without one."""
    layers = LAYERS[model]
    base = hub(FAMILY[model], layers)
    student = trained(model, base, tmp_path, "recipe=late_fusion_pyramid", "lora.train_projector=true")
    schedule = composed(f"model={model}", "recipe=late_fusion_pyramid").schedule
    assert student.schedule.enter == schedule.enter > 0 and student.schedule.exit == schedule.exit < layers
    printed = capsys.readouterr().out
    assert f"vision tokens by layer: 0-{schedule.enter - 1}: 0, {schedule.enter}-" in printed
    assert "estimate: " in printed
    saved = student.model.peft_config["default"].modules_to_save
    assert len(saved) == 2 and all(
        any(name.endswith(f"{module}.modules_to_save.default") for name, _ in student.model.named_modules())
        for module in saved
    )


def test_any_other_model_borrows_nothing_and_needs_a_schedule(hub, tmp_path, capsys):
    base = hub("qwen2_5_vl", 10)
    with pytest.raises(
        SystemExit, match=r"set schedule.enter=N and schedule.exit=N, or schedule=auto"
    ) as refused:
        trained("other", base, tmp_path)
    assert "\n" not in str(refused.value) and base in str(refused.value)
    with pytest.raises(SystemExit, match=r"schedule.cross=\[\] names no layer"):
        trained("other", base, tmp_path, "recipe=cross_only")
    student = trained("other", base, tmp_path, "schedule.enter=3", "schedule.exit=6")
    assert (student.schedule.enter, student.schedule.exit, student.schedule.keep) == (3, 6, {})
    assert student.model.peft_config["default"].target_modules.count("(3|4|5)") == 1  # LoRA where vision is
    assert "note:" not in capsys.readouterr().out


def test_any_other_model_starts_from_the_paper_s_thresholds_and_the_loop_s_own_settings():
    config = check_config(composed("model=other", "model.path=x/y", "recipe=dense"))
    assert (config.lora, config.entry) == (LoraConfig(), EntryConfig())
    assert config.train == TrainConfig(learning_rate=2e-4, batch_size=16)  # one pass over the data
    assert config.model == ModelConfig(path="x/y", teacher=Teacher.dense)
    assert config.model.visipruner.boundary == 6
    assert config.teacher is Teacher.dense  # thresholds of another model may teach nothing
    assert (
        check_config(
            composed("model=other", "model.path=x/y", "recipe=late_fusion_no_teacher", "schedule=auto")
        ).teacher
        is Teacher.none
    )


HUB = {  # what the preprocessor_config.json of these families says
    "qwen2_5_vl": {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14},
    "qwen3_vl": {"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16},
}


@pytest.mark.parametrize("model", [name for name, family in FAMILY.items() if family in HUB])
def test_the_most_vision_tokens_of_an_image_are_as_its_configuration_says(model, tmp_path):
    """Through the library's own loading: without the setting the same photo has four times as many or more."""
    on_the_hub = {**HUB[FAMILY[model]], "temporal_patch_size": 2, "merge_size": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(on_the_hub))

    def tokens(**settings):
        processor = Qwen2VLImageProcessorPil.from_pretrained(tmp_path, **settings)
        grid = processor(images=[Image.new("RGB", (3000, 2000))], return_tensors="pt")["image_grid_thw"]
        return int(grid.prod()) // 4

    limits = composed(f"model={model}").model.processor
    assert 1200 < tokens(**limits) <= 1280 < 4 * 1280 < tokens()
