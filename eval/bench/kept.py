"""How good the vision tokens are that `keep` leaves, by the rule that ranks them; untrained, equal numbers of tokens.

    python eval/bench/kept.py --json outputs/kept.json
    python eval/bench/kept.py --model smollm_icons --data icons --turns 0,8 --json outputs/kept_icons.json

A base answers validation questions with all vision tokens, and with the best `keep` under each rule; what a rule loses
is the KL from the whole model's first answer token, and how often the likeliest token is another one. No token leaves
for any other reason (no late entry, no exit), so nothing but the choice is measured. `--turns` puts that many turns
about the same image (question and right answer) before the question, for rules that look at few rows of a long prompt.

Beside the rules of `VisionSchedule`, parts of them: `rows` (text tokens before the answer that rank) and layers (all
since entry, or only the one before each keep).
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from latefusion.data.icons.load_icons import load_icons
from latefusion.data.prompts import prompt_inputs
from latefusion.data.scenes import load_scenes
from latefusion.eval.bench.timing import write_json
from latefusion.models.attach import attach
from latefusion.models.base_model import load_base
from latefusion.models.inputs import encode_images, fresh_inputs
from latefusion.models.policies.base import Decision, Prompt
from latefusion.models.policies.scheduled import ScheduleDecision
from latefusion.models.schedule import RANKINGS, VisionSchedule

KEEPS = {
    "embedded": [{4: 72, 8: 24}, {4: 48, 8: 10}],
    "smollm_icons": [{8: 72}, {10: 72, 16: 36}, {12: 36}],
}
ROWS = (1, 8, 16, 32, 64, None)


@dataclass(frozen=True, kw_only=True)
class Partial(VisionSchedule):
    """Ranks by some text rows and some layers.

    Args:
        rows: most text tokens before the answer; None: all.
        before: look at the layer before each keep alone, else at all.
    """

    rows: int | None = None
    before: bool = False

    def begin(self, prompt: Prompt) -> Decision:
        last = max(self.keep)
        watch = {i - 1 for i in self.keep} if self.before else range(self.enter, last)
        sees = self.sees(prompt.num_layers)
        return ScheduleDecision(prompt, sees=sees, keep=self.keep, watch=watch, frozen=False, rows=self.rows)


def variants(keep: dict[int, int], enter: int) -> dict[str, VisionSchedule]:
    rules: dict[str, VisionSchedule] = {
        rule: VisionSchedule(enter=enter, keep=keep, ranking=rule) for rule in RANKINGS
    }
    for rows in ROWS:
        for before in (False, True):
            name = f"{rows or 'all'} rows, {'layer before' if before else 'all layers'}"
            rules[name] = Partial(enter=enter, keep=keep, rows=rows, before=before)
    return rules


def with_turns(rows: list[dict[str, Any]], turns: int, seed: int) -> list[dict[str, Any]]:
    """Each question as the last turn of a conversation about its image."""
    by_image: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_image.setdefault(row["scene"], []).append(row)
    rng, result = random.Random(seed), []
    for row in rows:
        others = [other for other in by_image[row["scene"]] if other["id"] != row["id"]] or [row]
        earlier = [rng.choice(others) for _ in range(turns)]
        messages = []
        for number, turn in enumerate([*earlier, row]):
            image = [{"type": "image"}] if number == 0 else []
            text = [{"type": "text", "text": turn["question"]}]
            messages.append({"role": "user", "content": [*image, *text]})
            if turn is not row or number < turns:
                answer = [{"type": "text", "text": turn["answer"]}]
                messages.append({"role": "assistant", "content": answer})
        result.append({**row, "messages": messages[: 2 * turns + 1], "images": [row["image"]]})
    return result


@torch.no_grad()
def measure(
    model: Any, processor: Any, rows: list[dict[str, Any]], schedules: dict[Any, VisionSchedule], size: int
) -> tuple[float, dict[Any, dict[str, float]]]:
    """Mean text tokens, and what each schedule loses against the whole model."""
    losses: dict[Any, list[float]] = {name: [] for name in schedules}
    same: dict[Any, list[float]] = {name: [] for name in schedules}
    texts: list[int] = []
    with attach(model, VisionSchedule()) as attachment:
        for first in range(0, len(rows), size):
            raw = prompt_inputs(model, processor, rows[first : first + size])
            real = raw["attention_mask"].bool() & (raw["input_ids"] != model.config.image_token_id)
            texts += real.sum(1).tolist()
            inputs = encode_images(model, raw)

            def answer(schedule: VisionSchedule, inputs: Any = inputs) -> torch.Tensor:
                with attachment.using(schedule):
                    out = model(**fresh_inputs(inputs), logits_to_keep=1, use_cache=False)
                return out.logits[:, -1].float().log_softmax(-1)  # [B, V]

            whole = answer(VisionSchedule())
            for name, schedule in schedules.items():
                logprobs = answer(schedule)
                losses[name] += (whole.exp() * (whole - logprobs)).sum(-1).tolist()
                same[name] += (logprobs.argmax(-1) == whole.argmax(-1)).float().tolist()
    n = len(rows)
    return fmean(texts), {
        name: {
            "kl": fmean(losses[name]),
            "kl_error": stdev(losses[name]) / n**0.5,
            "other_answer": 1 - fmean(same[name]),
        }
        for name in schedules
    }


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model", default="embedded", choices=sorted(KEEPS))
    options.add_argument("--data", default="scenes", choices=["scenes", "icons"])
    options.add_argument("--samples", type=int, default=400)
    options.add_argument("--turns", default="0,20", help="turns before the question")
    options.add_argument("--enter", type=int, default=0)
    options.add_argument("--batch-size", type=int, default=16)
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--json", type=Path)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    model, processor = load_base(args.model, dtype=torch.float32)
    model.to(args.device)
    load = load_scenes if args.data == "scenes" else load_icons
    table = load("validation", args.samples // 8 + 5, seed=0)
    rows = [table[i] for i in range(min(args.samples, len(table)))]
    result: list[dict[str, Any]] = []
    for turns in map(int, args.turns.split(",")):
        prompts = with_turns(rows, turns, seed=0)
        for keep in KEEPS[args.model]:
            began = time.thread_time()
            text, lost = measure(model, processor, prompts, variants(keep, args.enter), args.batch_size)
            keeps = {str(layer): k for layer, k in keep.items()}
            head = {"turns": turns, "text_tokens": text, "keep": keeps, "samples": len(prompts)}
            result.append({**head, "seconds": time.thread_time() - began, "rules": lost})
            setting = {"model": args.model, "data": args.data, "enter": args.enter}
            write_json({**setting, "torch": torch.__version__, "rows": result}, args.json)
    for row in result:
        shown = Table(
            "rule", "KL", "standard error", "other answer, %", title=f"{row['turns']} turns, {row['keep']}"
        )
        for name, lost_by in row["rules"].items():
            values = (
                f"{lost_by['kl']:.4f}",
                f"{lost_by['kl_error']:.4f}",
                f"{100 * lost_by['other_answer']:.1f}",
            )
            shown.add_row(name, *values)
        Console(width=100).print(shown)


if __name__ == "__main__":
    main()
