"""What a forward must not bring to a policy, refused before anything is computed."""

from __future__ import annotations

from torch import Tensor, nn

from latefusion.models.executor.prompt import hides_no_question
from latefusion.models.policies.base import Decision, Policy, Prompt, SeesEmbeddings


def ranks(decision: Decision | None) -> bool:
    """Whether vision tokens are chosen by what text pays attention to."""
    return decision is not None and bool(decision.watch or getattr(decision, "ahead", ()))


def check_flash_attention(
    layer: nn.Module, *, window: int | None, length: int, has_vision: bool, takes_ids: bool, shares_keys: bool
) -> None:
    """Raise ValueError if flash attention would mistake which tokens are left.

    Args:
        layer: one of the decoder's, for its name.
        window: tokens of a sliding window that is shorter than the sequence, or None.
        length: tokens of the sequence.
        has_vision: the forward brings vision tokens.
        takes_ids: attention computes with position_ids.
        shares_keys: layers attend to the keys of a layer before.
    """
    fix = 'load the model with attn_implementation="sdpa".'
    if window is not None:
        raise ValueError(
            f"flash attention would count its sliding window of {window} over the tokens that are left, "
            f"not over all {length}: {fix}"
        )
    if has_vision and takes_ids:
        raise ValueError(
            f"{type(layer.self_attn).__name__} computes with position_ids, which flash attention takes "
            f"for packed rows once tokens are left out: {fix}"
        )
    if has_vision and shares_keys:
        raise ValueError(
            f"{type(layer).__name__} shares keys between layers, which flash attention cannot tell from "
            f"its own once tokens are left out: {fix}"
        )


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
