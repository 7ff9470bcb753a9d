"""How low the rank of the maps between reading layers may be: frozen tokens of `smollm_icons`, untrained.

    python eval/bench/icons_maps.py --json outputs/icons_maps.json
    python eval/bench/icons_maps.py --json outputs/icons_maps.json --markdown  # the table again

The base answers test questions with vision tokens that text reads in all layers of the recipe's band but the last. What
moves them on from one of these layers to the next is a whole matrix, a map of a lower rank, or nothing. All are fitted
to the same images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from latefusion.data.prompt_batches import batches
from latefusion.eval.bench.icons_schedules import MODEL, Asked, Row, described, measure, unmoved
from latefusion.eval.fusion.blind import Runner
from latefusion.eval.fusion.effects import interval
from latefusion.eval.metrics import paired
from latefusion.models.attach import attach
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.entry_fit import Moments

HEAD = (
    "right, %",
    "against whole matrices, points",
    "KL, nats",
    "least explained",
    "numbers in maps",
    "decoder FLOPs",
)


def run(options: Any) -> dict[str, Any]:
    """Measure every rank; what is done is in the file before the next one begins."""
    asked = Asked.drawn(options)
    model, boards, band = asked.model, asked.boards, asked.config.model.schedule
    cross = tuple(range(band.enter, band.exit - 1))
    whole = model.config.get_text_config().hidden_size
    out: dict[str, Any] = {
        "model": MODEL, "split": "test", "questions": len(asked.prompts), "boards": len(set(boards)),
        "dtype": str(model.dtype).removeprefix("torch."), "calibrating_images": options.images, "cross": list(cross),
    }  # fmt: skip
    with attach(model, VisionSchedule()) as attachment:
        made = (group.make() for group in batches(model, asked.collator, asked.images, options.batch_size))
        moments = Moments.of(
            attachment, ((batch.inputs, batch.vision) for batch in made), cross[0], cross[1:]
        )
        out |= {"chosen": moments.fit().entry.later_rank, "rows": []}
        runners = [Runner(model, attachment, group.make()) for group in track(asked.groups, "Images")]
        dense = [runner.answers(VisionSchedule()) for runner in runners]
        right = [one for answers in dense for one in answers.effect(answers).right]
        reference: dict[str, list[Any]] | None = None
        for rank in track([whole, *options.ranks, None], "Ranks"):
            fitted = moments.fit(rank or whole)
            name = "not moved on" if rank is None else "whole matrices" if rank == whole else f"rank {rank}"
            entry = unmoved(fitted.entry) if rank is None else fitted.entry
            row = Row(name, VisionSchedule(cross=cross), entry)
            values = measure(attachment, row, runners, dense)
            reference = reference or values
            gap = paired(values["right"], reference["right"], boards).difference
            farther = [kl - other for kl, other in zip(values["kl"], reference["kl"], strict=True)]
            out["rows"].append(
                described(row, values, right, boards, None)
                | {
                    "against_whole": [gap.value, gap.low, gap.high],
                    "kl_against_whole": list(interval(farther, boards)),
                    "explained": None if rank is None else list(fitted.later),
                    "numbers": entry.numbers(),
                }
            )
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(out, indent=1) + "\n")
    return out


def markdown(out: dict[str, Any]) -> str:
    """The table for docs/evidence.md."""
    head = [f"{out['questions']} test questions, text reads in {len(out['cross'])} layers", *HEAD]
    lines = [head, ["---", *["---:"] * len(HEAD)]]
    for row in out["rows"]:
        right, gap = (
            [f"{100 * value:{sign}.1f}" for value in row[key]]
            for key, sign in (("right", ""), ("against_whole", "+"))
        )
        whole = row["name"] == "whole matrices"
        lines.append([
            row["name"] + (", chosen by the fit" if row["name"] == f"rank {out['chosen']}" else ""),
            "{} ({} to {})".format(*right),
            "" if whole else "{} ({} to {})".format(*gap),
            "{:.3f} ({:.3f} to {:.3f})".format(*row["kl"]),
            "" if row["explained"] is None else f"{min(row['explained']):.1%}",
            f"{row['numbers'] / 1e6:.2f} M",
            f"{row['decoder_flops']:.1%}",
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[128, 64, 32, 16])
    parser.add_argument("--questions", type=int, default=240)
    parser.add_argument("--images", type=int, default=128, help="that calibrate the entry")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--markdown", action="store_true", help="print the table of the file as it is")
    options = parser.parse_args()
    print(markdown(json.loads(options.json.read_text()) if options.markdown else run(options)))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
