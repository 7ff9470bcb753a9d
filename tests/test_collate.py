"""Samples to batches: labels, marked by hand, on answer tokens alone; sources to samples."""

import json

import datasets
import pytest
from PIL import Image

from latefusion.data import sources
from latefusion.data.collate import IGNORE, Collator
from latefusion.models.embedded.vocabulary import EOS, IMAGE, build_processor

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
    """The labels of a row, `.` where there is none, padding left out."""
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
    assert batch["queries"].tolist() == [[12, 12], [9, 18], [9, 20], [5, 5]]
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
    assert batch["queries"].tolist() == [[10, 21]]


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
    with pytest.raises(ValueError, match="renders turn 1 differently"):
        collator(odd)([TWO_TURNS])


def test_no_label_where_a_vision_token_would_predict_it():
    bare = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<image>{% else %}"
        "{% generation %}{{ m['content'][0]['text'] }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    collate = collator(bare)
    batch = collate([ONE])
    assert learnt(collate, batch, 0) == ". . . . . <eos>"  # im*4 red: only the stop token follows text


def test_cutting_drops_text_but_never_a_placeholder():
    collate = collator(max_length=12)
    batch = collate([TWO_TURNS])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape == (1, 12)
    assert learnt(collate, batch, 0) == ". " * 10 + "2 <eos>"
    with pytest.raises(ValueError, match=r"sample 7 has vision tokens up to position 15.*data.max_length=12"):
        collate([{**LATER_IMAGE, "id": 7}])


# ---------------------------------------------------------------------------- sources


def test_scenes_give_one_question_a_row():
    rows = sources.scenes("validation", n_scenes=2)
    sample = rows[0]
    (user, assistant), (image,) = sample["messages"], sample["images"]
    assert user["content"] == [IMG, text(sample["question"])] and image.size == (96, 96)
    assert assistant == turn("assistant", sample["answer"])


@pytest.fixture
def llava(tmp_path):
    picture(9).save(tmp_path / "a.png")
    picture(8).save(tmp_path / "b.png")

    def write(*records: dict) -> str:
        path = tmp_path / "chat.json"
        path.write_text(json.dumps(list(records)))
        return str(path)

    return write, tmp_path


def said(*values: str) -> list[dict]:
    return [{"from": who, "value": v} for who, v in zip(["human", "gpt"] * 2, values, strict=False)]


def test_llava_json_places_images_where_they_stand(llava):
    write, folder = llava
    path = write(
        {"id": "x", "image": "a.png", "conversations": said("<image>\nwhat is it?", "red")},
        {
            "id": 5,
            "image": ["a.png", "b.png"],
            "conversations": said("what is it?\n<image>", "red", "and<image>?", "no"),
        },
        {"id": "z", "conversations": said("how many?", "2")},
    )
    rows = sources.llava(path, str(folder))
    assert rows[0]["messages"] == [turn("user", IMG, "what is it?"), turn("assistant", "red")]
    assert rows[1]["messages"][0] == turn("user", "what is it?", IMG)
    assert rows[1]["messages"][2] == turn("user", "and", IMG, "?")
    assert [image.getpixel((0, 0))[0] for image in rows[1]["images"]] == [9, 8]
    assert rows[2]["images"] == [] and rows[1]["id"] == "5"
    assert collator()([rows[i] for i in range(3)])["pixel_values"].shape[0] == 3


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": 1, "image": "a.png", "conversations": said("what?", "red")}, "has 1 images but 0 <image>"),
        ({"id": 1, "conversations": [{"from": "robot", "value": "x"}]}, "turn from 'robot'"),
    ],
)
def test_llava_json_that_contradicts_itself_is_refused(llava, record, message):
    write, folder = llava
    with pytest.raises(ValueError, match=message):
        sources.llava(write(record), str(folder))


def test_missing_data_is_one_sentence_with_the_fix(llava):
    write, folder = llava
    with pytest.raises(FileNotFoundError, match=r"no conversation file at nowhere\.json; .*data\.path="):
        sources.llava("nowhere.json", None)
    path = write({"id": 1, "image": "c.png", "conversations": said("<image>", "red")})
    with pytest.raises(FileNotFoundError, match=r"no image folder at nowhere; .*data\.images="):
        sources.llava(path, "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no image c\.png in .*data\.images="):
        sources.llava(path, str(folder))


def test_a_saved_data_set_with_messages_and_images(tmp_path):
    features = datasets.Features(
        {
            "messages": [
                {
                    "role": datasets.Value("string"),
                    "content": [{"type": datasets.Value("string"), "text": datasets.Value("string")}],
                }
            ],
            "images": datasets.List(datasets.Image()),
        }
    )
    row = {
        "messages": [turn("user", {"type": "image", "text": None}, "how many?"), turn("assistant", "2")],
        "images": [picture(3)],
    }
    datasets.Dataset.from_list([row], features=features).save_to_disk(tmp_path / "set")
    rows = sources.dataset(str(tmp_path / "set"), split="train")
    assert rows[0]["messages"][0] == turn("user", IMG, "how many?")
    assert collator()([rows[0]])["pixel_values"].shape[0] == 1
    datasets.Dataset.from_list([{"question": "x"}]).save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match=r"no column 'messages' \(it has question\)"):
        sources.dataset(str(tmp_path / "other"), split="train")
    with pytest.raises(FileNotFoundError, match="no data set with a split 'train' at"):
        sources.dataset(str(tmp_path / "nowhere"), split="train")
