"""Models whose vision reaches text in the layers [p, q) and nowhere else, by construction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from helpers.families import IMAGE, TOKENS_PER_IMAGE, build
from transformers.modeling_outputs import BaseModelOutputWithPooling

from latefusion.data.prompt_batches import Batch, Group
from latefusion.eval.fusion.measure import Measurer
from latefusion.eval.fusion.plan import Cost, Plan, make_plan
from latefusion.eval.fusion.run import shapes
from latefusion.eval.ledger import Ledger
from latefusion.models.attach import Attachment

CONTENT = 15  # dimensions of vision's content; as many of text's; then the two marks
VISION_MARK, TEXT_MARK = 30, 31
BOUND = 1e-5  # on the KL, in nats: what a planted band keeps to
NO_PLAN = Plan(Cost(0.0, 0.0, 0.0), [()], [0.0], [0.0], hold=True)
BLOCK = (
    300.0  # a text query score for a vision key is lowered by about its square: no vision is left in float32
)


def planted(family: str, p: int, q: int) -> Any:
    """A random model of a family with Llama's module names.

    Vision tokens and text tokens bear a mark that no layer touches. Outside [p, q) the marks keep a text query from
    every vision key; text goes on attending to text, and MLPs work on. Before p values and MLPs read the text's
    dimensions alone, so that vision tokens (which come first) stay what they are.
    """
    model = build(family)
    generator = torch.Generator().manual_seed(p * 10 + q)
    decoder = model.get_decoder()
    with torch.no_grad():
        embed = decoder.embed_tokens.weight
        embed.zero_()
        embed[:, CONTENT : 2 * CONTENT].normal_(0, 1, generator=generator)
        embed[:, TEXT_MARK] = 2.0
        model.get_output_embeddings().weight.normal_(0, 1.0, generator=generator)
        for i, layer in enumerate(decoder.layers):
            attention, mlp = layer.self_attn, layer.mlp
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
                linear.weight.normal_(0, 0.3, generator=generator)
                if linear.bias is not None:
                    linear.bias.zero_()
            for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
                linear.weight.normal_(0, 0.2, generator=generator)
            for linear in (attention.o_proj, mlp.down_proj):
                linear.weight[VISION_MARK:] = 0
            head_dim = attention.head_dim
            slow = head_dim // 2 - 1  # the dimension that positions hardly turn, and its partner
            for linear, mark in ((attention.q_proj, TEXT_MARK), (attention.k_proj, VISION_MARK)):
                heads = linear.weight.unflatten(0, (-1, head_dim))  # [H, D_head, D], a view
                heads[:, [slow, head_dim - 1]] = 0
                heads[:, :, VISION_MARK:] = 0
                if not p <= i < q:
                    heads[:, slow, mark] = BLOCK if mark == TEXT_MARK else -BLOCK
            if i < p:
                for linear in (attention.v_proj, mlp.gate_proj, mlp.up_proj):
                    linear.weight[:, :CONTENT] = 0
                    linear.weight[:, VISION_MARK:] = 0
                for linear in (attention.o_proj, mlp.down_proj):
                    linear.weight[:CONTENT] = 0
    return model


def questions(samples: int, seed: int = 0, images: int = 1) -> dict[str, Any]:
    """An image (or several, side by side) and six tokens of text each."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 90, (samples, 6), generator=generator)
    ids = torch.cat([torch.full((samples, images * TOKENS_PER_IMAGE), IMAGE), text], 1)
    features = torch.zeros(samples * images, TOKENS_PER_IMAGE, 32)
    features[..., :CONTENT].normal_(0, 1, generator=generator)
    features[..., VISION_MARK] = 2.0
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=list(features))},
    }


def grouped(batches: Sequence[Batch]) -> list[Group]:
    """Batches that are made already, one after the other."""
    groups, first = [], 0
    for batch in batches:
        numbers = tuple(range(first, first + batch.size))
        places = tuple(batch.vision[0].nonzero().flatten().tolist())
        lengths = tuple(batch.real.sum(1).tolist())
        groups.append(
            Group(numbers, lambda batch=batch: batch, places, lengths, int((batch.labels != -100).sum()))
        )
        first += batch.size
    return groups


def measurer(model: Any, attachment: Attachment, batches: Sequence[Batch], ledger: Path) -> Measurer:
    """Of these batches, as `run.profile` makes it."""
    groups = grouped(batches)
    plan = make_plan(model.config, shapes(attachment, groups))
    return Measurer(model, attachment, groups, Ledger(ledger, {"about": 1}), plan)


def planted_batch(model: Any, samples: int = 12, images: int = 1, seed: int = 0) -> Batch:
    """Questions whose labels are the dense model's own answers."""
    inputs = questions(samples, seed, images=images)
    ids = inputs["input_ids"]
    with torch.no_grad():
        answers = model(**inputs).logits.argmax(-1)
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = answers[:, -3:-1]
    queries = torch.full((samples, 1), ids.shape[1] - 3)
    return Batch(tuple(map(str, range(samples))), inputs, labels, queries, ids == IMAGE)
