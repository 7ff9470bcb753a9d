"""Labels of every family's chat, marked by hand: each answer with the token that ends it, and nothing else."""

import pytest
from helpers.processors import PROCESSORS, STOP, processor, vision_id
from PIL import Image

from latefusion.data.collate import IGNORE, Collator

IMG = {"type": "image"}


def turn(role, *parts):
    return {
        "role": role,
        "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts],
    }


SEEN = {
    "messages": [
        turn("user", IMG, "how many?"),
        turn("assistant", "2"),
        turn("user", "what color?"),
        turn("assistant", "red."),
    ],
    "images": [Image.new("RGB", (28, 28))],
}
TEXT = {"messages": [turn("user", "is it red?"), turn("assistant", "yes")], "images": []}

# "v*4" stands for 4 vision tokens, "|" for a line break; what is learnt stands in [ ]
BY_HAND = {
    "embedded": (
        "<bos> v*4 <user> how many ? <assistant> [2 <eos>] <user> what color ? <assistant> [red <unk> <eos>]",
        "<bos> <user> is <unk> red ? <assistant> [yes <eos>]",
    ),
    "llava": (
        "USER : v*4 | how many ? ASSISTANT : [2 <eos>] USER : what color ? ASSISTANT : [red . <eos>]",
        "USER : is it red ? ASSISTANT : [yes <eos>]",
    ),
    "llava_next": (  # a base view, and one of a grid with its line ends
        "( INST ) v*10 | how many ? ( / INST ) [2 <eos>] ( INST ) what color ? ( / INST ) [red . <eos>]",
        "( INST ) is it red ? ( / INST ) [yes <eos>]",
    ),
    "llava_onevision": (
        "<|im_start|> user | v*10 how many ? <|im_end|> | <|im_start|> assistant | [2 <|im_end|>] | "
        "<|im_start|> user | what color ? <|im_end|> | <|im_start|> assistant | [red . <|im_end|>] |",
        "<|im_start|> user | is it red ? <|im_end|> | <|im_start|> assistant | [yes <|im_end|>] |",
    ),
    "qwen2_5_vl": (
        "<|im_start|> system | You are a helpful assistant . <|im_end|> | <|im_start|> user | <|vision_start|> v*4 "
        "<|vision_end|> how many ? <|im_end|> | <|im_start|> assistant | [2 <|im_end|>] | <|im_start|> user | "
        "what color ? <|im_end|> | <|im_start|> assistant | [red . <|im_end|>] |",
        "<|im_start|> system | You are a helpful assistant . <|im_end|> | <|im_start|> user | is it red ? "
        "<|im_end|> | <|im_start|> assistant | [yes <|im_end|>] |",
    ),
    "qwen3_vl": (
        "<|im_start|> user | <|vision_start|> v*4 <|vision_end|> how many ? <|im_end|> | <|im_start|> assistant | "
        "[2 <|im_end|>] | <|im_start|> user | what color ? <|im_end|> | <|im_start|> assistant | [red . <|im_end|>] |",
        "<|im_start|> user | is it red ? <|im_end|> | <|im_start|> assistant | [yes <|im_end|>] |",
    ),
    "internvl": (
        "<|im_start|> user | <img> v*4 </img> | how many ? <|im_end|> | <|im_start|> assistant | [2 <|im_end|>] | "
        "<|im_start|> user | what color ? <|im_end|> | <|im_start|> assistant | [red . <|im_end|>] |",
        "<|im_start|> user | is it red ? <|im_end|> | <|im_start|> assistant | [yes <|im_end|>] |",
    ),
    "smolvlm": (
        "<|im_start|> User : <fake_token_around_image> <global-img> v*4 <fake_token_around_image> how many ? "
        "<end_of_utterance> | Assistant : [2 <end_of_utterance>] | User : what color ? <end_of_utterance> | "
        "Assistant : [red . <end_of_utterance>] |",
        "<|im_start|> User : is it red ? <end_of_utterance> | Assistant : [yes <end_of_utterance>] |",
    ),
    "gemma3": (
        "<bos> <start_of_turn> user | | | <start_of_image> v*4 <end_of_image> | | how many ? <end_of_turn> | "
        "<start_of_turn> model | [2 <end_of_turn>] | <start_of_turn> user | what color ? <end_of_turn> | "
        "<start_of_turn> model | [red . <end_of_turn>] |",
        "<bos> <start_of_turn> user | is it red ? <end_of_turn> | <start_of_turn> model | [yes <end_of_turn>] |",
    ),
}


def shown(family: str, batch: dict, row: int) -> str:
    """A row in the notation above."""
    real = int(batch["attention_mask"][row].sum())
    ids, labels = batch["input_ids"][row, :real], batch["labels"][row]
    assert (labels[real:] == IGNORE).all()
    words, vision, learning = [], 0, False
    for token, label in zip([*ids.tolist(), None], [*labels[:real].tolist(), IGNORE], strict=True):
        if token == vision_id(family):
            assert label == IGNORE
            vision += 1
            continue
        if vision:
            words, vision = [*words, f"v*{vision}"], 0
        if learning and label == IGNORE:
            words[-1] += "]"
        if token is not None:
            word = {"\n": "|", "[": "(", "]": ")"}.get(
                written := processor(family).tokenizer.convert_ids_to_tokens(token), written
            )
            assert label in (IGNORE, token)
            words.append("[" + word if label != IGNORE and not learning else word)
        learning = label != IGNORE
    return " ".join(words)


@pytest.mark.parametrize("family", PROCESSORS)
def test_labels_are_those_marked_by_hand(family):
    collate = Collator(processor=processor(family), vision_ids=[vision_id(family)], stop=[STOP[family]])
    seen, text = BY_HAND[family]
    alone = collate([SEEN])
    assert shown(family, alone, 0) == seen
    first = int((alone["labels"][0] != -100).nonzero()[0])
    assert alone["queries"].tolist() == [[first - 1]]  # the token before the first answer ranks for all turns
    for samples, order in (
        ([SEEN, TEXT], (seen, text)),
        ([TEXT, SEEN], (text, seen)),
        ([TEXT, TEXT], (text, text)),
    ):
        batch = collate(samples)
        assert (shown(family, batch, 0), shown(family, batch, 1)) == order
    assert "pixel_values" not in batch


@pytest.mark.parametrize("family", PROCESSORS)
def test_several_images_in_several_turns_become_as_many_features_as_placeholders(family):
    """What the family's model is going to count is counted by its own image features in `test_model_recipes.py`."""
    collate = Collator(processor=processor(family), vision_ids=[vision_id(family)], stop=[STOP[family]])
    images = [Image.new("RGB", (40, 30)), Image.new("RGB", (30, 50)), Image.new("RGB", (28, 28))]
    messages = [
        turn("user", IMG, "how many?", IMG),
        turn("assistant", "2"),
        turn("user", IMG, "what color?"),
        turn("assistant", "red."),
    ]
    batch = collate([TEXT, {"messages": messages, "images": images}, SEEN])
    assert [shown(family, batch, row).count("v*") > 0 for row in range(3)] == [False, True, True]
    learnt = [word for word in shown(family, batch, 1).split("[")[1:]]
    assert len(learnt) == 2 and learnt[0].startswith("2 ") and learnt[1].startswith("red ")
