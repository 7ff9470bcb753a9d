"""Another model as the teacher (`kl.model`): frozen, usually larger, with the student's tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig

from latefusion.models.attach import Attachment, attach
from latefusion.models.base_model import load_base, load_processor
from latefusion.models.executor.vision import vision_token_ids
from latefusion.models.locate import EMBEDDED, readable
from latefusion.models.policies.base import Policy
from latefusion.models.policies.configured import check_depths, teaches
from latefusion.recipes.schema import Config

SIZES = ((96, 64), (64, 160))  # images that both processors must turn into the same inputs


@dataclass(kw_only=True)
class OtherTeacher:
    """A frozen model under its policy.

    Attributes:
        model: the Hugging Face model, with `attachment` on it.
        forward: the model, or what an engine wrapped it in.
        sharded: its weights lie in shards, so all processes must run the same modules.
    """

    model: Any
    attachment: Attachment
    forward: Any = None
    sharded: bool = False

    def __post_init__(self) -> None:
        self.forward = self.forward or self.model


def load_teacher(config: Config, policy: Policy, *, dtype: torch.dtype) -> OtherTeacher:
    """Load the model that `kl.model` names, and attach `policy`; call `check_teacher` before.

    Raises:
        FileNotFoundError: its weights are not there.
    """
    model, _ = load_base(
        kl_model(config),
        dtype=dtype,
        revision=config.kl.revision,
        trust_remote_code=config.model.trust_remote_code,
    )
    model.requires_grad_(False)
    return OtherTeacher(model=model, attachment=attach(model, policy))


def check_teacher(config: Config) -> None:
    """Check from processors and configurations alone, before any weights are loaded, that `kl.model` can teach.

    The teacher reads the tokens and pixels of the student's processor.

    Raises:
        ValueError: another vocabulary, another number of vision tokens an image, or other pixels.
    """
    path = kl_model(config)
    student, teacher = (_processor(config, *of) for of in _both(config))
    fix = "choose a teacher of the student's family, or leave kl.model out"
    vocabulary, others = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    if vocabulary != others:
        word = min(
            (word for word in vocabulary.keys() | others.keys() if vocabulary.get(word) != others.get(word)),
            key=lambda word: min(vocabulary.get(word, len(vocabulary)), others.get(word, len(others))),
        )
        raise ValueError(
            f"kl.model={path} has another vocabulary: {word!r} is token {others.get(word)} there and "
            f"{vocabulary.get(word)} in {config.model.path}; {fix}."
        )
    if shared_vocabulary(config) < len(vocabulary):
        raise ValueError(
            f"kl.model={path} and {config.model.path} both score {shared_vocabulary(config)} tokens, but the "
            f"tokenizer has {len(vocabulary)}; {fix}."
        )
    placeholder, other = (_config(config, *of).image_token_id for of in _both(config))
    facts: list[tuple[str, Any, Any]] = [("image_token_id", placeholder, other)]
    for size in SIZES:
        text = student.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
        image = Image.radial_gradient("L").resize(size).convert("RGB")
        a, b = (processor(text=text, images=[image], return_tensors="pt") for processor in (student, teacher))
        of = f"an image of {size[0]}x{size[1]} pixels"
        tokens = [int((inputs["input_ids"] == placeholder).sum()) for inputs in (a, b)]
        facts.append((f"vision tokens of {of}", tokens[0], tokens[1]))
        facts.append((f"shape of {of}", tuple(a["pixel_values"].shape), tuple(b["pixel_values"].shape)))
        means = [round(float(inputs["pixel_values"].double().mean()), 4) for inputs in (a, b)]
        facts.append((f"mean value of {of}", means[0], means[1]))
    for what, here, there in facts:
        if here != there:
            raise ValueError(
                f"kl.model={path} does not see images as the student does: {what}: {there} there, {here} in "
                f"{config.model.path}; {fix}."
            )


def check_models(config: Config) -> None:
    """Check from configurations and processors alone that the models can do what `config` says.

    Raises:
        ValueError: a model takes no images, the schedule or thresholds need more layers, or `kl.model` cannot teach.
    """
    models = [_config(config, config.model.path, config.model.revision)]
    if config.kl.model is not None:
        models.append(_config(config, config.kl.model, config.kl.revision))
    for model in models:
        if "image" not in vision_token_ids(model):
            raise ValueError(
                f"{model.name_or_path} is a {model.model_type}, not an image-text model; name another with "
                "model.path=... (or kl.model=...)."
            )
    depths = [model.get_text_config().num_hidden_layers for model in models]
    check_depths(config, depths[0], depths[1] if len(depths) > 1 else None)
    if config.kl.model is not None and teaches(config):
        check_teacher(config)


def shared_vocabulary(config: Config) -> int:
    """Number of token ids that both models score; models with one tokenizer may pad their outputs differently."""
    both = [(config.model.path, config.model.revision)] if config.kl.model is None else _both(config)
    return min(_config(config, *of).get_text_config().vocab_size for of in both)


def kl_model(config: Config) -> str:
    assert config.kl.model is not None
    return config.kl.model


def _both(config: Config) -> list[tuple[str, str | None]]:
    return [(config.model.path, config.model.revision), (kl_model(config), config.kl.revision)]


def _config(config: Config, path: str, revision: str | None) -> Any:
    return AutoConfig.from_pretrained(
        readable(path), revision=revision, trust_remote_code=config.model.trust_remote_code
    )


def _processor(config: Config, path: str, revision: str | None) -> Any:
    settings = {} if path == EMBEDDED else config.model.processor
    return load_processor(
        path, revision=revision, trust_remote_code=config.model.trust_remote_code, settings=settings
    )
