"""The plugin of lmms-eval: its hundreds of tasks on a checkpoint, or on any model under a policy.

    pip install -c constraints.txt -e '.[lmms-eval]' && pip install --no-deps 'lmms-eval>=0.7,<0.8'
    lmms-eval eval --model latefusion --model_args checkpoint=outputs/late_fusion --tasks gqa,pope
    lmms-eval eval --model latefusion --tasks mme --model_args pretrained=HUB_ID,policy=fastv,keep_ratio=0.25
    lmms-eval eval --model latefusion --force_simple --tasks seedbench_ppl --model_args checkpoint=outputs/late_fusion
    lmms-eval eval --model latefusion --tasks videomme --model_args checkpoint=outputs/films,max_frames=8

lmms-eval finds it by the entry point `lmms_eval.models`; latefusion itself never imports this module. Tasks that rank
given answers need `--force_simple`: lmms-eval builds them for its older interface alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from torch import Tensor
from tqdm import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from latefusion.data.images import BadImage, load_image
from latefusion.data.prompts import check_placeholders, processed
from latefusion.data.videos import MAX_FRAMES, BadVideo, load_video
from latefusion.eval.comparison.systems import System, running
from latefusion.eval.evaluate import config_of
from latefusion.eval.lmms_eval_chat import Chat, chat_of, one_question
from latefusion.models.attach import attach, attached
from latefusion.models.base_model import compute_dtype, load_base
from latefusion.models.folder_contents import RUN_CONFIG
from latefusion.models.inputs import unwrapped
from latefusion.models.locate import student_folder
from latefusion.models.policies import tuned
from latefusion.models.student.restore import load
from latefusion.models.student.save import load_student
from latefusion.recipes.named_models import named_model

MANIFEST = ModelManifest(
    model_id="latefusion",
    chat_class_path=f"{__name__}.LateFusion",
    simple_class_path=f"{__name__}.LateFusionSimple",
)


GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None}


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
        texts = self.processor.batch_decode(input_ids[:, self.prompt :], skip_special_tokens=True)
        return torch.tensor(
            [any(stop in text for stop in self.stops) for text in texts], device=input_ids.device
        )


def generation(settings: dict[str, Any]) -> dict[str, Any]:
    """A task's settings as `generate` takes them; temperature 0 is greedy."""
    names = {"max_new_tokens", "temperature", "top_p", "num_beams", "do_sample", "min_new_tokens"}
    options = {"max_new_tokens": 256} | {name: value for name, value in settings.items() if name in names}
    if not options.get("do_sample") or not options.get("temperature"):
        options |= {**GREEDY, "num_beams": settings.get("num_beams", 1)}
    return options


def cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.partition(stop)[0] if stop else text
    return text.strip()


def dtype_of(name: str | None, device: torch.device) -> torch.dtype:
    kinds = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name is not None and name not in kinds:
        raise ValueError(f"dtype={name} is unknown; use {', '.join(kinds)}.")
    return kinds[name] if name else compute_dtype(device)


class LateFusion(lmms):
    """A model under a policy, asked by lmms-eval.

    Args:
        checkpoint: folder of a trained student, run under its schedule, adapters merged; or pretrained: a base alone
            (a name of `recipes/model/`, a hub id, a folder).
        policy: name of `recipes/policy/`, or a YAML file; for a checkpoint None is its own schedule, and another policy
            runs on its base, adapters off. For a base None is dense. `visipruner` has the model's own thresholds,
            where its recipe or the checkpoint's run says them.
        batch_size: prompts a batch.
        device: None: CUDA if there is one, else the CPU.
        dtype: `bfloat16`, `float16` or `float32`; None: bfloat16 where the hardware has it.
        attn_implementation: `sdpa`, `eager`, `flash_attention_2`; None: the model's default.
        max_frames: the most frames of a video that the model is shown; None: as the checkpoint was trained, else 16.
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
        max_frames: int | str | None = None,
        **arguments: Any,
    ):
        super().__init__()
        if (checkpoint is None) == (pretrained is None):
            raise ValueError(
                "name either a trained checkpoint=FOLDER or a base pretrained=PATH in --model_args."
            )
        frames, thresholds = MAX_FRAMES, {}
        if checkpoint is not None:
            folder = student_folder(checkpoint)
            if (folder / RUN_CONFIG).is_file():
                config = config_of(folder)
                frames, thresholds = config.data.max_frames, dict(vars(config.model.visipruner))
        else:
            assert pretrained is not None
            pretrained, recipe = named_model(pretrained)
            thresholds = recipe.get("visipruner", {})
        self.max_frames = frames if max_frames is None else int(max_frames)
        if self.max_frames < 1:
            raise ValueError(f"max_frames={max_frames} must be at least 1.")
        base_policy = tuned(policy or "dense", thresholds, **arguments)
        accelerator = Accelerator()
        self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        precision = dtype_of(dtype, accelerator.device)
        self.model: Any
        if checkpoint is not None and policy is None:  # under its own schedule
            self.model, self.processor = load(checkpoint, dtype=precision)
            attachment = attached(self.model)
            assert attachment is not None
            self.attachment, self.system = attachment, System(name="", policy=attachment.policy)
        elif checkpoint is not None:  # its base under another policy
            student = load_student(checkpoint, dtype=precision)
            self.model, self.processor, self.attachment = student.model, student.processor, student.attachment
            self.system = System(name="", policy=base_policy)
        else:
            assert pretrained is not None
            self.model, self.processor = load_base(pretrained, dtype=precision)
            self.attachment = attach(self.model, base_policy)
            self.system = System(name="", policy=base_policy)
        if attn_implementation is not None:
            unwrapped(self.model).set_attn_implementation(attn_implementation)
        self.model.to(device or accelerator.device)
        self.batch_size = int(batch_size)
        self.accelerator = accelerator

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests; requests with equal settings share a batch."""
        chats = [partial(self._chat, request) for request in requests]
        settings = [self._settings(request) for request in requests]
        return self._batched(chats, settings, self._generate, "answers")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """For each request, the answer of every round; what later rounds ask depends on the answers before.

        Requests that are in the same round share batches.
        """
        answered: list[list[str]] = [[] for _ in requests]
        handed: list[Any] = [None] * len(requests)  # what a task hands from round to round
        going, number = list(range(len(requests))), 0
        while going:
            chats: dict[int, Chat] = {}
            for i in going:
                chat, done, answered[i], handed[i] = self._round(requests[i], number, answered[i], handed[i])
                if not done:
                    chats[i] = chat
            going = list(chats)
            settings = [self._settings(requests[i]) for i in going]
            ready = [partial(chats.__getitem__, i) for i in going]
            answers = self._batched(ready, settings, self._generate, f"round {number + 1}")
            for i, answer in zip(going, answers, strict=True):
                answered[i] = [*answered[i], answer.text]
            number += 1
        return answered

    def loglikelihood(self, requests: Sequence[Instance]) -> list[Pair]:
        """For each answer of the task, its mean negative log-likelihood a token (nats), and whether it is greedy.

        lmms-eval calls the first a log-likelihood, but takes the choice with the least of it, so it is a loss, as its
        own models return it. A policy chooses tokens by the prompt alone, as it does when the model answers by itself.
        """
        chats = [partial(self._ranked, request) for request in requests]
        return self._batched(
            chats, [self._target(r) for r in requests], self._losses, "answers of the tasks", apart=False
        )

    def _target(self, request: Instance) -> str:
        """The answer that a request ranks."""
        if len(request.args) == 2:  # an answer without its prompt
            return request.args[1]
        _, target, _, document, task, split = request.args
        return target if isinstance(target, str) else str(target(self.task_dict[task][split][document]))

    def _ranked(self, request: Instance) -> Chat:
        """What the answer of a request follows."""
        if len(request.args) == 2:
            return one_question(request.args[0], [])
        context, _, visual, document, task, split = request.args
        shown = visual(self.task_dict[task][split][document]) if visual is not None else None
        return one_question(context, shown or [], f"{task} {document}")

    def _chat(self, request: Instance) -> Chat:
        """What a request asks: `args` are context, messages of a document, settings, document, task, split."""
        _, messages_of, _, document, task, split = request.args
        return chat_of(messages_of(self.task_dict[task][split][document]), f"{task} {document}")

    def _settings(self, request: Instance) -> dict[str, Any]:
        return dict(request.args[2])

    def _round(
        self, request: Instance, number: int, answered: list[str], handed: Any
    ) -> tuple[Chat, bool, list[str], Any]:
        """A round's question; whether the task is done; the answers as the task keeps them; what it hands on."""
        _, messages_of, _, document, task, split = request.args
        row = self.task_dict[task][split][document]
        if number == 0:
            return chat_of(messages_of(row), f"{task} {document}"), False, answered, handed
        messages, done, kept, handed = messages_of(
            row, round_idx=number, previous_output=answered, previous_round_info=handed
        )
        return (
            chat_of(messages or [], f"{task} {document}"),
            done,
            answered if kept is None else list(kept),
            handed,
        )

    def _batched(
        self,
        chats: Sequence[Callable[[], Chat]],
        settings: Sequence[Any],
        work: Callable[[list[Chat], list[Any]], list[Any]],
        name: str,
        *,
        apart: bool = True,
    ) -> list[Any]:
        """Results of `work` on batches, in the order of `chats`, each of which is made when its batch is run.

        With `apart`, prompts of different settings share no batch.
        """
        groups: dict[str, list[int]] = {}
        for i, setting in enumerate(settings):
            groups.setdefault(repr(setting) if apart else "", []).append(i)
        by_chat: dict[int, Any] = {}
        with tqdm(total=len(chats), disable=self.rank != 0, desc=f"latefusion, {name}") as bar:
            for group in groups.values():
                for start in range(0, len(group), self.batch_size):
                    batch = group[start : start + self.batch_size]
                    results = work([chats[i]() for i in batch], [settings[i] for i in batch])
                    by_chat.update(zip(batch, results, strict=True))
                    bar.update(len(batch))
        return [by_chat[i] for i in range(len(chats))]

    def _opened(self, chats: Sequence[Chat]) -> list[Chat]:
        """The chats with their pictures and videos opened.

        Raises:
            ValueError: one of them cannot be used.
        """
        opened = []
        for chat in chats:
            try:
                images = [load_image(image) for image in chat.images]
                videos = [load_video(video, max_frames=self.max_frames) for video in chat.videos]
            except (BadImage, BadVideo) as error:
                kind = "image" if isinstance(error, BadImage) else "video"
                raise ValueError(f"document {chat.name} has a bad {kind}: {error}.") from None
            opened.append(replace(chat, images=images, videos=videos))
        return opened

    def _inputs(self, texts: list[str], chats: Sequence[Chat]) -> Any:
        """The tensors of texts whose chats are opened."""
        for text, chat in zip(texts, chats, strict=True):
            check_placeholders(self.processor, f"document {chat.name}", text, chat.images, chat.videos)
        videos = [video for chat in chats for video in chat.videos]
        return processed(
            unwrapped(self.model), self.processor, texts, [chat.images for chat in chats], videos
        )

    def _prompts(self, chats: Sequence[Chat]) -> list[str]:
        return [
            self.processor.apply_chat_template(chat.messages, add_generation_prompt=True, tokenize=False)
            for chat in chats
        ]

    def _generate(self, chats: list[Chat], settings: list[dict[str, Any]]) -> list[GenerationResult]:
        chats = self._opened(chats)
        inputs = self._inputs(self._prompts(chats), chats)
        until = settings[0].get("until", [])
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        prompt = inputs["input_ids"].shape[1]
        until_stop = Until(stops, self.processor, prompt)
        with running(self.model, self.attachment, self.system):
            output = self.model.generate(
                **inputs, **generation(settings[0]), stopping_criteria=StoppingCriteriaList([until_stop])
            )
        new = output[:, prompt:]  # [B, N]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        padding = self.processor.tokenizer.pad_token_id
        counts = new.shape[1] - (new.flip(1) != padding).int().argmax(1)  # [B], without padding at the end
        return [
            GenerationResult(text=cut(text, stops), token_counts=TokenCounts(output_tokens=int(count)))
            for text, count in zip(texts, counts, strict=True)
        ]

    @torch.no_grad()
    def _losses(self, chats: list[Chat], answers: list[str]) -> list[Pair]:
        chats = self._opened(chats)
        prompts = self._prompts(chats)
        whole = self._inputs(
            [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)], chats
        )
        counts = []  # tokens of each answer: those that differ once it follows its prompt
        for i, (prompt, chat) in enumerate(zip(prompts, chats, strict=True)):
            bare = self._inputs([prompt], [chat])["input_ids"][0]
            full = whole["input_ids"][i][whole["attention_mask"][i].bool()]
            n = min(len(bare), len(full))
            same = int((bare[:n] == full[:n]).int().cumprod(0).sum())
            counts.append(len(full) - same)
        if empty := [answer for answer, count in zip(answers, counts, strict=True) if count == 0]:
            raise ValueError(f"the answer {empty[0]!r} has no token; leave it out of the task's choices.")
        ids, end, longest = whole["input_ids"], whole["input_ids"].shape[1], max(counts)  # [B, T]
        last = torch.tensor(
            [[end - count - 1] for count in counts], device=ids.device
        )  # [B, 1]: of the prompt
        with running(self.model, self.attachment, self.system), self.attachment.queries(last):
            logits = self.model(**whole, use_cache=False, logits_to_keep=longest + 1).logits[:, :-1].float()
        choice = ids[:, end - longest :]  # [B, A]
        places = torch.arange(longest, device=ids.device)
        answer = places >= longest - torch.tensor(counts, device=ids.device)[:, None]  # [B, A]
        loss = -logits.log_softmax(-1).gather(-1, choice[..., None])[..., 0]  # [B, A]
        mean = (loss * answer).sum(1) / answer.sum(1)
        greedy = ((logits.argmax(-1) == choice) | ~answer).all(1)
        return [Pair(*pair) for pair in zip(mean.tolist(), greedy.tolist(), strict=True)]


class LateFusionSimple(LateFusion):
    """`LateFusion` by lmms-eval's older interface (`--force_simple`); only that one has tasks that rank answers."""

    is_simple = True

    def _chat(self, request: Instance) -> Chat:
        """`args` are context, settings, pictures of a document, document, task, split."""
        context, _, visual, document, task, split = request.args
        shown = visual(self.task_dict[task][split][document]) or []
        return one_question(context, shown, f"{task} {document}")

    def _settings(self, request: Instance) -> dict[str, Any]:
        return dict(request.args[1])

    def _round(
        self, request: Instance, number: int, answered: list[str], handed: Any
    ) -> tuple[Chat, bool, list[str], Any]:
        context, _, visual, text_of, document, task, split = request.args
        row = self.task_dict[task][split][document]
        if number == 0:
            return one_question(context, visual(row) or [], f"{task} {document}"), False, answered, handed
        pictures, text, done, kept, handed = text_of(
            row, previous_output=answered, round_idx=number, previous_round_info=handed
        )
        return (
            one_question(text or "", pictures or [], f"{task} {document}"),
            done,
            answered if kept is None else list(kept),
            handed,
        )
