"""The four stages that make the base from nothing; `train_base.py` runs them.

tower    the vision tower learns per-patch labels of the generator (stands in for CLIP's pre-training)
decoder  the decoder learns the questions on pseudo-vision (stands in for a pre-trained language model)
align    tower and projector learn to produce that pseudo-vision from pixels
see      projector and decoder learn the questions on real images
blind    the control: a decoder of the same size and initialisation learns the same questions without vision

A stage's batch `k` depends on (stage seed, k) alone, so a resumed run sees what an uninterrupted one would.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from latefusion.models.executor.prompt import IGNORE
from latefusion.training.embedded import pseudo_vision
from latefusion.training.embedded.batches import Packed, block_mask, caption, draw, pack, rendered
from latefusion.training.embedded.grounding import GROUNDED_LAYER, GroundingHead
from latefusion.training.embedded.pseudo_vision import PseudoVision, patch_labels, sample_patches
from latefusion.training.embedded.vocabulary import BOS


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage's constants; the rate warms up over `warmup` steps and falls linearly over the last
    `decay` of them.
    """

    name: str
    seed: int  # of the scenes, too
    steps: int
    scenes: int  # a step
    lr: float
    decay: float
    warmup: int = 20
    floor: float = 0.03
    grounding: float = 0.0  # weight of the grounding loss
    crowd_every: int = 0  # every N-th scene is crowded, see `draw`; 0: scenes as they come

    def factor(self, step: int) -> float:
        """Learning rate of step `step` (from 0) over its peak."""
        falling = (1 - step / self.steps) / self.decay
        return min(1.0, (step + 1) / self.warmup) * max(self.floor, min(1.0, falling))

    def indices(self, step: int) -> range:
        return range(step * self.scenes, (step + 1) * self.scenes)


_STAGES = (
    Stage(name="tower", seed=101, steps=850, scenes=24, lr=3e-3, decay=0.5, floor=0.05),
    Stage(name="decoder", seed=102, steps=620, scenes=10, lr=2e-3, decay=0.75, warmup=30, grounding=0.5),
    Stage(name="align", seed=103, steps=650, scenes=24, lr=2e-3, decay=0.6),
    Stage(
        name="see",
        seed=104,
        steps=150,
        scenes=12,
        lr=8e-4,
        decay=0.8,
        floor=0.02,
        grounding=0.3,
        crowd_every=3,
    ),
    Stage(name="blind", seed=102, steps=300, scenes=10, lr=2e-3, decay=0.75),
)
STAGES = {stage.name: stage for stage in _STAGES}
PSEUDO_PATCHES = 40  # of 144, in stage `decoder`
CAPTIONED = 0.5  # share of stage `decoder`'s steps whose scenes come with a caption


class Learner(nn.Module):
    """The base with what is thrown away after training: a patch classifier, the pseudo-vision tables, a
    grounding head.
    """

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        width = model.model.language_model.config.hidden_size
        tower_width = model.model.vision_tower.config.hidden_size
        self.model = model
        self.classifier = nn.Linear(tower_width, pseudo_vision.N_COLORS + pseudo_vision.N_KINDS)
        self.pseudo = PseudoVision(width=width)
        self.grounding = GroundingHead(width=width)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def trained_in(self, stage: str) -> list[nn.Module]:
        model = self.model.model
        decoder = [model.language_model, self.grounding]
        return {
            "tower": [model.vision_tower, self.classifier],
            "decoder": [*decoder, self.pseudo],
            "align": [model.vision_tower, model.multi_modal_projector],
            "see": [*decoder, model.multi_modal_projector],
            "blind": [model.language_model],
        }[stage]

    def vision_tokens(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, N, D]"""
        features = self.model.model.vision_tower(images).last_hidden_state[:, 1:]
        return self.model.model.multi_modal_projector(features)

    def decode(
        self, vision: Tensor | None, positions: Tensor | None, packed: Packed
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, T, V] and the grounded layer's input [B, T, D] of packed text after vision [B, N, D].

        `positions` [B, N] are the vision tokens' position ids; without vision, text follows `<bos>` (the
        blind control).
        """
        decoder = self.model.model.language_model
        batch = len(packed.input_ids)
        bos = decoder.embed_tokens(torch.full((batch, 1), BOS))
        n_vision = 0 if vision is None else vision.shape[1]
        seen = [bos] if vision is None else [bos, vision]
        places = [torch.zeros(batch, 1, dtype=torch.long)] + ([] if positions is None else [positions])
        output = decoder(
            inputs_embeds=torch.cat([*seen, decoder.embed_tokens(packed.input_ids)], 1),
            attention_mask=block_mask(packed.blocks, n_vision, bos.dtype),
            position_ids=torch.cat([*places, packed.position_ids], 1),
            use_cache=False,
            output_hidden_states=True,
        )
        text = slice(1 + n_vision, None)
        grounded = output.hidden_states[GROUNDED_LAYER][:, text]
        return self.model.lm_head(output.last_hidden_state[:, text]), grounded

    def see(self, drawn: list, packed: Packed) -> tuple[Tensor, Tensor]:
        """`decode` after the real images of the scenes."""
        vision = self.vision_tokens(rendered(drawn, self.dtype))
        positions = torch.arange(1, 1 + vision.shape[1]).expand(len(vision), -1)
        return self.decode(vision, positions, packed)


def answer_loss(logits: Tensor, packed: Packed) -> Tensor:
    answered = packed.labels != IGNORE
    return F.cross_entropy(logits[answered].float(), packed.labels[answered])


def _language_loss(learner: Learner, stage: Stage, logits: Tensor, grounded: Tensor, packed: Packed) -> tuple:
    loss = answer_loss(logits, packed)
    phrases = grounded[packed.phrases[:, 0], packed.phrases[:, 1]]
    grounding, right = learner.grounding(phrases, packed.cells)
    return loss + stage.grounding * grounding, {"loss": loss.item(), "grounded": right.item()}


def tower_loss(learner: Learner, stage: Stage, step: int) -> tuple[Tensor, dict[str, float]]:
    """Colour and kind of every patch that shows something, and of 15% of the empty ones."""
    drawn = draw(stage.seed, stage.indices(step), more_counting=False)
    labels = torch.stack([patch_labels(scene) for scene, _ in drawn])  # [B, N, 2]
    features = learner.model.model.vision_tower(rendered(drawn, learner.dtype)).last_hidden_state[:, 1:]
    color, kind = (
        learner.classifier(features).float().split([pseudo_vision.N_COLORS, pseudo_vision.N_KINDS], -1)
    )
    chance = torch.rand(labels.shape[:2], generator=torch.Generator().manual_seed(stage.seed * 10**6 + step))
    used = (labels[..., 1] > 0) | (chance < 0.15)
    loss = F.cross_entropy(color[used], labels[used][:, 0]) + F.cross_entropy(kind[used], labels[used][:, 1])
    sign = labels[..., 1] >= pseudo_vision.FIRST_WORD
    read = (kind.argmax(-1) == labels[..., 1])[sign].float().mean().item()
    return loss, {"loss": loss.item(), "signs read": read}


def decoder_loss(learner: Learner, stage: Stage, step: int) -> tuple[Tensor, dict[str, float]]:
    drawn = draw(stage.seed, stage.indices(step))
    if step < CAPTIONED * stage.steps:
        drawn = [(scene, [*questions, caption(scene)]) for scene, questions in drawn]
    rng = random.Random(f"patches/{stage.seed}/{step}")
    logits, grounded, packed = read_pseudo_vision(learner, drawn, rng)
    return _language_loss(learner, stage, logits, grounded, packed)


def read_pseudo_vision(learner: Learner, drawn: list, rng: random.Random) -> tuple[Tensor, Tensor, Packed]:
    labels, places = sample_patches([scene for scene, _ in drawn], PSEUDO_PATCHES, rng)
    vision = learner.pseudo(learner.model.model.language_model.embed_tokens, labels, places)
    packed = pack(drawn, vision_tokens=pseudo_vision.SIDE**2)
    return *learner.decode(vision, 1 + places, packed), packed


def align_loss(learner: Learner, stage: Stage, step: int) -> tuple[Tensor, dict[str, float]]:
    """Squared error over the targets' variance, patches that show something and empty ones weighing the
    same.
    """
    drawn = draw(stage.seed, stage.indices(step), more_counting=False)
    labels = torch.stack([patch_labels(scene) for scene, _ in drawn])
    with torch.no_grad():
        places = torch.arange(labels.shape[1]).expand(len(labels), -1)
        targets = learner.pseudo(learner.model.model.language_model.embed_tokens, labels, places).float()
        variance = targets.flatten(0, 1).var(0).sum()
    error = (learner.vision_tokens(rendered(drawn, learner.dtype)).float() - targets).pow(2).sum(
        -1
    ) / variance
    shown = labels[..., 1] > 0
    return error[shown].mean() + error[~shown].mean(), {"error": error[shown].mean().item()}


def see_loss(learner: Learner, stage: Stage, step: int) -> tuple[Tensor, dict[str, float]]:
    drawn = draw(stage.seed, stage.indices(step), crowd_every=stage.crowd_every)
    packed = pack(drawn, vision_tokens=pseudo_vision.SIDE**2)
    logits, grounded = learner.see(drawn, packed)
    return _language_loss(learner, stage, logits, grounded, packed)


def blind_loss(learner: Learner, stage: Stage, step: int) -> tuple[Tensor, dict[str, float]]:
    packed = pack(draw(stage.seed, stage.indices(step)), vision_tokens=pseudo_vision.SIDE**2)
    logits, _ = learner.decode(None, None, packed)
    loss = answer_loss(logits, packed)
    return loss, {"loss": loss.item()}


LOSSES = {
    "tower": tower_loss,
    "decoder": decoder_loss,
    "align": align_loss,
    "see": see_loss,
    "blind": blind_loss,
}
