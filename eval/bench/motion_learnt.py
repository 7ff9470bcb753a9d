"""Whether a student learns, under a band, what only the order of a video's frames shows; needs `latefusion[video]`.

    python eval/bench/motion_learnt.py --json docs/results/motion.json

The embedded model's weights are put into a LLaVA-OneVision, which reads videos (36 tokens a frame: its grid is pooled
2 x 2), and `training/train.py` trains it on `motion` (data/motion.py), whose vision tokens it sees in the embedded
model's band alone. The test questions are then asked about the videos as they are, about their reversal, about their
frames in an order drawn anew for each video, about one frame, and about none. Half is the most that one frame, or the
frames in no order, can give on average; a reversed video has the opposite answers.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from latefusion.data.motion import FRAMES, write_clips
from latefusion.data.prompts import prompt_inputs
from latefusion.data.question_file import question_rows
from latefusion.data.scenes import SIZE
from latefusion.eval import metrics
from latefusion.eval.bench.timing import write_json
from latefusion.models.base_model import load_base
from latefusion.models.student.restore import load
from latefusion.recipes.schema import RECIPES
from latefusion.training.embedded.vocabulary import CHAT_TEMPLATE

NEW_WORDS = ("go", "moves", "first")
VIDEO = "<video>"
LEARNING = ("train.learning_rate=2e-3", "train.batch_size=8", "train.log_every=25")
BATCH = 50  # questions
ORDERS = ("as it is", "reversed", "shuffled", "one frame", "none")


def video_base(folder: Path) -> None:
    """Write the embedded model's weights as a LLaVA-OneVision, and its processor, to a folder.

    New are the word embeddings of `<video>` and of three words, drawn like the others, and the token after the last
    frame, which is zero.
    """
    from transformers.models.llava_onevision.video_processing_llava_onevision import (  # lazy: needs torchvision
        LlavaOnevisionVideoProcessor,
    )

    llava, processor = load_base("embedded", dtype=torch.float32)
    tokenizer: Any = processor.tokenizer
    tokenizer.add_tokens(VIDEO, special_tokens=True)
    tokenizer.add_tokens([AddedToken(word, single_word=True) for word in NEW_WORDS])
    torch.manual_seed(0)
    llava.resize_token_embeddings(len(tokenizer))
    config = LlavaOnevisionConfig(
        vision_config=llava.config.vision_config,
        text_config=llava.config.text_config,
        image_token_index=llava.config.image_token_index,
        video_token_index=tokenizer.convert_tokens_to_ids(VIDEO),
        vision_feature_select_strategy=llava.config.vision_feature_select_strategy,
        vision_feature_layer=llava.config.vision_feature_layer,
        image_grid_pinpoints=[[SIZE, SIZE]],
        tie_word_embeddings=True,
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(llava.state_dict(), strict=False)
    if missing != ["model.image_newline"] or unexpected:
        raise RuntimeError(f"weights of the embedded model do not fit: {missing}, {unexpected}")
    model.model.image_newline.data.zero_()
    model.generation_config = llava.generation_config
    images: Any = processor.image_processor
    pixels = {
        "size": {"height": SIZE, "width": SIZE},
        "image_mean": images.image_mean,
        "image_std": images.image_std,
    }
    template = CHAT_TEMPLATE.replace(
        "{%- for part in message['content'] if part['type'] == 'image'",
        "{%- for part in message['content'] if part['type'] == 'video' -%}{{- '<video>' -}}{%- endfor -%}"
        "{%- for part in message['content'] if part['type'] == 'image'",
    )
    made = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(**pixels, image_grid_pinpoints=[[SIZE, SIZE]]),
        tokenizer,
        LlavaOnevisionVideoProcessor(**pixels),
        num_image_tokens=llava.config.image_seq_length,
        vision_feature_select_strategy="default",
        chat_template=template,
    )
    model.save_pretrained(folder)
    made.save_pretrained(folder)


def train(base: Path, data: Path, output: Path, overrides: list[str]) -> None:
    """Train the student as a user would, or go on with its training."""
    words = [
        *("recipe=late_fusion_no_teacher", "model=embedded", f"model.path={base}", "data=dataset"),
        *(f"data.path={data / 'train.jsonl'}", f"data.max_frames={FRAMES}", "data.isolate=true"),
        *("schedule.keep=null", "eval.enabled=false", f"output_dir={output}", *overrides),
    ]
    subprocess.run([sys.executable, str(RECIPES.parent / "training" / "train.py"), *words], check=True)


def write_orders(data: Path) -> None:
    """Beside `test.jsonl`, the same questions about the frames in another order, one of them, or none."""
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    for order in ORDERS[1:]:
        lines = []
        for row in rows:
            shown = {key: value for key, value in row.items() if key != "video"}
            numbers = list(range(FRAMES))
            rng = random.Random(f"{order} {row['video']}")
            if order == "reversed":
                numbers.reverse()
            elif order == "shuffled":
                rng.shuffle(numbers)
            elif order == "one frame":
                numbers = [rng.choice(numbers)]
            frames = [f"{row['video']}/{number}.png" for number in numbers]
            lines.append({**shown, **({"image": None} if order == "none" else {"videos": [frames]})})
        path = data / f"test_{order.replace(' ', '_')}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@torch.no_grad()
def first_words(model: Any, processor: Any, file: Path) -> list[str]:
    """The likeliest first token of the answer to each question of a file."""
    rows, answers = question_rows(str(file), max_frames=FRAMES), []
    for start in range(0, len(rows), BATCH):
        inputs = prompt_inputs(
            model, processor, [rows[i] for i in range(start, min(start + BATCH, len(rows)))]
        )
        best = model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].argmax(-1)
        answers += [processor.decode(token).strip() for token in best]
    return answers


def asked(model: Any, processor: Any, data: Path) -> list[dict[str, Any]]:
    """Shares of right answers by order and type, with 95% intervals over videos."""
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    results = []
    for order in ORDERS:
        name = "test.jsonl" if order == ORDERS[0] else f"test_{order.replace(' ', '_')}.jsonl"
        answers = first_words(model, processor, data / name)
        for kind in ("direction", "first"):
            numbers = [i for i, row in enumerate(rows) if row["type"] == kind]
            right = [float(answers[i] == rows[i]["answers"][0]) for i in numbers]
            estimate = metrics.accuracy(right, [rows[i]["video"] for i in numbers])
            results.append({"order": order, "type": kind, **asdict(estimate)})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=int, default=4000, help="to train on")
    parser.add_argument("--test", type=int, default=100, help="to ask about")
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=[450, 800],
        help="of the run; with a second number it is gone on with until there, at a learning rate that rises again",
    )
    parser.add_argument("--trained", action="store_true", help="the first number of steps is done")
    parser.add_argument(
        "--rendered", action="store_true", help="take the videos and the base that lie in the folder"
    )
    parser.add_argument("--set", nargs="*", default=[], help="further keys of the training run")
    parser.add_argument("--folder", type=Path, default=Path("outputs/motion"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    data, base, student = (args.folder / name for name in ("data", "base", "student"))
    if not args.rendered:
        write_clips(data, "train", args.videos)
        write_clips(data, "test", args.test)
        write_orders(data)
        video_base(base)
    for number, steps in enumerate(args.steps):
        how = "resume=true" if number else "overwrite=true"
        if number or not args.trained:
            train(base, data, student, [*LEARNING, f"train.steps={steps}", how, *args.set])
    started = time.process_time()
    model, processor = load(student, dtype=torch.float32)
    results = asked(model, processor, data)
    print(f"asked in {time.process_time() - started:.0f} CPU s")
    for row in results:
        print(
            f"{row['order']:10} {row['type']:10} {100 * row['value']:5.1f} "
            f"({100 * row['low']:.1f} to {100 * row['high']:.1f})"
        )
    if args.json:
        write_json({"title": "motion", "rows": results}, args.json)


if __name__ == "__main__":
    main()
