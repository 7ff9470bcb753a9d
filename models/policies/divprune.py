"""DivPrune: the most diverse vision tokens, chosen before the decoder (Alvar et al., CVPR 2025, arXiv 2503.02175)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from latefusion.models.policies.base import AttentionCall, Prompt, Selection
from latefusion.models.policies.checks import check_ratio, number, settle
from latefusion.models.policies.ranking import on_device, share


@dataclass(frozen=True, kw_only=True)
class DivPrune:
    """A share of the vision tokens enters the decoder, far from each other in cosine distance.

    The greedy solution of the max-min diversity problem: first the token whose nearest neighbour is farthest,
    then, one by one, the token farthest from those chosen; ties to the earlier one. A sample's images are
    one set. The default is the ratio of the official README (github.com/vbdi/divprune, `SUBSET_RATIO` 0.098).

    The official `DivPrune` (read in copies of its LLaVA's `llava_arch.py` that other repositories hold; the original
    file was not at hand) starts and goes on in the same way, in the model's dtype, and takes `round(ratio n)`
    tokens. It does not rule out those it has: where the rest equal a chosen patch it can name one twice, and then
    keeps fewer. Ours computes in float32 and names none twice.

    Args:
        keep_ratio: share of the vision tokens that stays.

    Raises:
        ValueError: the ratio is out of its range.
    """

    keep_ratio: float = 0.098

    def __post_init__(self) -> None:
        settle(self, number, "keep_ratio")
        check_ratio("keep_ratio", self.keep_ratio)

    def validate(self, num_layers: int) -> None:
        """Accept every decoder: the choice is made before layer 0."""

    def begin(self, prompt: Prompt) -> _DivPruneDecision:
        return _DivPruneDecision(self, prompt)


class _DivPruneDecision:
    watch: frozenset[int] = frozenset()
    fusion_layer = None

    def __init__(self, policy: DivPrune, prompt: Prompt):
        self.prompt = prompt
        self.counts = share(prompt.n_vision, policy.keep_ratio)
        self.kept: Tensor | None = None  # bool [B, T]

    @torch.no_grad()
    def embedded(self, hidden_states: Tensor) -> None:
        vision = self.prompt.vision
        index = vision.int().argsort(dim=1, descending=True, stable=True)[
            :, : max(self.prompt.n_vision)
        ]  # [B, V]
        tokens = hidden_states.gather(1, index[..., None].expand(-1, -1, hidden_states.shape[2]))  # [B, V, D]
        chosen = diverse(tokens, vision.gather(1, index), self.counts)
        self.kept = torch.zeros_like(vision).scatter(1, index, chosen)

    def select(self, layer: int) -> Selection | None:
        if layer > 0:
            return None
        assert self.kept is not None, "the embeddings were not seen"
        return Selection(self.kept, self.counts)

    def attended(self, layer: int, call: AttentionCall) -> Tensor | None:
        raise AssertionError("watches nothing")


def diverse(tokens: Tensor, real: Tensor, counts: Sequence[int]) -> Tensor:
    """Greedy max-min diversity by cosine distance, in float32, without a host sync.

    Args:
        tokens: `[B, V, D]`.
        real: bool `[B, V]`, false for padding.
        counts: how many to choose of each sample.

    Returns:
        bool `[B, V]`.
    """
    unit = normalize(tokens.float(), dim=-1)
    distance = 1 - unit @ unit.mT  # [B, V, V]
    itself = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
    others = distance.masked_fill(itself | ~real[:, None, :], float("inf"))
    nearest = others.amin(2).masked_fill(
        ~real, float("-inf")
    )  # [B, V]; first to other tokens, then to the chosen
    chosen = torch.zeros_like(real)
    number = on_device(counts, tokens.device)[:, None]  # [B, 1]
    for step in range(max(counts)):
        farthest = nearest.argmax(1, keepdim=True)  # [B, 1]
        chosen |= torch.zeros_like(real).scatter(1, farthest, True) & (number > step)
        to_it = distance.gather(1, farthest[..., None].expand(-1, -1, distance.shape[2]))[:, 0]  # [B, V]
        nearest = to_it if step == 0 else torch.minimum(nearest, to_it)
        nearest = nearest.masked_fill(chosen | ~real, float("-inf"))
    return chosen
