"""Schedules and thresholds that other prompts chose, judged untrained on test questions of `smollm_icons`.

    python eval/bench/icons_schedules.py --profile docs/results/profile_icons \\
        --policy outputs/real/calibration/policy.yaml --json outputs/icons_schedules.json
    python eval/bench/icons_schedules.py --json outputs/icons_schedules.json  # the table again

Each question is about a board of its own, and every row answers all of them: the KL of its answer's tokens to the dense
model's, and whether greedy decoding would write the label. Beside the chosen schedule and the recipe's own stand three
forms of the recipe's band: vision tokens that enter as the projector made them (raw), through the calibrated entry, and
the dense model's own vision states, which text does not see outside of the band (the ceiling). Then three pyramids, the
recipe's among them, and frozen tokens, read in the recipe's layers, in all layers of the band but its last, and in
every second of these: as the calibrated entry left them, or moved on to each layer by a whole matrix, and the ceiling.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import PretrainedConfig

from latefusion.data.collate import Collator, build_collator
from latefusion.data.draw import distinct_images, images_key, opened, with_images
from latefusion.data.prompt_batches import Group, batches
from latefusion.data.question_sets import samples
from latefusion.eval.fusion.blind import KnockOut, Runner
from latefusion.eval.fusion.effects import interval, upper_limit
from latefusion.eval.fusion.run import calibrate, outside_share
from latefusion.eval.metrics import accuracy, paired
from latefusion.models.attach import Attachment, attach
from latefusion.models.base_model import compute_dtype, load_base
from latefusion.models.flops import decoder_flops, prefill_share
from latefusion.models.policies import named
from latefusion.models.policies.base import Policy
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.entry import CalibratedEntry
from latefusion.models.student.entry_fit import Calibration, installed
from latefusion.recipes.compose import compose_config
from latefusion.recipes.schema import Source

MODEL = "smollm_icons"
PYRAMIDS = (  # chosen untrained: by all validation questions, and by questions of the two types that lose most
    VisionSchedule(enter=8, exit=24, keep={10: 48, 16: 24, 19: 12}),
    VisionSchedule(enter=8, exit=24, keep={11: 36, 17: 16}),
)
HEAD = ("", "right, %", "against dense, points", "KL, nats", "decoder FLOPs", "whole prefill")


@dataclass(frozen=True)
class Row:
    """One way to run the base; `entry`: vision tokens enter through it."""

    name: str
    policy: Policy
    entry: CalibratedEntry | None = None
    prunes: bool = True  # else its FLOPs are those of the dense model, and say nothing


def rows(
    band: VisionSchedule,
    entry: CalibratedEntry,
    pyramids: Sequence[Row],
    frozen: Sequence[Row],
    layers: int,
    options: Any,
) -> Iterator[Row]:
    """Every row of the table but the dense one.

    Args:
        band: the recipe's schedule.
        entry: fitted at its first layer.
        pyramids: the recipe's, and others.
        frozen: the rows whose vision tokens are only read.
    """
    leave = layers if band.exit is None else band.exit
    alone, ends = VisionSchedule(enter=band.enter, exit=band.exit), f"[{band.enter}, {leave})"
    if options.profile is not None:
        chosen = VisionSchedule.from_dict(yaml.safe_load((options.profile / "schedule.yaml").read_text()))
        if chosen.enter > 0:
            raise ValueError(
                f"the schedule of {options.profile} enters at layer {chosen.enter}; a row of it needs its entry."
            )
        yield Row("schedule=auto", chosen)
    yield Row("by hand, calibrated entry", band, entry)
    yield Row("by hand, raw entry", band)
    yield Row(f"band {ends}, raw entry", alone)
    yield Row(f"band {ends}, calibrated entry", alone, entry)
    outside = [*range(band.enter), *range(leave, layers)]
    yield Row(f"band {ends}, ceiling", KnockOut(outside), prunes=False)
    yield from pyramids
    yield from frozen
    if options.policy is not None:
        yield Row("VisiPruner, calibrated", named(str(options.policy)))
    visipruner = compose_config([f"model={MODEL}"]).model.visipruner
    yield Row("VisiPruner, first guess", named("visipruner", **guess(visipruner)))


def pyramid_row(schedule: VisionSchedule, fit: Callable[..., Calibration]) -> Row:
    """A pyramid, entered through the calibrated entry of its first layer."""
    kept = ", ".join(f"{tokens} from {layer}" for layer, tokens in schedule.keep.items())
    name = f"pyramid [{schedule.enter}, {schedule.exit}), {kept}, calibrated entry"
    return Row(name, schedule, fit(schedule.enter).entry)


def frozen_rows(sets: Sequence[Sequence[int]], layers: int, fit: Callable[..., Calibration]) -> Iterator[Row]:
    """Frozen vision tokens, read in each of these sets of layers.

    Args:
        fit: the first layer that reads, and the later ones, to their maps.
    """
    for some in map(tuple, sets):
        name = f"frozen, read in {len(some)} layers"
        moved = fit(some[0], some[1:]).entry
        schedule = VisionSchedule(cross=some)
        yield Row(f"{name}, calibrated entry", schedule, unmoved(moved))
        yield Row(f"{name}, moved on to each", schedule, moved)
        yield Row(f"{name}, ceiling", KnockOut([i for i in range(layers) if i not in some]), prunes=False)


def unmoved(moved: CalibratedEntry) -> CalibratedEntry:
    """The entry without its maps to later layers."""
    first = CalibratedEntry(hidden_size=len(moved.weight), places=len(moved.bias))
    first.load_state_dict({"weight": moved.weight, "bias": moved.bias})
    return first


def guess(held: Any) -> dict[str, Any]:
    """The arguments of VisiPruner that the model's recipe names."""
    values = {
        name: getattr(held, name, None)
        for name in ("boundary", "layer_threshold", "tokens_threshold", "stages")
    }
    return {name: value for name, value in values.items() if value is not None}


def measure(
    attachment: Attachment, row: Row, runners: list[Runner], dense: list[Any]
) -> dict[str, list[Any]]:
    """`kl`, `right` and `flops` against dense of each question, in the order of the batches."""
    config: PretrainedConfig = attachment.model.config
    out: dict[str, list[Any]] = {"kl": [], "right": [], "flops": []}
    with installed(attachment.model, row.entry) if row.entry is not None else nullcontext():
        for runner, reference in zip(runners, dense, strict=True):
            effect = reference.effect(runner.answers(row.policy))
            out["kl"] += effect.kl
            out["right"] += effect.right
            for record in attachment.trace:
                whole = [record.tokens[0] if record.vision[0] else record.tokens[0] + record.n_vision]
                flops = decoder_flops(config, record.tokens, record.frozen)
                flops += 0 if row.entry is None else 2 * record.n_vision * row.entry.macs()
                out["flops"].append(flops / decoder_flops(config, whole * len(record.tokens)))
    return out


def described(
    row: Row, values: dict[str, list[Any]], dense: list[bool], boards: list[Any], outside: float | None
) -> dict[str, Any]:
    right, kl = accuracy(values["right"], boards), interval(values["kl"], boards)
    gap = paired(values["right"], dense, boards).difference
    flops = sum(values["flops"]) / len(values["flops"]) if row.prunes else None
    return {
        "name": row.name,
        "right": [right.value, right.low, right.high],
        "against_dense": [gap.value, gap.low, gap.high],
        "kl": list(kl),
        "kl_limit": upper_limit(values["kl"], boards),
        "decoder_flops": flops,
        "whole_prefill": None if flops is None or outside is None else prefill_share(flops, outside),
    }


def table(out: dict[str, Any]) -> list[list[str]]:
    """The cells of every row."""

    def points(values: list[float], sign: str = "") -> str:
        value, low, high = (f"{100 * one:{sign}.1f}" for one in values)
        return f"{value} ({low} to {high})"

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.0%}"

    return [
        [
            row["name"],
            points(row["right"]),
            "" if row["name"] == "dense" else points(row["against_dense"], "+"),
            "" if row["name"] == "dense" else "{:.4f} ({:.4f} to {:.4f})".format(*row["kl"]),
            share(row["decoder_flops"]),
            share(row["whole_prefill"]),
        ]
        for row in out["rows"]
    ]


def markdown(out: dict[str, Any]) -> str:
    """The table for docs/evidence.md."""
    head = [f"{out['questions']} test questions about as many boards, no training", *HEAD[1:]]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *table(out)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


@dataclass(frozen=True)
class Asked:
    """The base and the questions that it is asked.

    Attributes:
        groups: of their prompts; `boards` names the board of each, in the order of the groups.
        images: rows of the training set with one image each, that calibrate the entry.
    """

    config: Any
    model: Any
    collator: Collator
    prompts: list[Any]
    groups: list[Group]
    boards: list[Any]
    images: list[Any]

    @classmethod
    def drawn(cls, options: Any) -> Asked:
        """`options.questions` of the test questions, `options.images` of the training images."""
        config = compose_config([f"model={MODEL}"])
        model, processor = load_base(config.model.path, dtype=compute_dtype())
        collator = build_collator(processor, model.config, model.generation_config)
        test, train = (samples(Source.icons, split, seed=config.data.seed) for split in ("test", "train"))
        candidates, _ = with_images(test, needed=options.questions, seed=0)
        prompts = opened(test, candidates[: options.questions])
        groups = batches(model, collator, prompts, options.batch_size)
        boards = [images_key(prompts[number]) for group in groups for number in group.numbers]
        images = distinct_images(train, options.images)
        return cls(config, model, collator, prompts, groups, boards, images)


def run(options: Any) -> dict[str, Any]:
    """Measure every row; what is done is in the file before the next row begins."""
    asked = Asked.drawn(options)
    config, model, collator, prompts = asked.config, asked.model, asked.collator, asked.prompts
    groups, boards = asked.groups, asked.boards
    band, narrow = (
        VisionSchedule(
            enter=held.enter, exit=held.exit, keep=dict(held.keep or {}), ranking=config.schedule.ranking
        )
        for held in (config.model.schedule, config.model.pyramid)
    )
    tokens = {"vision": float(len(groups[0].places))}
    tokens["text"] = sum(sum(group.lengths) for group in groups) / len(prompts) - tokens["vision"]
    outside = outside_share(model, collator, prompts[:6], tokens)
    out: dict[str, Any] = {
        "model": MODEL, "split": "test", "questions": len(prompts), "boards": len(set(boards)),
        "dtype": str(model.dtype).removeprefix("torch."), "calibrating_images": options.images, "rows": [],
    }  # fmt: skip
    with attach(model, VisionSchedule()) as attachment:

        def fit(enter: int, later: Sequence[int] = ()) -> Calibration:
            whole = model.config.get_text_config().hidden_size
            return calibrate(attachment, collator, asked.images, enter, options.batch_size, later, whole)

        layers = len(attachment.layers)
        entry = fit(band.enter)
        pyramids = [pyramid_row(schedule, fit) for schedule in (narrow, *PYRAMIDS)]
        inside = range(band.enter, (layers if band.exit is None else band.exit) - 1)
        frozen = list(frozen_rows((config.model.cross, inside, inside[::2]), layers, fit))
        runners = [Runner(model, attachment, group.make()) for group in track(groups, "Images")]
        dense = [runner.answers(VisionSchedule()) for runner in runners]
        whole = [answers.effect(answers) for answers in dense]
        right = [one for effect in whole for one in effect.right]
        nothing = {"kl": [0.0] * len(right), "right": right, "flops": [1.0] * len(right)}
        out["rows"].append(described(Row("dense", VisionSchedule()), nothing, right, boards, outside))
        for row in track(list(rows(band, entry.entry, pyramids, frozen, layers, options)), "Rows"):
            values = measure(attachment, row, runners, dense)
            out["rows"].append(described(row, values, right, boards, outside))
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(out, indent=1) + "\n")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", type=Path, help="folder whose schedule.yaml is judged")
    parser.add_argument("--policy", type=Path, help="policy.yaml that calibrate.py wrote")
    parser.add_argument("--questions", type=int, default=240)
    parser.add_argument("--images", type=int, default=128, help="that calibrate the entry")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args()
    measured = options.profile is not None or options.policy is not None
    out = run(options) if measured else json.loads(options.json.read_text())
    if options.markdown:
        print(markdown(out))
        return
    printed = Table(
        *HEAD, title=f"{out['questions']} test questions about {out['boards']} boards of {MODEL}, untrained"
    )
    for cells in table(out):
        printed.add_row(*cells)
    Console(width=150).print(printed)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
