"""Tiny processors of the families that the recipes name: stock classes over a word-level tokenizer of their own.

Chat templates write what those of the hub write for system prompts, turns and placeholders. Video processors need
torchvision, which is not there; nothing here shows videos, so the processors do without.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import transformers as hf
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.utils import PushToHubMixin

from latefusion.training.embedded.vocabulary import build_processor

WORDS = (
    "user assistant model system User Assistant USER ASSISTANT You are a helpful INST how many what color is it red 2 "
    "yes and no : ? . [ ] /"
)
SQUARE = {"height": 28, "width": 28}
GRID = [[28, 56], [56, 28], [56, 56]]

PARTS = (
    "{%- for p in m['content'] -%}{%- if p['type'] == 'image' -%}{{ IMAGE }}"
    "{%- else -%}{{ p['text'] }}{%- endif -%}{%- endfor -%}"
)
LLAVA = (  # a generation mark, and no token that ends an answer
    "{%- for m in messages -%}{{ m['role'].upper() + ': ' }}"
    "{%- for p in m['content'] if p['type'] == 'image' -%}{{ '<image>\n' }}{%- endfor -%}"
    "{%- for p in m['content'] if p['type'] == 'text' -%}{%- if m['role'] == 'assistant' -%}"
    "{%- generation -%}{{ p['text'] + ' ' }}{%- endgeneration -%}"
    "{%- else -%}{{ p['text'] + ' ' }}{%- endif -%}{%- endfor -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)
MISTRAL = (
    "{%- for m in messages -%}{%- if m['role'] == 'user' -%}{{ '[INST] ' }}"
    + PARTS.replace("{{ IMAGE }}", "{{ '<image>\n' }}")
    + "{{ ' [/INST]' }}{%- else -%}{{ ' ' + m['content'][0]['text'] + '<eos>' }}{%- endif -%}{%- endfor -%}"
)
CHATML = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\n' }}"
    + PARTS
    + "{{ '<|im_end|>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
SYSTEM = "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
QWEN_IMAGE = "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
SMOLVLM = (
    "{{ '<|im_start|>' }}{%- for m in messages -%}"
    "{{ m['role'].capitalize() + (':' if m['content'][0]['type'] == 'image' else ': ') }}"
    + PARTS.replace("{{ IMAGE }}", "{{ '<image>' }}")
    + "{{ '<end_of_utterance>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}"
)
GEMMA = (
    "{{ bos_token }}{%- for m in messages -%}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    + PARTS.replace("{{ IMAGE }}", "{{ '<start_of_image>' }}").replace("p['text']", "p['text'] | trim")
    + "{{ '<end_of_turn>\n' }}{%- endfor -%}"
    + "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)


class NoVideo(PushToHubMixin):  # as every part of a processor, which `to_dict` asks for it
    """What `SmolVLMProcessor` asks of its video processor whether there are videos or not."""

    num_frames, fps, video_sampling, size = 1, 1, {"num_frames": 1, "fps": 1, "max_frames": 1}, None
    model_input_names: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {}

    def save_pretrained(self, folder: Any, **kwargs: Any) -> None:
        pass


def tokenizer(*special: str, named: dict[str, str] | None = None) -> hf.PreTrainedTokenizerFast:
    """Words, a line break and special tokens; `named` ones become attributes such as `image_token`."""
    marks = ["<pad>", "<bos>", "<eos>", "<unk>", *special, *(named or {}).values()]
    vocabulary = {word: i for i, word in enumerate([*marks, "\n", *WORDS.split()])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        **({"extra_special_tokens": named} if named else {}),
    )


def qwen(kind: type, template: str, patch_size: int, videos: Any = None) -> Any:
    side = 4 * patch_size
    images = Qwen2VLImageProcessorPil(
        patch_size=patch_size, size={"shortest_edge": side * side, "longest_edge": 4 * side * side}
    )
    words = tokenizer(
        "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
    )
    return kind(images, words, videos, chat_template=template.replace("{{ IMAGE }}", QWEN_IMAGE))


PROCESSORS: dict[str, Callable[[], Any]] = {
    "llava": lambda: hf.LlavaProcessor(
        CLIPImageProcessorPil(size=SQUARE, do_center_crop=False, crop_size=SQUARE),
        tokenizer("<image>"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA,
    ),
    "llava_next": lambda: hf.LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size=SQUARE, do_center_crop=False, crop_size=SQUARE, image_grid_pinpoints=GRID
        ),
        tokenizer("<image>"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=MISTRAL,
    ),
    "llava_onevision": lambda: hf.LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=GRID),
        tokenizer("<|im_start|>", "<|im_end|>", "<image>", "<video>"),
        None,
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=CHATML.replace("{{ IMAGE }}", "{{ '<image>' }}"),
    ),
    "qwen2_5_vl": lambda: qwen(hf.Qwen2_5_VLProcessor, SYSTEM + CHATML, 14),
    "qwen3_vl": lambda: qwen(hf.Qwen3VLProcessor, CHATML, 16),
    "internvl": lambda: hf.InternVLProcessor(
        GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=2),
        tokenizer(
            "<|im_start|>",
            "<|im_end|>",
            named={
                "start_image_token": "<img>",
                "end_image_token": "</img>",
                "context_image_token": "<IMG_CONTEXT>",
                "video_token": "<video>",
            },
        ),
        None,
        image_seq_length=4,
        chat_template=CHATML.replace("{{ IMAGE }}", "{{ '<IMG_CONTEXT>\n' }}"),
    ),
    "smolvlm": lambda: hf.SmolVLMProcessor(
        SmolVLMImageProcessorPil(
            size={"longest_edge": 28}, max_image_size={"longest_edge": 28}, do_image_splitting=False
        ),
        tokenizer(
            "<|im_start|>",
            named={
                "image_token": "<image>",
                "fake_image_token": "<fake_token_around_image>",
                "global_image_token": "<global-img>",
                "end_of_utterance_token": "<end_of_utterance>",
            },
        ),
        NoVideo(),
        image_seq_len=4,
        chat_template=SMOLVLM,
    ),
    "gemma3": lambda: hf.Gemma3Processor(
        Gemma3ImageProcessorPil(size=SQUARE),
        tokenizer(
            "<start_of_turn>",
            "<end_of_turn>",
            named={
                "boi_token": "<start_of_image>",
                "image_token": "<image_soft_token>",
                "eoi_token": "<end_of_image>",
            },
        ),
        image_seq_length=4,
        chat_template=GEMMA,
    ),
    "embedded": lambda: build_processor(image_size=28, patch_size=14),
}
STOP = {  # at which the family's model stops to generate
    "llava": "<eos>",
    "llava_next": "<eos>",
    "llava_onevision": "<|im_end|>",
    "qwen2_5_vl": "<|im_end|>",
    "qwen3_vl": "<|im_end|>",
    "internvl": "<|im_end|>",
    "smolvlm": "<end_of_utterance>",
    "gemma3": "<end_of_turn>",
    "embedded": "<eos>",
}


@cache
def processor(family: str) -> Any:
    """The family's tiny processor; one object a process."""
    checked = hf.ProcessorMixin.check_argument_for_proper_class
    words = processing_smolvlm.num2words

    def without_video(self: Any, name: str, argument: Any) -> Any:
        return None if argument is None or isinstance(argument, NoVideo) else checked(self, name, argument)

    hf.ProcessorMixin.check_argument_for_proper_class = without_video
    processing_smolvlm.num2words = words or str  # counts video frames
    try:
        return PROCESSORS[family]()
    finally:
        hf.ProcessorMixin.check_argument_for_proper_class = checked
        processing_smolvlm.num2words = words


def vision_id(family: str) -> int:
    """The token that the family's model replaces by image features."""
    made = processor(family)
    return made.tokenizer.image_token_id if family == "gemma3" else made.image_token_id
