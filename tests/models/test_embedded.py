"""The embedded base: its processor, packed training batches, resumable training, shipped weights."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from latefusion.data.scene_questions import TYPES
from latefusion.data.scenes import make_scene, render, split_of
from latefusion.models import locate
from latefusion.models.base_model import load_base
from latefusion.models.locate import EMBEDDED_WEIGHTS
from latefusion.training.embedded import batched_attention as attention
from latefusion.training.embedded.architecture import build_config, build_model
from latefusion.training.embedded.batches import caption, draw, pack, pixels
from latefusion.training.embedded.card import model_card
from latefusion.training.embedded.grounding import grounded_phrases
from latefusion.training.embedded.optimiser import orthogonalise
from latefusion.training.embedded.pseudo_vision import SIDE, patch_labels, sample_patches
from latefusion.training.embedded.record import score
from latefusion.training.embedded.stages import STAGES, Learner
from latefusion.training.embedded.train_base import build_learner, load_finished, run_stage
from latefusion.training.embedded.vocabulary import (
    ASSISTANT,
    BOS,
    EOS,
    IMAGE,
    UNK,
    USER,
    build_processor,
    encode,
    split_words,
)
from latefusion.training.outcomes import summary

TINY = {"tower_width": 32, "tower_layers": 1, "width": 32, "layers": 7, "heads": 2, "mlp": 32}


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def base():
    return load_base("embedded", dtype=torch.bfloat16)


def tiny_learner() -> Learner:
    return build_learner(build_config(**TINY), compiled=False)


def turn(role: str, text: str, image=None) -> dict:
    content = [{"type": "text", "text": text}]
    return {
        "role": role,
        "content": content if image is None else [{"type": "image", "image": image}, *content],
    }


# processor


def test_processor_survives_a_folder(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    scene, questions = make_scene("test", 0)
    prompt = [turn("user", questions[0].question, render(scene)), turn("assistant", questions[0].answer)]
    built, read = (
        p.apply_chat_template([prompt], tokenize=True, return_dict=True, return_tensors="pt")
        for p in (processor, loaded)
    )
    assert all(torch.equal(built[name], read[name]) for name in built) and set(built) == set(read)


def test_a_prompt_is_bos_vision_question(processor):
    scene, questions = make_scene("test", 1)
    for question in questions:
        text = processor.apply_chat_template(
            [turn("user", question.question, render(scene))], add_generation_prompt=True
        )
        inputs = processor(text=[text], images=[render(scene)], return_tensors="pt")
        words = encode(question.question)
        assert inputs["input_ids"][0].tolist() == [BOS] + [IMAGE] * SIDE**2 + [USER, *words, ASSISTANT]
        assert torch.equal(inputs["pixel_values"], pixels([render(scene)], torch.float32))
        assert SIDE**2 / inputs["input_ids"].shape[1] > 0.8  # vision dominates, as in LLaVA


def test_every_question_and_answer_survives_the_tokenizer(processor):
    for index in range(60):
        scene, questions = make_scene("train", index)
        for question in [*questions, caption(scene)]:
            for text in (question.question, question.answer):
                ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
                assert ids == encode(text) and UNK not in ids
                assert processor.tokenizer.decode(ids) == text


def test_users_type_freely(processor):
    ids = processor.tokenizer("Where  is the RED zebra?!", add_special_tokens=False)["input_ids"]
    assert ids == [*encode("where is the red"), UNK, *encode("?"), UNK]


def test_assistant_mask_covers_answers_and_eos(processor):
    image = render(make_scene("test", 0)[0])
    first = [turn("user", "what number is on the sign?", image), turn("assistant", "42")]
    second = [turn("user", "how many red objects?"), turn("assistant", "3")]
    inputs = processor.apply_chat_template(
        [first + second, first],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True},
    )
    answers = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(inputs["input_ids"], inputs["assistant_masks"], strict=True)
    ]
    assert answers == [[*encode("42"), EOS, *encode("3"), EOS], [*encode("42"), EOS]]


# what the base is trained on


@pytest.mark.slow
def test_packed_questions_equal_single_prompts(processor):
    """The stock model on one prompt at a time gives the logits that training computes in one packed row."""
    torch.manual_seed(0)
    learner = Learner(build_model(build_config(**TINY))).eval()
    for parameter in learner.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    drawn = draw(0, range(2))
    packed = pack(drawn, vision_tokens=SIDE**2)
    with torch.no_grad():
        together = learner.see(drawn, packed)[0]
        for row, (scene, questions) in enumerate(drawn):
            for (kind, first, stop), question in zip(packed.spans[row], questions, strict=True):
                text = [turn("user", question.question, render(scene)), turn("assistant", question.answer)]
                inputs = processor(
                    text=[processor.apply_chat_template(text)], images=[render(scene)], return_tensors="pt"
                )
                alone = learner.model(**inputs).logits[0]
                answer = inputs["input_ids"][0, first - stop :]
                assert kind == question.type and packed.labels[row, first:stop].tolist() == answer.tolist()
                torch.testing.assert_close(
                    together[row, first:stop], alone[first - stop - 1 : -1], atol=1e-4, rtol=1e-4
                )


def test_score_wants_every_token_of_an_answer():
    drawn = draw(0, range(1))
    packed = pack(drawn, vision_tokens=SIDE**2)
    logits = torch.nn.functional.one_hot(packed.labels.clamp(min=0), 200).float()
    assert all(right for _, right in score(logits, packed))
    kind, _, stop = packed.spans[0][2]
    logits[0, stop - 1] = 0  # its <eos> is missed
    assert [right for _, right in score(logits, packed)].count(False) == 1
    assert list(score(logits, packed))[2] == (kind, False)


def test_crowded_scenes_get_questions_about_what_crowds_them():
    drawn = draw(0, range(9), crowd_every=3)
    for index, (scene, questions) in enumerate(drawn):
        counts = [int(question.answer) for question in questions if question.type == "counting"]
        if index % 3 == 0:
            assert max(counts) >= 4 and split_of(scene) == "train"
        else:
            assert scene == make_scene("train", index)[0]


def test_patch_labels_agree_with_pixels():
    """The patch in the middle of an item is labelled; patches without a label show background."""
    for index in range(30):
        scene, _ = make_scene("train", index)
        image = np.asarray(render(scene)).astype(int)
        labels = patch_labels(scene).reshape(SIDE, SIDE, 2)
        for item in scene.items:
            x, y = item.column * 32 + 16 + item.dx, item.row * 32 + 16 + item.dy
            assert labels[y // 8, x // 8].min() > 0
        for row, column in zip(*np.nonzero(labels[..., 0].numpy() == 0), strict=True):
            patch = image[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
            assert (patch == scene.background).all(-1).mean() > 0.3


def test_sampled_patches_show_every_item():
    scenes = [make_scene("train", index)[0] for index in range(20)]
    labels, positions = sample_patches(scenes, 40, random.Random(0))
    assert labels.shape == (20, 40, 2) and positions.shape == (20, 40)
    for scene, label, position in zip(scenes, labels, positions, strict=True):
        assert torch.equal(patch_labels(scene)[position], label)
        cells = {(p // SIDE // 4, p % SIDE // 4) for p in position[label[:, 1] > 0].tolist()}
        assert cells >= {(i.row, i.column) for i in (*scene.items, scene.sign)}


def test_phrases_are_grounded_in_the_right_cells():
    for index in range(60):
        scene, questions = make_scene("train", index)
        at = {(i.row, i.column): i for i in scene.items}
        for question in questions:
            words = split_words(question.question)
            phrases = grounded_phrases(scene, words)
            assert phrases
            if question.type == "counting":
                assert sum(phrases[0][1]) == int(question.answer)
            if question.type == "existence":
                assert any(phrases[0][1]) == (question.answer == "yes")
            if question.type == "neighbor":
                cell = phrases[-1][1].index(1.0)
                assert question.answer in (at[divmod(cell, 3)].color, at[divmod(cell, 3)].shape)


# how it is trained


def test_attention_equals_eager():
    torch.manual_seed(0)
    config = build_config(**TINY)
    eager, plain = build_model(config), build_model(config)
    eager.set_attn_implementation("eager")
    plain.set_attn_implementation(attention.NAME)
    results = []
    for model in (eager, plain):
        learner = Learner(model)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.sin(torch.arange(parameter.numel()).float()).view_as(parameter)
        drawn = draw(0, range(2))
        logits, _ = learner.see(drawn, pack(drawn, vision_tokens=SIDE**2))
        logits.float().pow(2).mean().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_head_0_of_layers_0_and_1_starts_on_the_previous_token():
    model = build_model(build_config())
    model.set_attn_implementation("eager")
    ids = torch.tensor([[BOS, USER, *encode("is the red circle left of the blue star?")]])
    weights = model.model.language_model(input_ids=ids, output_attentions=True).attentions
    for layer in (0, 1):
        assert weights[layer][0, 0].diagonal(-1).mean() > 0.5
        assert weights[layer][0, 1].diagonal(-1).mean() < 0.4


def test_orthogonalised_matrices_have_singular_values_near_1():
    for shape in ((3, 20, 50), (2, 50, 20)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.4 and values.max() < 1.3


@pytest.mark.slow
@pytest.mark.parametrize("name", list(STAGES))
def test_an_interrupted_stage_ends_in_the_same_state(name, tmp_path):
    stage = replace(STAGES[name], steps=4, scenes=2)
    states = []
    for folder, stops in (("whole", [4]), ("cut", [1, 3, 4])):
        (tmp_path / folder).mkdir()
        for stop in stops:
            run_stage(tiny_learner(), stage, tmp_path / folder, stop_after=stop, checkpoint_every=2)
        states.append(torch.load(tmp_path / folder / f"{name}.pt", weights_only=True))
    whole, cut = (state["learner"] for state in states)
    assert states[0]["done"] == states[1]["done"] == 4
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    fresh = tiny_learner().state_dict()
    assert any(not torch.equal(whole[key], fresh[key]) for key in whole)


def test_stages_build_on_finished_ones(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"stage decoder is not finished in .*; run it first"):
        load_finished(tiny_learner(), ("decoder",), tmp_path)


# what ships


def test_weights_are_small_and_stock(base):
    files = {path.name: path.stat().st_size for path in EMBEDDED_WEIGHTS.iterdir()}
    assert sum(files.values()) <= 12e6
    assert AutoModelForImageTextToText.from_pretrained(EMBEDDED_WEIGHTS).dtype == torch.bfloat16
    model, _ = base
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert load_base("embedded", dtype=torch.float32)[0].dtype == torch.float32


def test_the_base_sees(base):
    """20 test scenes, one prompt a question, through stock `generate`."""
    model, processor = base
    right: list[bool] = []
    for index in range(20):
        scene, questions = make_scene("test", index)
        turns = [[turn("user", question.question, render(scene))] for question in questions]
        inputs = processor.apply_chat_template(
            turns,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(model.dtype)
        with torch.no_grad():
            tokens = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        answers = processor.batch_decode(tokens, skip_special_tokens=True)
        right += [answer == question.answer for answer, question in zip(answers, questions, strict=True)]
    assert sum(right) / len(right) >= 0.9


def test_the_record_reaches_the_bar_and_the_card_says_what_it_says():
    record = json.loads((EMBEDDED_WEIGHTS / "record.json").read_text())
    assert (EMBEDDED_WEIGHTS / "README.md").read_text() == model_card(record)
    assert len(record["test"]["base"]["by_seed"]) == len(record["test"]["blind"]["by_seed"]) == 3
    for result in record["test"]["base"]["by_seed"].values():
        assert result["all"]["accuracy"] >= 97
        assert min(result[kind]["accuracy"] for kind in TYPES) >= 90
    assert record["test"]["blind"]["pooled"]["all"]["accuracy"] < 40


def test_summary_counts_and_brackets():
    outcomes = {kind: [True, False] for kind in TYPES}
    result = summary(outcomes, TYPES, digits=2)
    assert result["all"]["questions"] == 2 * len(TYPES) and result["all"]["accuracy"] == 50
    assert result["all"]["low"] < 50 < result["all"]["high"]
    assert result["reading"]["high"] - result["reading"]["low"] > result["all"]["high"] - result["all"]["low"]


def test_missing_weights_are_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(locate, "EMBEDDED_WEIGHTS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no weights in .*; check out .*, or train them with"):
        load_base("embedded", dtype=torch.bfloat16)
