"""What the plugin of lmms-eval makes of a task: chats, settings of `generate`, where an answer stops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.protocol import ChatMessages
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteria

from latefusion.models.base_model import compute_dtype

GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None}
Chat = tuple[
    list[dict[str, Any]], list[Image.Image]
]  # messages as chat templates take them, and their pictures


class Pair(GenerationResult):
    """A loss, and whether the answer is the greedy one; unpacks as the two.

    The evaluator of lmms-eval 0.7 takes what `loglikelihood` returns for generated text, and makes a text of a plain
    pair; of this it takes the pair out.
    """

    def __init__(self, loss: float, greedy: bool):
        super().__init__(text=(loss, greedy))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.text)


class Until(StoppingCriteria):
    """Stop an answer as soon as it holds one of the texts.

    Args:
        prompt: tokens that are there before the answers.
    """

    def __init__(self, stops: Sequence[str], processor: Any, prompt: int):
        self.stops, self.processor, self.prompt = stops, processor, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
        said = self.processor.batch_decode(input_ids[:, self.prompt :], skip_special_tokens=True)
        return torch.tensor(
            [any(stop in text for stop in self.stops) for text in said], device=input_ids.device
        )


def user(text: str, pictures: Sequence[Image.Image]) -> Chat:
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]
    return [{"role": "user", "content": content}], [picture.convert("RGB") for picture in pictures]


def chat_of(messages: list[Any]) -> Chat:
    chat = ChatMessages(messages=messages)
    return chat.to_hf_messages(), [image.convert("RGB") for image in chat.extract_media()[0]]


def generation(settings: dict[str, Any]) -> dict[str, Any]:
    """A task's settings as `generate` takes them; temperature 0 is greedy."""
    known = {"max_new_tokens", "temperature", "top_p", "num_beams", "do_sample", "min_new_tokens"}
    found = {"max_new_tokens": 256} | {name: value for name, value in settings.items() if name in known}
    if not found.get("do_sample") or not found.get("temperature"):
        found |= {**GREEDY, "num_beams": settings.get("num_beams", 1)}
    return found


def cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.partition(stop)[0] if stop else text
    return text.strip()


def dtype_of(name: str | None, device: torch.device) -> torch.dtype:
    kinds = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name is not None and name not in kinds:
        raise ValueError(f"dtype={name} is unknown; use {', '.join(kinds)}.")
    return kinds[name] if name else compute_dtype(device)
