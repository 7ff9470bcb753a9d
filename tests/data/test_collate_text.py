"""Whatever is said, in any script: the labels are the answers and the token that ends each, byte by byte."""

import pytest
from helpers.processors import CHATML
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from latefusion.data.collate import IGNORE, Collator
from latefusion.training.embedded.vocabulary import build_processor

SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>", "<image>"]
SEEN = "the cat sat on the mat. how many? שלום مرحبا 你好 👩‍👩‍👧 é ü\n\n" * 9


def collator_over(backend: Tokenizer, trainer) -> Collator:
    """Of LLaVA's processor, with this tokenizer trained on a few words."""
    backend.train_from_iterator([SEEN], trainer)
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in SPECIAL])
    processor = build_processor(image_size=16, patch_size=8)
    processor.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    processor.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    processor.chat_template = CHATML.replace("{{ IMAGE }}", "{{ '<image>' }}")
    return Collator(processor=processor, vision_ids=[processor.image_token_id], stop=["<|im_end|>"])


def byte_level() -> Collator:
    """As Qwen's, Llama-3's: words of bytes, so that a token may be part of a character."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return collator_over(backend, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))


def byte_fallback() -> Collator:
    """As Llama-2's and Gemma's: words with their blank before them, bytes where a character is not known."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    marks = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    return collator_over(backend, trainers.BpeTrainer(vocab_size=340, special_tokens=marks))


COLLATORS = {"byte level": byte_level(), "byte fallback": byte_fallback()}
# Not drawn: tokens that no text may hold, and a line break that a tokenizer may join with the template's before it.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8) | st.sampled_from(
    ["the cat", "👩‍👩‍👧", "שלום", "مرحبا 2", "e\u0301", "\ufb01", "a\u202eb", "\u200b", " cat ", "你好 mat"]
)


def plain(text: str) -> bool:
    return bool(text.strip()) and not text.startswith("\n") and not any(mark in text for mark in SPECIAL)


@pytest.mark.parametrize("kind", COLLATORS)
@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(TEXTS, TEXTS).filter(lambda texts: all(map(plain, texts))), min_size=1, max_size=3))
def test_labels_spell_the_answers(kind, exchanges):
    collate = COLLATORS[kind]
    messages = []
    for question, answer in exchanges:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    messages[0]["content"].insert(0, {"type": "image"})
    batch = collate([{"messages": messages, "images": [Image.new("RGB", (16, 16))]}])
    labels, tokenizer = batch["labels"][0], collate.processor.tokenizer
    learnt = tokenizer.decode(labels[labels != IGNORE])
    assert learnt == "".join(f"{answer}<|im_end|>" for _, answer in exchanges)
    assert int((batch["input_ids"] == collate.processor.image_token_id).sum()) == 4
