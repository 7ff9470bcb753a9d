"""Every image-text type of transformers is exact under the policies that docs/families.md says, and else refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import transformers
from helpers.families_table import CLASSES, COMMAND, PAGE, RESULTS, classes, page
from helpers.judged_types import Subject, judged
from helpers.oracle import band, masked
from helpers.tiny_types import ROWS, VARIANTS, build_type
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from latefusion import VisionSchedule
from latefusion.models.attach import attach
from latefusion.models.executor.vision import VIDEO_AS_IMAGE

TABLE = json.loads(RESULTS.read_text())

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def test_every_type_has_a_row() -> None:
    for name in ROWS:
        assert name in TABLE["rows"], (
            f"transformers has the type {name}, which has no row: run `{COMMAND} {name}`"
        )
    gone = [name for name in TABLE["rows"] if name not in ROWS]
    assert not gone, f"transformers no longer has {gone}: run `{COMMAND}`"


def test_the_page_is_made_of_the_file() -> None:
    assert PAGE.read_text() == page(TABLE), f"run `{COMMAND}`"


def test_attach_knows_the_decoders_of_the_page_and_no_others() -> None:
    assert json.loads(CLASSES.read_text()) == classes(TABLE), f"run `{COMMAND}`"


def test_no_row_is_empty() -> None:
    """A policy is exact or refused with a reason: nothing else."""
    for name, row in TABLE["rows"].items():
        assert bool(row["exact"]) != ("all" in row["refused"]), name
        assert all(row["refused"].values()), name
        assert "all" in row["refused"] or len(row["exact"]) + len(row["refused"]) == 5, name


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ROWS])
def test_a_type_is_exact_or_refused_as_the_table_says(name: str, one_thread: None) -> None:
    assert judged(name) == TABLE["rows"].get(name), f"run `{COMMAND} {name!r}`"


@pytest.mark.parametrize(
    "name", ["llava", "qwen3_vl", *[name for name in VARIANTS if "gpt_oss" in name], "udop"]
)
def test_some_types_are_as_the_table_says(name: str, one_thread: None) -> None:
    assert judged(name) == TABLE["rows"][name]


def test_families_that_write_videos_with_tokens_of_images_are_known() -> None:
    """Read from the code of transformers, where their video features go: elsewhere their videos would stay dense."""
    classes = {
        name: file
        for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
        for name in re.findall(r"^class (\w+)", file.read_text(), re.MULTILINE)
    }
    merged = {
        kind
        for kind, name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()
        if "special_video_mask = input_ids == self.config.image_token_id" in classes[name].read_text()
    }
    assert {"glm4v", "glmga"} <= merged <= VIDEO_AS_IMAGE


@pytest.mark.parametrize("row", ["glmga", "glm4v_moe", "qwen3_vl"])
def test_videos_are_hidden_outside_of_a_band(row: str) -> None:
    """Features of a video, at the placeholders that the family writes for it, against masks on the whole model."""
    model = build_type(row).eval()
    subject = Subject(model)
    if row not in VIDEO_AS_IMAGE:
        subject.inputs["input_ids"][subject.vision] = model.config.video_token_id
    subject.inputs["mm_encoder_outputs"] = {"video": subject.inputs["mm_encoder_outputs"]["image"]}
    layers = len(model.get_decoder().layers)
    seen = band(subject.vision, layers, 1, layers - 1)
    with masked(model, subject.vision, seen, padding=subject.inputs["attention_mask"]):
        expected = subject.logits(use_cache=False)[subject.text]
    dense = subject.logits(use_cache=False)[subject.text]
    with attach(model, VisionSchedule(enter=1, exit=layers - 1)) as attachment:
        computed = subject.logits(use_cache=False)[subject.text]
        assert [record.n_vision for record in attachment.trace] == subject.vision.sum(1).tolist()
    assert (computed - expected).abs().max() <= 1e-5 and (computed - dense).abs().max() > 1e-2
