"""From pixels to a profile, a calibrated entry and an answer, where grids and tiles come with the pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import CONFIGS, LAYERS, build_from, prompt, vision_tokens
from helpers.models_with_processors import collator_of, model_and_processor
from PIL import Image
from rich.console import Console

from latefusion.data.prompt_batches import collated
from latefusion.data.prompts import prompt_inputs
from latefusion.eval.fusion.decide import Goal
from latefusion.eval.fusion.run import DrawnPrompts, calibrate, profile
from latefusion.models.attach import attach
from latefusion.models.inputs import encode_images
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.entry_fit import fit_entry, installed

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
FAMILIES = [
    "qwen2_5_vl",
    pytest.param("qwen3_vl", marks=pytest.mark.slow),
    pytest.param("gemma3", marks=pytest.mark.slow),
    pytest.param("internvl", marks=pytest.mark.slow),
]


def samples(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Noise in two shapes, so that grids differ where a family has grids."""
    random = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        pixels = random.integers(0, 255, (56, 56 if i % 3 else 84, 3), dtype=np.uint8)
        question = [{"type": "image"}, {"type": "text", "text": "what color is it ?"}]
        answer = [{"type": "text", "text": ["red", "yes", "no"][i % 3]}]
        rows.append(
            {
                "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
                "images": [Image.fromarray(pixels)],
            }
        )
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_a_profile_from_pixels_has_the_numbers_of_the_stock_model(family: str, tmp_path) -> None:
    model, made = model_and_processor(family)
    rows = samples(4)
    result = profile(
        model=model, processor=made,
        prompts=DrawnPrompts(measured=rows, confirming=samples(3, seed=5), calibrating=samples(20, seed=1)),
        about={"model": family, "data": "noise", "split": None}, output_dir=tmp_path, goal=Goal(bound=1e-5),
        batch_size=2, console=Console(quiet=True),
    )  # fmt: skip
    for i, row in enumerate(rows):
        inputs = dict(collator_of(family)([row]))
        labels = inputs.pop("labels")[0]
        del inputs["queries"]
        assert "pixel_values" in inputs
        at = [t - 1 for t in range(len(labels)) if labels[t] != -100]
        with torch.no_grad():
            dense = model(**inputs).logits[0, at].double().log_softmax(-1)
            for kind, schedule in (("late", VisionSchedule(enter=2)), ("suffix", VisionSchedule(exit=2))):
                with attach(model, schedule):
                    changed = model(**inputs).logits[0, at].double().log_softmax(-1)
                kl = (dense.exp() * (dense - changed)).sum(-1).mean().item()
                assert result["effects"][f"{kind} 2"]["kl"][i] == pytest.approx(kl, rel=1e-2, abs=1e-6), kind
    assert (tmp_path / "report.html").is_file() and len(result["curves"]["prefix"]) == LAYERS + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_an_entry_is_calibrated_from_pixels(family: str) -> None:
    """Exactly what a forward with pixels gives to the layer, for the images it was fitted on."""
    model, rows = model_and_processor(family)[0], samples(24, seed=2)
    collator, states = collator_of(family), []
    with attach(model, VisionSchedule()) as attachment:
        calibration = calibrate(attachment, collator, rows, 2, 8)
    assert 0 < calibration.explained < 1
    inputs = {k: v for k, v in collator(rows[:1]).items() if k not in ("labels", "queries")}
    vision = inputs["input_ids"][0] == model.config.image_token_id
    for layer in (0, 2):
        handle = (
            model.get_decoder()
            .layers[layer]
            .register_forward_pre_hook(lambda m, args: states.append(args[0][0][vision]))
        )
        with torch.no_grad():
            model(**inputs)
        handle.remove()
    features, states_inside = states
    if family != "qwen3_vl":  # whose tower adds to the rows on their way
        order = torch.arange(len(features))
        mapped = calibration.entry(features, order)
        assert (mapped - states_inside).norm() < (features - states_inside).norm()
    with installed(model, calibration.entry), attach(model, VisionSchedule(enter=2)), torch.no_grad():
        assert bool(model(**inputs).logits.isfinite().all())


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_from_encoded_images_is_generation_from_pixels(family: str) -> None:
    """What evaluation does, dense and under a schedule, in a batch of images of two shapes."""
    model, made = model_and_processor(family)
    inputs = prompt_inputs(model, made, samples(3, seed=3))
    with torch.no_grad():
        encoded = encode_images(model, inputs)
        assert "pixel_values" in inputs and "pixel_values" not in encoded
        for schedule in (None, VisionSchedule(enter=1, exit=4, keep={2: 3})):
            outputs = []
            for arguments in (inputs, encoded):
                kwargs = {**arguments}
                if "mm_encoder_outputs" in kwargs:
                    kwargs["mm_encoder_outputs"] = dict(kwargs["mm_encoder_outputs"])
                if schedule is None:
                    outputs.append(model.generate(**kwargs, max_new_tokens=4, do_sample=False))
                else:
                    with attach(model, schedule):
                        outputs.append(model.generate(**kwargs, max_new_tokens=4, do_sample=False))
            assert torch.equal(*outputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_with_encoded_images_answers_as_its_pixels(family: str) -> None:
    model, collator, rows = model_and_processor(family)[0], collator_of(family), samples(3, seed=4)
    batch = collated(model, collator, rows, ["0", "1", "2"])
    inputs = {k: v for k, v in collator(rows).items() if k not in ("labels", "queries")}
    assert "pixel_values" not in batch.inputs and int(batch.vision.sum()) > 0
    with torch.no_grad():
        torch.testing.assert_close(
            model(**batch.fresh()).logits, model(**inputs).logits, atol=1e-5, rtol=1e-4
        )


def test_vision_tokens_that_are_all_alike_are_refused() -> None:
    model = build_from(CONFIGS["gemma3"]())
    inputs = prompt("gemma3", ["t I tt"] * 12)
    features = inputs["mm_encoder_outputs"]["image"].pooler_output
    features.zero_()
    with (
        attach(model, VisionSchedule()) as attachment,
        pytest.raises(ValueError, match="the same vision tokens") as error,
    ):
        fit_entry(attachment, [(inputs, vision_tokens(inputs))], 1)
    assert "\n" not in str(error.value)


def test_a_batch_holds_no_graph_of_the_vision_tower() -> None:
    model = model_and_processor("qwen2_5_vl")[0]
    batch = collated(model, collator_of("qwen2_5_vl"), samples(2), ["0", "1"])
    features = batch.inputs["mm_encoder_outputs"]["image"].pooler_output
    assert not any(rows.requires_grad for rows in features)
