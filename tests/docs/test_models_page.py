"""The computed table of docs/models.md: what frozen tokens cost in models that have not run here."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import LlamaConfig

from latefusion.models.flops import decoder_flops
from latefusion.recipes.compose import compose_config

ROOT = Path(__file__).parents[2]
TEXT, VISION = 64, 576
DECODERS = {  # as the hub's config.json has them: hidden, heads, key heads, their size, MLP, layers
    "smolvlm_2b": (2048, 32, 32, 64, 8192, 24),
    "internvl3_2b": (1536, 12, 2, 128, 8960, 28),
    "qwen2_5_vl_3b": (2048, 16, 2, 128, 11008, 36),
    "gemma3_4b": (2560, 8, 4, 256, 10240, 34),
    "qwen3_vl_4b": (2560, 32, 8, 128, 9728, 36),
    "internvl3_8b": (3584, 28, 4, 128, 18944, 28),
    "llava_onevision_qwen2_7b": (3584, 28, 4, 128, 18944, 28),
    "qwen2_5_vl_7b": (3584, 28, 4, 128, 18944, 28),
    "llava_next_mistral_7b": (4096, 32, 8, 128, 14336, 32),
}


def cost(config: LlamaConfig, layers: list[int], rank: int | None) -> str:
    """Share of the dense decoder's FLOPs and size of the maps between `layers`."""
    frozen = [VISION if i in layers else 0 for i in range(config.num_hidden_layers)]
    tokens = [TEXT + n for n in frozen]
    dense = decoder_flops(config, [TEXT + VISION] * config.num_hidden_layers)
    width = config.hidden_size
    each = width * width if rank is None else 2 * width * rank
    macs = VISION * (width * width + (len(layers) - 1) * each)
    share = (decoder_flops(config, tokens, frozen) + 2 * macs) / dense
    return f"{share:.1%}, {4e-6 * (len(layers) - 1) * (each + width):,.0f} MB"


def test_what_frozen_tokens_cost_is_computed_from_the_models_sizes() -> None:
    page = (ROOT / "docs/models.md").read_text()
    (table,) = re.findall(r"\| \| d \| layers of the band .*?\n\n", page, flags=re.DOTALL)
    named = []
    for line in table.strip().splitlines()[2:]:
        models, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        for model in re.findall(r"`(\w+)`", models):
            named.append(model)
            hidden, heads, key_heads, size, mlp, layers = DECODERS[model]
            config = LlamaConfig(
                hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=size,
                intermediate_size=mlp, num_hidden_layers=layers,
            )  # fmt: skip
            recipe = compose_config([f"model={model}"]).model
            every = list(recipe.cross)
            assert every == list(range(recipe.schedule.enter, recipe.schedule.exit))
            half = [cost(config, every[::2], None)]
            costs = half + [cost(config, every, rank) for rank in (None, 128, 256)]
            assert cells == [f"{hidden:,}", str(len(every)), *costs], model
    assert sorted(named) == sorted(DECODERS)
