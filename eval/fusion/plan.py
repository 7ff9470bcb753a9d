"""What a profile measures at most, and what that costs: counted in prefills over all batches, before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from latefusion.models.flops import layer_flops

KNOCK_OUTS = 8  # prefills a sample that all knock-outs may take beyond two a layer
OPTIONAL = ("frozen", "single")  # knock-outs that nothing is decided by: a batch may leave one of them out

NEAR = 3  # layers that the joint band may be wider than each end alone allows, on either side
BANDS = (NEAR + 1) ** 2 + NEAR * (NEAR + 1) // 2  # joint bands at most: the second part where exit <= enter
TRIES = 5  # bands within the bound that are confirmed alone
KEEP_LAYERS = 6  # layers of the band, evenly spread, where a keep may begin
KEEP_SHARES = (2, 4, 8, 16, 32)  # a keep holds one of these parts of the vision tokens
STEPS = 3  # keeps in a pyramid at most
SPREAD = 4  # pyramids measured along the front of those that promise most
SINGLES = 11.2  # prefills a sample that measuring single keeps may take
ONCE = 7  # dense answers, two bands, raw entry, two schedules beside, tokens the chosen one keeps
SEARCH = SINGLES + SPREAD + ONCE  # prefills a sample for schedules at most
SCHEDULES = KEEP_LAYERS * len(KEEP_SHARES) + SPREAD + ONCE  # schedules at most
APART = 1.05  # of a ladder's rungs each has this many times the FLOPs of the one below it, or more
START = 0.7  # of the bound: the first rung that is confirmed is expected to cost no more
UNSEEN = 0.02  # of the bound, that halving the tokens from the band's first layer on costs at least
PROBES = 7  # pyramids confirmed in a band at most
# prefills a confirming prompt: its dense answers, bands alone, two of them with their pyramids, at most
CONFIRM = 1 + (TRIES + 1) + 2 * PROBES


# bytes of dense answers held on the host, and of batches with encoded images held beside the model; where there are
# more, each schedule computes them again
HELD = 2**30


@dataclass(frozen=True)
class Shape:
    """The prompts of a batch, all padded to `length` tokens.

    Attributes:
        samples: prompts in the batch.
        answers: tokens of their answers together.
        cut: tokens up to and including the last vision token.
        vision: vision tokens.
        tried: whether `CachedRuns` are tried on the batch.
        cached: whether they reproduce the dense answers.
    """

    samples: int
    answers: int
    length: int
    cut: int
    vision: int
    tried: bool
    cached: bool


@dataclass(frozen=True)
class Cost:
    """Prefills a sample, in decoder FLOPs of a dense one, mean over the samples.

    Attributes:
        observing: the dense forward whose attention and states are looked at.
        knock_outs: all knock-outs, and the forwards that find out whether `CachedRuns` work.
        deciding: bands, keeps and pyramids, at most.
        confirming: prefills a confirming prompt, at most.
    """

    observing: float
    knock_outs: float
    deciding: float
    confirming: float = CONFIRM

    @property
    def total(self) -> float:
        """Prefills a sample; confirming prompts come on top."""
        return self.observing + self.knock_outs + self.deciding


@dataclass(frozen=True)
class Plan:
    """The measurements that a profile will run, batch by batch, and their cost.

    Attributes:
        left_out: kinds of knock-out that each batch leaves out.
        knock_outs, bands: prefills a sample that these take in each batch.
        hold: whether all dense answers are held on the host.
    """

    cost: Cost
    left_out: list[tuple[str, ...]]
    knock_outs: list[float]
    bands: list[float]
    hold: bool


def reading_prefills(sets: int) -> float:
    """Prefills a sample at most that `knockouts.reading_effects` takes: two find the way, one for each set."""
    return 2.0 + sets


def make_plan(
    config: PretrainedConfig, shapes: Sequence[Shape], reading: float = 0.0, confirming: float = CONFIRM
) -> Plan:
    """Plan at most `2 L + KNOCK_OUTS` prefills a sample for the knock-outs of L layers, whatever the prompts.

    `prefix a`, `single a`, `frozen a` and `late a` run on from layer a with vision tokens, L (L - 1) / 2 layers each:
    2 L prefills. `suffix a` runs on with text alone, so it adds more the more text there is, up to L / 2 where a prompt
    is nothing but text. No two of these runs have a state in common behind layer a, so none can be saved. Where they
    would exceed the bound, a batch leaves out `frozen` or `single`, whichever more samples have so far; with two
    batches or more, both are measured on some samples. A single batch leaves nothing out.

    Args:
        reading: prefills a sample for the layers that text reads frozen tokens in.
        confirming: prefills a confirming prompt, at most.
    """
    left_out: list[tuple[str, ...]] = []
    costs: list[float] = []
    layers = config.get_text_config().num_hidden_layers
    spent, samples, missed = 0.0, 0, dict.fromkeys(OPTIONAL, 0)
    for shape in shapes:
        samples += shape.samples
        left: tuple[str, ...] = ()
        cost = knock_out_cost(config, shape)
        if len(shapes) > 1 and spent + cost * shape.samples > (2 * layers + KNOCK_OUTS) * samples:
            left = (min(OPTIONAL, key=lambda kind: missed[kind]),)
            missed[left[0]] += shape.samples
            cost = knock_out_cost(config, shape, left)
        spent += cost * shape.samples
        left_out.append(left)
        costs.append(cost)
    joint = [band_cost(config, shape) for shape in shapes]
    bands = sum(cost * shape.samples for cost, shape in zip(joint, shapes, strict=True)) / samples
    hold = fits_on_host(config, sum(shape.answers for shape in shapes))
    deciding = bands + SEARCH + (0 if hold else SCHEDULES) + reading
    return Plan(Cost(1.0, spent / samples, deciding, confirming), left_out, costs, joint, hold)


def fits_on_host(config: PretrainedConfig, answers: int) -> bool:
    """Whether the dense model's log-probabilities at that many answer tokens are held on the host."""
    return answers * config.get_text_config().vocab_size * 4 <= HELD


def knock_out_cost(config: PretrainedConfig, shape: Shape, left_out: Sequence[str] = ()) -> float:
    """Prefills a sample that `knockouts.effects` computes, chain by chain."""
    layers = config.get_text_config().num_hidden_layers
    half = (layers - 1) / 2  # a run from every layer on
    chain = (layers - 1) / layers  # all layers but the last
    single = 0.0 if "single" in left_out else half - 1 / layers
    frozen = 0.0 if "frozen" in left_out else half + chain
    head, rest, text, blind = _parts(config, shape)
    start = 1 + (head + rest if shape.tried else 0.0)
    if shape.cached:
        # the dense chain, prefix, late; the blind chains and suffix; heads that late and frozen share
        seeing = rest * (chain + 2 * half + single + frozen)
        return start + seeing + blind * (1 + chain + half) + head * (half + chain)
    return start + 1 + chain + 2 * half + single + frozen + text * (chain + half)


def band_cost(config: PretrainedConfig, shape: Shape) -> float:
    """Prefills a sample that `knockouts.band_effects` computes at most."""
    head, rest, text, blind = _parts(config, shape)
    start = 1 + (head + rest if shape.tried else 0.0)
    if shape.cached:
        return start + rest * (1 + NEAR) + blind * BANDS
    return start + 1 + NEAR + text * BANDS


def _parts(config: PretrainedConfig, shape: Shape) -> tuple[float, float, float, float]:
    """In prefills: the head, what follows on its cache, text without vision, what follows and sees no vision."""

    def flops(tokens: int, past: int = 0) -> int:
        layers = range(config.get_text_config().num_hidden_layers)
        return sum(layer_flops(config, tokens, past=past, layer=i) for i in layers)

    dense, behind = flops(shape.length), shape.length - shape.cut
    return (
        flops(shape.cut) / dense,
        flops(behind, past=shape.cut) / dense,
        flops(shape.length - shape.vision) / dense,
        flops(behind, past=shape.cut - shape.vision) / dense,
    )
