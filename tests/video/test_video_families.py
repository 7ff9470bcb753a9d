"""Videos of every family that reads them: from frames to logits, labels, answers and gradients."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from helpers.data_rows import turn
from helpers.families import LAYERS, TOLERANCE, build_from
from helpers.forwards import BAND, KEEPS, generate
from helpers.oracle import band, masked, ranked
from helpers.processors import STOP
from helpers.tiny_base import SMALL, configured
from helpers.video_models import FAMILIES, LIMIT, inputs_of, logits_of, moving, video_collator, video_model
from PIL import Image

from latefusion import VisionSchedule
from latefusion.data.collate import IGNORE, BadRow
from latefusion.data.prompts import prompt_inputs
from latefusion.data.videos import load_video
from latefusion.eval.comparison.encoded import EncodedImages
from latefusion.models.attach import attach
from latefusion.models.flops import encoder_flops
from latefusion.models.inputs import encode_images, fresh_inputs
from latefusion.training import assemble

VIDEO, PICTURE = {"type": "video"}, {"type": "image"}
SIZE = {"qwen2_5_vl": 56, "qwen3_vl": 64}
TOKENS = {
    "qwen2_5_vl": 8,
    "qwen3_vl": 8,
    "llava_onevision": 5,
    "internvl": 16,
    "smolvlm": 16,
}  # of four frames

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
each = pytest.mark.parametrize("family", FAMILIES)


def asked(family: str, seed: int, *words: str, n: int = LIMIT) -> dict[str, Any]:
    question, answer = words
    messages = [turn("user", VIDEO, question), turn("assistant", answer)]
    return {"messages": messages, "images": [], "videos": [moving(seed, n, size=SIZE.get(family, 28))]}


def samples_of(family: str) -> list[dict[str, Any]]:
    """A video, a shorter one under a longer question, and no video."""
    text = {"messages": [turn("user", "is it red?"), turn("assistant", "yes")], "images": []}
    return [
        asked(family, 1, "how many?", "2"),
        asked(family, 2, "what color is it?", "red and 2.", n=2),
        text,
    ]


def vision_of(family: str, batch: dict[str, Any]) -> torch.Tensor:
    config = video_model(family)[0].config
    token = config.image_token_id if family in ("internvl", "smolvlm") else config.video_token_id
    return batch["input_ids"] == token


@each
def test_answers_alone_are_learnt_and_every_frame_has_its_tokens(family: str) -> None:
    collate, words = video_collator(family), video_model(family)[1].tokenizer
    batch = collate(samples_of(family))
    learnt = [[t for t in row.tolist() if t != IGNORE] for row in batch["labels"]]
    expected = [["2"], ["red", "and", "2", "."], ["yes"]]
    assert [words.convert_ids_to_tokens(row) for row in learnt] == [[*row, STOP[family]] for row in expected]
    short = 4 if family == "qwen2_5_vl" or family == "qwen3_vl" else TOKENS[family]
    assert vision_of(family, batch).sum(1).tolist() == [TOKENS[family], short, 0]
    first = [int((row != IGNORE).nonzero()[0]) for row in batch["labels"]]
    assert batch["queries"].tolist() == [[at - 1] for at in first]


@each
def test_a_row_of_a_batch_gives_what_it_gives_alone(family: str) -> None:
    model, collate = video_model(family)[0], video_collator(family)
    rows = samples_of(family)
    together, batch = logits_of(model, inputs_of(collate(rows))), collate(rows)
    for i, row in enumerate(rows):
        alone = collate([row])
        real = batch["attention_mask"][i].bool()
        assert batch["input_ids"][i, real].tolist() == alone["input_ids"][0].tolist()
        assert (together[i, real] - logits_of(model, inputs_of(alone))[0]).abs().max() <= TOLERANCE


@each
def test_frames_reach_the_model_in_their_order_and_at_their_times(family: str) -> None:
    """Another order of frames, and in families whose positions or prompts have time another rate, change the answer."""
    model, collate = video_model(family)[0], video_collator(family)
    row = asked(family, 1, "how many?", "2")
    batch = collate([row])
    (video,) = row["videos"]
    backwards = deepcopy(video)
    backwards.frames[:] = video.frames[::-1]
    moved = logits_of(model, inputs_of(collate([{**row, "videos": [backwards]}])))
    assert (moved - logits_of(model, inputs_of(batch))).abs().max() > 1e-3
    if family == "qwen2_5_vl":
        slow = collate([{**row, "videos": [moving(1, size=SIZE.get(family, 28), rate=0.5)]}])
        # four of 30 frames at 10 a second: 0.75 s from one to the next, two to a token
        assert batch["second_per_grid_ts"].tolist() == [1.5]
        assert slow["second_per_grid_ts"].tolist() == [30.0]
        assert (logits_of(model, inputs_of(slow)) - logits_of(model, inputs_of(batch))).abs().max() > 1e-4
    _, ((moved_text,),) = collate.process([collate.rendered(0, row)[0]], [row])
    written = moved_text["replacement"]
    if family == "qwen3_vl":  # frames 0, 10, 19 and 29 in pairs
        assert [word.split()[0] for word in written.split("<") if "seconds" in word] == ["0.5", "2.4"]
    elif family == "smolvlm":
        assert [part[:5] for part in written.split("Frame from ")[1:]] == ["00:00", "00:01", "00:01", "00:02"]
        assert "four frames from a 0:00:03" in written


@each
def test_a_policy_that_keeps_everything_changes_no_bit_and_encoding_once_changes_nothing(family: str) -> None:
    model, batch = video_model(family)[0], video_collator(family)(samples_of(family))
    inputs = inputs_of(batch)
    expected = logits_of(model, inputs)
    encoded = encode_images(model, inputs)
    assert not any(name.startswith("pixel_values") for name in encoded)
    with attach(model, VisionSchedule()) as attachment:
        assert torch.equal(logits_of(model, inputs), expected)
        assert [record.n_vision for record in attachment.trace] == vision_of(family, batch).sum(1).tolist()
    with attach(model, BAND):
        assert torch.equal(logits_of(model, fresh_inputs(encoded)), logits_of(model, inputs))


@each
def test_bands_and_keeps_over_all_frames_equal_the_masked_model(family: str) -> None:
    model, batch = video_model(family)[0], video_collator(family)(samples_of(family))
    inputs, vision = inputs_of(batch), vision_of(family, batch)
    real = inputs["attention_mask"].bool()
    text = real & ~vision
    with masked(model, vision, band(vision, LAYERS, 2, 4), padding=inputs["attention_mask"]):
        expected = logits_of(model, inputs)[text]
    with attach(model, BAND):
        assert (logits_of(model, inputs)[text] - expected).abs().max() <= TOLERANCE
    rows = []
    for row, sees in zip(real.tolist(), vision.tolist(), strict=True):
        there = [i for i, is_real in enumerate(row) if is_real]
        rows.append([i for i in there if i == there[-1] or (any(sees[:i]) and not sees[i])][-16:])
    eager = build_from(model.config, "eager")
    seen = ranked(
        eager, inputs, vision, enter=KEEPS.enter, exit=KEEPS.exit, keep=dict(KEEPS.keep), queries=rows
    )
    with masked(model, vision, seen, padding=inputs["attention_mask"]):
        expected = logits_of(model, inputs)[text]
    ends = real.sum(1, keepdim=True) - 1
    with attach(model, KEEPS) as attachment, attachment.queries(ends):
        computed = logits_of(model, inputs)[text]
        kept = [record.kept for record in attachment.trace]
    assert kept[:2] == [row.nonzero().flatten().tolist() for row in seen[4][:2]]
    assert (computed - expected).abs().max() <= TOLERANCE


@each
def test_generate_equals_a_forward_over_what_it_wrote(family: str) -> None:
    model, processor = video_model(family)
    row = {
        "messages": [turn("user", VIDEO, "what color is it?")],
        "images": [],
        "videos": [moving(3, size=SIZE.get(family, 28))],
    }
    inputs = prompt_inputs(model, processor, [row])
    with attach(model, BAND), torch.no_grad():
        out = generate(model, inputs, tokens=4)
        cached = torch.stack(out.logits, 1)  # [1, N, V]
        longer = dict(inputs, input_ids=out.sequences, attention_mask=torch.ones_like(out.sequences))
        if "mm_token_type_ids" in inputs:
            grown = out.sequences.shape[1] - inputs["input_ids"].shape[1]
            longer["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, grown))
        n = cached.shape[1]
        whole = model(**longer, use_cache=False).logits[:, -n - 1 : -1]
    assert (whole - cached).abs().max() <= 1e-5


@each
def test_a_student_learns_from_videos_the_same_whether_they_are_encoded_once_or_twice(family: str) -> None:
    config = configured("teacher=dense", "schedule.enter=2", "schedule.exit=4", "schedule.keep=null", *SMALL)
    losses, gradients = [], []
    for share in (True, False):
        model, processor = video_model(family)
        student = assemble.student_from(config, build_from(model.config), processor)
        objective = assemble.objective_of(config, student)
        objective.share_images = share
        batch = video_collator(family)(samples_of(family))
        student.model.eval()  # no dropout
        loss, terms = objective(student.model, batch, count=int((batch["labels"] != IGNORE).sum()))
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad for n, p in student.model.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and terms["tokens"] > 0
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 10
    assert any(g.abs().max() > 0 for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name
    stock = video_model(family)[0]  # LoRA starts from nothing: the first loss is the band's own cross-entropy
    labels = batch["labels"]
    with attach(stock, BAND):
        logits = logits_of(stock, inputs_of(batch))
    ce = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="sum")
    assert terms["ce"].item() == pytest.approx(ce.item(), rel=1e-5)


@each
def test_the_vision_tower_is_counted_on_videos(family: str) -> None:
    model, collate = video_model(family)[0], video_collator(family)
    one = encoder_flops(model, inputs_of(collate([asked(family, 1, "how many?", "2")])))
    two = encoder_flops(model, inputs_of(collate([asked(family, s, "how many?", "2") for s in (1, 2)])))
    assert one and two and one < two <= 2.1 * one


def mixed(family: str) -> list[dict[str, Any]]:
    """Rows of an image and a video in either order, an image, a video, two images around a video, and no picture."""

    def row(words: tuple[str, str], *parts: Any) -> dict[str, Any]:
        side = SIZE.get(family, 28)
        n = {"pictures": 0}
        content, images, videos = [], [], []
        for part in parts:
            content.append(part)
            if part == PICTURE:
                n["pictures"] += 1
                images.append(Image.new("RGB", (side, side), (200, 10 * n["pictures"], len(words[0]))))
            elif part == VIDEO:
                videos.append(moving(len(words[0]) + len(videos), size=side))
        messages = [turn("user", *content, words[0]), turn("assistant", words[1])]
        return {"messages": messages, "images": images, "videos": videos}

    return [
        row(("how many?", "2"), PICTURE, VIDEO),
        row(("what color is it?", "red and 2."), VIDEO, "is it red?", PICTURE),
        row(("is it red?", "yes"), PICTURE),
        row(("how many?", "no"), VIDEO),
        row(("is it?", "yes and no"), PICTURE, VIDEO, PICTURE),
        row(("how?", "2")),
    ]


@each
def test_images_and_videos_in_one_batch_and_one_row(family: str) -> None:
    """Each row of a batch gives what it gives alone, under a band too, and what shows last is not taken for first."""
    model, collate, rows = video_model(family)[0], video_collator(family), mixed(family)
    batch = collate(rows)
    with attach(model, BAND):
        together = logits_of(model, inputs_of(batch))
        encoded = logits_of(model, fresh_inputs(encode_images(model, inputs_of(batch))))
        assert torch.equal(together, encoded)
        for i, row in enumerate(rows):
            alone = collate([row])
            real = batch["attention_mask"][i].bool()
            assert batch["input_ids"][i, real].tolist() == alone["input_ids"][0].tolist()
            assert batch["labels"][i, real].tolist() == alone["labels"][0].tolist()
            assert (together[i, real] - logits_of(model, inputs_of(alone))[0]).abs().max() <= TOLERANCE
    assert not torch.equal(together, logits_of(model, inputs_of(batch)))


@each
def test_images_that_an_evaluation_encodes_once_are_those_of_their_prompts(family: str) -> None:
    """Of mixed rows, and of an image beside a prompt without one."""
    model, collate, rows = video_model(family)[0], video_collator(family), mixed(family)
    for some in (rows, [rows[2], rows[5]], [rows[5], rows[2]]):
        inputs = inputs_of(collate(some))
        with torch.no_grad():
            encoded = EncodedImages().encode(model, inputs)
        assert (logits_of(model, fresh_inputs(encoded)) - logits_of(model, inputs)).abs().max() <= TOLERANCE


@each
def test_pixels_of_images_and_videos_follow_their_placeholders(family: str) -> None:
    """The features of a row with both are those of its image and its video alone, in the order of the text."""
    model, collate, rows = video_model(family)[0], video_collator(family), mixed(family)

    def features(row: dict[str, Any]) -> dict[str, torch.Tensor]:
        encoded = encode_images(model, inputs_of(collate([row])))["mm_encoder_outputs"]
        return {kind: torch.cat([*of.pooler_output]).flatten(0, -2) for kind, of in encoded.items()}

    def shown(row: dict[str, Any], part: Any) -> torch.Tensor:
        kept = {
            "images": row["images"] if part == PICTURE else [],
            "videos": row["videos"] if part == VIDEO else [],
        }
        (of,) = features({"messages": [turn("user", part, "?"), turn("assistant", "2")], **kept}).values()
        return of

    for row, order in ((rows[0], (PICTURE, VIDEO)), (rows[1], (VIDEO, PICTURE))):
        both = features(row)
        expected = [shown(row, part) for part in order]
        if len(both) == 1:
            assert torch.allclose(*both.values(), torch.cat(expected), atol=TOLERANCE)
        else:
            assert torch.allclose(both["image"], expected[order.index(PICTURE)], atol=TOLERANCE)
            assert torch.allclose(both["video"], expected[order.index(VIDEO)], atol=TOLERANCE)


def test_images_and_frames_of_different_sizes_are_refused_in_one_batch() -> None:
    _, processor = video_model("smolvlm")
    collate = video_collator("smolvlm")
    films = deepcopy(processor.video_processor)
    films.max_image_size = {"longest_edge": 56}
    collate.processor = deepcopy(processor)
    collate.processor.video_processor = films
    with pytest.raises(BadRow, match=r"images of 28 x 28 pixels and frames of 56 x 56.*give max_image_size"):
        collate(mixed("smolvlm")[:1])
    with pytest.raises(
        ValueError, match=r"images of 28 x 28 pixels and frames of 56 x 56.*give max_image_size"
    ):
        collate(mixed("smolvlm")[2:4])


@each
def test_videos_that_show_different_numbers_of_frames_share_a_batch(family: str) -> None:
    """`max_frames` of one video, and sizes of several, leave the others as they are alone."""
    model, collate = video_model(family)[0], video_collator(family)
    side = SIZE.get(family, 28)
    noise = np.random.default_rng(0)
    rows = []
    for n, (w, h), limit in (
        (9, (side, side), 2),
        (9, (2 * side, side), LIMIT),
        (3, (side, 2 * side), LIMIT),
    ):
        frames = [Image.fromarray(noise.integers(0, 256, (h, w, 3), dtype=np.uint8)) for _ in range(n)]
        video = load_video({"frames": frames, "max_frames": limit}, max_frames=LIMIT)
        assert (len(video.indices), len(video.filled().indices)) == (min(n, limit), LIMIT)
        messages = [turn("user", VIDEO, "how many?"), turn("assistant", "2")]
        rows.append({"messages": messages, "images": [], "videos": [video]})
    batch = collate(rows)
    together = logits_of(model, inputs_of(batch))
    for i, row in enumerate(rows):
        alone, real = collate([row]), batch["attention_mask"][i].bool()
        assert batch["input_ids"][i, real].tolist() == alone["input_ids"][0].tolist()
        assert (together[i, real] - logits_of(model, inputs_of(alone))[0]).abs().max() <= TOLERANCE


def test_seconds_stay_float32_in_a_bfloat16_model() -> None:
    """Rounded to bfloat16, the time from one pair of frames to the next would move positions."""
    model, processor = video_model("qwen2_5_vl")
    model = deepcopy(model).bfloat16()
    row = {"messages": [turn("user", VIDEO, "?")], "images": [], "videos": [moving(3, size=56, rate=29.97)]}
    inputs = prompt_inputs(model, processor, [row])
    assert inputs["pixel_values_videos"].dtype is torch.bfloat16
    assert inputs["second_per_grid_ts"].dtype is torch.float32
    assert inputs["second_per_grid_ts"].item() == pytest.approx(2 / (4 / 30 * 29.97), rel=1e-6)
