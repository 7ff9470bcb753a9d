"""Ask a model about an image or a video under one or several policies; print the answers and what each policy saved.

    python eval/generate.py model=embedded image=photo.png prompt="what is at the top left?" policy=visipruner
    python eval/generate.py model=HUB_ID video=clip.mp4 max_frames=8 prompt="where does it go?" policy=dense,fastv
    python eval/generate.py policy=dense,visipruner,fastv fastv.layer=4 picture=kept.svg

Without an image it takes a test image of `scenes` (`icons` for model=smollm_icons), and its question.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from latefusion.data.escape import terminal
from latefusion.data.images import BadImage, load_image
from latefusion.data.videos import BadVideo, load_video, unreadable_by
from latefusion.models.locate import check_base, decoder_layers
from latefusion.models.policies import recipe_of
from latefusion.recipes.compose import check_words, parse_words
from latefusion.recipes.launcher import run_to_exit
from latefusion.recipes.named_models import named_model
from latefusion.recipes.printable import error_line

if TYPE_CHECKING:
    from latefusion.models.explain import Explanation
    from latefusion.models.policies.base import Policy


@dataclass
class Arguments:
    """The command line of this script, as `key=value`.

    Attributes:
        model: a name in recipes/model (which also has VisiPruner's thresholds for it), a folder or a hub id.
        image: files, with commas between them.
        video: files or folders of frames, with commas between them.
        max_frames: the most frames of a video that the model is shown.
        prompt: the question.
        policy: names in recipes/policy or YAML files, with commas between them; `NAME.argument=value` changes one.
        max_new_tokens: longest answer.
        picture: SVG file of what the last policy kept.
    """

    model: str = "embedded"
    image: str | None = None
    video: str | None = None
    max_frames: int = 16
    prompt: str | None = None
    policy: str = "dense,visipruner"
    max_new_tokens: int = 64
    picture: str | None = None


def main(words: list[str]) -> None:
    """Run from the command line; what cannot work ends in one sentence."""
    words = check_words(words, Arguments, str(__doc__), show=configuration)
    try:
        arguments, names, changes = parsed(words)
        path, recipe = named_model(arguments.model)
        for name in names:
            recipe_of(name)
        row = question_of(arguments)
        check_base(path)
        thresholds = recipe.get("visipruner", {})
        policies = {name: policy_of(name, changes.get(name), thresholds) for name in names}
        layers = decoder_layers(path)
        for policy in policies.values() if layers is not None else ():
            policy.validate(layers)
        answer(arguments, path, row or scene_of(arguments), policies, Console())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(error_line(error))


def parsed(words: list[str]) -> tuple[Arguments, list[str], dict[str, DictConfig]]:
    """The arguments, the names of the policies, and by name the changed arguments of a policy."""
    values = OmegaConf.from_cli(words)
    names = [name.strip() for name in str(values.get("policy", Arguments.policy)).split(",")]
    changes = {name: values.pop(name) for name in names if isinstance(values.get(name), DictConfig)}
    return parse_words(values, Arguments), names, changes


def configuration(words: list[str]) -> dict[str, Any]:
    """The configuration that `--cfg job` prints."""
    arguments, _, changes = parsed(words)
    return {**vars(arguments), **changes}


def policy_of(name: str, changes: DictConfig | None, thresholds: dict[str, Any]) -> Policy:
    """A policy by name, with arguments changed; `visipruner` has the model's own thresholds."""
    from latefusion.models.policies import tuned  # lazy: keeps argument errors fast

    arguments: Any = {} if changes is None else OmegaConf.to_container(changes)
    return tuned(name, thresholds, **arguments)


def question_of(arguments: Arguments) -> dict[str, Any] | None:
    """The prompt as a row of `messages`, `images` and `videos`, its files read; None if it names no file.

    Raises:
        ValueError: a number is too small, the prompt is missing, or a file cannot be read.
        FileNotFoundError: there is no such file.
    """
    for name in ("max_frames", "max_new_tokens"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name}={getattr(arguments, name)} must be at least 1.")
    picture = arguments.picture and Path(arguments.picture).absolute()
    if picture and picture.suffix.lower() != ".svg":
        raise ValueError(f"picture={arguments.picture} must end in .svg: an SVG is what is drawn.")
    if picture and not picture.parent.is_dir():
        raise FileNotFoundError(f"no folder {picture.parent} for picture={arguments.picture}; make it first.")
    if arguments.image is None and arguments.video is None:
        return None
    images, videos = files_of("image", arguments.image), files_of("video", arguments.video)
    if not arguments.prompt:
        raise ValueError('prompt is not set; add prompt="YOUR QUESTION".')
    try:
        pictures = [load_image(file) for file in images]
        clips = [load_video(clip, max_frames=arguments.max_frames) for clip in videos]
    except (BadImage, BadVideo) as error:
        raise ValueError(f"{error}; name another file.") from None
    return row_of(arguments.prompt, pictures, clips)


def files_of(kind: str, names: str | None) -> list[str]:
    """The files that `image=` or `video=` names, with commas between them; all of them exist."""
    files = [name.strip() for name in names.split(",")] if names else []
    for name in files:
        if not (Path(name).is_file() or (kind == "video" and Path(name).is_dir())):
            raise FileNotFoundError(f"no {kind} at {name}; name a file with {kind}=FILE.")
    return files


def scene_of(arguments: Arguments) -> dict[str, Any]:
    """A test image of the model's own question set, as such a row."""
    from latefusion.data.question_sets import load_questions, usual_set  # lazy: keeps argument errors fast

    row = load_questions(usual_set(arguments.model), "test", n_images=1)[0]
    return row_of(arguments.prompt or row["question"], [row["image"]], [])


def row_of(text: str, images: list[Any], videos: list[Any]) -> dict[str, Any]:
    shown = [{"type": "image"} for _ in images] + [{"type": "video"} for _ in videos]
    messages = [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]
    return {"messages": messages, "images": images, "videos": videos, "question": text}


def check_videos(path: str, row: dict[str, Any]) -> None:
    """Raise ValueError if the row has videos and the model's family is not known to read them, before weights load."""
    if row["videos"] and (reason := unreadable_by(path)):
        raise ValueError(f"{reason}.")


def answer(
    arguments: Arguments, path: str, row: dict[str, Any], policies: dict[str, Policy], console: Console
) -> None:
    """Print a table of what the model answers under each policy and what that saves, and each one explained."""
    import torch  # lazy: keeps argument errors fast

    from latefusion.data.frame_cost import frames_in_words
    from latefusion.data.prompts import check_positions, prompt_inputs
    from latefusion.eval.memory import kv_cache_bytes
    from latefusion.models.attach import attach
    from latefusion.models.base_model import compute_dtype, load_base
    from latefusion.models.executor.vision import vision_tokens
    from latefusion.models.explain import explain
    from latefusion.models.flops import encoder_flops
    from latefusion.models.schedule import VisionSchedule

    check_videos(path, row)
    model: Any
    model, processor = load_base(path, dtype=compute_dtype())
    if torch.cuda.is_available():
        model.cuda()
    for policy in policies.values():
        policy.validate(model.config.get_text_config().num_hidden_layers)
    inputs = prompt_inputs(model, processor, [row])
    check_positions(model.config, "the prompt", inputs["input_ids"].shape[1], arguments.max_new_tokens)
    n_vision = int(vision_tokens(model.config, inputs["input_ids"]).sum())
    for name, policy in policies.items():
        if isinstance(policy, VisionSchedule):
            policy.check_keep(n_vision, f"this prompt (policy={name})")
    table = Table(title=terminal(f"{arguments.model}: {row['question']}"), title_justify="left")
    for name in ("policy", "answer"):
        table.add_column(name, overflow="fold")  # a long name goes on below
    for name in (
        "vision\na layer",
        "FLOPs\nsaved",
        "attention\nsaved",
        "after\nfusion",
        "KV cache",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    saved: dict[str, float] = {}  # of the whole prefill
    explanations: dict[str, Explanation] = {}
    with attach(model, VisionSchedule()) as attachment, torch.no_grad():
        for name, policy in policies.items():
            with attachment.using(policy):
                out = model.generate(
                    **inputs,
                    max_new_tokens=arguments.max_new_tokens,
                    do_sample=False,
                    return_dict_in_generate=True,
                )
                text = processor.decode(
                    out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
                )
                explanations[name] = explain(model, inputs)
            sample = explanations[name].samples[0]
            cost = sample.account
            if sample.prefill_saved is not None:
                saved[name] = sample.prefill_saved
            table.add_row(
                terminal(Path(name).name),
                terminal(text.strip()),
                f"{cost.vision / len(sample.record.tokens):.1f} of {sample.record.n_vision}",
                f"{cost.flops_saved:.1%}",
                f"{cost.attention_saved:.1%}",
                f"{cost.attention_saved_after:.1%}",
                f"{kv_cache_bytes(out.past_key_values) / 1e6:.2f} MB",
            )
    console.print(table)
    if row["videos"] and not row["images"]:
        record = sample.record
        counts = [(record.tokens[0] - record.vision[0], record.n_vision)]
        encoder = encoder_flops(model, inputs)
        words = frames_in_words(model.config, row["videos"], counts, encoder=encoder, encoded=record.n_vision)
        console.print(words, highlight=False)
    if saved:
        shares = ", ".join(f"{terminal(Path(name).name)} {share:.1%}" for name, share in saved.items())
        console.print(
            f"FLOPs saved are the decoder's. Of the whole prefill, vision tower included: {shares}."
        )
    for name, explanation in explanations.items():
        heading = f"[bold]{terminal(Path(name).name)}[/bold]"
        console.print(f"{heading} {terminal(str(explanation))}", highlight=False, soft_wrap=True)
    if arguments.picture is not None:
        explanation.save(arguments.picture)
        console.print(f"Picture of {name}: {arguments.picture}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_to_exit(lambda: main(sys.argv[1:]))
