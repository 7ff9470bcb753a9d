"""Assembly of the base: a stock LLaVA folder from the packages and the weights that ship here."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import (
    CLIPImageProcessor,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from latefusion.models.smollm_icons import WEIGHTS
from latefusion.models.smollm_icons.folder import assembled_folder, check_parts
from latefusion.models.smollm_icons.packages import load_language_model, load_network, load_tokenizer
from latefusion.models.smollm_icons.tower import SIDE, STRIDE, IconsTowerConfig, folded

LORA_SCALE = 2.0
IMAGE = "<file_sep>"  # a special token that SmolLM2 never used: no embedding has to be added
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% if message['content'] is string %}{{ '\\n' + message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}Image:"
    + IMAGE
    + "{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ '\\n' + part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% elif message['content'] is string %}"
    "{% generation %}{{ ' ' + message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{% for part in message['content'] %}"
    "{% generation %}{{ ' ' + part['text'] + '<|im_end|>' }}{% endgeneration %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


def assemble(weights: Path = WEIGHTS) -> Path:
    """The folder of the assembled base (280 MB), written on first use; safe against parallel processes.

    Raises:
        FileNotFoundError: the weights or a package are missing.
    """
    check_parts(weights)
    folder = assembled_folder(weights)
    if (folder / "config.json").is_file():
        return folder
    print(f"assembling smollm_icons from its packages into {folder} (once, under a minute)", flush=True)
    began = time.time()
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        model, processor = build(weights)
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        partial.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise
        # another process was faster
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"assembled in {time.time() - began:.0f} s", flush=True)
    return folder


@torch.no_grad()
def build(weights: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The base in bfloat16: SmolLM2 with the LoRA merged, EfficientNet-Lite0 and the projector."""
    trained = load_file(weights / "model.safetensors")
    language = load_language_model()
    parameters = dict(language.named_parameters())
    for name in [name for name in trained if name.endswith(".down")]:
        module = name.removesuffix(".down")
        update = LORA_SCALE * trained[f"{module}.up"].float() @ trained[name].float()
        weight = parameters[f"{module.removeprefix('lora.')}.weight"]
        weight.copy_(weight.float() + update)

    tokenizer = load_tokenizer()
    config = LlavaConfig(
        vision_config=IconsTowerConfig(),
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=SIDE**2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config).bfloat16()
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    tower.network.load_state_dict(folded(load_network()).state_dict())
    for name in ("mean", "std"):
        getattr(tower, name).copy_(trained[f"projector.{name}"])
    for layer in ("linear_1", "linear_2"):
        state = {part: trained[f"projector.{layer}.{part}"] for part in ("weight", "bias")}
        getattr(projector, layer).load_state_dict(state)
    eos = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=eos, pad_token_id=eos, max_new_tokens=8, do_sample=False
    )
    return model.eval(), build_processor(tokenizer)


def build_processor(tokenizer) -> LlavaProcessor:
    """Pictures to 768 x 768 pixels and 144 image tokens; questions on lines of their own."""
    size = {"height": SIDE * STRIDE, "width": SIDE * STRIDE}
    images = CLIPImageProcessor(
        size=size, crop_size=size, do_center_crop=False, image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=STRIDE,
        vision_feature_select_strategy="full",
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=0,
    )
