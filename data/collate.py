"""Make a batch of samples: the processor's own chat template and expansion, labels on answer tokens alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.utils.chat_template_utils import render_jinja_template

from latefusion.data.printing import first_line
from latefusion.data.processor import called, recorded
from latefusion.data.samples import BadSample, TooLong, videos_of_sample
from latefusion.data.turns import isolate_turns
from latefusion.data.videos import check_limits, unreadable
from latefusion.models.base_model import load_processor
from latefusion.models.executor.masks import attention_window
from latefusion.models.executor.prompt import IGNORE
from latefusion.models.executor.vision import vision_token_ids
from latefusion.models.inputs import stop_tokens
from latefusion.models.layer_kinds import attends
from latefusion.models.locate import check_base, readable
from latefusion.models.self_check import isolating
from latefusion.recipes.schema import Config, Teacher

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]


class BadRow(ValueError):
    """A sample of a batch that cannot be used: its place `at` in the batch, and the `reason`."""

    def __init__(self, at: int, name: Any, reason: BadSample):
        super().__init__(f"sample {name} {reason}.")
        self.at, self.reason = at, reason


class Collator:
    """A list of `{"messages", "images"}` samples (and `videos`) to the model's inputs, with `labels` and `queries`.

    A batch is what the processor returns (`input_ids` `[B, T]`, `pixel_values`, ..., padded on the
    right), and

    - `labels` int64 `[B, T]`: the token where an assistant's answer is to be learnt (every turn, with the
      token that ends it), -100 elsewhere; never on a vision token, nor on one that a vision token would
      predict, whose state is stale once vision tokens have left.
    - `queries` int64 `[B, Q]`: where the prompts end by which a policy may rank vision tokens (for
      `Attachment.queries`). `[B, 1]`, the token before the first answer after an image: later turns have read that
      answer, and a chat on a kept cache has only the vision tokens that the turn of the image kept. With `isolate`,
      the token before each answer, repeated to fill the row: all questions of a row rank together (see `turns`).

    Args:
        processor: of the model (a `ProcessorMixin`), with a fast tokenizer.
        vision_ids: token ids that stand for vision features (`config.image_token_id`).
        stop: the tokens at which the model's `generate` stops; the first is written after an answer that the
            chat template does not close (LLaVA-1.5's does not).
        max_length: the most tokens, vision included, that a sample may have; None: any number. Nothing is ever cut.
        isolate: every turn sees the image and itself alone (`isolate_turns`), under a mask of this dtype;
            None: turns see those before them. It needs sdpa or eager attention (`check_isolates`).
        ranked: a policy of the run chooses vision tokens by the text that follows them. Then a second image after an
            answer is a bad row: one question would have to rank the tokens of images that it has not read.
        window: tokens that local layers look back, which the mask of `isolate` does not hold; None: all see everything.
        family: the model's type; a video is a bad row to a family that is not known to read it (`videos.FAMILIES`).
    """

    def __init__(
        self,
        *,
        processor: Any,
        vision_ids: Sequence[int],
        stop: Sequence[str],
        max_length: int | None = None,
        isolate: torch.dtype | None = None,
        ranked: bool = False,
        family: str = "",
        window: int | None = None,
    ):
        self.family = family
        self.processor, self.stop, self.max_length = processor, tuple(stop), max_length
        self.isolate, self.ranked, self.window = isolate, ranked, window
        self.vision_ids = torch.tensor(sorted(set(vision_ids)))
        self.reserved = reserved_tokens(processor, self.vision_ids.tolist())

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch.

        Raises:
            BadRow: a sample is too long, has no token to learn, or is refused by the chat template or the processor.
        """
        rendered = [self.rendered(at, sample) for at, sample in enumerate(samples)]
        texts, spans = zip(*rendered, strict=True)
        try:
            batch, moved = self.process(texts, samples)
        except Exception as error:  # whatever a processor leads to, with an image of one pixel, say
            for at, sample in enumerate(samples):
                try:
                    self.process(texts[at : at + 1], [sample])
                except Exception as alone:
                    raise self.bad(
                        at, sample, f"does not go through the processor: {first_line(alone)}"
                    ) from alone
            raise error
        offsets = batch.pop("offset_mapping")  # [B, T, 2]
        lengths = batch["attention_mask"].sum(1).tolist()
        for at, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
            if self.max_length is not None and length > self.max_length:
                reason = TooLong(f"has {length} tokens, more than data.max_length={self.max_length}")
                raise BadRow(at, sample.get("id", at), reason)
            if self.isolate is not None and self.window is not None and length > self.window:
                local = f"more than the {self.window} that the decoder's local layers look back"
                raise self.bad(at, sample, f"has {length} tokens, {local}; that takes data.isolate=false")
        answer, first = mark(offsets, [_after(s, m) for s, m in zip(spans, moved, strict=True)])
        inputs = dict(batch)
        ids = inputs["input_ids"]  # [B, T]

        vision = torch.isin(ids, self.vision_ids)  # bool [B, T]
        blocked = vision.clone()
        blocked[:, 1:] |= vision[:, :-1]  # the token that a vision token predicts
        blocked[:, 0] = True  # nothing predicts the first
        learnt = answer & ~blocked  # [B, T]
        for at in (~learnt.any(1)).nonzero().flatten().tolist():
            raise self.bad(at, samples[at], "has no token to learn")
        inputs["labels"] = ids.masked_fill(~learnt, IGNORE)
        begun = vision.cumsum(1) > 0  # bool [B, T]: from the first vision token on
        follows = vision.flip(1).cumsum(1).flip(1) > 0  # bool [B, T]: vision tokens come later
        if self.isolate is None:
            pictured = first & begun
            first = torch.where(pictured.any(1, keepdim=True), pictured, first)
            first &= first.cumsum(1) == 1
        inputs["queries"] = before(first, inputs["attention_mask"])
        if self.isolate is not None:
            self.refuse_late(samples, answer & follows, "that takes data.isolate=false")
        elif self.ranked:
            fix = "that takes a schedule without keep and teacher=dense or none"
            self.refuse_late(samples, answer & follows & begun, fix)
        if self.isolate is not None:
            inputs.update(isolate_turns(vision, answer, inputs["attention_mask"].bool(), self.isolate))
        return inputs

    def refuse_late(self, samples: Sequence[dict[str, Any]], late: Tensor, fix: str) -> None:
        """Raise BadRow for the first sample with an answer before an image that must not stand there.

        Args:
            late: bool `[B, T]`, such answers' tokens.
        """
        for at in late.any(1).nonzero().flatten().tolist():
            raise self.bad(at, samples[at], f"has an image after an answer; {fix}")

    def rendered(self, at: int, sample: dict[str, Any]) -> tuple[str, list[Span]]:
        """Render a conversation (`render`) and check that the text shows exactly the sample's images.

        Raises:
            BadRow: it does not, the chat template refuses the conversation, or a token is written in a text that
                would be read as an image or a video, as the end of an answer, or as the beginning of a turn.
        """
        try:
            text, spans = self.render(sample["messages"])
        except Exception as error:  # whatever a template's expressions lead to
            raise self.bad(at, sample, f"is refused by the chat template: {first_line(error)}") from error
        videos = videos_of_sample(sample)
        if videos and (reason := unreadable(self.family)):
            raise self.bad(at, sample, f"has a video: {reason}")
        for kind, media in (("image", sample["images"]), ("video", videos)):
            placeholder = getattr(self.processor, f"{kind}_token", None)
            shown = text.count(placeholder) if isinstance(placeholder, str) else 0
            if (kind == "image" or media) and shown != len(media):
                reason = f"has {len(media)} {kind}(s) but {shown} times {placeholder} in its text"
                raise self.bad(at, sample, reason)
        for turn, message in enumerate(sample["messages"]):
            reserved = self.reserved + (self.stop if message["role"] == "assistant" else ())
            for part in message["content"]:
                if written := [token for token in reserved if token in part.get("text", "")]:
                    raise self.bad(
                        at, sample, f"has the token {written[0]} written in the text of turn {turn}"
                    )
        return text, spans

    def bad(self, at: int, sample: dict[str, Any], reason: str) -> BadRow:
        return BadRow(at, sample.get("id", at), BadSample(reason))

    def process(
        self, texts: Sequence[str], samples: Sequence[dict[str, Any]]
    ) -> tuple[dict[str, Any], list[list[dict[str, Any]]]]:
        """The processor's batch, and for each text where its placeholders stood and what replaced them."""
        images = [list(sample["images"]) for sample in samples]
        videos = [video for sample in samples for video in videos_of_sample(sample)]
        bos = self.processor.tokenizer.bos_token
        # as an output (`return_text_replacement_offsets`), InternVL's processor would try to make a tensor of it
        with recorded(self.processor, "get_text_with_replacements") as replaced:
            batch = called(
                self.processor,
                self.family,
                texts,
                images,
                videos,
                add_special_tokens=not (bos is not None and texts[0].startswith(bos)),
                padding=True,
                padding_side="right",
                return_offsets_mapping=True,
                return_tensors="pt",
            )
        moved = [of_text for _, of_texts in replaced for of_text in of_texts]
        return batch, moved or [[] for _ in texts]

    def render(self, messages: list[dict[str, Any]]) -> tuple[str, list[Span]]:
        """The conversation as text, and where in it the answers stand, each with the token that ends it."""
        template: Any = self.processor.chat_template
        special = self.processor.tokenizer.special_tokens_map
        if GENERATION.search(template):
            rendered: Any = render_jinja_template(
                [messages], chat_template=template, return_assistant_tokens_mask=True, **special
            )
            (text,), (generated,) = rendered
            return self.close(text, [(start, end) for start, end in generated])
        text = self.processor.apply_chat_template(messages)
        spans = []
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self.processor.apply_chat_template(messages[:turn], add_generation_prompt=True)
                until = self.processor.apply_chat_template(messages[: turn + 1])
                if not (until.startswith(prompt) and text.startswith(until.rstrip())):
                    raise ValueError(
                        f"the chat template renders turn {turn} differently when others follow it, so its "
                        "answer cannot be found; put {% generation %} ... {% endgeneration %} around answers "
                        "in the template."
                    )
                spans.append((len(prompt), min(len(until), len(text))))
        return self.close(text, spans)

    def close(self, text: str, spans: list[Span]) -> tuple[str, list[Span]]:
        """End every span right after a stop token, writing one where the template has none."""
        closed, grown = [], 0
        for start, end in spans:
            start, end = start + grown, end + grown
            ends = [at + len(stop) for stop in self.stop if (at := text.find(stop, start, end)) >= 0]
            if not ends:
                tail = text[end:]
                stop = next((s for s in self.stop if tail.lstrip().startswith(s)), None)
                if stop is not None:
                    ends = [end + tail.index(stop) + len(stop)]
                else:
                    kept = start + len(text[start:end].rstrip())
                    text = text[:kept] + self.stop[0] + text[end:]
                    grown += kept + len(self.stop[0]) - end
                    ends = [kept + len(self.stop[0])]
            closed.append((start, min(ends)))
        return text, closed


def reserved_tokens(processor: Any, vision_ids: Sequence[int]) -> tuple[str, ...]:
    """The tokens that no text of a row may contain, because they would be read as structure.

    They are those of images, videos and audio, and the special tokens that the chat template writes between turns.
    """
    tokenizer, template = processor.tokenizer, processor.chat_template or ""
    special = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    others = (getattr(processor, f"{kind}_token", None) for kind in ("video", "audio"))
    tokens = [
        *filter(None, tokenizer.convert_ids_to_tokens(vision_ids)),  # its tokenizer may lack one
        *(token for token in special if token in template),
        *(token for token in others if isinstance(token, str)),
    ]
    return tuple(dict.fromkeys(tokens))


def build_collator(
    processor: Any,
    config: PretrainedConfig,
    generation_config: GenerationConfig,
    *,
    max_length: int | None = None,
    isolate: torch.dtype | None = None,
    ranked: bool = False,
) -> Collator:
    """The collator of a model, by its configuration alone: no weights are needed.

    Args:
        config, generation_config: of the model.
        max_length, isolate, ranked: as `Collator` has them.

    Raises:
        ValueError: turns are to be isolated by a mask, and a layer of the decoder has none.
    """
    if isolate is not None:
        check_isolates(config)
    return Collator(
        processor=processor,
        vision_ids=list(vision_token_ids(config).values()),
        stop=stop_tokens(generation_config, processor),
        max_length=max_length,
        isolate=isolate,
        ranked=ranked,
        family=config.model_type,
        window=attention_window(config),
    )


def check_isolates(config: PretrainedConfig) -> None:
    """Raise ValueError if the turns of a row that `isolate_turns` keeps apart would not get what each gets alone."""
    text = config.get_text_config()
    fix = "set data.isolate=false and data.turns=1."
    if not all(attends(config)):
        raise ValueError(
            f"data.isolate=true keeps the turns of a row apart by a mask, which the recurrent layers of a decoder of "
            f"type {text.model_type} do not have: {fix}"
        )
    several_axes = "mrope_section" in (getattr(text, "rope_parameters", None) or {})
    both_ways = getattr(text, "use_bidirectional_attention", None)
    if config.model_type not in isolating() or several_axes or both_ways:
        raise ValueError(
            f"data.isolate=true keeps the turns of a row apart by a mask and positions of its own, under which models "
            f"of type {config.model_type} are not known to answer as in a row each (docs/families.md): {fix}"
        )


def collator_without_weights(config: Config, *, dtype: torch.dtype = torch.float32) -> Collator:
    """The collator of a run, before its model is loaded.

    Args:
        dtype: what the model will compute in; the mask of `data.isolate` has it.

    Raises:
        OSError: the processor or the configuration cannot be reached.
        ValueError: parts of the data show videos of which one batch cannot hold both.
    """
    model = config.model
    check_base(model.path)
    path = str(readable(model.path))
    where: dict[str, Any] = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    processor = load_processor(model.path, settings=model.processor, **where)
    model_config = AutoConfig.from_pretrained(path, **where)
    check_limits(
        model_config.model_type, (part.max_frames or config.data.max_frames for part in config.data.parts)
    )
    try:
        generation = GenerationConfig.from_pretrained(path, revision=model.revision)
    except OSError:  # no file of its own: the model's configuration says it
        generation = GenerationConfig.from_model_config(model_config)
    return build_collator(
        processor,
        model_config,
        generation,
        max_length=config.data.max_length,
        isolate=dtype if config.data.isolate else None,
        ranked=is_ranked(config),
    )


def is_ranked(config: Config) -> bool:
    """Whether the student's schedule or its teacher chooses vision tokens by the text that follows them."""
    return bool(config.schedule.keep) or config.teacher is Teacher.visipruner


def mark(offsets: Tensor, spans: Sequence[Sequence[Span]]) -> tuple[Tensor, Tensor]:
    """The tokens that overlap a span, and the first of each span, both bool `[B, T]`.

    Args:
        offsets: where each token stands in its text, `[B, T, 2]`; padding and added tokens are empty.
        spans: of each text.
    """
    inside = torch.zeros(offsets.shape[:2], dtype=torch.bool)
    first = torch.zeros_like(inside)
    for row, (tokens, row_spans) in enumerate(zip(offsets, spans, strict=True)):
        start, end = tokens.unbind(-1)  # [T]
        for left, right in row_spans:
            hit = (start < right) & (end > left) & (end > start)
            inside[row] |= hit
            first[row] |= hit & (hit.cumsum(0) == 1)
    return inside, first


def before(first: Tensor, attention_mask: Tensor) -> Tensor:
    """The position before each marked token, int64 `[B, Q]`, short rows filled with their last one.

    A row without a mark gets its last token.

    Args:
        first: bool `[B, T]`.
        attention_mask: `[B, T]`, padded on the right.
    """
    rows = [row.nonzero().flatten() - 1 for row in first]
    rows = [
        row[row >= 0] if (row >= 0).any() else mask.sum().view(1) - 1
        for row, mask in zip(rows, attention_mask, strict=True)
    ]
    width = max(map(len, rows))
    return torch.stack([torch.cat([row, row[-1:].expand(width - len(row))]) for row in rows])


def label_columns(labels: Tensor) -> Tensor:
    """The columns whose logits predict a label in some row of `[B, T]`, int64 `[R]`; at least one."""
    columns = (labels[:, 1:] != IGNORE).any(0).nonzero().flatten()  # [R]
    return columns if len(columns) else columns.new_zeros(1)


def _after(spans: Sequence[Span], moved: Sequence[dict[str, Any]]) -> list[Span]:
    """Spans of the template's text, moved to where they stand once image placeholders have been expanded."""

    def place(at: int) -> int:
        return at + next((m["new_span"][1] - m["span"][1] for m in reversed(moved) if m["span"][1] <= at), 0)

    return [(place(start), place(end)) for start, end in spans]
