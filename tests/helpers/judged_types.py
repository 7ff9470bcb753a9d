"""Puts a model into the table of families: what is exact under which policy, what is refused and why."""

from __future__ import annotations

import copy
from typing import Any

import torch
from helpers.families import IMAGE
from helpers.oracle import band, masked
from helpers.tiny_types import (
    LAYERS,
    TOKENS_PER_IMAGE,
    VARIANTS,
    build_type,
    encoded_images,
    inputs_for,
    prompt_for,
    weightless,
)
from torch import Tensor

from latefusion import VisionSchedule
from latefusion.data.turns import isolate_turns
from latefusion.models.attach import attach
from latefusion.models.policies.base import AttentionCall, Prompt, Selection
from latefusion.models.policies.fastv import FastV
from latefusion.models.policies.visipruner.settings import VisiPruner
from latefusion.models.self_check import check_decoder, class_names, name_of

NEAR = 2e-4  # of logits of order 1 to 10; a wrong mask or router is off by 0.05 and more
NEW_TOKENS = 3


class Subject:
    """A tiny model and the prompt that its checks run on."""

    def __init__(self, model: Any):
        self.model = model
        self.inputs, self.vision = prompt_for(model)
        layers = model.get_decoder()._modules.get("layers", ())
        self.softmax = [
            i for i, layer in enumerate(layers) if "self_attn" in layer._modules
        ]  # others run a recurrence
        self.first = next((i for i in self.softmax if i > 0), 0)  # that a policy can look at, behind layer 0
        self.mask: Tensor | None = (
            None  # the vision mask that `attach` is given; None: it finds placeholders itself
        )
        self.text = self.inputs["attention_mask"].bool() & ~self.vision
        self._feed()

    def _feed(self) -> None:
        """Find how the stock model takes images; else text stands in for them, marked by `vision_mask`."""
        for features in encoded_images():
            inputs = {**self.inputs, "mm_encoder_outputs": features}
            try:
                with torch.no_grad():
                    self.model(**copy.deepcopy(inputs), use_cache=False)
            except Exception:  # another family's container
                continue
            self.inputs = inputs
            return
        generator = torch.Generator().manual_seed(2)
        ids = torch.randint(3, 90, self.inputs["input_ids"].shape, generator=generator)
        self.inputs["input_ids"] = torch.where(self.vision, ids, self.inputs["input_ids"])
        self.inputs = {name: self.inputs[name] for name in ("input_ids", "attention_mask")}
        self.mask = self.vision

    def logits(self, inputs: dict[str, Any] | None = None, **options: Any) -> Tensor:
        """Logits `[B, T, V]`."""
        with torch.no_grad():
            return self.model(**copy.deepcopy(self.inputs if inputs is None else inputs), **options).logits

    def attached(self, policy: Any, check: bool = True) -> Any:
        try:
            return attach(self.model, policy, vision_mask=self.mask, check=check)
        except ValueError as error:
            raise Refused(str(error)) from None

    def oracle(self, seen: list[Tensor], frozen: bool = False) -> Tensor:
        with masked(self.model, self.vision, seen, padding=self.inputs["attention_mask"], frozen=frozen):
            return self.logits(use_cache=False)

    def error(self, got: Tensor, expected: Tensor) -> float:
        return (got - expected)[self.text].abs().max().item()

    # ---------------------------------------------------------------- one check a policy

    def keep_all(self) -> float:
        """Bit for bit, in one forward and in `generate`.

        Gemma 4 with shared keys computes only a prompt's last row in some layers, which a policy turns off: there a
        generation is equal to float error.
        """
        stock, written = self.logits(use_cache=False), self.generate()[0]
        with self.attached(VisionSchedule()):
            same = torch.equal(self.logits(use_cache=False), stock)
            again = self.generate()[0]
        if getattr(self.model.get_decoder().config, "num_kv_shared_layers", 0):
            return (again - written).abs().max().item() if same else float("inf")
        return 0.0 if same and torch.equal(again, written) else float("inf")

    def bands(self) -> float:
        expected = self.oracle(band(self.vision, LAYERS, 1, 4))
        with self.attached(VisionSchedule(enter=1, exit=4)):
            return max(
                self.error(self.logits(use_cache=False), expected),
                self.error(self.logits(use_cache=True), expected),
            )

    def generation(self) -> float:
        """Steps on a cache equal one forward over everything, full length and masked."""
        with self.attached(VisionSchedule(enter=1, exit=4)):
            steps, new = self.generate()
        inputs, vision = self.longer(new), torch.nn.functional.pad(self.vision, (0, NEW_TOKENS))
        with masked(self.model, vision, band(vision, LAYERS, 1, 4), padding=inputs["attention_mask"]):
            expected = self.logits(inputs, use_cache=False)
        return (steps - expected[:, -NEW_TOKENS - 1 : -1]).abs().max().item()

    def longer(self, new: Tensor) -> dict[str, Any]:
        out = dict(copy.deepcopy(self.inputs), input_ids=torch.cat([self.inputs["input_ids"], new], 1))
        if (
            "image_grid_thw" not in out
        ):  # as `generate` gives them; families whose positions have axes make them
            mask = torch.nn.functional.pad(out["attention_mask"], (0, NEW_TOKENS), value=1)
            first = int(self.model.config.model_type == "paligemma")
            out["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0) + first
        for name, fill in (
            ("attention_mask", 1),
            ("mm_token_type_ids", 0),
            ("moe_mm_token_type_ids", 0),
            ("token_type_ids", 0),
        ):
            if name in out:
                old = out[name]
                fill = 1 if self.model.config.model_type == "paligemma" else fill  # its suffix is causal
                out[name] = torch.cat([old, torch.full(new.shape, fill, dtype=old.dtype)], 1)
        return out

    def generate(self) -> tuple[Tensor, Tensor]:
        """Logits `[B, steps, V]` and tokens `[B, steps]` of a greedy generation."""
        with torch.no_grad():
            out = self.model.generate(
                **copy.deepcopy(self.inputs),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        return torch.stack(out.logits, 1), out.sequences[:, -NEW_TOKENS:]

    def chosen(self, policy: Any) -> float:
        """What the policy chose, carried out by the full-length model with masks."""
        with self.attached(policy) as attachment:
            got = self.logits(use_cache=False)
            steps = dict(attachment.last.selections)
        now, seen = self.vision, []
        for layer in range(LAYERS):
            now = steps[layer].vision & self.vision if layer in steps else now
            seen.append(now)
        return self.error(got, self.oracle(seen))

    def weights(self) -> float:
        """The weights that policies are shown, times the values, are what the layer's own attention gives."""
        look = Look(self.softmax)
        with self.attached(look):
            self.logits(use_cache=False)
        if sorted(look.errors) != self.softmax:
            raise AssertionError(f"the attention of layers {sorted(look.errors)} alone was shown")
        return max(look.errors.values())

    def turns(self) -> bool:
        """Whether the turns of a row that `data.isolate` keeps apart get what each gets in a row of its own."""
        if self.mask is not None:
            return False
        image = [IMAGE] * TOKENS_PER_IMAGE
        start = (
            getattr(self.model.config, "vision_start_token_id", None) or 5
        )  # by which Qwen-Omni knows an image
        ids = torch.tensor(
            [[start, *image, 11, 13, 17], [start, *image, 19, 23, 29]]
        )  # no longer than windows
        first = 1 + len(image)  # behind the image: a turn of one token, and one of two
        answer = torch.zeros_like(ids, dtype=torch.bool)
        answer[:, [first, first + 2]] = True

        def logits(ids: Tensor, **more: Tensor) -> Tensor:
            inputs, _ = inputs_for(self.model, ids)
            return self.logits({**self.inputs, **inputs, **more}, use_cache=False)

        apart = isolate_turns(ids == IMAGE, answer, torch.ones_like(answer), torch.float32)
        try:
            together = logits(ids, **apart)
        except Exception:  # a model that takes no such mask or positions
            return False
        alone = [logits(torch.cat([ids[:, :first], ids[:, turn]], 1))[:, first:] for turn in ([5], [6, 7])]
        return float((together[:, first:] - torch.cat(alone, 1)).abs().max()) <= NEAR

    def keep(self) -> float:
        keep = {self.first + 1: 3, LAYERS - 1: 2}
        return max(self.weights(), self.chosen(VisionSchedule(enter=1, keep=keep)))

    def fastv(self) -> float:
        return max(self.weights(), self.chosen(FastV(layer=self.first + 1)))

    def visipruner(self) -> float:
        policy = VisiPruner(
            boundary=self.first,
            layer_threshold=0.9999,
            tokens_threshold=0.5,
            exit_patience=1,
            stages=("middle", "deep"),
        )
        return max(self.weights(), self.chosen(policy))

    def cross(self) -> float:
        read = (1, 2, 4) if len(self.softmax) == LAYERS else tuple(self.softmax)
        seen = [self.vision & (i in read) for i in range(LAYERS)]
        with self.attached(VisionSchedule(cross=read)):
            got = self.logits(use_cache=False)
        return self.error(got, self.oracle(seen, frozen=True))


BASIC = ("keep_all", "bands", "generation")
POLICIES = {
    "bands": BASIC,
    "keep": ("keep",),
    "FastV": ("fastv",),
    "VisiPruner": ("visipruner",),
    "cross": ("cross",),
}


class Refused(Exception):
    """`attach` refused the policy."""


def judged(row: str) -> dict[str, Any]:
    """A row of the table: the decoder, the policies that are exact on it, and the reasons of those that are refused.

    Raises:
        AssertionError: something is neither exact nor refused at `attach`.
    """
    reason = refused_without_weights(row)
    if reason is not None:
        return {"exact": [], "refused": {"all": reason}}
    subject = Subject(build_type(row))
    try:
        subject.attached(VisionSchedule(), check=False).detach()
    except Refused as refusal:
        return {"exact": [], "refused": {"all": str(refusal)}}
    decoder = subject.model.get_decoder()
    assert check_decoder(decoder) == {}, f"{row}: the check at `attach` would refuse what is exact"
    result: dict[str, Any] = {
        "decoder": type(decoder).__name__,
        "classes": [name_of(decoder), *sorted(class_names(decoder) - {name_of(decoder)})],
        "exact": [],
        "refused": {},
    }
    for policy, checks in POLICIES.items():
        try:
            for check in checks:
                error = getattr(subject, check)()
                assert error <= NEAR, f"{row}: {check} is off by {error:.2g} and nothing refused it"
        except Refused as refusal:
            result["refused"][policy] = str(refusal)
        else:
            result["exact"].append(policy)
    if subject.mask is not None:
        result["images"] = "vision_mask"
    result["turns"] = subject.turns()
    return result


def refused_without_weights(row: str) -> str | None:
    """Why a type's default model is refused, which needs no weights; None if it is not, or only a tiny one can tell."""
    if row in VARIANTS:
        return None
    try:
        model = weightless(row)
    except Exception:  # defaults of which transformers itself makes no model
        return None
    try:
        attach(model, VisionSchedule(), vision_mask=lambda **inputs: None, check=False).detach()
    except ValueError as error:
        return str(error)
    return None


class Look:
    """A policy that removes nothing and compares what it is shown in every layer."""

    fusion_layer = None

    def __init__(self, watch: list[int]) -> None:
        self.watch = watch
        self.errors: dict[int, float] = {}

    def validate(self, num_layers: int) -> None: ...

    def begin(self, prompt: Prompt) -> Look:
        return self

    def select(self, layer: int) -> Selection | None:
        return None

    def attended(self, layer: int, call: AttentionCall) -> None:
        rows = torch.arange(call.query.shape[2])[None].expand(len(call.query), -1)
        value = call.value.repeat_interleave(call.query.shape[1] // call.value.shape[1], dim=1)
        expected = (call.weights(rows) @ value.float()).transpose(1, 2)
        real = call.query_index >= 0
        self.errors[layer] = (expected - call.output)[real].abs().max().item()
