"""`VisionSchedule`: the single source of truth for which vision tokens each layer sees, decided ahead of time.

It is plain numbers, read, checked and counted without torch. `models/policies/scheduled.py` carries it out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from latefusion.models.flops import (
    decoder_flops,
    projection_flops,
    ranking_flops,
    vision_macs,
)
from latefusion.models.layer_kinds import attends, require_attention
from latefusion.models.policies.checks import whole_number

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from latefusion.models.policies.base import Decision, Prompt

SCHEDULE_FILE = "vision_schedule.json"
Ranking = Literal["question", "reading", "hidrop"]
QUESTION_ROWS = 16  # text tokens before an answer that rank vision tokens, under the rule "question"
RANKINGS: tuple[str, ...] = get_args(Ranking)


@dataclass(frozen=True, kw_only=True)
class VisionSchedule:
    """Vision tokens enter at layer `enter`, shrink to the best `keep[layer]` from each `layer` on, leave at `exit`.

    Layers count from 0: `enter` is the first layer that sees vision tokens, `exit` the first that no longer does
    (None: they stay to the end). The default sees everything everywhere: the dense model. A keep of `k` is at most `k`:
    a prompt with fewer vision tokens, all its images together, has all of them there.

    `ranking` says which `k` are the best (`policies/scheduled.py`):

    - `"question"`, ours: those that some attention head of one of the prompt's last 16 text tokens has read most of so
      far, in any layer since they entered. No single layer, and not the last token, knows all that the question needs.
    - `"reading"`: the same of all text after the image, whatever its length; students saved before there was another
      rule were trained with it. In a prompt of up to 16 such tokens both are one.
    - `"hidrop"` (arXiv 2602.23699): those to which layer `layer` itself, on the tokens of the layer before, gives most
      attention from the last token of the prompt, or from those before each answer, on average over heads.
      Exactly `k` are kept; where scores tie at the border, the official code keeps all that tie.

    `cross` names layers instead of a band, as ViCA does (arXiv 2602.07574): vision tokens bypass attention and MLPs
    altogether, stay what the projector (or an entry adapter) made them, and are read by the text in these layers alone,
    in one softmax with the text before, at their original positions. Only their keys and values are computed, with the
    layer's own weights. Empty: no layer reads, the answer is blind; None: vision tokens are computed, in the band.
    `freeze_prefix`: the attention output of the text before the image is zero in every layer, while its MLP runs
    (ViCA's 7B model).

    In a hybrid decoder, layers that run a recurrence (linear attention, a short convolution) read the tokens of the
    band in their original order, and text alone elsewhere. They rank nothing, and `cross` cannot name them: a token
    that they read changes their state, so it would not only be read.

    Raises:
        ValueError: the numbers contradict each other.
    """

    enter: int = 0
    exit: int | None = None
    keep: Mapping[int, int] = field(default_factory=dict)
    cross: Sequence[int] | None = None
    ranking: Ranking = "question"
    freeze_prefix: bool = False

    def __post_init__(self) -> None:
        keep, cross = self.keep, self.cross
        if not isinstance(keep, Mapping):
            raise ValueError(f"keep={keep!r} must map layers to numbers of tokens, as in keep={{4: 72}}.")
        if isinstance(cross, str) or not isinstance(cross, Iterable | None):
            raise ValueError(f"cross={cross!r} must list layers, as in cross=[8, 12].")
        if not isinstance(self.freeze_prefix, bool):
            raise ValueError(f"freeze_prefix={self.freeze_prefix!r} must be true or false.")
        for name in ("enter", "exit"):
            layer = getattr(self, name)
            if name == "enter" or layer is not None:
                object.__setattr__(self, name, whole_number(name, layer))
        keep = {whole_number("keep", i): whole_number("keep", k) for i, k in self.keep.items()}
        keep = dict(sorted(keep.items()))
        object.__setattr__(self, "keep", keep)
        if self.ranking not in RANKINGS:
            raise ValueError(f"ranking={self.ranking!r} does not exist; choose one of {', '.join(RANKINGS)}.")
        self._settle_cross()
        if self.enter < 0:
            raise ValueError(f"enter={self.enter} must not be negative; layers count from 0.")
        if self.exit is not None and self.enter >= self.exit:
            earlier = f"enter < {self.exit}, or " if self.exit > 0 else ""
            raise ValueError(
                f"enter={self.enter} must be below exit={self.exit}, or no layer sees vision tokens; "
                f"choose {earlier}exit > {self.enter}."
            )
        previous: int | None = None
        for layer, k in keep.items():
            if layer <= self.enter or (self.exit is not None and layer >= self.exit):
                end = "the last layer" if self.exit is None else f"exit={self.exit}"
                raise ValueError(
                    f"keep={{{layer}: {k}}} must lie after enter={self.enter} and before {end}: tokens are ranked by "
                    "the attention of the layer before."
                )
            if k < 1:
                raise ValueError(
                    f"keep={{{layer}: {k}}} must keep at least one token; to drop all use exit={layer}."
                )
            if previous is not None and k > previous:
                raise ValueError(
                    f"keep={{{layer}: {k}}} grows from {previous}: a token that left does not return; "
                    f"choose at most {previous}."
                )
            previous = k

    def _settle_cross(self) -> None:
        if self.cross is None:
            if self.freeze_prefix:
                raise ValueError(
                    "freeze_prefix=True is for frozen vision tokens: name the layers that read with cross."
                )
            return
        cross = tuple(sorted({whole_number("cross", layer) for layer in self.cross}))
        object.__setattr__(self, "cross", cross)
        if self.ranking == "hidrop" and self.keep:
            raise ValueError(
                'ranking="hidrop" ranks computed vision tokens; with cross use ranking="question" or "reading".'
            )
        if not cross:
            if self.enter or self.exit is not None or self.keep:
                raise ValueError(
                    f"cross=() says that no layer reads vision tokens, and contradicts enter={self.enter}, "
                    f"exit={self.exit}, keep={dict(self.keep)}: leave those out."
                )
            return
        if cross[0] < 0:
            raise ValueError(f"cross={list(cross)} names layer {cross[0]}; layers count from 0.")
        enter, exit_layer = cross[0], cross[-1] + 1
        if self.enter not in (0, enter) or self.exit not in (None, exit_layer):
            raise ValueError(
                f"cross={list(cross)} says where vision tokens are read, and contradicts enter={self.enter}, "
                f"exit={self.exit}: leave those out."
            )
        object.__setattr__(self, "enter", enter)
        object.__setattr__(self, "exit", exit_layer)
        for layer in self.keep:
            if layer not in cross:
                raise ValueError(
                    f"keep names layer {layer}, which cross={list(cross)} does not read; name one of its layers."
                )

    def validate(self, num_layers: int) -> None:
        ends = (
            (("enter", self.enter), ("exit", self.exit)) if not self.cross else (("cross", self.cross[-1]),)
        )
        for name, layer in (*ends, *(("keep", i) for i in self.keep)):
            check_depth(name, layer, num_layers)

    def check_keep(self, n_vision: int, whose: str) -> None:
        """Raise ValueError if a keep is more than the vision tokens that there are, so that it removes none.

        Args:
            n_vision: the most that any of the prompts has, where that is known before they run.
            whose: these prompts, in words.
        """
        for layer, k in self.keep.items():
            if k > n_vision:
                raise ValueError(
                    f"keep={{{layer}: {k}}} is more than the {n_vision} vision tokens of {whose}, so it removes none; "
                    f"choose fewer than {n_vision}, or leave it out."
                )

    def check_attention(self, attention: Sequence[bool]) -> None:
        for layer in self.keep:
            if self.ranking == "hidrop":
                require_attention("a layer of keep", [layer], attention)
            elif not any(attention[self.enter : layer]):
                first = [i for i, attends in enumerate(attention) if attends and i >= self.enter][:1]
                raise ValueError(
                    f"keep={{{layer}: {self.keep[layer]}}} ranks by softmax attention, but layers {self.enter} to "
                    f"{layer - 1} run a recurrence (linear attention or a convolution): "
                    + (f"choose a layer above {first[0]}." if first else "no layer after them attends.")
                )
        if self.cross:
            require_attention("a layer of cross", self.cross, attention)
        if self.freeze_prefix:
            raise ValueError(
                "freeze_prefix=True silences attention, which the layers of this decoder that run a recurrence do not "
                "have: leave it out."
            )

    def begin(self, prompt: Prompt) -> Decision | None:
        from latefusion.models.policies.scheduled import (
            ScheduleDecision,  # lazy: a schedule is read without torch
        )

        if self.keep and prompt.piece:
            raise ValueError(
                f"keep={self.keep} ranks vision tokens by the text that follows them, but this forward begins or ends "
                "inside an image: prefill the prompt at once, or use a schedule without keep."
            )
        if self.freeze_prefix and prompt.past:
            raise ValueError(
                "freeze_prefix=True concerns the text before the image, which an earlier forward has computed: prefill "
                "the prompt at once."
            )
        sees = self.sees(prompt.num_layers)
        if all(sees) and not self.keep and self.cross is None:
            return None
        return ScheduleDecision(
            prompt,
            sees=sees,
            keep=self.keep,
            watch=prompt.attending(self.watched),
            frozen=self.cross is not None,
            rows=self.asking,
            ahead=self.looked_ahead,
            silent=self.freeze_prefix,
        )

    @property
    def freezes(self) -> bool:
        """Whether some tokens are only read (`Policy.freezes`)."""
        return bool(self.cross) or self.freeze_prefix

    def sees(self, num_layers: int) -> list[bool]:
        """Whether each layer sees vision tokens."""
        if self.cross is not None:
            return [layer in self.cross for layer in range(num_layers)]
        exit_layer = num_layers if self.exit is None else self.exit
        return [self.enter <= layer < exit_layer for layer in range(num_layers)]

    def vision_tokens(self, num_layers: int, n_vision: int) -> list[int]:
        """The number of vision tokens that each layer sees, for a prompt with `n_vision` of them."""
        self.validate(num_layers)
        if n_vision < 0:
            raise ValueError(f"n_vision={n_vision} must not be negative.")
        tokens, left = [], n_vision
        for layer, sees in enumerate(self.sees(num_layers)):
            left = min(left, self.keep.get(layer, left))
            tokens.append(left if sees else 0)
        return tokens

    def widened(self, progress: float, num_layers: int) -> VisionSchedule:
        """The schedule on the way from all layers (`progress` 0) to this one (1 and beyond).

        Enter and exit move in step; a keep of `k` tokens is one of `k / progress`, so it begins by keeping everything.

        Raises:
            ValueError: the schedule has frozen tokens; there is no way to them from computed ones.
        """
        if self.cross is not None:
            raise ValueError(f"cross={list(self.cross)} has no band that could narrow; use train.narrow=0.")
        if progress >= 1:
            return self
        exit_layer = num_layers if self.exit is None else self.exit
        wide_exit = num_layers - round((num_layers - exit_layer) * progress)
        keep = {layer: math.ceil(k / progress) for layer, k in self.keep.items()} if progress > 0 else {}
        return VisionSchedule(
            enter=round(self.enter * progress),
            exit=None if wide_exit == num_layers and self.exit is None else wide_exit,
            keep=keep,
            ranking=self.ranking,
        )

    def flops(
        self, config: PretrainedConfig, n_text: int, n_vision: int, *, convention: str = "computed"
    ) -> int:
        """Decoder cost of prefilling one prompt.

        Args:
            config: the model's configuration (its text part is read).
            n_text, n_vision: tokens of the prompt.
            convention: `"computed"`: FLOPs of everything the decoder layers compute (`decoder_flops`), and of
                ranking; `"vision_only"`: the literature's MACs of vision tokens alone (`vision_macs`).
        """
        vision = self.vision_tokens(config.get_text_config().num_hidden_layers, n_vision)
        if convention == "computed":
            tokens = [n_text + n for n in vision]
            return decoder_flops(config, tokens, () if self.cross is None else vision) + self.ranking_flops(
                config, n_text, vision
            )
        if convention == "vision_only":
            return vision_macs(config, vision, frozen=self.cross is not None)
        raise ValueError(f"convention={convention!r} is unknown; use 'computed' or 'vision_only'.")

    def ranking_flops(self, config: PretrainedConfig, n_text: int, vision_tokens: Sequence[int]) -> int:
        """FLOPs of ranking: the attention scores of the asking text for vision tokens, in every watched layer.

        Under HiDrop's rule the scores of one row, and the projections of the layers that are looked at.
        """
        rows = n_text if self.asking is None else min(self.asking, n_text)
        attention, flops = attends(config), 0
        for layer in self.watched:
            flops += ranking_flops(config, rows, vision_tokens[layer]) if attention[layer] else 0
        for layer in self.looked_ahead:
            tokens = n_text + vision_tokens[layer - 1]
            flops += projection_flops(config, tokens) + ranking_flops(config, 1, tokens)
        return flops

    @property
    def watched(self) -> Sequence[int]:
        """The layers whose attention ranks vision tokens as they run."""
        if not self.keep or self.ranking == "hidrop":
            return []
        last = max(self.keep)
        return range(self.enter, last) if self.cross is None else [i for i in self.cross if i < last]

    @property
    def asking(self) -> int | None:
        """Most text tokens before an answer that rank vision tokens; None: all of them."""
        return QUESTION_ROWS if self.ranking == "question" else None

    @property
    def looked_ahead(self) -> Sequence[int]:
        """The layers whose attention ranks vision tokens before they run: HiDrop's rule."""
        return list(self.keep) if self.ranking == "hidrop" else []

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: enter, exit, keep, and whatever else differs from the default."""
        values: dict[str, Any] = {"enter": self.enter, "exit": self.exit}
        values["keep"] = {str(i): k for i, k in self.keep.items()}
        if self.cross is not None:
            values["cross"] = list(self.cross)
        if self.ranking != _unsaid_ranking(self.keep):
            values["ranking"] = self.ranking
        if self.freeze_prefix:
            values["freeze_prefix"] = True
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VisionSchedule:
        """The schedule in plain values, as JSON and YAML hold them.

        Raises:
            ValueError: they are not a schedule.
        """
        names = [f.name for f in fields(cls)]
        if not isinstance(values, Mapping):
            raise ValueError(f"a vision schedule is a mapping of {', '.join(names)}, not {values!r}.")
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ValueError(f"a vision schedule has no {unknown[0]!r}; it has {', '.join(names)}.")
        enter, keep, cross = values.get("enter") or 0, values.get("keep") or {}, values.get("cross")
        return cls(
            enter=enter,
            exit=values.get("exit"),
            keep=keep,
            cross=cross,
            ranking=values.get("ranking", _unsaid_ranking(keep)),
            freeze_prefix=values.get("freeze_prefix", False),
        )

    def save(self, folder: str | Path) -> None:
        """Write `vision_schedule.json` into `folder`."""
        (Path(folder) / SCHEDULE_FILE).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> VisionSchedule:
        """Read `vision_schedule.json` from `folder`.

        Raises:
            ValueError: the file is damaged.
        """
        file = Path(folder) / SCHEDULE_FILE
        try:
            return cls.from_dict(json.loads(file.read_text("utf-8-sig")))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is damaged: {error}") from None


def check_depth(name: str, layer: int | None, num_layers: int) -> None:
    """Raise ValueError if the layer that `enter`, `exit`, `keep` or `cross` names is beyond the decoder's."""
    limit = num_layers if name == "exit" else num_layers - 1
    if layer is not None and layer > limit:
        raise ValueError(
            f"{name} names layer {layer}, but the decoder has layers 0 to {num_layers - 1}; "
            f"choose at most {limit}."
        )


def _unsaid_ranking(keep: Mapping[Any, Any]) -> Any:
    """The rule of plain values that name none: that of the students saved before there was another default."""
    return "reading" if keep else "question"
