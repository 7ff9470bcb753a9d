"""Load the model to start from (`embedded`, `smollm_icons`, a local folder, or a hub id) and its processor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.integrations import deepspeed as of_deepspeed

from latefusion.models.locate import check_base, check_four_bits, check_not_a_student, readable
from latefusion.models.smollm_icons import tower as tower  # registers it


def compute_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """bfloat16 if the hardware multiplies in it, else float32."""
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def load_base(
    path: str,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    processor: Mapping[str, Any] | None = None,
    four_bits: bool = False,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a base model in eval mode, and its processor.

    Args:
        path: `embedded`, `smollm_icons`, a local folder, or a hub id.
        dtype: of the weights; with `four_bits`, of what is computed with them.
        revision: branch, tag or commit of a hub id; None: its main branch.
        processor: settings that the processor is loaded with (`max_pixels`, ...).
        four_bits: hold the decoder in NF4 (QLoRA, arXiv 2305.14314); the rest stays as it is.
        trust_remote_code: run code that comes with the weights.

    Raises:
        FileNotFoundError: there are no such weights, or they cannot be reached from here.
        ValueError: the folder holds a student; or 4 bits, or the processor, need a package that is not here.
    """
    if four_bits:
        check_four_bits(path)
    check_base(path)
    place: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    more = {"quantization_config": _nf4(path, dtype, place)} if four_bits else {}
    loaded = load_processor(path, settings=processor, **place)
    model = read_weights(AutoModelForImageTextToText, path, dtype=dtype, **place, **more)
    check_not_a_student(model.config.to_dict(), path)  # of a hub id nothing was known before
    return model, loaded


def read_weights(kind: Any, path: str, **settings: Any) -> PreTrainedModel:
    """`kind.from_pretrained` in eval mode.

    Raises:
        FileNotFoundError: the weights cannot be read.
    """
    try:
        return kind.from_pretrained(readable(path), **settings).eval()
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise FileNotFoundError(
            f"the weights of {path} cannot be read ({reason}); download them again."
        ) from None


def load_processor(
    path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> ProcessorMixin:
    """Load a model's processor without the model; see `load_base`.

    Raises:
        FileNotFoundError: there is no processor that can be read.
        ValueError: it needs a package that is not here, or does not take images.
    """
    place = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        processor = AutoProcessor.from_pretrained(readable(path), **place, **(settings or {}))
    except ImportError as error:  # SmolVLM's needs num2words, those of videos need torchvision
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the processor of {path} needs a package that is not here (latefusion[video] has num2words and "
            f"torchvision): {reason}"
        ) from None
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"the processor in {path} cannot be read ({reason}); name a folder that holds the model's processor beside "
            "its weights, or its hub id."
        ) from None
    except ValueError as error:
        if not str(error).startswith("Unrecognized processing class"):
            raise
        raise ValueError(
            f"{path} comes without a processor, so it is not an image-text model; name one that does, such as "
            "LLaVA or Qwen2-VL."
        ) from None
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"{path} comes with a {type(processor).__name__} alone, so it is not an image-text model."
        )
    return processor


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Another model over the very same weights, with its own modules, so that hooks and adapters stay apart.

    `deepcopy` takes a tensor whose `id` is in its memo as copied already.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return deepcopy(model, {id(tensor): tensor for tensor in tensors})


def beside_the_decoder(model: PreTrainedModel) -> list[nn.Module]:
    """The parts of a model that are not its decoder: vision tower, projector, ..."""
    decoder = model.get_decoder()
    return [module for module in model.base_model.children() if module is not decoder]


def with_blank_vision(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same shape whose vision tower and projector are zeros on the CPU; its decoder has no memory.

    It counts the work of an encoder whose weights lie in shards. Buffers, which no engine shards, are the model's.
    """
    with torch.device("meta"), _outside_zero3():
        blank: Any = type(model)(model.config)
    blank = blank.to(model.dtype).eval()
    for part, sharded in zip(beside_the_decoder(blank), beside_the_decoder(model), strict=True):
        buffers = dict(sharded.named_buffers())
        part.to_empty(device="cpu")
        for tensor in part.parameters():
            tensor.data.zero_()
        for name, buffer in part.named_buffers():
            buffer.copy_(buffers[name]) if name in buffers else buffer.zero_()
    return blank


@contextmanager
def _outside_zero3() -> Iterator[None]:
    """Inside, transformers does not cut a new model into shards, in which all processes would have to take part."""
    weak = of_deepspeed._hf_deepspeed_config_weak_ref
    config = None if weak is None else weak()
    of_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            of_deepspeed.set_hf_deepspeed_config(config)


def _nf4(path: str, dtype: torch.dtype, place: dict[str, Any]) -> BitsAndBytesConfig:
    """Settings for 4 bits in the decoder's layers alone: a part that trains in full cannot be quantised."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(readable(path), **place))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=unquantised(model),
    )


def unquantised(model: PreTrainedModel) -> list[str]:
    """Whole names of the modules that 4 bits leave alone: vision tower, projector, output head."""
    parts = set(beside_the_decoder(model))
    return [*(name for name, module in model.named_modules() if module in parts), "lm_head"]
