"""Profiles and calibrations on rows with videos, on tiny random models with their real processors."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from helpers.data_rows import turn, write_rows
from helpers.tiny_base import save_tiny_base
from helpers.video_models import moving, video_collator, video_model
from PIL import Image
from rich.console import Console

from latefusion.data.prompt_batches import batches
from latefusion.eval import calibrate, profile_model
from latefusion.eval.thresholds.questions import read

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
VIDEO, PICTURE = {"type": "video"}, {"type": "image"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions about twelve folders of frames and, last, one about a picture."""
    folder, rng = tmp_path_factory.mktemp("rows"), np.random.default_rng(0)
    shown = []
    for i in range(12):
        (folder / f"clip{i}").mkdir()
        for t in range(2 + i % 3):
            frame = Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8))
            frame.save(folder / f"clip{i}" / f"{t}.png")
        question, answer = [("how many?", "2"), ("what color is it?", "red")][i % 2]
        shown.append(
            {"messages": [turn("user", VIDEO, question), turn("assistant", answer)], "videos": [f"clip{i}"]}
        )
    Image.new("RGB", (28, 28), (200, 10, 10)).save(folder / "a.png")
    picture = {
        "messages": [turn("user", PICTURE, "is it red?"), turn("assistant", "yes")],
        "images": ["a.png"],
    }
    write_rows(folder, *shown, picture, name="rows.jsonl")
    return folder / "rows.jsonl"


def saved(family: str, folder: Path) -> Path:
    model, processor = video_model(family)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_profile_is_measured_on_videos(rows: Path, tmp_path: Path) -> None:
    base = saved("qwen2_5_vl", tmp_path / "base")
    words = [
        f"model={base}",
        f"data={rows}",
        "data.max_frames=4",
        "samples=3",
        "confirm=2",
        "images=2",
        "batch_size=4",
    ]
    arguments, config = profile_model.parse([*words, "dtype=float32", "bound=1e-10", f"output={tmp_path}"])
    printed = io.StringIO()
    profile = profile_model.run(arguments, config, Console(file=printed, width=200))
    assert (
        len(set(profile["images"])) == 3 and (tmp_path / "schedule.yaml").is_file() and profile["outside"] > 0
    )
    assert "left out" not in printed.getvalue()
    page = (tmp_path / "report.html").read_text()
    assert "first picture of" in page and "last picture of" in page and "a frame of a video" in page


@pytest.mark.parametrize("family", ["llava_onevision", "smolvlm"])
def test_a_calibration_is_searched_on_videos(family: str, rows: Path, tmp_path: Path) -> None:
    base = saved(family, tmp_path / "base")
    arguments = calibrate.Arguments(
        model=str(base), data=str(rows), split="train", samples=8, batch_size=4, layer_thresholds=[0.9],
        tokens_thresholds=[0.5], boundaries=[1], max_new_tokens=2, kl=50, output=str(tmp_path),
    )  # fmt: skip
    calibration = calibrate.calibrate(arguments, Console(quiet=True))
    assert calibration["prompts"] == 6 and (tmp_path / "policy.yaml").is_file()


def test_prompts_with_videos_share_no_batch_with_images() -> None:
    """SmolVLM's processor takes one kind at a time."""
    collator = video_collator("smolvlm")
    picture = Image.new("RGB", (28, 28), (200, 10, 10))
    filmed = {"messages": [turn("user", VIDEO, "how many?"), turn("assistant", "2")], "images": []}
    shown = {"messages": [turn("user", PICTURE, "how many?"), turn("assistant", "2")], "images": [picture]}
    samples = [{**filmed, "videos": [moving(1)]}, shown, {**filmed, "videos": [moving(2)]}, shown]
    groups = batches(video_model("smolvlm")[0], collator, samples, 4)
    assert sorted(sorted(group.numbers) for group in groups) == [[0, 2], [1, 3]]
    assert all(group.make().size == 2 for group in groups)


def test_a_model_that_is_shown_no_videos_says_why_it_passes_over_them(rows: Path, tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    reason = "has a video: a model of type llava is shown no videos; use one of"
    arguments, config = profile_model.parse([f"model={base}", f"data={rows}", "samples=2"])
    with pytest.raises(
        ValueError,
        match=rf"samples=2 is more than the one sample with an image.* 12 rows that cannot.*{reason}",
    ) as error:
        profile_model.run(arguments, config, Console(quiet=True))
    assert "\n" not in str(error.value)
    searched, others = read(calibrate.Arguments(model=str(base), data=str(rows), split="train"))
    assert len(searched) == 1 and others is None and reason in searched.remarks[0]
    only = tmp_path / "only.jsonl"
    only.write_text(
        json.dumps({**json.loads(rows.read_text().splitlines()[0]), "videos": [str(rows.parent / "clip0")]})
    )
    with pytest.raises(
        ValueError, match=rf"no prompt of .*only.jsonl has an image: name others\. .*{reason}"
    ):
        read(calibrate.Arguments(model=str(base), data=str(only), split="train"))
