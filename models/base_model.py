"""The model to start from: `embedded`, a local folder, or a hub id."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from latefusion.models import embedded
from latefusion.models.locate import EMBEDDED, EMBEDDED_WEIGHTS, check_base, check_four_bits


def compute_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """bfloat16 where the hardware multiplies in it, else float32."""
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
    """A base model and its processor: `embedded`, a local folder, or a hub id.

    Args:
        dtype: of the weights, or with `four_bits` of what is computed with them.
        revision: branch, tag or commit of a hub id; None: its main branch.
        processor: settings that the processor is loaded with (`max_pixels`, ...).
        four_bits: hold the decoder in NF4 (QLoRA, arXiv 2305.14314); the rest stays as it is.
        trust_remote_code: run code that comes with the weights.

    Raises:
        FileNotFoundError: there are no such weights, or they cannot be reached from here.
        ValueError: 4 bits, or the processor, need a package that is not here.
    """
    if four_bits:
        check_four_bits(path)
    if path == EMBEDDED:
        return embedded.load_base(dtype)
    check_base(path)
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    more = {"quantization_config": _nf4(path, dtype, where)} if four_bits else {}
    found = load_processor(path, settings=processor, **where)
    try:
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, **where, **more)
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise FileNotFoundError(
            f"the weights of {path} cannot be read ({reason}); download them again."
        ) from None
    return model.eval(), found


def load_processor(
    path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> ProcessorMixin:
    """The processor of a base model, without its weights; see `load_base`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it needs a package that is not here, or is none of images and text.
    """
    where = EMBEDDED_WEIGHTS if path == EMBEDDED else path
    code = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        found = AutoProcessor.from_pretrained(where, **code, **(settings or {}))
    except ImportError as error:  # SmolVLM's needs num2words, PIL's relatives need torchvision
        reason = " ".join(str(error).split())
        raise ValueError(f"the processor of {path} needs a package that is not here: {reason}") from None
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{path} holds no processor that can be read ({reason}); name a folder that holds the model's processor "
            "beside its weights, or its hub id."
        ) from None
    if not isinstance(found, ProcessorMixin):
        raise ValueError(
            f"{path} is no model of images and text: it comes with a {type(found).__name__} alone."
        )
    return found


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Another model over the very same weights, with modules (and hooks, and adapters to come) of its own."""
    tensors = [*model.parameters(), *model.buffers()]
    return deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _nf4(path: str, dtype: torch.dtype, where: dict[str, Any]) -> BitsAndBytesConfig:
    """Four bits for the decoder's layers alone: what trains in full cannot be quantised."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path, **where))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=unquantised(model),
    )


def unquantised(model: PreTrainedModel) -> list[str]:
    """What 4 bits leave alone, by whole names, as transformers compares them: vision tower, projector, output head."""
    decoder = model.get_decoder()
    parts = {module for module in model.base_model.children() if module is not decoder}
    return [*(name for name, module in model.named_modules() if module in parts), "lm_head"]
