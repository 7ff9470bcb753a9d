"""Turn a released HiDrop or ViCA checkpoint, in LLaVA's own format, into a Hugging Face one with its schedule.

    python training/import_llava.py checkpoint=FOLDER recipe=hidrop_tok48 output=outputs/hidrop_tok48
    python training/import_llava.py checkpoint=FOLDER recipe=vica_7b vision_tower=CLIP_FOLDER output=outputs/vica_7b

`lf.load` and `eval/evaluate.py checkpoint=outputs/hidrop_tok48` take the folder that is written. Both methods release
LLaVA-1.5's format (EIT-NLP/HiDrop at fb79d6c8, EIT-NLP/ViCA at 1ca09b9): a Llama whose weights also hold
`model.mm_projector` and, in some folders, `model.vision_tower`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from latefusion.models.folder_contents import check_free
from latefusion.models.policies.configured import schedule_of
from latefusion.recipes.compose import check_words, compose_config, parse_words
from latefusion.recipes.launcher import run_to_exit
from latefusion.recipes.printable import error_line
from latefusion.training.run_folder import check_writable

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlavaConfig, LlavaProcessor

    from latefusion.models.schedule import VisionSchedule

TOWER = "model.vision_tower.vision_tower.vision_model."
"""What LLaVA's tower wrapper puts before CLIP's own names."""

RENAMED = {
    TOWER: "model.vision_tower.",
    "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
    "lm_head.": "lm_head.",
    "model.": "model.language_model.",  # after its longer prefixes
}

READ = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "flat",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
}
"""Settings of LLaVA-1.5 that this import reads, and the value that each must have; absent, it has it."""

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""LLaVA-1.5's system prompt (`vicuna_v1`), with which both methods were trained."""

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}" + SYSTEM + " {% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% elif message['role'] == 'assistant' %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass
class Arguments:
    """Keys of the command line.

    Attributes:
        checkpoint: the released folder, in LLaVA's format.
        recipe: names the schedule that it was trained under: hidrop_tok48, hidrop_tok64, hidrop_tok80, vica_7b,
            vica_13b or vica_3b.
        output: folder to write; must not hold a model.
        vision_tower: CLIP's folder or hub id; None: the one that the checkpoint's config.json names.
    """

    checkpoint: str = MISSING
    recipe: str = MISSING
    output: str = MISSING
    vision_tower: str | None = None


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's `config.json`, checked to be of LLaVA-1.5's format.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is of another format, in one sentence that names the setting.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"checkpoint={folder} has no config.json; name a folder in LLaVA's format.")
    config = json.loads(file.read_text())
    if not str(config.get("model_type")).startswith("llava") or "mm_vision_tower" not in config:
        raise ValueError(
            f"{file} is of model_type {config.get('model_type')!r} without mm_vision_tower or not LLaVA's; only "
            "LLaVA-1.5-format checkpoints can be imported (a Hugging Face checkpoint needs no import)."
        )
    for name, value in READ.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"{file} has {name}={config[name]!r}; only {value!r}, LLaVA-1.5's, can be imported."
            )
    return config


def shards(folder: Path) -> Iterator[Mapping[str, Tensor]]:
    """The checkpoint's tensors, one file at a time.

    Raises:
        FileNotFoundError: the folder holds no weights.
    """
    import torch
    from safetensors.torch import load_file

    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise FileNotFoundError(
            f"checkpoint={folder} holds no weights: neither model*.safetensors nor pytorch_model*.bin."
        )
    for file in files:
        if file.suffix == ".safetensors":
            yield load_file(file)
        else:
            yield torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def renamed(name: str) -> str:
    """LLaVA's name of a tensor as Hugging Face's `LlavaForConditionalGeneration` calls it."""
    for prefix, other in RENAMED.items():
        if name.startswith(prefix):
            return other + name.removeprefix(prefix)
    return name


def llava_config(config: Mapping[str, Any], vision_config: Any) -> LlavaConfig:
    """The Hugging Face configuration of a checkpoint; `<image>` is one token behind the vocabulary."""
    from transformers import LlamaConfig, LlavaConfig

    names = set(LlamaConfig().to_dict()) - {
        "model_type",
        "architectures",
        "transformers_version",
        "dtype",
        "torch_dtype",
    }
    text = LlamaConfig(**{name: value for name, value in config.items() if name in names})
    text.vocab_size = config["vocab_size"] + 1
    return LlavaConfig(
        text_config=text,
        vision_config=vision_config,
        image_token_index=config["vocab_size"],
        vision_feature_layer=config.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="default",  # without CLIP's class token: "patch"
    )


def with_image_token(weight: Tensor) -> Tensor:
    """Append the mean row: an embedding that images replace, and an output whose logit, the mean of all, is never the
    largest, so that greedy answers are those of the released model."""
    import torch

    return torch.cat([weight, weight.float().mean(0, keepdim=True).to(weight.dtype)])


def check(arguments: Arguments) -> tuple[dict[str, Any], VisionSchedule]:
    """The checkpoint's configuration and its schedule.

    Raises:
        FileNotFoundError, ValueError: this cannot be imported, in one sentence, before anything is loaded.
    """
    folder, target = Path(arguments.checkpoint), Path(arguments.output)
    config = read_config(folder)
    options = [f"recipe={arguments.recipe}", *(["model.path=."] if arguments.recipe == "vica_3b" else [])]
    schedule = schedule_of(compose_config(options).schedule)
    schedule.validate(config["num_hidden_layers"])
    check_writable(target, key="output")
    check_free(target, fix="choose another output=FOLDER")
    return config, schedule


def import_checkpoint(arguments: Arguments) -> None:
    """Write `arguments.output`: weights, configuration, processor and schedule.

    Raises:
        FileNotFoundError, ValueError: what cannot be imported, in one sentence, before anything is written.
    """
    folder = Path(arguments.checkpoint)
    config, schedule = check(arguments)

    import torch  # lazy: keeps argument errors fast
    from transformers import AutoConfig, CLIPVisionModel, LlavaForConditionalGeneration

    from latefusion.models.student.save import spare_deepspeed_the_guess
    from latefusion.models.student.whole import record

    tower = arguments.vision_tower or config["mm_vision_tower"]
    try:
        clip = AutoConfig.from_pretrained(tower)
    except OSError:
        raise FileNotFoundError(
            f"the vision tower {tower} is neither a folder nor within reach; name CLIP's with vision_tower=FOLDER."
        ) from None
    clip = getattr(clip, "vision_config", clip)
    about = llava_config(config, clip)
    weights: dict[str, Tensor] = {}
    for shard in shards(folder):
        weights.update({renamed(name): weight for name, weight in shard.items()})
    weights = {
        name: w for name, w in weights.items() if not name.endswith(("position_ids", "rotary_emb.inv_freq"))
    }
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name] = with_image_token(weights[name])
    if not any(name.startswith("model.vision_tower.") for name in weights):
        vision = CLIPVisionModel.from_pretrained(tower).state_dict()
        weights |= {
            f"model.vision_tower.{name.removeprefix('vision_model.')}": w for name, w in vision.items()
        }
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(about)
    check_weights({name: tuple(w.shape) for name, w in model.state_dict().items()}, weights, folder)
    dtype = weights["lm_head.weight"].dtype
    model.load_state_dict({name: w.to(dtype) for name, w in weights.items()}, assign=True)
    processor = llava_processor(folder, config, clip)
    record(model, schedule)
    spare_deepspeed_the_guess()
    model.save_pretrained(arguments.output)
    processor.save_pretrained(arguments.output)
    schedule.save(arguments.output)


def llava_processor(folder: Path, config: Mapping[str, Any], clip: Any) -> LlavaProcessor:
    """The checkpoint's tokenizer, with `<image>` behind its vocabulary, CLIP's image settings and LLaVA-1.5's chat."""
    from transformers import AutoTokenizer, LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"the tokenizer of {folder} cannot be read ({str(error).splitlines()[0].rstrip('.')})."
        ) from None
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    if tokenizer.convert_tokens_to_ids("<image>") != config["vocab_size"]:
        raise ValueError(
            f"the tokenizer of {folder} has {len(tokenizer) - 1} tokens, its config.json {config['vocab_size']}: these "
            "files do not belong together."
        )
    tokenizer.pad_token = tokenizer.unk_token
    return LlavaProcessor(
        image_processor=LlavaImageProcessorPil(
            do_pad=config.get("image_aspect_ratio", "pad") == "pad",
            size={"shortest_edge": clip.image_size},
            crop_size=clip.image_size,
        ),
        tokenizer=tokenizer,
        patch_size=clip.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def check_weights(shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor], folder: Path) -> None:
    """Raise ValueError unless the weights are all of the model's, each of its shape, and none else."""
    for name in sorted(shapes.keys() ^ weights.keys()):
        missing = name in shapes
        raise ValueError(
            f"{folder} {'lacks' if missing else 'holds'} {name}, which a LLaVA-1.5 of its configuration "
            f"{'has' if missing else 'does not have'} ({len(weights)} tensors, {len(shapes)} expected)."
        )
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise ValueError(
                f"{name} of {folder} has shape {list(weights[name].shape)}, its config.json says {list(shape)}."
            )


def main(words: list[str]) -> None:
    """Run from the command line; what cannot be imported ends in one sentence."""
    try:
        arguments = parse_words(check_words(words, Arguments, str(__doc__)), Arguments)
        import_checkpoint(arguments)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(error_line(error))
    print(f"{arguments.output}: evaluate it with python eval/evaluate.py checkpoint={arguments.output}")


if __name__ == "__main__":
    run_to_exit(lambda: main(sys.argv[1:]))
