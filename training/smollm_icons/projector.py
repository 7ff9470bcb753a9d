"""Stage 1: the projector, as a regression onto `targets`, on single squares and without a language model."""

from __future__ import annotations

import random
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latefusion.data.icons.boards import COLORS, SIDE, Board
from latefusion.data.icons.pictures import NAMES
from latefusion.models.smollm_icons.tower import CHANNELS, standardise, token_places
from latefusion.training.smollm_icons.features import Square, square_tokens
from latefusion.training.smollm_icons.targets import NOTHING, Targets

STEPS, BATCH, LEARNING_RATE = 1500, 96, 2e-3


class Projector(nn.Module):
    """LLaVA's two-layer projector behind the standardisation that the tower does once assembled."""

    mean: Tensor
    std: Tensor
    places: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(CHANNELS))
        self.register_buffer("std", torch.ones(CHANNELS))
        self.register_buffer("places", token_places(), persistent=False)
        self.linear_1 = nn.Linear(CHANNELS + self.places.shape[1], width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: Tensor, places: Tensor | None = None) -> Tensor:
        """Features [B, K, CHANNELS] of all tokens, or of those at `places` [B, K, 24]."""
        x = standardise(features, self.mean, self.std, self.places if places is None else places)
        return self.linear_2(F.gelu(self.linear_1(x)))


def fit_projector(
    squares: list[Square], targets: Targets, steps: int = STEPS, seed: int = 0
) -> tuple[Projector, float]:
    """A projector from squares to targets (mean squared error and cosine classification); CPU seconds."""
    began = time.process_time()
    torch.manual_seed(seed)
    rng = random.Random(seed)
    projector = Projector(targets.words.shape[1])
    shown = [square for square in squares if square.thing is not None]
    empty = [square for square in squares if square.thing is None]
    everything = (
        torch.stack([s.tokens for s in rng.sample(shown, min(2000, len(shown)))]).float().flatten(0, 1)
    )
    projector.mean.copy_(everything.mean(0))
    projector.std.copy_(everything.std(0) + 1e-3)
    center = targets.words[:-1].mean(0)
    directions = F.normalize(targets.words - center, dim=1)
    scale = targets.words.pow(2).sum(-1).mean()
    optimizer = torch.optim.AdamW(
        projector.parameters(), lr=LEARNING_RATE, weight_decay=0.05, betas=(0.9, 0.98)
    )
    for step in range(steps):
        factor = min(1, step / 30) * (1 - max(0, step / steps - 0.3) / 0.7)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * factor
        batch = rng.sample(shown, BATCH - BATCH // 5) + rng.sample(empty, BATCH // 5)
        at = [rng.randrange(SIDE * SIDE) for _ in batch]
        features = torch.stack([square.tokens for square in batch]).float()
        features = features + 0.15 * projector.std * torch.randn(features.shape)
        places = projector.places[[square_tokens(*divmod(k, SIDE)) for k in at]]
        words = torch.tensor([targets.token_words(square.thing) for square in batch])
        aims = torch.stack([targets.square(s.thing, k) for s, k in zip(batch, at, strict=True)])
        projected = projector(features, places)
        error = (projected - aims).pow(2).sum(-1).mean() / scale
        similarity = F.normalize(projected - (aims - targets.words[words]) - center, dim=-1) @ directions.T
        loss = error + 0.3 * F.cross_entropy(
            12 * similarity.flatten(0, 1), words.flatten(), label_smoothing=0.05
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return projector, time.process_time() - began


@torch.no_grad()
def token_accuracy(
    projector: Projector, targets: Targets, boards: list[tuple[Board, Tensor]]
) -> dict[str, float]:
    """Percent of the name, colour and empty tokens that are nearest to the word they should say."""
    center = targets.words[:-1].mean(0)
    directions = F.normalize(targets.words - center, dim=1)
    right: dict[str, list[bool]] = {"name": [], "color": [], "empty": []}
    for board, features in boards:
        output = projector(features[None].float())[0]
        at = {(thing.row, thing.column): thing for thing in board.things + board.blanks}
        for square in range(SIDE * SIDE):
            thing = at.get(divmod(square, SIDE))
            words = targets.token_words(thing)
            tokens = output[square_tokens(*divmod(square, SIDE))] - (targets.places[square] if thing else 0)
            nearest = (F.normalize(tokens - center, dim=-1) @ directions.T).argmax(-1).tolist()
            for word, near in zip(words, nearest, strict=True):
                kind = (
                    "empty" if word == NOTHING
                    else "name" if word < len(NAMES)
                    else "color" if word < len(NAMES) + len(COLORS)
                    else "empty"
                )  # fmt: skip
                right[kind].append(word == near)
    return {kind: round(100 * sum(values) / len(values), 1) for kind, values in right.items() if values}
