"""What a prefill costs: decoder FLOPs and attention pairs, from the tokens that enter each layer.

All FLOPs of a prefill are counted here and nowhere else. `layer_flops` and `decoder_flops` take numbers of tokens;
`account` takes the traces of real runs, so it assumes nothing about what a policy decided; `encoder_flops` runs the
vision tower.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from latefusion.models.layer_kinds import attends, layer_kind

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from latefusion.models.executor.trace import TraceRecord


MOST_ROWS = 64  # rows that rank vision tokens and are scored at a time


def layer_flops(
    config: PretrainedConfig, tokens: int, *, past: int = 0, frozen: int = 0, layer: int | None = None
) -> int:
    """FLOPs (2 a multiply-add) of one decoder layer on `tokens` new tokens over `past` cached ones.

    `frozen` of the new tokens are only read: their keys and values are computed.

    Counts the q/k/v/o projections, attention (scores and weighted sum over every key: kernels are counted as
    `torch.utils.flop_counter` does, without the causal half) and the gated MLP. Norms, RoPE and softmax are left
    out, as is customary (below 1%). A layer that runs a recurrence costs `delta_flops` or `convolution_flops` in place
    of attention, whatever is cached.

    Args:
        layer: its number, in decoders whose layers differ; None: a layer that attends with a softmax.
    """
    text = config.get_text_config()
    hidden, heads = text.hidden_size, text.num_attention_heads
    kv_heads = text.num_key_value_heads or heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    whole = tokens - frozen
    mlp = 6 * whole * hidden * mlp_width(text, layer) + whole * flops_beside(text)
    kind = "full_attention" if layer is None else layer_kind(config, layer)
    if kind == "linear_attention":
        return delta_flops(text, whole) + mlp
    if kind == "conv":
        return convolution_flops(text, whole) + mlp
    written = 2 + gates_attention(text)  # projections of queries, outputs and gates
    stored = 0 if shares_keys(text, layer) else 2 * kv_heads * tokens
    projections = 2 * hidden * head_dim * (written * heads * whole + stored)
    attention = 4 * whole * (past + tokens) * heads * head_dim
    return projections + attention + mlp


def delta_flops(text: PretrainedConfig, tokens: int) -> int:
    """FLOPs of a Gated DeltaNet (arXiv 2412.06464, equation 10) on `tokens` tokens, its projections included.

    A token's recurrence, in each head with a state `d_k x d_v`: what the state holds for its key, the update by their
    difference, and the reading by its query, `2 d_k d_v` each. Kernels for prefills work in chunks of 64 tokens and
    compute more to be faster: `64 (5 d_k + 3 d_v)` a token and head, which is not counted.
    """
    heads, width_k, width_v = (
        text.linear_num_value_heads,
        text.linear_key_head_dim,
        text.linear_value_head_dim,
    )
    keys, values = text.linear_num_key_heads * width_k, heads * width_v
    projections = (
        2 * text.hidden_size * (2 * keys + 3 * values + 2 * heads)
    )  # q, k; v, gate, output; two rates
    convolution = 2 * text.linear_conv_kernel_dim * (2 * keys + values)
    return tokens * (projections + convolution + 6 * heads * width_k * width_v)


def convolution_flops(text: PretrainedConfig, tokens: int) -> int:
    """FLOPs of a gated short convolution (LFM2, arXiv 2511.23404) on `tokens` tokens: projections and kernel."""
    hidden = text.hidden_size
    return tokens * (2 * hidden * 4 * hidden + 2 * hidden * text.conv_L_cache)


def flops_beside(text: PretrainedConfig) -> int:
    """FLOPs of a token in a layer beside attention and MLP: Gemma 3n's and 4's inputs of a layer, AltUp, Laurel."""
    hidden, states = text.hidden_size, getattr(text, "altup_num_inputs", 0)
    # AltUp: routed twice, both maps, the prediction
    altup = 2 * states * (2 * hidden + states * (states + 1 + hidden))
    inner = (getattr(text, "hidden_size_per_layer_input", 0) or 0) + getattr(text, "laurel_rank", 0)
    return altup + 4 * hidden * inner


def shares_keys(text: PretrainedConfig, layer: int | None) -> bool:
    """Whether a layer attends to the keys of a layer before (Gemma 3n, Gemma 4 E2B and E4B)."""
    shared = getattr(text, "num_kv_shared_layers", 0) or 0
    return layer is not None and layer >= text.num_hidden_layers - shared


def mlp_width(text: PretrainedConfig, layer: int | None = None) -> int:
    """The inner size of a layer's MLP; LFM2 derives it from `intermediate_size`. Without one, of the active experts."""
    width: int | None = getattr(text, "intermediate_size", None)
    if isinstance(width, (list, tuple)):  # Gemma 3n's, one a layer
        return int(width[layer or 0])
    if width is None:
        shared = getattr(text, "shared_expert_intermediate_size", 0)
        return int(text.num_experts_per_tok * text.moe_intermediate_size + shared)
    if getattr(text, "block_auto_adjust_ff_dim", False):
        width = int(2 * width / 3)
        if text.block_ffn_dim_multiplier is not None:
            width = int(text.block_ffn_dim_multiplier * width)
            width = -(-width // text.block_multiple_of) * text.block_multiple_of
    return width


def gates_attention(text: PretrainedConfig) -> bool:
    """Whether attention projects a gate of the size of its queries: decoders with a Gated DeltaNet do (Qwen)."""
    return hasattr(text, "linear_num_value_heads")


def decoder_flops(
    config: PretrainedConfig, tokens: Sequence[int], frozen: Sequence[int] = (), *, first: int = 0
) -> int:
    """FLOPs of a prefill whose layer `i` takes `tokens[i]` tokens (text and vision), padding not counted.

    Args:
        frozen: the number of them that are only read in each layer; empty: none.
        first: the number of the layer that `tokens` begins with.
    """
    pairs = zip(tokens, frozen or [0] * len(tokens), strict=True)
    return sum(layer_flops(config, n, frozen=f, layer=i) for i, (n, f) in enumerate(pairs, start=first))


def projection_flops(config: PretrainedConfig, tokens: int) -> int:
    """FLOPs of one layer's query, key and value projections of `tokens` tokens."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    queries = heads * (1 + gates_attention(text))
    return 2 * tokens * text.hidden_size * head_dim * (queries + 2 * (text.num_key_value_heads or heads))


def head_flops(config: PretrainedConfig, tokens: int) -> int:
    """FLOPs of scoring the vocabulary for `tokens` tokens."""
    text = config.get_text_config()
    return 2 * tokens * text.hidden_size * text.vocab_size


def encoder_flops(model: Any, inputs: dict[str, Any]) -> int | None:
    """FLOPs of vision tower and projector on images and videos of these inputs, as torch counts them while they run.

    Returns:
        0 without images; None if they cannot be counted: images that were encoded before, or an attention kernel that
        torch does not count.
    """
    if "mm_encoder_outputs" in inputs:
        return None
    import torch  # lazy: the rest of this module is arithmetic
    from torch.utils.flop_counter import FlopCounterMode

    from latefusion.models.inputs import PIXELS, encode_images

    def attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
        batch, heads, queries, width = query
        return 2 * batch * heads * queries * key[2] * (width + value[3])

    vision = getattr(model.config, "vision_config", None)
    if getattr(vision, "_attn_implementation", "sdpa") not in ("sdpa", "eager"):
        return None
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}  # torch leaves it out
    # a projector in training is float32 beside a bfloat16 tower: as in training, autocast brings them together
    mixed = len({parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}) > 1
    pixels = [inputs[name] for name in PIXELS.values() if name in inputs]
    device = pixels[0].device.type if pixels else "cpu"
    cast = torch.autocast(device, torch.bfloat16, enabled=mixed)
    with torch.no_grad(), cast, FlopCounterMode(display=False, custom_mapping=fused) as counter:
        encode_images(model, inputs)
    return counter.get_total_flops()


def outside_flops(model: Any, inputs: dict[str, Any]) -> float | None:
    """FLOPs of one prompt's prefill outside the decoder layers: vision tower, projector, and the head for one token.

    Args:
        inputs: of the model's forward, with the images as pixels; the mean over its prompts is returned.

    Returns:
        None where `encoder_flops` is.
    """
    encoder = encoder_flops(model, inputs)
    return None if encoder is None else encoder / len(inputs["input_ids"]) + head_flops(model.config, 1)


def prefill_share(decoder: float, outside: float) -> float:
    """The share of a dense model's whole prefill that is computed.

    Args:
        decoder: the share of the dense decoder's FLOPs that is computed.
        outside: `outside_flops`, as a share of the dense decoder's FLOPs.
    """
    return (decoder + outside) / (1 + outside)


def shares_in_words(decoder: float, outside: float | None, digits: int = 1) -> str:
    """A share of the dense decoder's FLOPs and, where it is known, of the whole prefill's (see `prefill_share`).

    Args:
        outside: None if it is unknown.
        digits: after the point, of the percentages.
    """
    whole = (
        ""
        if outside is None
        else f" ({100 * prefill_share(decoder, outside):.{digits}f}% of the whole prefill's)"
    )
    return f"{100 * decoder:.{digits}f}% of the dense decoder's FLOPs{whole}"


def ranking_flops(config: PretrainedConfig, rows: int, keys: int) -> int:
    """FLOPs of the attention scores of `rows` queries with `keys` keys, computed once more to rank tokens by them."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return 2 * rows * keys * heads * head_dim


def vision_macs(config: PretrainedConfig, vision_tokens: Sequence[int], *, frozen: bool = False) -> int:
    """The literature's vision-only convention, in MACs: `4nd^2 + 2n^2d + 3ndm` per layer (FastV, HiDrop).

    `n` is the number of vision tokens of the layer, `d` the hidden size, `m` the MLP's inner size. Dense
    LLaVA-1.5-7B gives 3.82T. Of `frozen` tokens keys and values are left, `2nd^2`.
    """
    text = config.get_text_config()
    d = text.hidden_size
    if frozen:
        return sum(2 * n * d * d for n in vision_tokens)
    widths = [mlp_width(text, i) for i in range(len(vision_tokens))]
    return sum(
        4 * n * d * d + 2 * n * n * d + 3 * n * d * m for n, m in zip(vision_tokens, widths, strict=True)
    )


@dataclass(frozen=True)
class Account:
    """What one prompt cost and would have cost the dense model, or the sum over several prompts.

    Attributes:
        flops, dense_flops: of the decoder layers (`decoder_flops`).
        attention, dense_attention: pairs of a query and a key it may see (causal order), at least one of them a
            vision token, summed over the layers that attend with a softmax: "vision-related attention".
        attention_after, dense_attention_after: the same in the layers after the last that computes all vision
            tokens (for VisiPruner: after the fusion layer).
        vision, dense_vision: vision tokens, summed over layers.
    """

    flops: int
    dense_flops: int
    attention: int
    dense_attention: int
    attention_after: int
    dense_attention_after: int
    vision: int
    dense_vision: int

    @property
    def flops_saved(self) -> float:
        """The share of the dense decoder's FLOPs that was not computed."""
        return 1 - self.flops / self.dense_flops

    @property
    def attention_saved(self) -> float:
        """The share of the dense model's vision-related attention that was not computed; 0 without vision tokens."""
        return 1 - self.attention / self.dense_attention if self.dense_attention else 0.0

    @property
    def attention_saved_after(self) -> float:
        """`attention_saved` over the layers after the last one with all vision tokens; 0 without such layers."""
        return 1 - self.attention_after / self.dense_attention_after if self.dense_attention_after else 0.0


def account(config: PretrainedConfig, records: Iterable[TraceRecord]) -> Account:
    """Sum up what the prompts of these records cost, and would have cost the dense model."""
    totals, softmax = [0] * 8, attends(config)
    for record in records:
        n_text, n_vision = record.tokens[0] - record.vision[0], record.n_vision
        every = [n_vision] * len(record.tokens)
        full = [layer for layer, n in enumerate(record.vision) if n == n_vision]
        after = slice(full[-1] + 1 if full else 0, None)
        reading = record.vision, record.frozen, record.reads
        row = (
            decoder_flops(config, record.tokens, record.frozen),
            decoder_flops(config, [n_text + n for n in every]),
            vision_pairs(n_text, *reading, attention=softmax),
            vision_pairs(n_text, every, attention=softmax),
            vision_pairs(n_text, *(values[after] for values in reading), attention=softmax[after]),
            vision_pairs(n_text, every[after], attention=softmax[after]),
            sum(record.vision),
            sum(every),
        )
        totals = [total + value for total, value in zip(totals, row, strict=True)]
    return Account(*totals)


def vision_pairs(
    n_text: int,
    vision: Sequence[int],
    frozen: Sequence[int] = (),
    reads: Sequence[int] = (),
    *,
    attention: Sequence[bool] = (),
) -> int:
    """Causal pairs with a vision token in them, that is all pairs less those of text alone; over all layers.

    Args:
        frozen, reads: as in `TraceRecord`; frozen tokens are keys only. Empty: there are none.
        attention: whether each layer attends with a softmax: a recurrence has no pairs. Empty: all do.
    """
    none, every = [0] * len(vision), [True] * len(vision)
    layers = zip(vision, frozen or none, reads or none, attention or every, strict=True)
    return sum(pairs(n_text + n - f) - pairs(n_text) + read for n, f, read, attends in layers if attends)


def pairs(n: int) -> int:
    """The number of pairs of a query and a key that is not after it, among n tokens."""
    return n * (n + 1) // 2
