"""What states mean in the vocabulary's terms: logit lens, value-output lens, and the nearest words of vision tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SINK = 10.0  # times the mean attention that a vision token receives
DEAD = 0.1  # of the mean squared distance to the mean vision token


@contextmanager
def states_at(layers: Sequence[nn.Module], index: Tensor) -> Iterator[list[Tensor]]:
    """The output of every layer at one position of each sample, `[B, D]` each, in the forward inside.

    Args:
        index: int64 `[B]`.
    """
    found: list[Tensor] = []

    def keep(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        found.append(output[torch.arange(len(index), device=index.device), index])

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logit_lens(model: Any, state: Tensor) -> Tensor:
    """Next-token probabilities if the decoder ended here: final norm, then lm_head (nostalgebraist, 2020).

    Args:
        state: `[..., D]`.

    Returns:
        float32 `[..., V]`.
    """
    normed = model.get_decoder().get_submodule("norm")(state.to(model.dtype))
    return model.get_output_embeddings()(normed).float().softmax(-1)


@torch.no_grad()
def value_output_lens(model: Any, layer: int, heads: Tensor) -> tuple[Tensor, Tensor]:
    """What each head writes, in words: its output through its slice of o_proj, then as `logit_lens`.

    VisiPruner (arXiv 2510.17205) reads so that shallow layers recognise the task. A head's contribution has no bias.

    Args:
        heads: outputs before o_proj, `[B, H, D_head]`.

    Returns:
        Probabilities float32 `[B, H, V]`, and the l2 norm of what each head adds to the residual stream `[B, H]`.
    """
    o_proj = model.get_decoder().layers[layer].self_attn.o_proj  # its weights may be quantised
    apart = torch.einsum("bhk,hg->bhgk", heads, torch.eye(heads.shape[1]).to(heads)).flatten(2)
    apart = apart.to(model.dtype)  # [B, H, H * D_head], all heads but one silent
    written = (o_proj(apart) - o_proj(torch.zeros_like(apart))).float()  # [B, H, D]
    return logit_lens(model, written), written.norm(dim=-1)


@torch.no_grad()
def nearest_words(embeddings: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The vocabulary entry of greatest cosine to each row (EmbedLens, arXiv 2603.00510): ids and cosines, `[N]`.

    Args:
        embeddings: of the input vocabulary, `[V, D]`; rows: projected vision features `[N, D]`.
    """
    unit = nn.functional.normalize(embeddings.float(), dim=-1)
    best = (nn.functional.normalize(rows.float(), dim=-1) @ unit.T).max(-1)
    return best.indices, best.values


def kinds(rows: Tensor, attention: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """Sink (0), dead (1) or alive (2), for each of a sample's vision tokens, int64 `[K]`.

    The three kinds are EmbedLens's (arXiv 2603.00510), the rules are not: its code calls a token a sink or dead if one
    of three vocabulary entries, which its authors chose by hand for LLaVA-1.5-7B (two for sinks, one for dead tokens),
    is among the three nearest to it by cosine, and the rest alive. Such entries are not known of another model. So
    here, without a claim to give the paper's shares: a *sink* receives over ten times the mean
    vision token's attention from the last prompt token (mean over layers); a *dead* token is one whose feature
    says what the average image says there, its squared distance from the mean below a tenth of the average one.

    Args:
        rows: projected features `[K, D]`; attention: `[K]`; mean: of such features over images, `[K, D]` or `[1, D]`;
        spread: mean squared distance of a feature from that mean, `[]`.
    """
    distance = (rows - mean).square().sum(-1)
    found = torch.where(distance < DEAD * spread, 1, 2)
    return torch.where(attention > SINK * attention.mean(), 0, found)
