"""The plugin of lmms-eval: its hundreds of tasks on a checkpoint, or on any model under a policy.

    pip install 'latefusion[lmms-eval]'
    lmms-eval eval --model latefusion --model_args checkpoint=outputs/late_fusion --tasks gqa,pope
    lmms-eval eval --model latefusion --tasks mme --model_args pretrained=HUB_ID,policy=fastv,keep_ratio=0.25

lmms-eval finds it by the entry point `lmms_eval.models`; latefusion itself never imports this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from peft import PeftModel
from tqdm import tqdm

from latefusion.eval.systems import System, running
from latefusion.models.attach import attach
from latefusion.models.base import load_base
from latefusion.models.policies import named
from latefusion.models.saved import load_student

MANIFEST = ModelManifest(model_id="latefusion", chat_class_path=f"{__name__}.LateFusion")
GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None}


class LateFusion(lmms):
    """A model under a policy, asked by lmms-eval.

    Args:
        checkpoint: folder of a trained student, run with its adapters under its schedule; or pretrained: a base alone
            (`embedded`, a hub id, a folder).
        policy: name of `recipes/policy/`; for a checkpoint None is its own schedule, and another policy runs on its
            base, adapters off. For a base None is dense.
        batch_size: prompts a batch.
        device: None: CUDA if there is one, else the CPU.
        dtype: `bfloat16`, `float16` or `float32`; None: bfloat16 where the hardware has it.
        attn_implementation: `sdpa`, `eager`, `flash_attention_2`; None: the model's default.
        arguments: of the policy, in place of its recipe's (`keep_ratio=0.25`).

    Raises:
        ValueError: neither or both of checkpoint and pretrained are given, or there is no such policy or argument.
        FileNotFoundError: there are no such weights.
    """

    is_simple = False

    def __init__(
        self,
        *,
        checkpoint: str | None = None,
        pretrained: str | None = None,
        policy: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        **arguments: Any,
    ):
        super().__init__()
        if (checkpoint is None) == (pretrained is None):
            raise ValueError(
                "name either a trained checkpoint=FOLDER or a base pretrained=PATH in --model_args."
            )
        chosen = named(policy or "dense", **arguments)
        accelerator = Accelerator()
        self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        precision = _dtype(dtype, accelerator.device)
        self.model: Any
        if checkpoint is not None:
            student = load_student(checkpoint, dtype=precision)
            self.model, self.processor, self.attachment = student.model, student.processor, student.attachment
            own = policy is None
            self.system = System(name="", policy=student.schedule if own else chosen, adapters=own)
        else:
            assert pretrained is not None
            self.model, self.processor = load_base(pretrained, dtype=precision)
            self.attachment = attach(self.model, chosen)
            self.system = System(name="", policy=chosen)
        if attn_implementation is not None:
            inner: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
            inner.set_attn_implementation(attn_implementation)
        self.model.to(device or accelerator.device)
        self.batch_size = int(batch_size)
        self.accelerator = accelerator

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests; requests with equal settings share a batch."""
        found: dict[int, GenerationResult] = {}
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[2]), []).append(i)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="latefusion") as bar:
            for group in groups.values():
                for start in range(0, len(group), self.batch_size):
                    batch = group[start : start + self.batch_size]
                    answers = self._answer([requests[i] for i in batch])
                    found.update(zip(batch, answers, strict=True))
                    bar.update(len(batch))
        return [found[i] for i in range(len(requests))]

    def _answer(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """One batch: `args` are context, messages of a document, settings, document, task and split."""
        chats = []
        for request in requests:
            _, messages_of, _, document, task, split = request.args
            chats.append(ChatMessages(messages=messages_of(self.task_dict[task][split][document])))
        texts = [
            self.processor.apply_chat_template(
                chat.to_hf_messages(), add_generation_prompt=True, tokenize=False
            )
            for chat in chats
        ]
        images = [[image.convert("RGB") for image in chat.extract_media()[0]] for chat in chats]
        inputs = self.processor(
            text=texts,
            images=images if any(images) else None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(self.model.device, dtype=self.model.dtype)
        settings = dict(requests[0].args[2])
        until = settings.pop("until", [])
        with running(self.model, self.attachment, self.system):
            output = self.model.generate(**inputs, **_generation(settings))
        new = output[:, inputs["input_ids"].shape[1] :]  # [B, N]
        said = self.processor.batch_decode(new, skip_special_tokens=True)
        stops = [until] if isinstance(until, str) else until
        return [
            GenerationResult(text=_cut(text, stops), token_counts=TokenCounts(output_tokens=len(ids)))
            for text, ids in zip(said, new, strict=True)
        ]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not offered: the tasks of lmms-eval that need it rank given answers instead of asking for one."""
        raise NotImplementedError("latefusion answers by generating; choose tasks with generate_until.")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("latefusion answers single rounds; choose tasks with generate_until.")


def _generation(settings: dict[str, Any]) -> dict[str, Any]:
    """A task's settings as `generate` takes them; temperature 0 is greedy."""
    known = {"max_new_tokens", "temperature", "top_p", "num_beams", "do_sample", "min_new_tokens"}
    found = {"max_new_tokens": 256} | {name: value for name, value in settings.items() if name in known}
    if not found.get("do_sample") or not found.get("temperature"):
        found |= {**GREEDY, "num_beams": settings.get("num_beams", 1)}
    return found


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.partition(stop)[0] if stop else text
    return text.strip()


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    from latefusion.models.base import compute_dtype

    kinds = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name is not None and name not in kinds:
        raise ValueError(f"dtype={name} is unknown; use {', '.join(kinds)}.")
    return kinds[name] if name else compute_dtype(device)
