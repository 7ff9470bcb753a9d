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
DROPPED = (
    0.3  # of a square's channels, so that new drawings are named a little better (84% against 83% of tokens)
)


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
    squares: list[Square], targets: Targets, steps: int = STEPS, seed: int = 0, device: str = "cpu"
) -> tuple[Projector, float]:
    """A projector from squares to targets (mean squared error and cosine classification); CPU seconds."""
    began = time.process_time()
    torch.manual_seed(seed)
    rng = random.Random(seed)
    projector = Projector(targets.words.shape[1]).to(device)
    shown = [k for k, square in enumerate(squares) if square.thing is not None]
    empty = [k for k, square in enumerate(squares) if square.thing is None]
    tokens = torch.stack([square.tokens for square in squares]).to(device)  # [N, 4, CHANNELS]
    words_of = torch.tensor([targets.token_words(square.thing) for square in squares], device=device)
    is_shown = torch.tensor([square.thing is not None for square in squares], device=device)
    tokens_of = torch.tensor([square_tokens(*divmod(k, SIDE)) for k in range(SIDE * SIDE)], device=device)
    words, places = targets.words.to(device), targets.places.to(device)
    everything = tokens[rng.sample(shown, min(2000, len(shown)))].float().flatten(0, 1)
    projector.mean.copy_(everything.mean(0))
    projector.std.copy_(everything.std(0) + 1e-3)
    center = words[:-1].mean(0)
    directions = F.normalize(words - center, dim=1)
    scale = words.pow(2).sum(-1).mean()
    optimizer = torch.optim.AdamW(
        projector.parameters(), lr=LEARNING_RATE, weight_decay=0.05, betas=(0.9, 0.98)
    )
    for step in range(steps):
        factor = min(1, step / 30) * (1 - max(0, step / steps - 0.3) / 0.7)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * factor
        batch = torch.tensor(rng.sample(shown, BATCH - BATCH // 5) + rng.sample(empty, BATCH // 5)).to(device)
        at = torch.tensor([rng.randrange(SIDE * SIDE) for _ in range(len(batch))]).to(device)
        features = tokens[batch].float()
        features = features + 0.15 * projector.std * torch.randn_like(features)
        dropped = torch.rand(len(batch), 1, features.shape[-1], device=device) < DROPPED
        features = torch.where(dropped, projector.mean, features)
        aim_words = words_of[batch]  # [BATCH, 4]
        aims = words[aim_words] + is_shown[batch, None, None] * places[at][:, None]
        projected = projector(features, projector.places[tokens_of[at]])
        error = (projected - aims).pow(2).sum(-1).mean() / scale
        similarity = F.normalize(projected - (aims - words[aim_words]) - center, dim=-1) @ directions.T
        loss = error + 0.3 * F.cross_entropy(
            12 * similarity.flatten(0, 1), aim_words.flatten(), label_smoothing=0.05
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
    device = projector.mean.device
    center = targets.words[:-1].mean(0)
    directions = F.normalize(targets.words - center, dim=1)
    right: dict[str, list[bool]] = {"name": [], "color": [], "empty": []}
    for board, features in boards:
        output = projector(features[None].float().to(device))[0].cpu()
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
