"""`explain`, its accounting and `eval/generate.py`, against counts and places written down by hand."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from helpers.families import LAYERS, build, prompt, shared
from helpers.flop_counter import CPU_ATTENTION
from helpers.models_with_processors import model_and_processor
from helpers.oracle import Fixed
from helpers.tiny_base import save_tiny_base
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import latefusion as lf
from latefusion.data.prompts import prompt_inputs
from latefusion.eval import generate
from latefusion.models.explain import explain, grid_shape, run_lengths
from latefusion.models.flops import account, vision_pairs
from latefusion.models.policies.random import Random

KEPT = [1, 4]  # positions; the image's tokens 0 and 3 of 0 to 3


def kept_two(inputs: dict[str, Any]) -> Fixed:
    """All four tokens in layers 0 and 1, two of them in 2 and 3, none later; for "t I tt"."""
    every = inputs["input_ids"] == 100
    two = torch.zeros_like(every)
    two[0, KEPT] = True
    return Fixed([every, every, two, two, torch.zeros_like(two), torch.zeros_like(two)])


def test_words_and_numbers_of_one_prompt() -> None:
    model, inputs = build("llava"), prompt("llava", ["t I tt"])
    with lf.attach(model, kept_two(inputs)):
        explanation = lf.explain(model, inputs)
    numbers = explanation.to_dict()[0]
    assert numbers["kept"] == KEPT and numbers["kept_patches"] == [0, 3] and numbers["exit_layer"] == 4
    assert numbers["vision"] == [4, 4, 2, 2, 0, 0] and numbers["tokens"] == [7, 7, 5, 5, 3, 3]
    json.dumps(numbers)
    text = str(explanation)
    assert "4 vision and 3 text tokens, 6 layers" in text and "2 of 4 vision tokens were chosen" in text
    assert "Vision tokens: all in layers 0 to 1, 2 in layers 2 to 3, none in layers 4 to 5." in text


def test_the_share_of_the_whole_prefill_is_that_of_real_forwards() -> None:
    """Vision tower, projector and head counted by torch in a dense and in a pruned forward from pixels."""
    model, processor = model_and_processor("llava")
    ask = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color"}]}]
    row = {"messages": ask, "images": [Image.new("RGB", (28, 28), "red")]}
    inputs = prompt_inputs(model, processor, [row])
    counts = []
    for schedule in (lf.VisionSchedule(), lf.VisionSchedule(enter=2, exit=4)):
        with lf.attach(model, schedule), torch.no_grad():
            with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
                model(**inputs, use_cache=False, logits_to_keep=1)
            counts.append(counter.get_total_flops())
            explanation = explain(model, inputs)
    saved = explanation.to_dict()[0]["prefill_flops_saved"]
    assert saved == pytest.approx(1 - counts[1] / counts[0], rel=0.01)
    assert f"({saved:.1%} of the whole prefill's, with vision tower and head)" in str(explanation)


def test_the_whole_prefill_of_images_encoded_before_is_unknown() -> None:
    model, inputs = build("llava"), prompt("llava", ["t I tt"])
    with lf.attach(model, kept_two(inputs)):
        explanation = lf.explain(model, inputs)
    assert explanation.to_dict()[0]["prefill_flops_saved"] is None and "whole prefill" not in str(explanation)


def test_accounting_counts_pairs_one_by_one() -> None:
    """t v v t v t: each query with each key not after it, counted in loops."""
    row = "tvvtvt"
    expected = sum("v" in (row[q], row[k]) for q in range(6) for k in range(q + 1))
    assert vision_pairs(3, [3]) == expected
    assert vision_pairs(3, [3, 0, 3]) == 2 * expected
    model, inputs = shared("llava"), prompt("llava", ["t I tt"])
    with lf.attach(model, kept_two(inputs)) as att, torch.no_grad():
        model(**inputs)
        cost = account(model.config, att.trace)
    dense, two = 28 - 6, 15 - 6  # pairs of 7, of 5 tokens, without those of the 3 of text
    assert (cost.dense_attention, cost.attention) == (6 * dense, 2 * dense + 2 * two)
    assert (cost.dense_vision, cost.vision) == (24, 12)
    assert cost.attention_saved == pytest.approx(1 - (2 * dense + 2 * two) / (6 * dense))
    assert (cost.dense_attention_after, cost.attention_after) == (4 * dense, 2 * two)  # layers 2 to 5
    assert cost.attention_saved_after == pytest.approx(1 - 2 * two / (4 * dense))
    assert 0 < cost.flops_saved < 1


def test_paper_shape_of_llava_7b() -> None:
    """Fusion in layer 12, 10 tokens kept, exit at 24, as the paper reports for LLaVA-1.5-7B with 64 text tokens."""
    from transformers import LlamaConfig

    from latefusion.models.executor.trace import TraceRecord

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    vision = [576] * 13 + [10] * 11 + [0] * 8
    record = TraceRecord(12, list(range(10)), 24, [64 + n for n in vision], vision, 576, [0] * 32, [0] * 32)
    cost = account(config, [record])
    assert cost.flops_saved == pytest.approx(0.53, abs=0.01)
    assert cost.attention_saved == pytest.approx(0.59, abs=0.01)
    assert cost.attention_saved_after == pytest.approx(0.998, abs=0.001)
    dense = replace(record, tokens=[640] * 32, vision=[576] * 32)
    assert account(config, [dense]).attention_saved_after == 0.0


def test_a_batch_with_text_and_late_entry() -> None:
    model, inputs = shared("llava"), prompt("llava", ["t I t I tt", "tttt"])
    with lf.attach(model, lf.VisionSchedule(enter=2, exit=5)):
        explanation = explain(model, inputs)
    first, second = str(explanation).split("\n")
    assert "none in layers 0 to 1, all in layers 2 to 4, none in layer 5" in first
    assert first.startswith("Prompt 0: 8 vision and 4 text") and "no vision tokens" in second
    assert [len(sample.positions) for sample in explanation.samples] == [8, 0]
    with lf.attach(model, lf.VisionSchedule()):
        text_only = explain(model, prompt("llava", ["tttt", "tt"]))
    assert str(text_only).count("nothing to remove") == 2


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_picture_frames_the_kept_patches(family: str, tmp_path: Path) -> None:
    model, inputs = shared(family), prompt(family, ["t I t I tt"])
    images = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    with lf.attach(model, Random(layer=1, keep_ratio=0.4)):
        explanation = explain(model, inputs, images=images)
    kept = explanation.samples[0].kept_patches
    assert kept is not None and len(kept) == 3
    explanation.save(tmp_path / "kept.svg")
    root = ElementTree.parse(tmp_path / "kept.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{space}image")) == 2
    frames = [r for r in root.findall(f"{space}rect") if r.get("class") == "k"]
    assert (
        len(frames) == 3 and len([r for r in root.findall(f"{space}rect") if r.get("class") == "veil"]) == 5
    )
    # 2 x 2 patches of 125 units, from (30, 34); the second image below the first
    places = {(round((float(r.get("x", 0)) - 30) / 125), float(r.get("y", 0))) for r in frames}
    for patch in kept:
        image, cell = divmod(patch, 4)
        assert (cell % 2, 34 + image * 294 + cell // 2 * 125.0) in places
    lines = root.findall(f"{space}polyline")
    assert [line.get("class") for line in lines] == ["t", "v"] and LAYERS == 6


def test_pictures_come_from_the_pixels_or_stay_away(tmp_path: Path) -> None:
    model, inputs = shared("llava"), prompt("llava", ["t I tt"])
    with lf.attach(model, lf.VisionSchedule(exit=3)):
        explanation = explain(model, inputs)
        assert explanation.samples[0].images == [] and "<image" not in explanation.samples[0].picture()
        with pytest.raises(ValueError, match="2 images given for prompts with 1; pass one for each"):
            explain(model, inputs, images=[Image.new("RGB", (4, 4))] * 2)
        with pytest.raises(
            ValueError, match=r"inputs of type str are not a processor's; pass what processor\("
        ):
            explain(model, "how many?")  # type: ignore[arg-type]
        with pytest.raises(
            ValueError, match=r"is an SVG, and .*kept.png is named otherwise; end its name in .svg"
        ):
            explanation.save(tmp_path / "kept.png")
    with pytest.raises(
        ValueError, match=r"has no policy to explain; attach one with lf.attach\(model, policy\)"
    ):
        explain(model, inputs)


def test_where_images_and_their_patches_are() -> None:
    mask = torch.tensor([False, True, True, False, True, False, False, True])
    assert run_lengths(mask) == [2, 1, 1]
    assert grid_shape(144, None) == (12, 12) and grid_shape(10, None) is None
    assert grid_shape(12, [1, 6, 8]) == (3, 4) and grid_shape(12, [2, 6, 4]) is None


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_base(tmp_path_factory.mktemp("base")))


def test_generate_answers_and_compares(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "photo.png"
    Image.new("RGB", (16, 16), "green").save(image)
    generate.main(
        [
            f"model={base}",
            f"image={image}",
            "prompt=what is it?",
            "policy=dense,random,vtw",
            "vtw.layer=3",
            "max_new_tokens=3",
            f"picture={tmp_path / 'kept.svg'}",
        ]
    )
    out = capsys.readouterr().out
    assert re.search(r"dense +│.*4\.0 of 4 +│ +0\.0% +│ +0\.0%", out)
    assert re.search(r"random +│.*2\.0 of 4", out) and re.search(r"vtw +│.*2\.0 of 4 +│.* +50\.0%", out)
    assert "Vision tokens: all in layers 0 to 2, none in layers 3 to 5." in out
    picture = (tmp_path / "kept.svg").read_text()
    assert "<image" in picture and "<title>4 vision" in picture


def test_a_policy_files_name_is_not_cut(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files of one beginning would be one name in a narrow terminal."""
    monkeypatch.setenv("COLUMNS", "80")
    name = "a_schedule_of_my_own_for_this_model_second.yaml"
    (tmp_path / name).write_text("_target_: latefusion.models.policies.random.Random\n")
    generate.main([f"model={base}", f"policy={tmp_path / name}", "max_new_tokens=2"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert "".join(line.split("│")[1].strip() for line in lines) == name


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["policy=dens"], r"policy=dens does not exist \(did you mean dense\?\)"),
        (["policy=vtw", "vtw.leyer=3"], r"policy vtw has no 'leyer' \(did you mean layer\?\)"),
        (["polcy=vtw"], "the keys are model, image, video, max_frames, prompt, policy"),
        (["image=nowhere.png", "prompt=x"], "no image at nowhere.png; name a file with image=FILE"),
        (["image=x.png"], "prompt is not set"),
        (["policy=pyramiddrop"], "a layer of keep_ratios=8 is beyond a decoder with layers 0 to 5"),
        (["policy=mine.yaml"], "no policy file at mine.yaml"),
        (
            ["policy=own.yaml"],
            r"No module named 'mypolicy'\); mypolicy.py lies in .*, so write PYTHONPATH=.* before",
        ),
        (["max_new_tokens=0"], "max_new_tokens=0 must be at least 1"),
        (["image=broken.png", "prompt=x"], r"broken\.png is not an image .*; name another file\."),
        (
            ["policy=dense", "max_new_tokens=100000"],
            r"the prompt has \d+ tokens.* has \d+ positions for both: shorten",
        ),
        (
            ["policy=dense", "dense.keep={4: 50}"],
            r"keep=\{4: 50\} is more than the 4 vision tokens of this prompt \(policy=dense\), so it removes none; ",
        ),
        (["picture=nowhere/x.svg"], "no folder .*nowhere for picture=nowhere/x.svg; make it first"),
        (["picture=x.png"], r"picture=x.png must end in \.svg: an SVG is what is drawn"),
        (
            ["model=embeded"],
            r"model=embeded does not exist \(did you mean embedded\?\); model can be embedded, ",
        ),
    ],
)
def test_what_cannot_work_ends_in_a_sentence(
    arguments: list[str], sentence: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("x.png")
    Path("broken.png").write_text("not a picture")
    Path("own.yaml").write_text("_target_: mypolicy.Mine")
    Path("mypolicy.py").write_text("raise SystemExit('nobody asked for this code')")
    with pytest.raises(SystemExit, match=sentence):
        generate.main([f"model={base}", *arguments])
