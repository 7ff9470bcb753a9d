"""Fit the calibrated entry: an affine map from the projector's output to the dense model's states at layer `enter`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from latefusion.models.attach import Attachment
from latefusion.models.executor.partial import inputs_of_layers
from latefusion.models.inputs import fresh_inputs
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.entry import ENTRY, CalibratedEntry, entry_of

RIDGE = 1e-4  # of the mean eigenvalue of the inputs' covariance


class TooFew(ValueError):
    """There are too few vision tokens to fit the map's weights."""


@dataclass(frozen=True)
class Calibration:
    """A fitted entry.

    Attributes:
        entry: the fitted map.
        explained: share of the variance of the dense states (around their mean at each place) that the map explains in
            the images it was fitted on.
        tokens: number of vision tokens it was fitted on.
        unseen: the same share in the last batch, by a map fitted on the batches before it; None: those are too few.
        raw: the same share in the last batch without a map.
        later: `unseen` at each of the later layers, by the maps up to it.
    """

    entry: CalibratedEntry
    explained: float
    tokens: int
    unseen: float | None
    raw: float | None
    later: tuple[float, ...] = ()


@torch.no_grad()
def fit_entry(
    attachment: Attachment,
    batches: Iterable[tuple[dict[str, Any], Tensor]],
    enter: int,
    *,
    later: Sequence[int] = (),
    advance: Callable[[], None] = lambda: None,
) -> Calibration:
    """Fit the map by ridge regression, in closed form: from the rows that enter at layer `enter` to the dense states.

    Only the layers before `enter`, or before the last of `later`, run. Each place in the image has its own bias if all
    images have the same number of tokens; else there is one bias for all.

    Args:
        attachment: of a model without an entry adapter.
        batches: inputs of the model and their vision tokens, bool `[B, T]`.
        enter: at least 1.
        later: the layers that read frozen tokens after `enter`, in ascending order. Each gets a map to the dense
            states there, from what the maps before it have made of the rows.
        advance: called after each batch.

    Raises:
        TooFew: there are too few vision tokens.
        ValueError: the vision tokens are all alike, or there are none.
    """
    model = attachment.model
    if entry_of(model) is not None:
        raise ValueError("the model already has an entry adapter; calibrate a fresh base model.")
    sums: list[_Sums] | None = None  # of all batches, a layer each
    before: list[_Sums] | None = None  # of all but the last batch
    last: list[_Sums] | None = None  # of the last
    for inputs, vision in batches:
        rows, order = _entering(attachment, inputs, vision, enter)  # [N, D], [N]
        states = _dense_states(attachment, inputs, vision, [enter, *later])  # [N, D] each
        sizes = set(vision.sum(1).tolist())
        before, last = sums, _Sums.of(rows, states, order, sizes)
        sums = last if before is None else [one.plus(other) for one, other in zip(before, last, strict=True)]
        advance()
    if sums is None or last is None:
        raise ValueError("calibration needs at least one image; give it some.")
    if len(sums[0].sizes) > 1:  # a place means nothing where images differ in size
        sums, last = [one.pooled() for one in sums], [one.pooled() for one in last]
        before = None if before is None else [one.pooled() for one in before]
    first = sums[0]
    if not first.enough():
        raise TooFew(
            f"{first.tokens} vision tokens, which is all that the usable images have, are too few to fit the "
            f"calibrated entry's map of {first.x.shape[1]} inputs and {len(first.n)} biases: use more images "
            "(entry.images, rows that can be read) or entry.init=identity."
        )
    maps, explained = _solved(sums, sums)
    weight, bias = maps[0]  # [D, D], [places, D]
    with weight.device:
        entry = CalibratedEntry(hidden_size=len(weight), places=len(bias), later=later)
    for fitted, (w, b) in zip([entry, *entry.later.values()], maps, strict=True):
        fitted.weight.copy_(w)  # type: ignore[operator]
        fitted.bias.copy_(b)  # type: ignore[operator]
    unseen, raw = [None], None
    if before is not None and before[0].enough():
        _, unseen = _solved(before, last)  # type: ignore[assignment]
        raw = before[0].explained(torch.eye(len(weight)).to(weight), torch.zeros_like(bias), last[0])
    return Calibration(entry, explained[0], first.tokens, unseen[0], raw, tuple(unseen[1:]))  # type: ignore[arg-type]


def _solved(
    sums: Sequence[_Sums], tested: Sequence[_Sums]
) -> tuple[list[tuple[Tensor, Tensor]], list[float]]:
    """The maps of `sums`, each from what those before it have made, and what each explains in `tested`."""
    maps: list[tuple[Tensor, Tensor]] = []
    explained = []
    so_far: tuple[Tensor, Tensor] | None = None  # the maps up to here as one
    for one, test in zip(sums, tested, strict=True):
        if so_far is not None:
            one, test = one.moved(*so_far), test.moved(*so_far)
        weight, bias = one.solve()
        maps.append((weight, bias))
        explained.append(one.explained(weight, bias, test))
        so_far = (weight, bias) if so_far is None else (so_far[0] @ weight, so_far[1] @ weight + bias)
    return maps, explained


@dataclass(frozen=True)
class _Sums:
    """Sums over tokens in float64: the regression needs no more, however many images there are."""

    sizes: frozenset[int]  # numbers of vision tokens that samples have
    xx: Tensor  # [D, D]
    xy: Tensor  # [D, D]
    yy: Tensor  # []
    x: Tensor  # [places, D]
    y: Tensor  # [places, D]
    n: Tensor  # [places]

    @classmethod
    def of(cls, x: Tensor, states: Iterable[Tensor], order: Tensor, sizes: Iterable[int]) -> list[_Sums]:
        """Those of each layer: from `x` to its `states`, `[N, D]` each."""
        x = x.double()
        places = int(order.max()) + 1
        zero = x.new_zeros(places, x.shape[1])
        xx, sum_x, n = x.T @ x, zero.index_add(0, order, x), order.bincount(minlength=places).double()
        out = []
        for state in states:
            y = state.double()
            sum_y = zero.index_add(0, order, y)
            out.append(cls(frozenset(sizes), xx, x.T @ y, y.square().sum(), sum_x, sum_y, n))
        return out

    def plus(self, other: _Sums) -> _Sums:
        places = max(len(self.n), len(other.n))

        def add(a: Tensor, b: Tensor) -> Tensor:
            wide = a.new_zeros(places, *a.shape[1:])
            wide[: len(a)] += a
            wide[: len(b)] += b
            return wide

        return _Sums(
            self.sizes | other.sizes,
            self.xx + other.xx,
            self.xy + other.xy,
            self.yy + other.yy,
            add(self.x, other.x),
            add(self.y, other.y),
            add(self.n, other.n),
        )

    @property
    def tokens(self) -> int:
        return int(self.n.sum())

    def pooled(self) -> _Sums:
        """These sums added up over places, as if all tokens stood at one."""
        x, y, n = (part.sum(0, keepdim=True) for part in (self.x, self.y, self.n))
        return replace(self, x=x, y=y, n=n)

    def moved(self, weight: Tensor, bias: Tensor) -> _Sums:
        """The sums of `x @ weight + bias` in the place of x."""
        mixed = weight.T @ self.x.T @ bias  # [D, D]
        return replace(
            self,
            xx=weight.T @ self.xx @ weight + mixed + mixed.T + bias.T @ (self.n[:, None] * bias),
            xy=weight.T @ self.xy + bias.T @ self.y,
            x=self.x @ weight + self.n[:, None] * bias,
        )

    def enough(self) -> bool:
        """Whether there are more tokens than the map has inputs and biases."""
        return self.tokens > self.x.shape[1] + len(self.n)

    def solve(self) -> tuple[Tensor, Tensor]:
        """The map's weight `[D, D]` and bias `[places, D]`."""
        mean_x, mean_y = self.x / self.n[:, None], self.y / self.n[:, None]
        xx = self.xx - self.x.T @ mean_x
        xy = self.xy - self.x.T @ mean_y
        ridge = RIDGE * xx.diagonal().mean()
        if not ridge > 0:
            raise ValueError(
                "the projector gives all images the same vision tokens, so no map can be fitted to them; check that "
                "the model's weights are loaded."
            )
        weight = torch.linalg.solve(xx + ridge * torch.eye(len(xx), dtype=xx.dtype, device=xx.device), xy)
        return weight, mean_y - mean_x @ weight

    def explained(self, weight: Tensor, bias: Tensor, sums: _Sums) -> float:
        """Share of the variance in `sums`, around these sums' means, that a map explains."""
        means = self.y / self.n[:, None]
        return float(1 - sums.error(weight, bias) / sums.error(torch.zeros_like(weight), means))

    def error(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Squared error of `x @ weight + bias`, summed over the tokens."""
        return (
            self.yy
            - 2 * (weight * self.xy).sum()
            + (weight * (self.xx @ weight)).sum()
            + 2 * (bias * (self.x @ weight - self.y)).sum()
            + (self.n[:, None] * bias.square()).sum()
        )


class _Recorded(Exception):
    """Ends a forward once the rows that enter are recorded."""


class _Recorder(nn.Module):
    """Stands in for an entry adapter and records its inputs."""

    rows: Tensor
    order: Tensor

    def forward(self, hidden_states: Tensor, order: Tensor) -> Tensor:
        self.rows, self.order = hidden_states, order
        raise _Recorded


def _entering(
    attachment: Attachment, inputs: dict[str, Any], vision: Tensor, enter: int
) -> tuple[Tensor, Tensor]:
    """The rows `[N, D]` that an entry adapter would get, and the number of each among its sample's vision tokens."""
    recorder = _Recorder()
    try:
        with installed(attachment.model, recorder):
            _forward(attachment, inputs, VisionSchedule(enter=enter))
        raise ValueError(f"no vision token reached layer {enter}; calibrate on samples with images.")
    except _Recorded:
        rows, order = recorder.rows, recorder.order  # [B, n, D], [B, n], padded on the left
    n = rows.shape[1]
    valid = torch.arange(n, device=rows.device) >= n - vision.sum(1, keepdim=True)  # [B, n]
    return rows[valid], order[valid]


def _dense_states(
    attachment: Attachment, inputs: dict[str, Any], vision: Tensor, layers: Sequence[int]
) -> list[Tensor]:
    """The dense model's inputs of some layers at its vision tokens, `[N, D]` each."""
    forward = partial(_forward, attachment, inputs, VisionSchedule())
    return [state[vision] for state in inputs_of_layers(attachment.layers, layers, forward)]


def _forward(attachment: Attachment, inputs: dict[str, Any], schedule: VisionSchedule) -> None:
    with attachment.using(schedule):
        attachment.model(**fresh_inputs(inputs), use_cache=False, logits_to_keep=1)


@contextmanager
def installed(model: PreTrainedModel, entry: nn.Module) -> Iterator[None]:
    """Give the model `entry` as its entry adapter inside the scope."""
    model.add_module(ENTRY, entry)
    try:
        yield
    finally:
        del model._modules[ENTRY]
