"""Refuses forwards that a policy cannot run on, before anything is computed."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils.generic import is_flash_attention_requested

from latefusion.models.executor.prompt import hides_no_question
from latefusion.models.executor.tokens import Tokens
from latefusion.models.executor.traits import DecoderTraits, in_shards
from latefusion.models.policies.base import Decision, Policy, Prompt, SeesEmbeddings, Selection


def ranks(decision: Decision | None) -> bool:
    """Whether vision tokens are chosen by what text pays attention to."""
    return decision is not None and bool(decision.watch or getattr(decision, "ahead", ()))


def check_flash_attention(traits: DecoderTraits, tokens: Tokens) -> None:
    """Raise ValueError if flash attention would mistake which tokens are left."""
    layer, length = traits.layers[0], tokens.past + tokens.length
    fix = 'load the model with attn_implementation="sdpa".'
    if traits.window is not None and length > traits.window:
        raise ValueError(
            f"flash attention would count its sliding window of {traits.window} over the tokens that are left, "
            f"not over all {length}: {fix}"
        )
    if tokens.prompt is not None and traits.takes_ids:
        raise ValueError(
            f"{type(layer.self_attn).__name__} computes with position_ids, which flash attention takes "
            f"for packed rows once tokens are left out: {fix}"
        )
    if tokens.prompt is not None and traits.shares_keys:
        raise ValueError(
            f"{type(layer).__name__} shares keys between layers, which flash attention cannot tell from "
            f"its own once tokens are left out: {fix}"
        )


def check_prompt(
    policy: Policy, decision: Decision | None, tokens: Tokens, *, prompt_length: int | None, training: bool
) -> None:
    """Raise ValueError if a forward does not show all that a policy chooses vision tokens by.

    Args:
        tokens: with vision tokens among them.
        prompt_length: tokens of the whole prompt, where it may come in chunks.
        training: gradients flow and the model is in training mode.
    """
    assert tokens.prompt is not None
    if not tokens.marked and ranks(decision) and (tokens.labels is not None or training):
        check_labels(policy, tokens.prompt, tokens.labels)
    if tokens.past + tokens.length < (prompt_length or 0):
        check_whole(policy, decision)


def check_whole(policy: Policy, decision: Decision | None) -> None:
    """Raise ValueError if a chunk of a prompt does not show what vision tokens are chosen by."""
    if ranks(decision) or isinstance(decision, SeesEmbeddings):
        raise ValueError(
            f"{type(policy).__name__} chooses vision tokens by the whole prompt, which comes in chunks here: leave "
            "prefill_chunk_size out, or use a schedule without keep."
        )


def check_labels(policy: Policy, prompt: Prompt, labels: Tensor | None) -> None:
    """Raise ValueError if a training forward of a ranking policy does not say where prompts end, or teaches questions.

    Args:
        labels: int64 `[B, T]`, or None if the forward has none.
    """
    if labels is None:
        raise ValueError(
            f"{type(policy).__name__} chooses vision tokens by the prompt, but this training forward does not "
            "say where the prompt ends, so the answer would choose them: pass labels, or name the last token "
            "of each prompt with attachment.queries(index)."
        )
    unasked = [
        not text and asks and bool(vision)
        for text, asks, vision in zip(prompt.n_text, prompt.asks, prompt.n_vision, strict=True)
    ]
    if any(unasked) or hides_no_question(labels, prompt.real):
        raise ValueError(
            f"{type(policy).__name__} chooses vision tokens by the question, but the labels begin before it: set "
            "the labels of everything but the answers to -100 (in TRL: completion_only_loss=True or "
            "assistant_only_loss=True), or name the last token of each prompt with attachment.queries(index)."
        )


def check_choice(layer: int, selection: Selection, tokens: Tokens, config: PretrainedConfig) -> None:
    """Raise ValueError if the policy cannot have chosen rightly.

    That is where a row holds several samples, whose tokens would be mixed up, and where an image comes after the
    question by whose text its tokens would have to be chosen.

    Args:
        layer: before which the policy chose.
        selection: of the policy's prompt, with its counts.
        tokens: of the forward.
        config: of the decoder.
    """
    prompt = tokens.policy_prompt
    assert prompt is not None and selection.counts is not None
    some = any(0 < count < total for count, total in zip(selection.counts, prompt.n_vision, strict=True))
    if some and prompt.late:
        raise ValueError(
            f"the policy chooses among the vision tokens of a row in layer {layer}, but an image comes after the last "
            "of the queries: no text of the prompt has read it. Use a policy that keeps all vision tokens or none, "
            "such as VisionSchedule(enter=..., exit=...)."
        )
    if not prompt.packed and tokens.samples is None:
        return
    if is_flash_attention_requested(config):
        raise ValueError(
            "several samples are packed into a row with images (position_ids begin again), and flash attention "
            "would let them see each other once vision tokens leave: put them into rows of their own, or load the "
            'model with attn_implementation="sdpa".'
        )
    if some and not tokens.marked and tokens.samples is None:
        raise ValueError(
            f"the policy chooses among the vision tokens of a row in layer {layer}, but several samples are packed "
            "into the row (position_ids begin again): put them into rows of their own, or use a policy that keeps "
            "all vision tokens or none, such as VisionSchedule(enter=..., exit=...)."
        )


def check_recurrence_takes(tokens: Tokens) -> None:
    """Raise ValueError if rows hold several samples, which recurrent layers would read as one text."""
    if tokens.prompt is not None and (tokens.prompt.packed or tokens.samples is not None):
        raise ValueError(
            "several samples are packed into a row (position_ids begin again), and the recurrent layers of "
            "this decoder would read one after the other: put them into rows of their own."
        )


def check_not_sharded(layer: nn.Module) -> None:
    """Raise ValueError if the layer's weights lie in shards, which only a call of the layer itself gathers."""
    if in_shards(layer):
        raise ValueError(
            'ranking="hidrop" looks into a layer before it runs, which weights in shards (ZeRO-3, FSDP2) do not allow: '
            'use ZeRO-2 or DDP, or ranking="reading".'
        )
