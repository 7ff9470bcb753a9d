"""Released HiDrop and ViCA checkpoints, on tiny folders in LLaVA's format: the same logits, or one clear sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

import latefusion as lf
from latefusion.models.attach import attached
from latefusion.training import import_llava

WORDS = ["<unk>", "<s>", "</s>", "what", "is", "this", "?", "USER", "ASSISTANT", ":", "red"]
LAYERS = 26  # the published layers fit


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, LlavaForConditionalGeneration]:
    """A folder as HiDrop and ViCA release it, CLIP's folder, and the model that was put into them."""
    torch.manual_seed(0)
    folder, clip = tmp_path_factory.mktemp("llava-v1.5"), tmp_path_factory.mktemp("clip")
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=len(WORDS),
        max_position_embeddings=256,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=0, vision_feature_layer=-2)
    ).eval()
    tower = CLIPVisionModel(vision)
    tower.load_state_dict(model.model.vision_tower.state_dict())
    tower.save_pretrained(clip)
    names = {
        "model.language_model.": "model.",
        "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
        "lm_head.": "lm_head.",
    }
    weights = {
        new + name.removeprefix(old): w.clone()
        for name, w in model.state_dict().items()
        for old, new in names.items()
        if name.startswith(old)
    }
    half = len(weights) // 2
    save_file(dict(list(weights.items())[:half]), folder / "model-00001-of-00002.safetensors")
    save_file(dict(list(weights.items())[half:]), folder / "model-00002-of-00002.safetensors")
    settings = {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": str(clip),
        "mm_hidden_size": 16,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        **{name: getattr(text, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")},
        **{
            name: getattr(text, name) for name in ("num_attention_heads", "num_key_value_heads", "vocab_size")
        },
        "rms_norm_eps": text.rms_norm_eps,
        "max_position_embeddings": 256,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", add_bos_token=True
    )
    tokenizer.save_pretrained(folder)
    return folder, clip, model


def imported(folder: Path, output: Path, *options: str) -> tuple[Any, Any]:
    import_llava.main([f"checkpoint={folder}", f"output={output}", *options])
    return lf.load(output, dtype=torch.float32)


@pytest.mark.parametrize("recipe", ["vica_7b", "hidrop_tok48"])
def test_the_weights_are_those_that_were_released(released, tmp_path: Path, recipe: str) -> None:
    folder, _, original = released
    model, processor = imported(folder, tmp_path / "out", f"recipe={recipe}")
    attachment = attached(model)
    assert attachment is not None and attachment.policy == lf.VisionSchedule.load(tmp_path / "out")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this ?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text.startswith(import_llava.SYSTEM + " USER: <image>\nwhat is this ? ASSISTANT:")
    image = Image.new("RGB", (40, 20), "red")
    inputs = dict(processor(text=text, images=image, return_tensors="pt"))
    with torch.no_grad():
        attachment.detach()
        ours = model(**inputs).logits
        vision = inputs["input_ids"] == model.config.image_token_id  # [1, T]
        embeds = original.get_input_embeddings()(inputs["input_ids"].masked_fill(vision, 0))
        embeds[vision] = original.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[
            0
        ]
        released_logits = (
            original.model.language_model(inputs_embeds=embeds).last_hidden_state @ original.lm_head.weight.T
        )
    assert vision.sum() == 4
    torch.testing.assert_close(ours[..., : len(WORDS)], released_logits)
    mean = released_logits.mean(-1)
    torch.testing.assert_close(ours[..., len(WORDS)], mean)  # <image> is never the likeliest word
    assert torch.equal(ours.argmax(-1), released_logits.argmax(-1))


def test_weights_in_torch_files_and_a_tower_of_their_own(released, tmp_path: Path) -> None:
    folder, clip, original = released
    torched = tmp_path / "torched"
    shutil.copytree(folder, torched)
    weights = {}
    for file in sorted(torched.glob("model*.safetensors")):
        weights |= load_file(file)
        file.unlink()
    tower = {f"{import_llava.TOWER}{n}": w for n, w in original.model.vision_tower.state_dict().items()}
    torch.save({**weights, **tower}, torched / "pytorch_model.bin")
    model, _ = imported(torched, tmp_path / "out", "recipe=vica_13b", f"vision_tower={clip}")
    expected, _ = imported(folder, tmp_path / "again", "recipe=vica_13b")
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "llava"}, None),
        ({"model_type": "llama"}, r"^error: .*config\.json is of model_type 'llama'"),
        ({"mm_projector_type": "linear"}, r"has mm_projector_type='linear'; only 'mlp2x_gelu'"),
        ({"mm_use_im_start_end": True}, r"has mm_use_im_start_end=True; only False"),
        (
            {"num_hidden_layers": 25},
            r"holds model\.language_model\.layers\.25\..*, which a LLaVA-1\.5 .* does not have",
        ),
        (
            {"num_hidden_layers": 27},
            r"lacks model\.language_model\.layers\.26\..*, which a LLaVA-1\.5 .* has",
        ),
        ({"intermediate_size": 96}, r"mlp\..*_proj\.weight of .* has shape \[.*\], its config\.json says \["),
        ({"num_hidden_layers": 8}, r"cross names layer|exit names layer"),
        (
            {"mm_vision_tower": "/nowhere/clip"},
            r"the vision tower /nowhere/clip is neither a folder nor within reach",
        ),
        ({"vocab_size": 10}, r"shape|files do not belong together"),
    ],
)
def test_another_format_is_one_sentence(
    released, tmp_path: Path, change: dict[str, Any], sentence: str | None
) -> None:
    folder, _, _ = released
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | change))
    words = [f"checkpoint={copy}", f"output={tmp_path / 'out'}", "recipe=vica_7b"]
    if sentence is None:
        import_llava.main(words)
        return
    with pytest.raises(SystemExit, match=sentence) as error:
        import_llava.main(words)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["recipe=vica_8b"],
            r"^error: recipe=vica_8b does not exist \(did you mean vica_7b\?\); recipe can be ",
        ),
        (["recip=vica_7b"], r"^error: recip does not exist \(did you mean recipe\?\)"),
        (["recipe=vica_7b", "checkpoint=/nowhere"], r"^error: checkpoint=/nowhere has no config\.json"),
    ],
)
def test_wrong_words_are_one_sentence(released, tmp_path: Path, words: list[str], sentence: str) -> None:
    with pytest.raises(SystemExit, match=sentence):
        import_llava.main([f"checkpoint={released[0]}", f"output={tmp_path / 'out'}", *words])


def test_a_folder_that_holds_a_model_is_not_overwritten(released, tmp_path: Path) -> None:
    imported(released[0], tmp_path / "out", "recipe=vica_7b")
    with pytest.raises(SystemExit, match="holds a model already"):
        import_llava.main([f"checkpoint={released[0]}", f"output={tmp_path / 'out'}", "recipe=vica_7b"])
