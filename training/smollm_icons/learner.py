"""SmolLM2 with LoRA and the projector, as training and measuring run it: tokens in, logits at answers out."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from latefusion.data.icons.boards import SIDE, Board
from latefusion.models.smollm_icons.packages import load_language_model, load_tokenizer
from latefusion.training.smollm_icons.batch import Batch, Sample, attention, collate
from latefusion.training.smollm_icons.features import square_tokens
from latefusion.training.smollm_icons.lora import add_lora
from latefusion.training.smollm_icons.projector import Projector
from latefusion.training.smollm_icons.question_tree import OPENING, VISION


def language_model(untrained: bool = False, seed: int = 0, device: str = "cpu") -> LlamaForCausalLM:
    """SmolLM2, or with `untrained` its shape with random weights."""
    attention_code = "eager" if device == "cpu" else "sdpa"  # what is faster there
    model = load_language_model(attn_implementation=attention_code)
    if untrained:
        torch.manual_seed(seed)
        model = LlamaForCausalLM(model.config).bfloat16()
    model.to(torch.device(device))  # type: ignore[arg-type]
    return model.eval()


class Learner:
    """The language model, its trained parts, and float32 masters of them for the optimiser."""

    def __init__(
        self, model: LlamaForCausalLM, projector: Projector, *, blind: bool = False,
        freeze_language: bool = False, untrained: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        self.tokenizer = load_tokenizer()
        self.model, self.device, self.blind = model, model.device, blind
        self.trained = dict(model.named_parameters()) if untrained else add_lora(model)
        if freeze_language:
            model.requires_grad_(False)
        model.to(self.device)  # type: ignore[arg-type]  # the new layers
        self.projector = projector.to(self.device)
        self.masters = {name: p.detach().float().clone() for name, p in self.trained.items()}
        ids = self.tokenizer(OPENING, add_special_tokens=False).input_ids
        self.opening = torch.tensor(ids, device=self.device)

    def logits(self, batch: Batch, unseen_in: Sequence[int] = ()) -> Tensor:
        """Logits [L, vocabulary] at the text tokens that must predict something.

        Args:
            unseen_in: layers in which no text token sees the picture.
        """
        batch = batch.without_vision() if self.blind else batch
        embed = self.model.get_input_embeddings()
        text = embed(batch.ids)  # [B, T, width]
        parts = [embed(self.opening).expand(len(text), -1, -1), text]
        n_opening, n_vision = len(self.opening), batch.places.shape[1]
        if n_vision:
            parts.insert(1, self._vision(batch).to(text.dtype))  # [B, K, width]
        positions = [
            torch.arange(n_opening, device=text.device).expand(len(text), -1),
            batch.places + n_opening,
            batch.depths + n_opening + VISION,
        ]
        with self._hiding(
            attention(batch, n_opening, text.dtype, hidden=True) if unseen_in else None, unseen_in
        ):
            hidden = self.model.model(
                inputs_embeds=torch.cat(parts, 1),
                attention_mask=attention(batch, n_opening, text.dtype),
                position_ids=torch.cat(positions, 1),
                use_cache=False,
            ).last_hidden_state[:, n_opening + n_vision :]
        return self.model.lm_head(hidden.flatten(0, 1)[batch.learnt]).float()

    def _vision(self, batch: Batch) -> Tensor:
        if batch.words is not None:
            return batch.words
        return self.projector(batch.features, self.projector.places[batch.places])

    @contextmanager
    def _hiding(self, mask: Tensor | None, layers: Sequence[int]) -> Iterator[None]:
        def replace(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "attention_mask": mask}

        hooks = [
            self.model.model.layers[layer].register_forward_pre_hook(replace, with_kwargs=True)
            for layer in layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy of all answers, the mean over boards."""
        losses = F.cross_entropy(self.logits(batch), batch.labels, reduction="none")
        return (losses * batch.weights).sum()

    @torch.no_grad()
    def right(self, samples: Sequence[Sample]) -> list[list[bool]]:
        """Whether greedy decoding gives each answer of each board: every token is the likeliest after the others."""
        batch = collate(samples).to(self.device)
        return verdicts(samples, batch, self.logits(batch))

    def state(self) -> dict[str, Any]:
        return {"lora": self.masters, "projector": self.projector.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, master in state["lora"].items():
                self.masters[name].copy_(master)
                self.trained[name].copy_(master)
        self.projector.load_state_dict(state["projector"])


def verdicts(samples: Sequence[Sample], batch: Batch, logits: Tensor) -> list[list[bool]]:
    """Whether each answer of each board is the likeliest, token after token."""
    right = torch.ones(batch.ids.shape, dtype=torch.bool)
    right.view(-1)[batch.learnt.cpu()] = (logits.argmax(-1) == batch.labels).cpu()
    return [[bool(right[k][path].all()) for path in sample.tree.answers] for k, sample in enumerate(samples)]


def tokens_that_matter(board: Board, rng: random.Random, empty: int) -> list[int]:
    """The tokens of all things and blank cards and `empty` others, in order."""
    things = {
        token for thing in board.things + board.blanks for token in square_tokens(thing.row, thing.column)
    }
    others = [token for token in range(4 * SIDE * SIDE) if token not in things]
    return sorted(things | set(rng.sample(others, min(empty, len(others)))))
