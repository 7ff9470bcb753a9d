"""What a profile will cost, before it starts: in prefills, counted over all batches that it will run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from latefusion.eval.fusion import decide
from latefusion.models.flops import layer_flops

KNOCK_OUTS = 8  # prefills a sample that all knock-outs may take beyond two a layer
SINGLES = 11.2  # prefills a sample that measuring single keeps may take at most
ONCE = 5  # the dense answers, the band's raw entry, two schedules beside, which tokens the chosen one keeps
SEARCH = (
    SINGLES + decide.TRIES + decide.SPREAD + decide.PROBES + ONCE
)  # prefills a sample for schedules at most
SCHEDULES = decide.KEEP_LAYERS * len(decide.KEEP_SHARES) + decide.TRIES + decide.SPREAD + decide.PROBES + ONCE
HELD = (
    2**30
)  # bytes of the dense model's answers that are held on the host; more are computed anew for each schedule
OPTIONAL = (
    "frozen",
    "single",
)  # the knock-outs that nothing is decided by, one of which a batch may leave out


@dataclass(frozen=True)
class Shape:
    """Of a batch's prompts, all padded to `length` tokens.

    Attributes:
        samples: of the batch; answers: tokens of their answers together.
        cut: tokens up to the last vision token, it included; vision: such tokens.
        tried: whether it is tried to continue what follows the images on their cache; continued: whether that holds.
    """

    samples: int
    answers: int
    length: int
    cut: int
    vision: int
    tried: bool
    continued: bool


@dataclass(frozen=True)
class Cost:
    """Prefills a sample, in decoder FLOPs of a dense one, mean over the samples.

    Attributes:
        observing: the dense forward whose attention and states are looked at.
        knock_outs: all of them, and the forwards that find out whether prompts can be continued.
        deciding: bands, keeps, front, at most.
    """

    observing: float
    knock_outs: float
    deciding: float

    @property
    def total(self) -> float:
        return self.observing + self.knock_outs + self.deciding


@dataclass(frozen=True)
class Plan:
    """What will be run.

    Attributes:
        left_out: kinds of knock-out that each batch leaves out; knock_outs, bands: prefills a sample of each batch.
        hold: whether all dense answers are held on the host.
    """

    cost: Cost
    left_out: list[tuple[str, ...]]
    knock_outs: list[float]
    bands: list[float]
    hold: bool


def planned(config: PretrainedConfig, shapes: Sequence[Shape]) -> Plan:
    """At most `2 L + KNOCK_OUTS` prefills a sample for the knock-outs of L layers, whatever the prompts.

    `prefix a`, `single a`, `frozen a` and `late a` run on from layer a with vision tokens, L (L - 1) / 2 layers each:
    2 L prefills. `suffix a` runs on with text alone, so that the more text there is the more it adds, up to L / 2
    where a prompt is nothing else. No two of these runs have a state in common behind layer a, so none can be saved:
    where they would go beyond the bound, a batch leaves out `frozen` or `single`, whichever more samples have. Of
    two batches or more each of the two has some. One batch alone leaves nothing out.
    """
    left_out: list[tuple[str, ...]] = []
    costs: list[float] = []
    layers = config.get_text_config().num_hidden_layers
    spent, samples, missed = 0.0, 0, dict.fromkeys(OPTIONAL, 0)
    for shape in shapes:
        samples += shape.samples
        left: tuple[str, ...] = ()
        cost = knock_outs(config, shape)
        if len(shapes) > 1 and spent + cost * shape.samples > (2 * layers + KNOCK_OUTS) * samples:
            left = (min(OPTIONAL, key=lambda kind: missed[kind]),)
            missed[left[0]] += shape.samples
            cost = knock_outs(config, shape, left)
        spent += cost * shape.samples
        left_out.append(left)
        costs.append(cost)
    joint = [bands(config, shape) for shape in shapes]
    total = sum(cost * shape.samples for cost, shape in zip(joint, shapes, strict=True))
    answers = sum(shape.answers for shape in shapes)
    hold = answers * config.get_text_config().vocab_size * 4 <= HELD
    deciding = total / samples + SEARCH + (0 if hold else SCHEDULES)
    expense = Cost(observing=1.0, knock_outs=spent / samples, deciding=deciding)
    return Plan(expense, left_out, costs, joint, hold)


def knock_outs(config: PretrainedConfig, shape: Shape, left_out: Sequence[str] = ()) -> float:
    """Prefills a sample: what `Runner.effects` computes, way by way (`paths.blinded`, `entering`)."""
    layers = config.get_text_config().num_hidden_layers
    half, chain = (
        (layers - 1) / 2,
        (layers - 1) / layers,
    )  # a run from every layer on; all layers but the last
    single = 0.0 if "single" in left_out else half - 1 / layers
    frozen = 0.0 if "frozen" in left_out else half + chain
    head, rest, alone, blind = _parts(config, shape)
    found = 1 + (head + rest if shape.tried else 0.0)
    if shape.continued:
        # the dense chain, prefix, late; the blind chains and suffix; heads that late and frozen share
        seeing = rest * (chain + 2 * half + single + frozen)
        return found + seeing + blind * (1 + chain + half) + head * (half + chain)
    return found + 1 + chain + 2 * half + single + frozen + alone * (chain + half)


def bands(config: PretrainedConfig, shape: Shape) -> float:
    """Prefills a sample that `Runner.bands` computes at most."""
    head, rest, alone, blind = _parts(config, shape)
    found = 1 + (head + rest if shape.tried else 0.0)
    if shape.continued:
        return found + rest * (1 + decide.NEAR) + blind * decide.BANDS
    return found + 1 + decide.NEAR + alone * decide.BANDS


def _parts(config: PretrainedConfig, shape: Shape) -> tuple[float, float, float, float]:
    """In prefills of the whole: the head, what follows on its cache, text alone, what follows and sees no vision."""
    dense = layer_flops(config, shape.length)
    behind = shape.length - shape.cut
    return (
        layer_flops(config, shape.cut) / dense,
        layer_flops(config, behind, past=shape.cut) / dense,
        layer_flops(config, shape.length - shape.vision) / dense,
        layer_flops(config, behind, past=shape.cut - shape.vision) / dense,
    )
