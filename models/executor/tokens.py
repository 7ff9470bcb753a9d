"""`Tokens`: the tokens of one forward, and what is known of them before its first layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from latefusion.models.executor.packed import Samples
from latefusion.models.executor.prompt import PromptEnd, end_of_labels, read_prompt, real_tokens
from latefusion.models.executor.traits import DecoderTraits
from latefusion.models.policies.base import Prompt


@dataclass
class Tokens:
    """The tokens of one forward of the decoder.

    Attributes:
        length: T, tokens of this forward.
        past: tokens that the cache has seen before.
        real: bool `[B, T]`, false for padding; by sample, `[S, L]`, where rows hold several. None in a decode step.
        prompt: the rows' prompt; None if the forward brings no vision tokens.
        policy_prompt: the prompt that the policy sees: `prompt`, or where rows hold several samples, one with a row
            for each of them.
        samples: which tokens of a row belong to which sample, where rows hold several and bring vision tokens.
        labels: int64 `[B, T]`, where they are what says where prompts end.
        marked: `attachment.queries` says where prompts end.
    """

    length: int
    past: int
    real: Tensor | None = None
    prompt: Prompt | None = None
    policy_prompt: Prompt | None = None
    samples: Samples | None = None
    labels: Tensor | None = None
    marked: bool = False


def read_tokens(
    arguments: Mapping[str, Any],
    *,
    past: int,
    vision: Tensor | None,
    padding: Tensor | None,
    labels: Any,
    end: PromptEnd,
    traits: DecoderTraits,
) -> Tokens:
    """Read the tokens of a forward.

    Args:
        arguments: of the decoder, by name.
        past: tokens that the cache has seen before.
        vision: bool `[B, T]`, or None.
        padding: the 2-D attention mask `[B, past + T]`, or its last T columns.
        labels: of a forward with a loss.
        end: where prompts end.
        traits: of the decoder.
    """
    tensor = arguments.get("inputs_embeds")
    tensor = arguments["input_ids"] if tensor is None else tensor
    batch, length = tensor.shape[:2]
    tokens = Tokens(length, past, marked=end.queries is not None)
    if vision is None and past:
        return tokens
    real = real_tokens(padding, batch, length, tensor.device)
    samples = None
    if end.samples is not None:
        samples = Samples(end.samples.to(tensor.device))
        real = real & (samples.number >= 0)
    tokens.real = real if samples is None else samples.valid
    if vision is None:
        return tokens
    vision = vision.to(tensor.device)
    if not tokens.marked and isinstance(labels, Tensor) and labels.shape == real.shape:
        tokens.labels = labels.to(tensor.device)
        end = end_of_labels(tokens.labels, vision & real)
    tokens.prompt = tokens.policy_prompt = read_prompt(
        vision,
        real,
        past=past,
        end=end,
        position_ids=arguments.get("position_ids") if samples is None else None,
        num_layers=len(traits.layers),
        attention=traits.attention if traits.recurrent else (),
    )
    if samples is not None and tokens.prompt is not None:
        tokens.samples, tokens.policy_prompt = samples, samples.prompt(tokens.prompt, end)
    return tokens
