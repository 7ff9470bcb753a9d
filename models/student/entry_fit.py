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
LEAST_RANK = 16  # of the maps to later layers, where the fit chooses it
MAY_LOSE = 5e-4  # share of the variance at any layer that the chosen rank explains less than the full one


MORE = "use more images (entry.images of a run, images of a profile, rows that can be read)"


class TooFew(ValueError):
    """There are too few images to fit the map's weights, or to fit them well."""


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

    def check(self, images: int, enter: int) -> None:
        """Raise TooFew unless the map explains more of images that it was not fitted to than no map does.

        Args:
            images: number of those that it was fitted on.
            enter: the layer.
        """
        if self.unseen is not None and self.raw is not None and self.unseen > self.raw:
            return
        why = "on images it was not fitted to, the map is no better than none"
        if self.unseen is None:
            why = "a part of them, to test the map on the others, cannot be fitted"
        raise TooFew(
            f"{images} images are too few to calibrate the entry at layer {enter}: {why}; {MORE} or "
            "entry.init=identity."
        )


@torch.no_grad()
def fit_entry(
    attachment: Attachment,
    batches: Iterable[tuple[dict[str, Any], Tensor]],
    enter: int,
    *,
    later: Sequence[int] = (),
    later_rank: int | None = None,
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
        later_rank: of these maps, see `Moments.fit`.
        advance: called after each batch.

    Raises:
        TooFew: there are too few vision tokens.
        ValueError: the vision tokens are all alike, or there are none.
    """
    return Moments.of(attachment, batches, enter, later, advance).fit(later_rank)


@dataclass(frozen=True)
class Moments:
    """What a fit takes from its images: sums over their vision tokens, one for each layer.

    Attributes:
        later: the layers after the first.
        sums: of all batches.
        before: of all but the last batch; None: there was one.
        last: of the last batch.
    """

    later: tuple[int, ...]
    sums: list[_Sums]
    before: list[_Sums] | None
    last: list[_Sums]

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        attachment: Attachment,
        batches: Iterable[tuple[dict[str, Any], Tensor]],
        enter: int,
        later: Sequence[int] = (),
        advance: Callable[[], None] = lambda: None,
    ) -> Moments:
        """Run the model over the batches; arguments and errors as of `fit_entry`."""
        if entry_of(attachment.model) is not None:
            raise ValueError("the model already has an entry adapter; calibrate a fresh base model.")
        sums: list[_Sums] | None = None
        before: list[_Sums] | None = None
        last: list[_Sums] | None = None
        for inputs, vision in batches:
            rows, order = _entering(attachment, inputs, vision, enter)  # [N, D], [N]
            states = _dense_states(attachment, inputs, vision, [enter, *later])  # [N, D] each
            sizes = set(vision.sum(1).tolist())
            before, last = sums, _Sums.of(rows, states, order, sizes)
            sums = last if before is None else _added(before, last)
            advance()
        if sums is None or last is None:
            raise ValueError("calibration needs at least one image; give it some.")
        if len(sums[0].sizes) > 1:  # a place means nothing where images differ in size
            sums, last = [one.pooled() for one in sums], [one.pooled() for one in last]
            before = None if before is None else [one.pooled() for one in before]
        return cls(tuple(later), sums, before, last)

    @torch.no_grad()
    def fit(self, later_rank: int | None = None) -> Calibration:
        """The entry that these moments determine.

        Args:
            later_rank: of the maps to later layers. From half the hidden size on they are whole matrices, which are as
                small then. None: the smallest power of two that explains as much of the last batch, fitted to the
                batches before it; whole matrices if none does, or if those batches are too few to tell.

        Raises:
            TooFew, ValueError: as `fit_entry`.
        """
        first, width = self.sums[0], self.sums[0].x.shape[1]
        if not first.enough():
            raise TooFew(
                f"{first.tokens} vision tokens, which is all that the usable images have, are too few to fit the "
                f"calibrated entry's map of {width} inputs and {len(first.n)} biases; {MORE} or entry.init=identity."
            )
        before = self.before if self.before is not None and self.before[0].enough() else None
        if self.later and later_rank is None and before is not None:
            later_rank = _smallest_rank(before, self.last)
        if later_rank is not None and 2 * later_rank >= width:
            later_rank = None
        maps, explained = _solved(self.sums, self.sums, later_rank)
        weight, bias = maps[0].weight, maps[0].bias  # [D, D], [places, D]
        with weight.device:
            entry = CalibratedEntry(
                hidden_size=width, places=len(bias), later=self.later, later_rank=later_rank
            )
        for module, fitted in zip([entry, *entry.later.values()], maps, strict=True):
            for name, value in fitted.tensors().items():
                module.get_buffer(name).copy_(value)
        if before is None:
            return Calibration(entry, explained[0], first.tokens, None, None)
        _, unseen = _solved(before, self.last, later_rank)
        identity = _Map(torch.eye(width).to(weight), torch.zeros_like(bias))
        raw = before[0].explained(identity, self.last[0])
        return Calibration(entry, explained[0], first.tokens, unseen[0], raw, tuple(unseen[1:]))


@dataclass(frozen=True)
class _Map:
    """`x @ weight + bias`, or of a low rank: the weight is then `1 + down @ up`."""

    weight: Tensor  # [D, D]
    bias: Tensor  # [places, D]
    factors: tuple[Tensor, Tensor] | None = None  # [D, rank], [rank, D]

    def then(self, other: _Map) -> _Map:
        """Both as one."""
        return _Map(self.weight @ other.weight, self.bias @ other.weight + other.bias)

    def tensors(self) -> dict[str, Tensor]:
        """By their names in `CalibratedEntry` or `LowRankMap`."""
        if self.factors is None:
            return {"weight": self.weight, "bias": self.bias}
        down, up = self.factors
        return {"down": down, "up": up, "bias": self.bias}


def _added(sums: Sequence[_Sums], others: Sequence[_Sums]) -> list[_Sums]:
    """Both, layer by layer; all layers share the sums of their one input."""
    first = sums[0].plus(others[0])
    rest = (one.plus(other) for one, other in zip(sums[1:], others[1:], strict=True))
    return [first, *(replace(one, xx=first.xx) for one in rest)]


def _solved(
    sums: Sequence[_Sums], tested: Sequence[_Sums], rank: int | None
) -> tuple[list[_Map], list[float]]:
    """The maps of `sums`, each from what those before it have made, and what each explains in `tested`.

    Args:
        rank: of the maps after the first; None: they are whole matrices.
    """
    maps: list[_Map] = []
    explained = []
    so_far: _Map | None = None  # the maps up to here as one
    for one, test in zip(sums, tested, strict=True):
        if so_far is not None:
            one, test = one.moved(so_far), test.moved(so_far)
        fitted = one.solve() if so_far is None or rank is None else one.low_rank([rank])[0]
        maps.append(fitted)
        explained.append(one.explained(fitted, test))
        so_far = fitted if so_far is None else so_far.then(fitted)
    return maps, explained


def _smallest_rank(sums: Sequence[_Sums], tested: Sequence[_Sums]) -> int | None:
    """The smallest rank whose maps of `sums` explain as much in `tested` as those of full rank; None: none below half.

    At each layer the maps before it are of full rank.
    """
    width = sums[0].x.shape[1]
    ranks = []
    rank = LEAST_RANK
    while 2 * rank < width:
        ranks.append(rank)
        rank *= 2
    lost = dict.fromkeys(ranks, 0.0)
    so_far = sums[0].solve()
    for one, test in zip(sums[1:], tested[1:], strict=True):
        one, test = one.moved(so_far), test.moved(so_far)
        *maps, full = one.low_rank([*ranks, width])
        whole = one.explained(full, test)
        for rank, fitted in zip(ranks, maps, strict=True):
            lost[rank] = max(lost[rank], whole - one.explained(fitted, test))
        so_far = so_far.then(full)
    return min((rank for rank, loss in lost.items() if loss <= MAY_LOSE), default=None)


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

    def moved(self, before: _Map) -> _Sums:
        """The sums of `before`'s outputs in the place of its inputs x."""
        weight, bias = before.weight, before.bias
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

    def solve(self) -> _Map:
        """The map by ridge regression."""
        xx, xy, ridge = self._covariances()
        weight = torch.linalg.solve(xx + ridge, xy)
        return _Map(weight, self._bias(weight))

    def low_rank(self, ranks: Sequence[int]) -> list[_Map]:
        """The maps whose change `down @ up` of x has these ranks, by reduced-rank regression, one for each.

        The whole change, by ridge regression, is projected on the directions in which most of its outputs lie; no
        change of that rank comes closer to the states.
        """
        xx, xy, ridge = self._covariances()
        one = torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
        difference = xy - xx  # of y - x with x
        change = torch.linalg.solve(xx + ridge, difference)
        directions = torch.linalg.eigh(difference.T @ change).eigenvectors.flip(
            1
        )  # [D, D], the largest first
        maps = []
        for rank in ranks:
            up = directions[:, :rank].T
            down = change @ up.T
            weight = one + down @ up
            maps.append(_Map(weight, self._bias(weight), (down, up)))
        return maps

    def _covariances(self) -> tuple[Tensor, Tensor, Tensor]:
        """Times the number of tokens, around the means of each place: of x, of x with y, and the ridge `[D, D]`."""
        mean_x, mean_y = self.x / self.n[:, None], self.y / self.n[:, None]
        xx, xy = self.xx - self.x.T @ mean_x, self.xy - self.x.T @ mean_y
        ridge = RIDGE * xx.diagonal().mean()
        if not ridge > 0:
            raise ValueError(
                "the projector gives all images the same vision tokens, so no map can be fitted to them; check that "
                "the model's weights are loaded."
            )
        return xx, xy, ridge * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)

    def _bias(self, weight: Tensor) -> Tensor:
        """`[places, D]`, with which `x @ weight` has the mean of y at each place."""
        return (self.y - self.x @ weight) / self.n[:, None]

    def explained(self, fitted: _Map, sums: _Sums) -> float:
        """Share of the variance in `sums`, around these sums' means, that a map explains."""
        nothing = _Map(torch.zeros_like(fitted.weight), self.y / self.n[:, None])
        return float(1 - sums.error(fitted) / sums.error(nothing))

    def error(self, fitted: _Map) -> Tensor:
        """Squared error of the map's outputs, summed over the tokens."""
        weight, bias = fitted.weight, fitted.bias
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
