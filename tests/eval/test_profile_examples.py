"""Example images of a profile: which picture, which grid, which cell."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.models_with_processors import collator_of, model_and_processor
from PIL import Image

from latefusion.eval.fusion.examples import SIDE, View, examples, maps, views

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
IDS = [7]


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def row(ids: list[int], **more: Any) -> dict[str, Any]:
    return {"input_ids": torch.tensor([ids]), **more}


def test_every_image_has_its_tokens_and_its_grid() -> None:
    images = [picture(40, 40), picture(60, 40), picture(40, 40)]
    ids = [1, *[7] * 4, 2, *[7] * 6, 3, *[7] * 9]
    grids = torch.tensor([[1, 4, 4], [1, 4, 6], [1, 6, 6]])  # patches, merged two by two
    images_shown = views(row(ids, image_grid_thw=grids), {"images": images}, IDS)
    assert [(view.tokens, view.grid) for view in images_shown] == [
        (range(0, 4), (2, 2)),
        (range(4, 10), (2, 3)),
    ]
    assert [view.image for view in images_shown] == images[:2], "two are shown"
    for ids in ([1, *[7] * 8, 2, 7, 7, 7, 7], [7] * 12):  # LLaVA's stand side by side
        images_shown = views(row(ids), {"images": images}, IDS)
        assert [(view.tokens, view.grid) for view in images_shown] == [
            (range(0, 4), (2, 2)),
            (range(4, 8), (2, 2)),
        ]
    alone = views(row([1, *[7] * 9]), {"images": images[:1]}, IDS)
    assert [(view.tokens, view.grid) for view in alone] == [(range(9), (3, 3))]


def test_an_image_in_tiles_is_shown_without_a_map() -> None:
    wide = picture(80, 40)
    for ids in ([7, 7, 7, 7, 1, 7, 7, 7, 7], [7] * 12):  # more runs than images; a number that is no square
        (view,) = views(row(ids), {"images": [wide]}, IDS)
        assert view.grid is None and view.image is wide
        assert [label for label, _ in maps({}, 0, view)] == ["the image"]


def test_an_image_that_is_cropped_is_shown_as_cropped() -> None:
    wide, pixels = picture(80, 40), torch.zeros(1, 3, 8, 8)
    pixels[0, 0, :, 4:] = 1.0  # red on the right
    (view,) = views(row([7] * 4, pixel_values=pixels), {"images": [wide]}, IDS)
    assert view.image.size == (8, 8) and view.image.getpixel((6, 2)) == (255, 0, 0)
    square = picture(40, 40)
    (view,) = views(row([7] * 4, pixel_values=pixels), {"images": [square]}, IDS)
    assert view.image is square, "nothing is lost of it"


def view_of(grid: tuple[int, int], seen: int, kept: Any) -> dict[str, Any]:
    """A model of four layers whose last prompt token looks at one token, a schedule that keeps some from layer 2."""
    attention = [0.0] * (grid[0] * grid[1] + 3)  # three belong to an image before
    attention[seen] = 1.0
    return {
        "layers": 4,
        "chosen": {"schedule": {"enter": 1, "exit": 3, "keep": {2: 2, 3: 1}}},
        "maps": [{"attention": [attention] * 4}],
        "kept": {"tokens": [kept]},
    }


def test_cells_are_where_their_tokens_are() -> None:
    """The brightest cell, and those in colour, in a grid of two rows of four."""
    view = View(Image.new("RGB", (80, 40), "#ff0000"), range(3, 11), (2, 4))
    made = dict(maps(view_of((2, 4), 3 + 6, [[1, list(range(11))], [2, [0, 3, 9]]]), 0, view))
    assert list(made) == [
        "the image", "attention, layer 0", "attention, layer 2", "attention, layer 3", "kept from layer 2: 2",
    ]  # fmt: skip
    assert {picture.size for picture in made.values()} == {(SIDE, SIDE // 2)}
    step = SIDE // 4

    def middles(picture: Image.Image) -> list[tuple[int, int, int]]:
        return [
            picture.getpixel((c * step + step // 2, r * step + step // 2)) for r in range(2) for c in range(4)
        ]  # type: ignore[misc]

    heat = [sum(colour) for colour in middles(made["attention, layer 2"])]
    assert heat.index(max(heat)) == 6 and len(set(heat)) == 2
    assert [colour == (255, 0, 0) for colour in middles(made["kept from layer 2: 2"])] == [
        i in (0, 6) for i in range(8)
    ]


def test_a_keep_that_holds_all_of_a_small_image_has_no_picture() -> None:
    view = View(picture(40, 40), range(3, 7), (2, 2))
    made = dict(maps(view_of((2, 2), 3, [[2, list(range(7))], [3, [4]]]), 0, view))
    assert [label for label in made if "kept" in label] == ["kept from layer 3: 1"]


def test_examples_of_a_family_with_grids_have_their_maps(tmp_path) -> None:
    """Pixels through the processor, wide and square ones."""
    model, _ = model_and_processor("qwen2_5_vl")
    for width, height in ((56, 56), (84, 56)):
        question = [{"type": "image"}, {"type": "text", "text": "what color is it ?"}]
        sample = {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
            ],
            "images": [picture(width, height)],
        }
        seen = views(collator_of("qwen2_5_vl")([sample]), sample, [model.config.image_token_id])
        (view,) = seen
        assert view.grid is not None and view.grid[1] * height == view.grid[0] * width
        example = view_of(view.grid, 0, None)
        (made,) = examples(tmp_path, example, [sample], [seen])
        assert made["question"] == "what color is it ?" and made["answer"] == "red"
        assert len(made["pictures"]) == 4 and not made["unknown"] and made["hidden"] == 0
        assert Image.open(tmp_path / "example_0.png").width == 4 * SIDE + 3 * 8
