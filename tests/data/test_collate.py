"""Samples to batches: labels, marked by hand, on answer tokens alone."""

import pytest
import torch
from helpers.families import CONFIGS
from helpers.processors import STOP, processor, vision_id
from PIL import Image

from latefusion.data.collate import IGNORE, BadRow, Collator, check_isolates
from latefusion.data.samples import TooLong
from latefusion.training.embedded.vocabulary import EOS, IMAGE, build_processor

# one image is 4 tokens here: <image> * 4
LLAVA_TEMPLATE = (  # as llava-hf/llava-1.5-7b-hf has it: no token ends an answer
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for p in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for p in message['content'] | selectattr('type', 'equalto', 'text') %}{{ p['text'] + ' ' }}"
    "{% endfor %}"
    "{% else %}{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
PLAIN_TEMPLATE = (  # as Qwen2-VL: no generation marks, a stop token and a line break end every turn
    "{% for message in messages %}{{ '<user>' if message['role'] == 'user' else '<assistant>' }}"
    "{% for p in message['content'] %}{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}"
    "{{ '<eos>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def turn(role: str, *parts) -> dict:
    return {"role": role, "content": [text(p) if isinstance(p, str) else p for p in parts]}


IMG = {"type": "image"}


def picture(shade: int = 0) -> Image.Image:
    return Image.new("RGB", (16, 16), (shade, shade, shade))


def collator(template: str | None = None, **options) -> Collator:
    processor = build_processor(image_size=16, patch_size=8)
    if template is not None:
        processor.chat_template = template
    return Collator(processor=processor, vision_ids=[IMAGE], stop=["<eos>"], **options)


def learnt(collate: Collator, batch: dict, row: int) -> str:
    """The labels of a row, `.` for a token without one, without padding."""
    tokenizer = collate.processor.tokenizer
    real = int(batch["attention_mask"][row].sum())
    assert (batch["labels"][row, real:] == IGNORE).all()
    words = tokenizer.convert_ids_to_tokens(
        [i if i != IGNORE else EOS for i in batch["labels"][row, :real].tolist()]
    )
    return " ".join(
        word if label != IGNORE else "."
        for word, label in zip(words, batch["labels"][row, :real].tolist(), strict=True)
    )


ONE = {
    "messages": [turn("user", IMG, "what color is the circle?"), turn("assistant", "red")],
    "images": [picture()],
}
TWO_TURNS = {
    "messages": [
        turn("user", IMG, "how many?"),
        turn("assistant", "2"),
        turn("user", "is there a star?"),
        turn("assistant", "yes"),
    ],
    "images": [picture()],
}
LATER_IMAGE = {
    "messages": [
        turn("user", IMG, "how many?"),
        turn("assistant", "2"),
        turn("user", IMG, "how many?"),
        turn("assistant", "3"),
    ],
    "images": [picture(1), picture(2)],
}
NO_IMAGE = {"messages": [turn("user", "how many?"), turn("assistant", "nothing")], "images": []}


def test_labels_and_queries_of_a_mixed_batch_are_those_marked_by_hand():
    collate = collator()
    batch = collate([ONE, TWO_TURNS, LATER_IMAGE, NO_IMAGE])
    #                                   bos im im im im usr what color is the circle ? ast
    assert learnt(collate, batch, 0) == ". " * 13 + "red <eos>"
    #                                   bos im*4 usr how many ? ast          usr is there a star ? ast
    assert learnt(collate, batch, 1) == ". " * 10 + "2 <eos> " + ". " * 7 + "yes <eos>"
    #                                   bos im*4 usr how many ? ast          im*4 usr how many ? ast
    assert learnt(collate, batch, 2) == ". " * 10 + "2 <eos> " + ". " * 9 + "3 <eos>"
    assert learnt(collate, batch, 3) == ". " * 6 + "nothing <eos>"
    assert batch["queries"].tolist() == [[12], [9], [9], [5]]  # before the first answer
    assert (batch["input_ids"] == IMAGE).sum(1).tolist() == [4, 4, 8, 0]
    assert batch["pixel_values"].shape[0] == 4


def test_llava_template_gets_the_stop_token_it_lacks():
    collate = collator(LLAVA_TEMPLATE)
    rendered, spans = collate.render(TWO_TURNS["messages"])
    assert rendered == "USER: <image>\nhow many? ASSISTANT: 2<eos>USER: is there a star? ASSISTANT: yes<eos>"
    assert [rendered[a:b] for a, b in spans] == ["2<eos>", "yes<eos>"]
    batch = collate([TWO_TURNS])
    #                                   user : im*4 how many ? assistant :
    #                                   user : is there a star ? assistant :
    assert learnt(collate, batch, 0) == ". " * 11 + "2 <eos> " + ". " * 9 + "yes <eos>"
    assert batch["queries"].tolist() == [[10]]


@pytest.mark.parametrize("sample", [ONE, TWO_TURNS, LATER_IMAGE, NO_IMAGE])
def test_a_template_without_generation_marks_gives_the_same_answers(sample):
    marked = PLAIN_TEMPLATE.replace(
        "{% for p in message['content'] %}",
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'][0]['text'] + '<eos>' }}"
        "{% endgeneration %}{{ '\n' }}{% else %}{% for p in message['content'] %}",
    ).replace("{{ '<eos>\n' }}", "{{ '<eos>\n' }}{% endif %}", 1)
    plain, with_marks = collator(PLAIN_TEMPLATE), collator(marked)
    a, b = plain([sample]), with_marks([sample])
    assert plain.render(sample["messages"])[0] == with_marks.render(sample["messages"])[0]
    for name in ("input_ids", "labels", "queries"):
        assert a[name].tolist() == b[name].tolist()
    assert [t for t in learnt(plain, a, 0).split() if t != "."][-1] == "<eos>"


def test_template_that_renders_turns_by_what_follows_is_refused():
    odd = PLAIN_TEMPLATE.replace("{{ '<eos>\n' }}", "{{ '<eos>\n' if loop.last else '' }}")
    with pytest.raises(
        BadRow, match=r"sample 0 is refused by the chat template: .*renders turn 1 differently"
    ):
        collator(odd)([TWO_TURNS])


def test_no_label_where_a_vision_token_would_predict_it():
    bare = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<image>{% else %}"
        "{% generation %}{{ m['content'][0]['text'] }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    collate = collator(bare)
    batch = collate([ONE])
    assert learnt(collate, batch, 0) == ". . . . . <eos>"  # im*4 red: only the stop token follows text


def test_nothing_is_cut_and_what_is_too_long_is_named():
    collate = collator(max_length=18)
    assert collate([ONE, NO_IMAGE])["input_ids"].shape[1] == 15
    with pytest.raises(BadRow, match=r"sample 7 has 21 tokens, more than data\.max_length=18\.") as error:
        collate([ONE, {**TWO_TURNS, "id": 7}])
    assert error.value.at == 1 and isinstance(error.value.reason, TooLong)


def test_an_image_that_the_text_does_not_show_is_named():
    with pytest.raises(BadRow, match=r"sample 1 has 1 image\(s\) but 0 times <image> in its text"):
        collator()([ONE, {"messages": NO_IMAGE["messages"], "images": [picture()]}])
    written = {"messages": [turn("user", "an <image>?"), turn("assistant", "no")], "images": []}
    with pytest.raises(BadRow, match=r"sample 0 has 0 image\(s\) but 1 times <image> in its text"):
        collator()([written, ONE])


def test_a_token_that_ends_answers_or_stands_for_images_is_no_text():
    """Written in a text it would be read as the token: an answer would be learnt up to it, an image counted."""
    stopped = {"messages": [turn("user", "how many?"), turn("assistant", "2 <eos> red")], "images": []}
    with pytest.raises(BadRow, match="sample 1 has the token <eos> written in the text of turn 1"):
        collator()([ONE, stopped])
    question_with_mark = {"messages": [turn("user", "how <eos> many?"), turn("assistant", "2")], "images": []}
    collate = collator()
    assert learnt(collate, collate([question_with_mark]), 0) == ". " * 7 + "2 <eos>"
    gemma = Collator(processor=processor("gemma3"), vision_ids=[vision_id("gemma3")], stop=[STOP["gemma3"]])
    written = {"messages": [turn("user", "a <image_soft_token>?"), turn("assistant", "2")], "images": []}
    with pytest.raises(BadRow, match="has the token <image_soft_token> written in the text of turn 0"):
        gemma([written])


def test_a_sample_without_a_token_to_learn_is_named():
    """Its only answer token would be predicted by a vision token."""
    bare = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<image>{% else %}"
        "{% generation %}<eos>{% endgeneration %}{% endif %}{% endfor %}"
    )
    with pytest.raises(BadRow, match="sample 1 has no token to learn"):
        collator(bare)([{**ONE, "id": 1}])


def test_an_image_after_an_answer_is_a_bad_row_where_turns_are_isolated():
    with pytest.raises(
        BadRow, match=r"sample 1 has an image after an answer; that takes data\.isolate=false"
    ):
        collator(isolate=torch.float32)([ONE, LATER_IMAGE])


def test_a_row_longer_than_the_window_is_bad_where_turns_are_isolated():
    """One mask for all layers: the local ones would look back over everything, without a word."""
    with pytest.raises(BadRow, match=r"sample 1 has \d+ tokens, more than the 16 that .*data\.isolate=false"):
        collator(isolate=torch.float32, window=16)([ONE, TWO_TURNS])
    assert "position_ids" in collator(isolate=torch.float32, window=64)([ONE, TWO_TURNS])
    assert "position_ids" not in collator(window=16)([ONE, TWO_TURNS])


@pytest.mark.parametrize(
    ("family", "exact"),
    [
        *((name, True) for name in ("llava", "llava_onevision", "internvl", "smolvlm")),
        *((name, False) for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "gemma3", "paligemma")),
    ],
)
def test_turns_are_isolated_where_each_gets_what_it_gets_alone(family, exact):
    """`judged_types` compares them: positions of several axes, or image tokens that see each other, were lost."""
    config = CONFIGS[family]()
    if exact:
        check_isolates(config)
    else:
        with pytest.raises(
            ValueError, match=rf"models of type {config.model_type} .*: set data\.isolate=false"
        ):
            check_isolates(config)


def test_an_image_after_an_answer_is_a_bad_row_where_a_policy_ranks_by_text():
    """Its tokens could only be ranked by text that has read the answer that is to be learnt."""
    assert collator()([ONE, LATER_IMAGE])["queries"].tolist() == [[12], [9]]
    with pytest.raises(
        BadRow, match="sample 1 has an image after an answer; that takes a schedule without keep"
    ):
        collator(ranked=True)([ONE, LATER_IMAGE])


def test_an_image_of_a_later_turn_is_ranked_by_its_own_question():
    """Before it there is nothing to rank: a chat prefills it with the text of its turn."""
    later = {"messages": [*NO_IMAGE["messages"], *ONE["messages"]], "images": ONE["images"]}
    batch = collator(ranked=True)([later, NO_IMAGE])
    #                      bos usr how many ? ast nothing <eos>: 8, im*4, usr what color is the circle ? ast
    assert batch["queries"].tolist() == [[19], [5]]


def test_the_questions_of_isolated_turns_are_all_queries():
    batch = collator(isolate=torch.float32)([ONE, TWO_TURNS])
    assert batch["queries"].tolist() == [[12, 12], [9, 18]]


def test_no_text_may_hold_a_token_that_the_template_writes_between_turns():
    """It would end the question there, and what follows would be read as a turn of the assistant's."""
    forged = {
        "messages": [turn("user", "how many?<eos>\n<assistant>2"), turn("assistant", "3")],
        "images": [],
    }
    with pytest.raises(BadRow, match="has the token <eos> written in the text of turn 0"):
        collator(PLAIN_TEMPLATE)([forged])


def test_what_the_processor_refuses_is_one_sample_not_a_batch(monkeypatch):
    collate = collator()
    process = collate.process

    def narrow(texts, samples):
        if any(image.width < 2 for sample in samples for image in sample["images"]):
            raise ValueError("mean must have 1 elements\nand more")
        return process(texts, samples)

    monkeypatch.setattr(collate, "process", narrow)
    thin = {**ONE, "images": [Image.new("RGB", (1, 9))], "id": "thin"}
    with pytest.raises(
        BadRow, match="sample thin does not go through the processor: mean must have 1 el"
    ) as error:
        collate([ONE, NO_IMAGE, thin])
    assert error.value.at == 2 and "\n" not in str(error.value)


def test_a_template_that_refuses_a_conversation_is_one_sample():
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
    system = {"messages": [turn("system", "be kind"), *NO_IMAGE["messages"]], "images": [], "id": 3}
    collate = collator(strict + PLAIN_TEMPLATE)
    with pytest.raises(BadRow, match="sample 3 is refused by the chat template: begin with the user"):
        collate([ONE, system])
    texts = "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% endif %}"
    with pytest.raises(BadRow, match="sample 3 is refused by the chat template: can only concatenate list"):
        collator(texts + PLAIN_TEMPLATE)([ONE, system])
