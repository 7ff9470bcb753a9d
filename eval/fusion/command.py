"""The command line of `eval/profile_model.py`, and what it makes of `model=` and `data=`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from latefusion.data.local_files import check_local_files
from latefusion.models.schedule import VisionSchedule
from latefusion.recipes.compose import compose_config, refusal, unknown_key
from latefusion.recipes.schema import RECIPES, Config, DataConfig, Dtype, Source

if TYPE_CHECKING:
    from latefusion.data.draw import ImageRow


@dataclass
class Arguments:
    """Beside `model=` and `data=` (names in recipes/, or a folder or hub id) and their keys (`data.path=`, ...):

    Attributes:
        samples: prompts to measure on, as many different images as there are.
        split: of the data; null: validation of scenes, else the data's own.
        bound: nats of KL per answer token that the schedule may cost, its entry and keeps included.
        budget: decoder FLOPs to stay below, in parts of dense; null: as few as the bound allows.
        images: that calibrate the entry; none of them is a sample's.
        output: folder; null: outputs/profile_MODEL.
        batch_size: samples a batch.
        dtype: auto (bfloat16 where the hardware computes in it), bfloat16 or float32.
        seed: of the choice of samples.
        new_tokens: of the model's own answer, where the data has none.
    """

    samples: int = 128
    split: str | None = None
    bound: float = 0.05
    budget: float | None = None
    images: int = 256
    output: str | None = None
    batch_size: int = 16
    dtype: Dtype = Dtype.auto
    seed: int = 0
    new_tokens: int = 16


KEYS = ["model", "data", *(field.name for field in fields(Arguments))]


def main(words: Sequence[str], usage: str) -> None:
    """Run; what cannot work ends in one sentence."""
    try:
        if any("=" not in word for word in words) or not words:
            sys.exit(f"{usage}\n{Arguments.__doc__}")
        own, config = parsed(words)
        run(own, config)
    except OmegaConfBaseException as error:
        sys.exit(f"error: {refusal(error, KEYS)}")
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


def parsed(words: Sequence[str]) -> tuple[Arguments, Config]:
    """This script's own keys, and the rest as a configuration of training (`model`, `data`)."""
    names = {field.name for field in fields(Arguments)}
    mine = [word for word in words if word.partition("=")[0] in names]
    for key in (word.partition("=")[0].lstrip("+") for word in words):
        if key.partition(".")[0] not in ("model", "data") and key not in names:
            raise ValueError(unknown_key(key, KEYS))
    rest = [found for word in words if word not in mine for found in named(word)]
    own: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Arguments), OmegaConf.from_cli(mine)))
    for name in ("samples", "images", "batch_size", "new_tokens"):
        if getattr(own, name) < 1:
            raise ValueError(f"{name}={getattr(own, name)} must be at least 1.")
    if not own.bound > 0:
        raise ValueError(f"bound={own.bound} must be positive; it is in nats.")
    if own.budget is not None and not 0 < own.budget <= 1:
        raise ValueError(f"budget={own.budget} is a part of dense FLOPs; choose it above 0 and at most 1.")
    return own, compose_config(rest)


def named(word: str) -> list[str]:
    """`model=PATH` and `data=PATH`, where that is no name in recipes/, as the keys that it stands for."""
    key, _, value = word.partition("=")
    if key not in ("model", "data") or (RECIPES / key / f"{value}.yaml").is_file():
        return [word]
    if "/" not in value and not Path(value).exists():
        return [word]  # a mistyped name: `compose_config` lists what there is
    if key == "data":
        return ["data=dataset", f"data.path={value}"]
    return ["model=other", f"model.path={value}"]


def run(own: Arguments, config: Config, **options: Any) -> dict[str, Any]:
    """Profile the model that `config` names on its data."""
    import torch

    from latefusion.eval.fusion.run import profile
    from latefusion.eval.fusion.study import Wishes
    from latefusion.models.base_model import check_base, compute_dtype, load_base
    from latefusion.models.fingerprint import model_fingerprint

    if own.samples < 2:
        raise ValueError(f"samples={own.samples} says nothing of how samples differ; use 2 or more.")
    wanted, console = config.model, options.pop("console", None) or Console()
    check_base(wanted.path)
    check_local_files(config.data)
    drawn = chosen_rows(config.data, own)
    dtype = {Dtype.bfloat16: torch.bfloat16, Dtype.float32: torch.float32}.get(own.dtype, compute_dtype())
    try:
        model, processor = load_base(
            wanted.path,
            dtype=dtype,
            revision=wanted.revision,
            processor=wanted.processor,
            four_bits=wanted.load_in_4bit,
            trust_remote_code=wanted.trust_remote_code,
        )
    except ValueError as error:
        raise ValueError(
            f"{wanted.path} is no model that reads images and text ({str(error).splitlines()[0][:120]}); name an "
            "image-text-to-text model."
        ) from None
    if torch.cuda.is_available() and model.device.type != "cuda":
        model.cuda()  # type: ignore[call-arg]
    for remark in drawn.remarks:
        console.print(remark)
    rows = drawn.measured
    labelled = all(row["messages"][-1]["role"] == "assistant" for row in rows)
    if not labelled:
        console.print(
            f"The data have no answers: the model writes its own first, up to {own.new_tokens} tokens to each of "
            f"{len(rows)} prompts."
        )
        rows = own_answers(model, processor, rows, own.new_tokens, console)
    name = Path(config.model.path).name
    about = {
        "model": config.model.path,
        "weights": model_fingerprint(config.model.path, config.model.revision),
        "data": config.data.path or config.data.source.value,
        "split": own.split,
        "seed": own.seed,
        "data_seed": config.data.seed,
        "dtype": str(dtype).removeprefix("torch."),
        "images": own.images,
        "labelled": labelled,
    }
    return profile(
        model=model,
        processor=processor,
        samples=rows,
        fit_on=drawn.calibrating,
        remarks=drawn.remarks,
        console=console,
        labelled=labelled,
        about=about,
        output_dir=own.output or f"outputs/profile_{name}",
        wishes=Wishes(bound=own.bound, budget=own.budget, given=by_hand(config, model)),
        batch_size=own.batch_size,
        **options,
    )


def by_hand(config: Config, model: Any) -> VisionSchedule | None:
    """The schedule that `recipes/model` holds for the model, if it holds one and the model is one that it fits."""
    asked = config.model.schedule
    if asked.enter is None:
        return None
    schedule = VisionSchedule.from_dict({"enter": asked.enter, "exit": asked.exit, "keep": asked.keep})
    try:
        schedule.validate(model.config.get_text_config().num_hidden_layers)
    except ValueError:
        return None
    return None if schedule == VisionSchedule() else schedule


@dataclass(frozen=True)
class Drawn:
    """Rows to measure on, rows to calibrate on, and in sentences what should be known of them."""

    measured: list[dict[str, Any]]
    calibrating: list[dict[str, Any]]
    remarks: list[str]


def chosen_rows(data: DataConfig, own: Arguments) -> Drawn:
    """Rows to measure on and rows to calibrate on, with different images.

    Raises:
        FileNotFoundError, ValueError: the data are not there, or there are fewer than asked for.
    """
    from latefusion.data import sources
    from latefusion.data.draw import (
        distinct_images,
        left_out,
        opened,
        prompt_rows,
        with_images,
        with_other_images,
    )

    if data.source is Source.scenes:
        rows: Any = sources.scenes(own.split or "validation", seed=data.seed)
        found, _ = with_images(rows, needed=own.samples, seed=own.seed)
        measured = opened(rows, enough(found, own))
        train: Any = sources.scenes("train", seed=data.seed)
        return Drawn(measured, distinct_images(train, own.images), [])
    wanted = own.samples + own.images
    rows = prompt_rows(data, own.split, wanted)
    found, bad = with_images(rows, needed=wanted, seed=own.seed)
    chosen, remarks = enough(found, own), left_out(bad)
    others = with_other_images(found[own.samples :], chosen, own.images)
    if not others:
        others = with_other_images(chosen, [], own.images)
        remarks.append(
            "The data have no images beside those of the samples, so the entry is calibrated on them: its KL is better "
            "than it will be on others; fewer samples leave some."
        )
    return Drawn(opened(rows, chosen), opened(rows, others), remarks)


def enough(found: Sequence[ImageRow], own: Arguments) -> list[ImageRow]:
    if len(found) < own.samples:
        raise ValueError(
            f"samples={own.samples} is more than the {len(found)} samples with images that the data has"
            + (f"; choose at most {len(found)}." if len(found) > 1 else "; name data with images.")
        )
    return list(found[: own.samples])


def own_answers(
    model: Any, processor: Any, rows: list[dict[str, Any]], new_tokens: int, console: Console
) -> list[dict[str, Any]]:
    """The rows with the model's own greedy answer at their end, in the place of one that some of them may have."""
    import torch
    from rich.progress import track

    from latefusion.data.prompts import prompt_inputs, prompt_of

    found = []
    for row in track(rows, "Answering", console=console):
        inputs = prompt_inputs(model, processor, [row])
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, num_beams=1)
        text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        said = {"role": "assistant", "content": [{"type": "text", "text": text or "."}]}
        found.append({**row, "messages": [*prompt_of(row), said]})
    return found
