"""An image is encoded once for all its questions and systems, with the features that a batch gives."""

from types import SimpleNamespace

import pytest
import torch
from helpers import evaluated_student
from peft import LoraConfig, get_peft_model
from torch import nn

from latefusion.data.prompts import prompt_inputs, without_image
from latefusion.data.scenes import load_scenes
from latefusion.eval.comparison import encoded as encoded_module
from latefusion.eval.comparison.answers import answer_questions, dense_rows
from latefusion.eval.comparison.encoded import EncodedImages, EncodedPrompts, rows_of_images, vision_weights
from latefusion.models.attach import attach
from latefusion.models.base_model import load_base, twin
from latefusion.models.inputs import encode_images, fresh_inputs
from latefusion.models.schedule import VisionSchedule


@pytest.fixture(scope="module")
def base():
    return load_base("embedded", dtype=torch.float32)


@pytest.fixture
def runs(base):
    counts = []
    handle = base[0].model.vision_tower.register_forward_hook(lambda module, args, output: counts.append(1))
    yield counts
    handle.remove()


@pytest.fixture(scope="module")
def rows():
    scenes = load_scenes("test", 3)
    first = {}
    for i, scene in enumerate(scenes["scene"]):
        first.setdefault(scene, i)
    starts = list(first.values())
    return [
        scenes[i] for start in starts for i in (start, start + 1)
    ]  # two questions about each of three images


@torch.no_grad()
def test_features_and_logits_are_those_of_the_batch(base, rows, runs):
    model, processor = base
    inputs = prompt_inputs(model, processor, rows)
    expected = encode_images(model, inputs)
    runs.clear()
    images = EncodedImages()
    encoded = images.encode(model, inputs)
    assert len(runs) == 3
    assert sorted(encoded) == sorted(expected)
    both = [one["mm_encoder_outputs"]["image"].pooler_output for one in (encoded, expected)]
    assert len(both[0]) == len(both[1]) == 6
    for alone, in_batch in zip(*both, strict=True):
        torch.testing.assert_close(alone, in_batch, atol=1e-5, rtol=1e-4)
    with attach(model, VisionSchedule(enter=2, exit=9)):
        logits = [model(**fresh_inputs(one)).logits for one in (encoded, expected)]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-3)
    again = images.encode(twin(model), prompt_inputs(model, processor, rows[1:4]))
    assert len(runs) == 3  # nor for another model over the same weights
    assert torch.equal(again["mm_encoder_outputs"]["image"].pooler_output[0], both[0][1])


@torch.no_grad()
def test_features_do_not_depend_on_the_batch(base, rows):
    model, processor = base
    alone = EncodedImages().encode(model, prompt_inputs(model, processor, rows[2:3]))
    among = EncodedImages().encode(model, prompt_inputs(model, processor, rows))
    assert torch.equal(
        alone["mm_encoder_outputs"]["image"].pooler_output[0],
        among["mm_encoder_outputs"]["image"].pooler_output[2],
    )


@torch.no_grad()
def test_what_is_kept_is_bounded_and_the_oldest_goes(base, rows, runs):
    model, processor = base
    images = EncodedImages(limit=1)
    runs.clear()
    images.encode(model, prompt_inputs(model, processor, rows[::2]))
    assert len(runs) == 3 and len(images.features) == 1
    images.encode(model, prompt_inputs(model, processor, rows[4:5]))
    assert len(runs) == 3  # the last one is still there
    images.encode(model, prompt_inputs(model, processor, rows[:1]))
    assert len(runs) == 4


def test_another_encoder_has_features_of_its_own(base):
    model, _ = base
    other, _ = load_base("embedded", dtype=torch.float32)
    assert vision_weights(model) == vision_weights(twin(model)) != vision_weights(other)
    student = get_peft_model(
        twin(model), LoraConfig(target_modules=["q_proj"], modules_to_save=["multi_modal_projector"])
    )
    on = vision_weights(student)
    with student.disable_adapter():
        off = vision_weights(student)
    assert on != off


@torch.no_grad()
def test_students_that_share_a_base_have_features_of_their_own(base, rows):
    """Each has trained the projector; one encoder after the other is on, in any order."""
    model, processor = base
    settings = LoraConfig(target_modules=["q_proj"], modules_to_save=["multi_modal_projector"])
    students = get_peft_model(twin(model), settings, adapter_name="first")
    students.add_adapter("second", settings)
    for name, weight in students.named_parameters():
        if "modules_to_save.second" in name:
            weight.copy_(weight + 0.1)
    inputs = prompt_inputs(model, processor, rows[:1])
    expected, images = {}, EncodedImages()
    for name in ("first", "second"):
        students.set_adapter(name)
        expected[name] = encode_images(students, inputs)["mm_encoder_outputs"]["image"].pooler_output[0]
    assert not torch.allclose(expected["first"], expected["second"], atol=1e-2)
    for name in ("first", "second", "first"):
        students.set_adapter(name)
        output = images.encode(students, inputs)["mm_encoder_outputs"]["image"].pooler_output[0]
        torch.testing.assert_close(output, expected[name], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_prompt_without_an_image_and_patches_in_one_tensor_go_the_usual_way(base, rows):
    model, processor = base
    blind = prompt_inputs(model, processor, [without_image(rows[0])])
    assert "mm_encoder_outputs" not in EncodedImages().encode(model, blind)
    packed = {"pixel_values": torch.ones(12, 4), "image_grid_thw": torch.ones(2, 3)}
    assert rows_of_images(packed) is None

    class Encoder(nn.Module):
        def get_image_features(self, pixel_values, image_grid_thw, return_dict):
            return SimpleNamespace(rows=len(pixel_values))

    encoder = Encoder()
    encoder.base_model = encoder
    output = EncodedImages().encode(SimpleNamespace(base_model=encoder), packed)
    assert output["mm_encoder_outputs"]["image"].rows == 12


def test_a_comparison_encodes_an_image_once_for_all_questions_and_systems():
    student, questions = evaluated_student.student(), evaluated_student.questions()
    runs = []
    tower = student.model.get_base_model().model.vision_tower
    handle = tower.register_forward_hook(lambda module, args, output: runs.append(1))
    answer_questions(
        model=student.model.eval(),
        processor=student.processor,
        attachment=student.attachment,
        systems=evaluated_student.SYSTEMS,
        task=evaluated_student.task(questions),
        batch_size=3,
    )
    handle.remove()
    assert len(runs) == 2 * len(set(questions["scene"]))  # the student has trained its projector


@pytest.fixture
def read(monkeypatch):
    """How many rows each call of `prompt_inputs` reads."""
    counts = []

    def counted(model, processor, rows):
        counts.append(len(rows))
        return prompt_inputs(model, processor, rows)

    monkeypatch.setattr(encoded_module, "prompt_inputs", counted)
    return counts


def test_prompts_are_read_once_for_all_systems_and_for_those_asked_later(read):
    """The second half of a comparison, its controls, reads no prompt and encodes no image again."""
    student, questions = evaluated_student.student(), evaluated_student.questions()
    runs, prompts = [], EncodedPrompts()
    tower = student.model.get_base_model().model.vision_tower
    handle = tower.register_forward_hook(lambda module, args, output: runs.append(1))
    options = {
        "model": student.model.eval(),
        "processor": student.processor,
        "attachment": student.attachment,
        "task": evaluated_student.task(questions),
        "batch_size": 3,
    }
    first = answer_questions(**options, systems=evaluated_student.SYSTEMS, prompts=prompts)
    batches, encoded = -(-len(questions) // 3), len(runs)
    assert sum(read) == len(questions) and len(read) == batches  # base and student, which encode apart
    later = {key: evaluated_student.SYSTEMS[key] for key in ("pruned", "student")}
    second = answer_questions(**options, systems=later, prompts=prompts)
    handle.remove()
    assert len(read) == batches and len(runs) == encoded
    assert second == {key: first[key] for key in later}
    for key, expected in evaluated_student.naive().items():
        assert [answer.prediction for answer in first[key]] == [text for text, _ in expected]


def equal(first, second):
    pair = [one.pop("mm_encoder_outputs")["image"].pooler_output for one in (first, second)]
    features = all(torch.equal(*both) for both in zip(*pair, strict=True))
    assert sorted(first) == sorted(second)
    return features and all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def test_what_was_read_serves_the_same_prompts_in_the_same_form_alone(base, rows, read):
    model, processor = base
    prompts = EncodedPrompts()
    fresh = EncodedImages().encode(model, prompt_inputs(model, processor, rows[:2]))
    assert equal(prompts.encoded(model, processor, rows[:2], "a"), dict(fresh))
    assert equal(prompts.encoded(model, processor, rows[:2], "a"), dict(fresh))
    assert read == [2]
    prompts.encoded(model, processor, rows[2:4], "b")
    assert equal(prompts.encoded(twin(model), processor, rows[:2], "a"), dict(fresh))
    assert read == [2, 2]  # of "a" features are there, of pixels none
    _, other = load_base("embedded", dtype=torch.float32)  # another object that reads as the first does
    assert equal(prompts.encoded(model, other, rows[:2], "a"), dict(fresh))
    assert read == [2, 2]
    _, brighter = load_base("embedded", dtype=torch.float32)
    brighter.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert not equal(prompts.encoded(model, brighter, rows[:2], "a"), dict(fresh))
    assert read == [2, 2, 2]
    blind = [without_image(row) for row in rows[:2]]
    assert "mm_encoder_outputs" not in prompts.encoded(model, processor, blind, ("a", "blind"))


@torch.no_grad()
def test_prompts_whose_features_are_gone_are_read_again(base, rows, read, runs):
    model, processor = base
    prompts = EncodedPrompts(limit=1)
    first = prompts.encoded(model, processor, rows[:2], "a")
    prompts.encoded(model, processor, rows[2:4], "b")
    runs.clear()
    again = prompts.encoded(model, processor, rows[:2], "a")
    assert read == [2, 2, 2] and len(runs) == 1 and equal(first, again)


def test_the_head_gets_rows_that_lie_side_by_side():
    head = nn.Linear(4, 3)
    states = torch.randn(5, 7, 4)[:, -1:]
    strides = []
    head.register_forward_hook(lambda module, args, output: strides.append(args[0].stride()))
    with torch.no_grad():
        expected = head(states)
        with dense_rows(head):
            assert torch.equal(head(states), expected)
            head(states[:1])  # one row is contiguous for torch, whatever its strides
        head(states)
    assert strides == [(28, 4, 1), (4, 4, 1), (4, 4, 1), (28, 4, 1)]
