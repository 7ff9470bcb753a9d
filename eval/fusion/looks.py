"""What the dense model looks at and what its states say, layer by layer, at the last token of the prompt.

This is shown beside the knock-outs because it is not the same thing: a token may draw attention and give nothing (a
sink). `observe` gathers all of it in one forward; the functions it uses are below it: attention (`Watch`, `look`), then
lenses (logit lens, value-output lens, nearest words, kinds of vision tokens).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from latefusion.eval.fusion.blind import Runner
from latefusion.models.executor.frozen_rows import output_projection
from latefusion.models.executor.recurrence import last_norm, recurrence_of
from latefusion.models.policies.base import AttentionCall, Prompt
from latefusion.models.policies.visipruner.decision import removal_effect

MASS = 0.9  # share of the attention on vision whose tokens are counted
QUANTILES = (0.01, 0.1, 0.5)
TOP = 3  # tokens of a lens
SINK = 10.0  # times the mean attention that a vision token receives
DEAD = 0.1  # share of the mean squared distance to the average image


@dataclass(frozen=True)
class AverageImage:
    """The mean projected feature at each place, and the mean squared distance of a feature to it.

    Attributes:
        mean: `[K, D]`, or `[1, D]` over all places if images differ in size.
        spread: `[]`.
    """

    mean: Tensor
    spread: Tensor

    @classmethod
    def of(cls, features: Tensor, vision: Tensor) -> AverageImage:
        """Average over one batch: features `[B, T, D]`, vision tokens bool `[B, T]`."""
        sizes = vision.sum(1)
        if bool((sizes == sizes[0]).all()):
            rows = features[vision].unflatten(0, (len(vision), -1))  # [B, K, D]
            mean = rows.mean(0)
        else:
            rows = features[vision][None]  # [1, N, D]
            mean = rows[0].mean(0, keepdim=True)
        return cls(mean, (rows - mean).square().sum(-1).mean())

    def at(self, places: int) -> Tensor:
        """The mean for a sample with that many vision tokens."""
        return self.mean if len(self.mean) in (1, places) else self.mean.mean(0, keepdim=True)


def observe(
    runner: Runner, with_maps: Sequence[bool], average: AverageImage | None
) -> tuple[list[dict[str, Any]], AverageImage]:
    """One dense forward over a batch: of each sample its looks, lenses and kinds of vision tokens, as JSON holds them.

    Args:
        with_maps: whether to keep each sample's numbers for every single vision token, too.
        average: tells dead vision tokens from others; None: this batch's own.

    Returns:
        The samples, and the average image that was used.

    Raises:
        ValueError: the model's logits are not finite.
    """
    watch, model, batch = Watch(), runner.model, runner.batch
    last = batch.queries[:, 0]
    entering: list[Tensor] = []
    handle = runner.layers[0].register_forward_pre_hook(lambda layer, args: entering.append(args[0].float()))
    try:
        with states_at(runner.layers, last) as states, written_at(runner.layers, last) as written_by:
            answers = runner.answers(watch)
    finally:
        handle.remove()
    if not bool(answers.log_probs.isfinite().all()):
        raise ValueError(
            f"the model's logits are not finite on sample {batch.names[0]} or one beside it; load it with "
            "dtype=float32."
        )
    features = entering[0]  # [B, T, D]
    average = average or AverageImage.of(features, batch.vision)
    first = torch.stack([answers.log_probs[answers.sample == i][0] for i in range(batch.size)])  # [B, V]
    written = first.argmax(-1)  # [B]
    logit, value = [], []
    for layer, state in enumerate(states):
        top = logit_lens(model, state).topk(TOP)
        logit.append([(i, p) for i, p in zip(top.indices.tolist(), _rounded(top.values), strict=True)])
        share, norm = value_output_lens(model, layer, written_by[layer])
        best = share.max(-1)  # [B, H]
        heads = norm.argsort(dim=1, descending=True)[:, :TOP]
        value.append(
            [
                (heads[b].tolist(), best.indices[b, heads[b]].tolist(), _rounded(norm[b, heads[b]]))
                for b in range(batch.size)
            ]
        )
    received = torch.stack(watch.attention).mean(0)  # [B, T]
    samples = []
    for b, vision in enumerate(batch.vision):
        rows = features[b][vision]  # [K, D]
        words, cosine = nearest_words(model.get_input_embeddings().weight, rows)
        kind = kinds(rows, received[b][vision], average.at(len(rows)), average.spread)
        maps = {
            "words": words.tolist(),
            "kinds": kind.tolist(),
            "attention": [_rounded(layer[b][vision], 6) for layer in watch.attention],
            "value_norm": [_rounded(layer[b][vision], 3) for layer in watch.values],
        }
        samples.append(
            {
                "looks": [asdict(layer[b]) for layer in watch.looks],
                "written": int(written[b]),
                "logit": [layer[b] for layer in logit],
                "value": [layer[b] for layer in value],
                "word_cosine": round(float(cosine.mean()), 4),
                "kinds": kind.bincount(minlength=3).tolist(),
                "maps": maps if with_maps[b] else None,
            }
        )
    return samples, average


# ---------------------------------------------------------------- attention


@dataclass(frozen=True)
class Look:
    """One layer's attention of one sample's last prompt token, to the K vision tokens.

    A layer that runs a recurrence (linear attention, a convolution) attends to nothing: 0 all of it, and cosines of 1.

    Attributes:
        share: of its attention, mean over heads, that falls on vision tokens (FastV, arXiv 2403.06764).
        entropy: of that attention among vision tokens, nats; log K if it is even, 0 if none falls on vision (which
            local attention may not reach).
        tokens: the fewest vision tokens that 90% of it falls on; 0 if none falls on vision.
        sink: Spearman's correlation of attention received with the L1 norm of the value vector (mean over heads).
            Attention sinks have small values (arXiv 2309.17453, 2510.17205): a negative number.
        cosine: VisiPruner's removal cosine (arXiv 2510.17205), minimum and 1%, 10%, 50% quantiles over vision tokens:
            between the attention output (heads concatenated, before o_proj) and the same without one token.
        norm: l2 norm of a token's contribution to that output: maximum, and 99%, 90%, 50% quantiles.
    """

    share: float
    entropy: float
    tokens: int
    sink: float
    cosine: list[float]
    norm: list[float]


@dataclass
class Watch:
    """A policy that removes nothing and records what the last prompt token attends to.

    Attributes:
        looks: per layer, per sample.
        attention: per layer `[B, T]`, attention of the last prompt token, mean over heads.
        values: per layer `[B, T]`, L1 norm of the value vectors, mean over heads.
    """

    looks: list[list[Look]] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def validate(self, num_layers: int) -> None:
        return None

    def begin(self, prompt: Prompt) -> _Watching:
        return _Watching(self, prompt)


class _Watching:
    fusion_layer = None

    def __init__(self, record: Watch, prompt: Prompt):
        self.record, self.prompt = record, prompt
        self.watch = prompt.attending(range(prompt.num_layers))

    def select(self, layer: int) -> None:
        if layer not in self.watch:
            nothing = torch.zeros(self.prompt.vision.shape, device=self.prompt.vision.device)
            self._record(nothing, nothing, nothing + 1, nothing)

    @torch.no_grad()
    def attended(self, layer: int, call: AttentionCall) -> None:
        prompt, length = self.prompt, self.prompt.vision.shape[1]
        weights = call.weights(call.compact_rows(prompt.queries[:, :1]))  # [B, H, 1, K]
        cosine, norm = removal_effect(weights, call.value)  # [B, 1, K]
        attention = call.to_logical(weights[:, :, 0].mean(1), length)  # [B, T]
        values = call.to_logical(call.value.float().abs().sum(-1).mean(1), length)
        cosine, norm = call.to_logical(cosine[:, 0], length, fill=1.0), call.to_logical(norm[:, 0], length)
        self._record(attention, values, cosine, norm)

    def _record(self, attention: Tensor, values: Tensor, cosine: Tensor, norm: Tensor) -> None:
        """One layer's; `[B, T]` each."""
        self.record.looks.append(
            [
                look(attention[i][vision], values[i][vision], cosine[i][vision], norm[i][vision])
                for i, vision in enumerate(self.prompt.vision)
            ]
        )
        self.record.attention.append(attention)
        self.record.values.append(values)


def look(attention: Tensor, values: Tensor, cosine: Tensor, norm: Tensor) -> Look:
    """Args: attention, L1 norm of the values, removal cosine and l2 norm of a sample's vision tokens, `[K]` each."""
    share = attention.sum()
    p = (attention / share).double() if share > 0 else torch.zeros_like(attention).double()
    ranked = p.sort(descending=True).values.cumsum(0)
    levels = torch.tensor(QUANTILES, dtype=cosine.dtype, device=cosine.device)
    flat = len(attention) < 3 or bool((attention == attention[0]).all()) or bool((values == values[0]).all())
    sink: Any = 0.0 if flat else spearmanr(attention.cpu(), values.cpu()).statistic
    return Look(
        share=float(share),
        entropy=float(torch.special.entr(p).sum()),
        tokens=int((ranked < MASS).sum()) + 1 if share > 0 else 0,
        sink=float(sink),
        cosine=[float(cosine.min()), *cosine.quantile(levels).tolist()],
        norm=[float(norm.max()), *norm.quantile(1 - levels).tolist()],
    )


def fusion_layer(looks: Sequence[Look], threshold: float) -> int | None:
    """VisiPruner's fusion layer of one sample: the first where removing some vision token turns the output."""
    return next((layer for layer, at in enumerate(looks) if at.cosine[0] < threshold), None)


# ---------------------------------------------------------------- lenses


@contextmanager
def states_at(layers: Sequence[nn.Module], index: Tensor) -> Iterator[list[Tensor]]:
    """Record the output of every layer at one position of each sample, `[B, D]` each, in the forward inside.

    Args:
        index: int64 `[B]`.
    """
    states: list[Tensor] = []

    def keep(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        states.append(output[torch.arange(len(index), device=index.device), index])

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def written_at(layers: Sequence[nn.Module], index: Tensor) -> Iterator[list[Tensor]]:
    """Record what every layer's attention gives to its output projection at one position, in the forward inside.

    `[B, H, D_head]` each, behind a gate where there is one; of a recurrence its output, `[B, 1, D]`.

    Args:
        index: int64 `[B]`.
    """
    written: list[Tensor] = []
    rows = torch.arange(len(index), device=index.device)

    def keep_input(width: int, projection: nn.Module, args: tuple[Any, ...]) -> None:
        written.append(args[0][rows, index].unflatten(-1, (-1, width)))

    def keep_output(mixer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        written.append(output[rows, index][:, None])

    handles = []
    for layer in layers:
        mixer = recurrence_of(layer)
        if mixer is None:
            attention: Any = layer.self_attn
            keep = partial(keep_input, attention.head_dim)
            handles.append(output_projection(attention).register_forward_pre_hook(keep))
        else:
            handles.append(mixer.register_forward_hook(keep_output))
    try:
        yield written
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logit_lens(model: Any, state: Tensor) -> Tensor:
    """Next-token probabilities if the decoder ended here: final norm, then lm_head (nostalgebraist, 2020).

    Args:
        state: `[..., D]`.

    Returns:
        float32 `[..., V]`.
    """
    normed = last_norm(model.get_decoder())(state.to(model.dtype))  # type: ignore[misc]
    return model.get_output_embeddings()(normed).float().softmax(-1)


@torch.no_grad()
def value_output_lens(model: Any, layer: int, heads: Tensor) -> tuple[Tensor, Tensor]:
    """What each head writes, in words: its output through its slice of o_proj, then as `logit_lens`.

    VisiPruner (arXiv 2510.17205) reads in this way that shallow layers recognise the task. A head's contribution has
    no bias. A recurrence counts as one head.

    Args:
        heads: of this layer, as `written_at` records them.

    Returns:
        Probabilities float32 `[B, H, V]`, and the l2 norm of what each head adds to the residual stream `[B, H]`.
    """
    module = model.get_decoder().layers[layer]
    if recurrence_of(module) is not None:
        written = heads.float()
        return logit_lens(model, written), written.norm(dim=-1)
    o_proj = output_projection(module.self_attn)  # its weights may be quantised
    apart = torch.einsum("bhk,hg->bhgk", heads, torch.eye(heads.shape[1]).to(heads)).flatten(2)
    apart = apart.to(model.dtype)  # [B, H, H * D_head], all heads but one silent
    written = (o_proj(apart) - o_proj(torch.zeros_like(apart))).float()  # [B, H, D]
    return logit_lens(model, written), written.norm(dim=-1)


@torch.no_grad()
def nearest_words(embeddings: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The vocabulary entry of greatest cosine to each row (EmbedLens, arXiv 2603.00510): ids and cosines, `[N]`.

    Args:
        embeddings: of the input vocabulary, `[V, D]`.
        rows: projected vision features `[N, D]`.
    """
    unit = nn.functional.normalize(embeddings.float(), dim=-1)
    best = (nn.functional.normalize(rows.float(), dim=-1) @ unit.T).max(-1)
    return best.indices, best.values


def kinds(rows: Tensor, attention: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """Sink (0), dead (1) or alive (2), for each of a sample's vision tokens, int64 `[K]`.

    The three kinds are EmbedLens's (arXiv 2603.00510), the rules are not. Its code calls a token a sink or dead if one
    of three vocabulary entries is among the three nearest to it by cosine, and alive otherwise; its authors chose the
    entries by hand for LLaVA-1.5-7B (two for sinks, one for dead tokens), and nobody knows them for other models. So
    here a *sink* receives over ten times the mean vision token's attention from the last prompt token (mean over
    layers), and the feature of a *dead* token says what the average image says there: its squared distance from the
    mean is below a tenth of the average one. The shares are therefore not the paper's.

    Args:
        rows: projected features `[K, D]`.
        attention: `[K]`.
        mean: the average image's features, `[K, D]` or `[1, D]`.
        spread: mean squared distance of a feature from that mean, `[]`.
    """
    distance = (rows - mean).square().sum(-1)
    kind = torch.where(distance < DEAD * spread, 1, 2)
    return torch.where(attention > SINK * attention.mean(), 0, kind)


def _rounded(values: Tensor, digits: int = 4) -> Any:
    return [
        round(v, digits) if isinstance(v, float) else [round(w, digits) for w in v] for v in values.tolist()
    ]
