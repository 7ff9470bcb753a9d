"""SmolLM2 with LoRA and the projector, as training and measuring run it: tokens in, logits at answers out."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latefusion.data.icons.board_questions import Question
from latefusion.data.icons.boards import SIDE, Board
from latefusion.models.smollm_icons.packages import load_language_model, load_tokenizer
from latefusion.training.smollm_icons.features import square_tokens
from latefusion.training.smollm_icons.lora import add_lora
from latefusion.training.smollm_icons.projector import Projector
from latefusion.training.smollm_icons.question_tree import OPENING, VISION, Tree, attention, question_tree


class Learner:
    """The language model, its trained parts, and float32 masters of them for the optimiser."""

    def __init__(self, projector: Projector, *, blind: bool = False, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.tokenizer = load_tokenizer()
        self.model = load_language_model(attn_implementation="eager").eval()
        self.lora = add_lora(self.model)
        self.projector = projector
        self.blind = blind
        self.masters = {name: p.detach().float().clone() for name, p in self.lora.items()}
        opening = self.tokenizer(OPENING, add_special_tokens=False).input_ids
        self.opening = self.model.get_input_embeddings().weight[opening].detach()

    def logits(self, vision: Tensor, places: list[int] | Tensor, tree: Tree) -> tuple[Tensor, Tensor]:
        """Logits at the labelled tokens of the tree, and the labels; `vision` [K, width] at `places` of 144."""
        if self.blind:
            vision, places = vision[:0], torch.zeros(0, dtype=torch.long)
        embed = self.model.get_input_embeddings()
        text = embed(torch.tensor(tree.ids))
        opening = len(self.opening)
        inputs = torch.cat([self.opening, vision.to(text.dtype), text])
        positions = torch.cat(
            [
                torch.arange(opening),
                torch.as_tensor(places) + opening,
                torch.tensor(tree.depths) + opening + VISION,
            ]
        )
        mask = attention(tree, opening + len(vision), text.dtype)
        hidden = self.model.model(
            inputs_embeds=inputs[None], attention_mask=mask, position_ids=positions[None], use_cache=False
        ).last_hidden_state[0, opening + len(vision) :]
        labels = torch.tensor(tree.labels)
        learnt = labels != -100
        return self.model.lm_head(hidden[learnt]).float(), labels[learnt]

    def loss(self, vision: Tensor, places: list[int] | Tensor, questions: list[Question]) -> Tensor:
        """Cross-entropy of all answers."""
        logits, labels = self.logits(vision, places, question_tree(questions, self.tokenizer))
        return F.cross_entropy(logits, labels)

    @torch.no_grad()
    def right(self, vision: Tensor, places: list[int] | Tensor, questions: list[Question]) -> list[bool]:
        """Whether greedy decoding gives each answer: every token is the likeliest after those before it."""
        tree = question_tree(questions, self.tokenizer)
        logits, labels = self.logits(vision, places, tree)
        verdicts = torch.ones(len(tree.ids), dtype=torch.bool)
        verdicts[torch.tensor(tree.labels) != -100] = logits.argmax(-1) == labels
        return [bool(verdicts[path].all()) for path in tree.answers]

    def see(self, features: Tensor, places: list[int] | None = None) -> Tensor:
        """Vision tokens of a picture's features [144, CHANNELS], all or those at `places`."""
        if places is None:
            return self.projector(features[None])[0]
        return self.projector(features[None, places], self.projector.places[None, places])[0]

    def state(self) -> dict[str, Any]:
        return {"lora": self.masters, "projector": self.projector.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.lora.items():
                self.masters[name].copy_(state["lora"][name])
                parameter.copy_(self.masters[name])
        self.projector.load_state_dict(state["projector"])


def tokens_that_matter(board: Board, rng: random.Random, empty: int) -> list[int]:
    """The tokens of all things and blank cards and `empty` others, in order."""
    things = {
        token for thing in board.things + board.blanks for token in square_tokens(thing.row, thing.column)
    }
    others = [token for token in range(4 * SIDE * SIDE) if token not in things]
    return sorted(things | set(rng.sample(others, min(empty, len(others)))))
