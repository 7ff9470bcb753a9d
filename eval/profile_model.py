"""Find where a model fuses vision into text, and write the schedule that follows.

python eval/profile_model.py model=embedded data=scenes samples=128
python eval/profile_model.py model=HUB_ID_OR_FOLDER data=FOLDER samples=64 budget=0.3 output=outputs/profile
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from latefusion.data.local_files import FORMATS, JSON, check_local_files
from latefusion.models.folder_contents import PROFILE, check_free
from latefusion.models.locate import check_base, check_four_bits
from latefusion.models.profile_schedule import PROFILE_FILE
from latefusion.models.schedule import VisionSchedule
from latefusion.recipes.compose import (
    HELP,
    compose_config,
    print_and_exit,
    refusal,
    refuse_bare_words,
    unknown_key,
    without_cfg,
)
from latefusion.recipes.launcher import GOES_ON, run_to_exit
from latefusion.recipes.printable import error_line
from latefusion.recipes.schema import QUESTION_SETS, RECIPES, Config, DataConfig, Dtype
from latefusion.training.run_folder import check_unfinished, check_writable, claimed

if TYPE_CHECKING:
    from latefusion.data.draw import ImageRow
    from latefusion.eval.fusion.run import DrawnPrompts


@dataclass
class Arguments:
    """Beside `model=` and `data=` (names in recipes/, or a folder or hub id) and their keys (`data.path=`, ...):

    Attributes:
        samples: prompts to measure on, about as many different images as the data has.
        confirm: other prompts to accept the schedule on, as many of them as the data has.
        split: of the data; null: validation of scenes, icons and easy_vqa, the data's own otherwise.
        bound: nats of KL per answer token that the schedule may cost, its entry and keeps included: the upper limit of
            the mean over the confirming prompts stays within it.
        budget: decoder FLOPs to stay below, as a share of dense; null: as few as the bound allows.
        cross: choose also, within the same bound, the layers in which text reads frozen vision tokens
            (`recipe=cross_only`).
        images: training images that calibrate the entry; no sample shows one of them.
        output: folder; null: outputs/profile_MODEL.
        overwrite: replace the profile in it; measurements that it shares with the new one are not made again.
        batch_size: samples a batch.
        dtype: auto (bfloat16 where the hardware computes in it), bfloat16 or float32.
        seed: for drawing the samples.
        new_tokens: length of the model's own answers, where the data has none.
    """

    samples: int = 128
    confirm: int = 1536
    split: str | None = None
    bound: float = 0.05
    budget: float | None = None
    cross: bool = False
    images: int = 256
    output: str | None = None
    overwrite: bool = False
    batch_size: int = 16
    dtype: Dtype = Dtype.auto
    seed: int = 0
    new_tokens: int = 16


NAMES = [field.name for field in fields(Arguments)]
KEYS = ["model", "data", *NAMES]


def main(words: Sequence[str]) -> None:
    """Run from the command line; invalid arguments end the program with one sentence."""
    if HELP & set(words):
        print(f"{__doc__}\n{Arguments.__doc__}")
        return
    words, printed = without_cfg(words)
    refuse_bare_words(words)
    try:
        if not words and not printed:
            raise ValueError("name the model to profile: model=embedded, say; --help lists the keys.")
        arguments, config = parse(words)
        if printed:
            print_and_exit(lambda: {**vars(arguments), "model": config.model, "data": config.data})
        check_unfinished(output_of(arguments, config), PROFILE_FILE, overwrite=arguments.overwrite)
        check(arguments, config)
        with claimed(output_of(arguments, config), key="output"):
            run(arguments, config)
    except OmegaConfBaseException as error:
        sys.exit(error_line(refusal(error, KEYS)))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(error_line(error))


def parse(words: Sequence[str]) -> tuple[Arguments, Config]:
    """The arguments of this command, and the keys of `model` and `data` as a configuration of training."""
    profiling, rest = [], []
    for word in words:
        key = word.partition("=")[0]
        if key in NAMES:
            profiling.append(word)
        elif key.lstrip("+").partition(".")[0] in ("model", "data"):
            rest += expanded(word)
        else:
            raise ValueError(unknown_key(key.lstrip("+"), KEYS))
    arguments: Any = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(Arguments), OmegaConf.from_cli(profiling))
    )
    for name in ("samples", "confirm", "images", "batch_size", "new_tokens"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name}={getattr(arguments, name)} must be at least 1.")
    if not 0 < arguments.bound < inf:
        raise ValueError(f"bound={arguments.bound} must be positive and finite; it is in nats.")
    if arguments.seed < 0:
        raise ValueError(f"seed={arguments.seed} must not be negative.")
    if arguments.budget is not None and not 0 < arguments.budget <= 1:
        raise ValueError(
            f"budget={arguments.budget} is a share of dense FLOPs; choose it above 0 and at most 1."
        )
    config = compose_config(rest)
    for word in rest:
        key = word.partition("=")[0]
        if config.data.source in QUESTION_SETS and key.startswith("data.") and key != "data.seed":
            raise ValueError(
                f"{word} would not be read: a profile on data={config.data.source.value} draws its own rows; say "
                "samples=N, confirm=N, split=NAME or data.seed=N."
            )
    return arguments, config


def expanded(word: str) -> list[str]:
    """`model=PATH` or `data=PATH` as the keys that it stands for; any other word as it is."""
    key, _, value = word.partition("=")
    if key not in ("model", "data") or (RECIPES / key / f"{value}.yaml").is_file():
        return [word]
    if "/" not in value and not Path(value).exists() and Path(value).suffix not in (*FORMATS, *JSON):
        return [word]  # a mistyped name: `compose_config` lists those that exist
    if key == "data":
        return ["data=dataset", f"data.path={value}"]
    return ["model=other", f"model.path={value}"]


def check(arguments: Arguments, config: Config) -> None:
    """Raise ValueError or FileNotFoundError, before anything is loaded, if this profile cannot work."""
    if arguments.samples < 2:
        raise ValueError(f"samples={arguments.samples} does not show how samples differ; use 2 or more.")
    if config.model.load_in_4bit:
        check_four_bits(config.model.path)
    check_base(config.model.path)
    check_local_files(config.data)
    check_writable(output_of(arguments, config), key="output")
    check_free(output_of(arguments, config), fix="choose another output=FOLDER", own=[PROFILE])


def run(arguments: Arguments, config: Config, console: Console | None = None) -> dict[str, Any]:
    """Profile the model that `config` names on its data; returns what `profile.json` holds."""
    check(arguments, config)

    import torch  # lazy: keeps argument errors fast

    from latefusion.eval.fusion.decide import Goal
    from latefusion.eval.fusion.run import profile
    from latefusion.models.base_model import compute_dtype, load_base
    from latefusion.models.fingerprint import model_identity

    console = console or Console()
    prompts = draw(config.data, arguments, no_videos=videos_refused(config))
    dtype = {Dtype.bfloat16: torch.bfloat16, Dtype.float32: torch.float32}.get(
        arguments.dtype, compute_dtype()
    )
    source = config.model
    try:
        model, processor = load_base(
            source.path,
            dtype=dtype,
            revision=source.revision,
            processor=source.processor,
            four_bits=source.load_in_4bit,
            trust_remote_code=source.trust_remote_code,
        )
    except ValueError as error:
        raise ValueError(
            f"{source.path} is not a model that reads images and text ({str(error).splitlines()[0][:120]}); name an "
            "image-text-to-text model."
        ) from None
    if torch.cuda.is_available() and model.device.type != "cuda":
        model.cuda()  # type: ignore[call-arg]
    for remark in prompts.remarks:
        console.print(remark, markup=False)
    samples, n = [*prompts.measured, *prompts.confirming], len(prompts.measured)
    labelled = all(sample["messages"][-1]["role"] == "assistant" for sample in samples)
    if not labelled:
        console.print(
            f"The data have no answers: the model writes its own first, up to {arguments.new_tokens} tokens to each of "
            f"{len(samples)} prompts."
        )
        samples = model_answers(model, processor, samples, arguments.new_tokens, console)
    prompts = replace(prompts, measured=samples[:n], confirming=samples[n:], labelled=labelled)
    about = {
        "model": source.path,
        **model_identity(
            source.path,
            source.revision,
            processor=processor,
            dtype="nf4" if source.load_in_4bit else dtype,
        ),
        "data": config.data.path or config.data.source.value,
        "split": arguments.split,
        "seed": arguments.seed,
        "data_seed": config.data.seed,
        "images": arguments.images,
        "labelled": labelled,
    }
    return profile(
        model=model,
        processor=processor,
        prompts=prompts,
        console=console,
        about=about,
        output_dir=output_of(arguments, config),
        goal=Goal(
            bound=arguments.bound,
            budget=arguments.budget,
            by_hand=schedule_by_hand(config, model),
            cross=arguments.cross,
        ),
        batch_size=arguments.batch_size,
    )


def output_of(arguments: Arguments, config: Config) -> str:
    """The folder to write."""
    return arguments.output or f"outputs/profile_{Path(config.model.path).name}"


def schedule_by_hand(config: Config, model: Any) -> VisionSchedule | None:
    """The schedule that `recipes/model` holds for the model; None if it holds none, or it is another model's."""
    held, tuned_for = config.model.schedule, config.model.tuned_for
    if held.enter is None or tuned_for not in (None, config.model.path):
        return None
    schedule = VisionSchedule(
        enter=held.enter, exit=held.exit, keep=dict(held.keep or {}), ranking=config.schedule.ranking
    )
    try:
        schedule.validate(model.config.get_text_config().num_hidden_layers)
    except ValueError:
        return None
    return None if schedule == VisionSchedule() else schedule


def videos_refused(config: Config) -> str:
    """Why rows with videos cannot be measured on; empty if they can."""
    from latefusion.data.videos import unreadable_by

    if config.data.source in QUESTION_SETS:
        return ""
    source = config.model
    return unreadable_by(source.path, revision=source.revision, trust_remote_code=source.trust_remote_code)


def draw(data: DataConfig, arguments: Arguments, no_videos: str = "") -> DrawnPrompts:
    """Draw samples to measure on, others to confirm on, and others again, with different images, to calibrate on.

    Args:
        no_videos: why a row with a video cannot be used; empty: it can.

    Raises:
        FileNotFoundError, ValueError: the data are missing, or have fewer samples than `samples`.
    """
    from latefusion.data.draw import (
        distinct_images,
        left_out,
        opened,
        prompt_rows,
        with_images,
        with_other_images,
    )
    from latefusion.data.question_sets import samples
    from latefusion.eval.fusion.run import DrawnPrompts

    needed = arguments.samples + arguments.confirm
    if data.source in QUESTION_SETS:
        scenes: Any = samples(data.source, arguments.split or "validation", seed=data.seed)
        candidates, _ = with_images(scenes, needed=needed, seed=arguments.seed)
        chosen = first_samples(candidates, arguments.samples)
        others = candidates[arguments.samples :][: arguments.confirm]
        train: Any = samples(data.source, "train", seed=data.seed)
        calibrating = distinct_images(train, arguments.images)
        return DrawnPrompts(
            measured=opened(scenes, chosen),
            confirming=opened(scenes, others),
            calibrating=calibrating,
            remarks=few(others, arguments),
        )
    needed += arguments.images
    rows = prompt_rows(data, arguments.split, needed)
    candidates, bad = with_images(rows, needed=needed, seed=arguments.seed, no_videos=no_videos)
    remarks = left_out(bad)
    try:
        chosen = first_samples(candidates, arguments.samples)
    except ValueError as error:  # of data all of which are videos, why
        raise ValueError(" ".join([str(error), *remarks])) from None
    rest = candidates[arguments.samples :]
    calibrating = with_other_images(rest, chosen, min(arguments.images, -(-len(rest) // 2)))
    seen = {image for row in calibrating for image in row.images}
    others = [row for row in rest if not row.images & seen][: arguments.confirm]
    remarks += few(others, arguments)
    if not calibrating:
        calibrating = with_other_images(chosen, [], arguments.images)
        remarks.append(
            "The data have no images beside those of the samples, so the entry is calibrated on them: its KL is better "
            "than it will be on others; fewer samples leave some."
        )
    return DrawnPrompts(
        measured=opened(rows, chosen),
        confirming=opened(rows, others),
        calibrating=opened(rows, calibrating),
        remarks=remarks,
    )


def few(confirming: Sequence[ImageRow], arguments: Arguments) -> list[str]:
    """In a sentence, that the data have too few prompts to confirm the schedule on."""
    n = len(confirming)
    if n == 0:
        return [
            "The data have no prompts beside the samples, so these confirm the schedule that they chose: its KL on "
            "others may be above the bound; fewer samples leave some."
        ]
    if n < min(arguments.samples, arguments.confirm):
        return [
            f"The data have only {n} prompts beside the samples to confirm the schedule on: its upper limit is wide, "
            "and a cheaper one might do; fewer samples leave more."
        ]
    return []


def first_samples(candidates: Sequence[ImageRow], samples: int) -> list[ImageRow]:
    """The first `samples` of the rows with images; refuses data that has fewer."""
    n = len(candidates)
    if n < samples:
        there = "one sample with an image" if n == 1 else f"{n} samples with images"
        fix = (
            f"choose at most {n}"
            if n > 1
            else "name data with two at least"
            if n
            else "name data with images"
        )
        raise ValueError(f"samples={samples} is more than the {there} that the data has; {fix}.")
    return list(candidates[:samples])


def model_answers(
    model: Any, processor: Any, samples: list[dict[str, Any]], new_tokens: int, console: Console
) -> list[dict[str, Any]]:
    """The samples with the model's own greedy answer at their end, which replaces one that a sample may have."""
    import torch
    from rich.progress import track

    from latefusion.data.prompts import prompt_inputs, prompt_of

    answered = []
    for sample in track(samples, "Answering", console=console):
        inputs = prompt_inputs(model, processor, [sample])
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, num_beams=1)
        text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        answer = {"role": "assistant", "content": [{"type": "text", "text": text or "."}]}
        answered.append({**sample, "messages": [*prompt_of(sample), answer]})
    return answered


if __name__ == "__main__":
    run_to_exit(lambda: main(sys.argv[1:]), interrupted=GOES_ON)
