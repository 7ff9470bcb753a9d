"""What each system costs: FLOPs, vision tokens, latency, KV-cache bytes, working memory, energy."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig
from transformers.generation.streamers import BaseStreamer

from latefusion.eval.comparison.energy import joules_of
from latefusion.eval.comparison.systems import System, running
from latefusion.eval.memory import kv_cache_bytes, peak_bytes, whole_peak_bytes
from latefusion.eval.metrics import Spread, spread
from latefusion.eval.tasks.base import Answer
from latefusion.models.flops import decoder_flops, encoder_flops, vision_macs, vision_pairs
from latefusion.models.inputs import encode_images
from latefusion.models.layer_kinds import attends
from latefusion.models.policies.base import Policy
from latefusion.models.schedule import VisionSchedule

PEAK_PROMPTS = 2  # recording every allocation is slow


@dataclass(frozen=True)
class Compute:
    """Mean over questions, from what the executor really ran.

    Attributes:
        flops: decoder FLOPs of a prefill (`decoder_flops` of the tokens of each layer).
        vision_macs: of the vision tokens alone, in the literature's convention (`vision_macs`).
        attention_pairs: causal pairs of query and key, over all layers, of which at least one is a vision token.
        vision_tokens: vision tokens in each layer.
        text_tokens: prompt tokens that are not vision.
    """

    flops: float
    vision_macs: float
    attention_pairs: float
    vision_tokens: list[float]
    text_tokens: float


@dataclass(frozen=True)
class Cost:
    """Measured at batch 1 on a fixed set of prompts.

    Attributes:
        ttft, tpot: seconds to the first token (vision tower, projector, prefill), seconds a further token.
        kv_bytes: key-value cache after the prefill, mean over the prompts.
        working_bytes: peak of tensor memory beyond weights and inputs in prefill and one decode step, most
            over the first `PEAK_PROMPTS`.
        peak_bytes: of everything meanwhile, weights and libraries too: CUDA's allocator, or the process's resident
            memory; None where the system does not say.
        joules: energy of an answer, mean; None where the device does not report it.
    """

    ttft: Spread
    tpot: Spread
    kv_bytes: float
    working_bytes: float
    peak_bytes: float | None
    joules: float | None


def compute(
    config: PretrainedConfig, answers: Sequence[Answer], policy: Policy, entry: Any = None
) -> Compute:
    """Mean decoder FLOPs and vision tokens a layer of one system's answers.

    Args:
        config: of the model.
        answers: with the tokens that each layer computed.
        policy: whose ranking counts, where it takes more than a row a layer.
        entry: its entry adapter, whose work counts where vision tokens enter after layer 0; None: no adapter.
    """

    def flops(answer: Answer) -> float:
        total = float(decoder_flops(config, answer.tokens, answer.frozen))
        if isinstance(policy, VisionSchedule):
            total += policy.ranking_flops(config, answer.text_tokens, answer.vision_tokens)
        if entry is not None and not answer.vision_tokens[0]:
            total += entry.flops(max(answer.vision_tokens))
        return total

    layers = zip(*(answer.vision_tokens for answer in answers), strict=True)
    return Compute(
        flops=fmean(flops(answer) for answer in answers),
        vision_macs=fmean(vision_macs(config, a.vision_tokens, frozen=any(a.frozen)) for a in answers),
        attention_pairs=fmean(
            vision_pairs(a.text_tokens, a.vision_tokens, a.frozen, a.reads, attention=attends(config))
            for a in answers
        ),
        vision_tokens=[fmean(layer) for layer in layers],
        text_tokens=fmean(answer.text_tokens for answer in answers),
    )


class TokenClock(BaseStreamer):
    """Times at which `generate` hands out tokens; the first `put` brings the prompt, before the prefill."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def time_answer(model: Any, inputs: dict[str, Any], new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token and median seconds of each further one, of one `generate` call.

    Tokens reach the clock through `.cpu()`, so a GPU has finished them by then; before the start, what others left
    on it. `new_tokens` are always generated (an early end token is ruled out), so that all systems do the same number
    of decode steps.
    """
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    clock = TokenClock()
    start = time.perf_counter()
    generate(model, inputs, new_tokens, streamer=clock)
    tokens = clock.times[1:]
    return tokens[0] - start, median(np.diff(tokens))


def seconds(
    work: Callable[[], Any], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Time of `work`: by `clock` on a CPU, on CUDA between two events, once the device has finished."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000
    began = clock()
    work()
    return clock() - began


def vision_seconds(model: Any, prompts: Sequence[dict[str, Any]]) -> float:
    """Median seconds that vision tower and projector take for one prompt; no policy changes them."""
    with torch.no_grad():
        return median(seconds(partial(encode_images, model, prompt), model.device) for prompt in prompts)


def vision_flops(model: Any, prompts: Sequence[dict[str, Any]]) -> float | None:
    """FLOPs of vision tower and projector, mean over prompts; None if they cannot be counted."""
    counts = [encoder_flops(model, prompt) for prompt in prompts]
    return None if None in counts else fmean(count for count in counts if count is not None)


def measure(
    *,
    model: Any,
    attachment: Any,
    systems: dict[str, System],
    prompts: Sequence[dict[str, Any]],
    reference: str,
    repeats: int,
    new_tokens: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Cost]:
    """Latency and memory of every system at batch 1.

    Rounds are interleaved (A B C, B C A, ...), so that drift of the machine falls on all systems alike, and
    each ratio divides by the reference's run on the same prompt in the same round. Adapters are off for
    every system: merged into the weights, as a student is deployed, LoRA costs nothing, and costs do not
    depend on the values of weights. The entry adapter runs where a schedule enters late.

    Args:
        prompts: inputs of single prompts, with their pixels.
        repeats: timed rounds over the prompts, after one untimed.
        new_tokens: tokens to generate, at least two.
        advance: called after each prompt of each round.
    """
    keys = list(systems)
    deployed = {key: replace(system, adapters=False) for key, system in systems.items()}
    kv: dict[str, list[int]] = {key: [] for key in keys}
    peak: dict[str, list[int]] = {key: [] for key in keys}
    whole: dict[str, list[int | None]] = {key: [] for key in keys}
    times: dict[str, list[tuple[float, float]]] = {key: [] for key in keys}
    joules = joules_of(model.device)
    used = dict.fromkeys(keys, 0.0)
    for prompt in prompts:  # untimed: the warm-up
        for key in keys:
            with running(model, attachment, deployed[key]) as active:
                kv[key].append(kv_cache_bytes(active(**prompt, use_cache=True).past_key_values))
        advance()
    memory: tuple[tuple[Callable, dict], ...] = ((whole_peak_bytes, whole), (peak_bytes, peak))
    for measured, into in memory:  # the profiler last: what it keeps is not given back
        for prompt in prompts[:PEAK_PROMPTS]:
            for key in keys:
                with running(model, attachment, deployed[key]) as active:
                    # so that what the attachment remembers is gone
                    active(input_ids=prompt["input_ids"][:, :1])
                    into[key].append(measured(partial(generate, active, prompt, 2), active.device))
    for repeat in range(repeats):
        for number, prompt in enumerate(prompts):
            first = (repeat + number) % len(keys)
            for key in keys[first:] + keys[:first]:
                with running(model, attachment, deployed[key]) as active:
                    before = joules() if joules else 0.0
                    times[key].append(time_answer(active, prompt, new_tokens))
                    used[key] += joules() - before if joules else 0.0
            advance()
    return {
        key: Cost(
            ttft=spread([t for t, _ in times[key]], [t for t, _ in times[reference]]),
            tpot=spread([t for _, t in times[key]], [t for _, t in times[reference]]),
            kv_bytes=fmean(kv[key]),
            working_bytes=max(peak[key]),
            peak_bytes=max((n for n in whole[key] if n is not None), default=None),
            joules=used[key] / len(times[key]) if joules else None,
        )
        for key in keys
    }


def weight_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def generate(model: Any, inputs: dict[str, Any], new_tokens: int, **kwargs: Any) -> torch.Tensor:
    """Generate exactly `new_tokens` greedy tokens."""
    lengths = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    return model.generate(**inputs, **lengths, do_sample=False, num_beams=1, **kwargs)
