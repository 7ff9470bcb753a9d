"""Tasks with videos, by the plugin and by lmms-eval's own command. Needs the extra and `latefusion[video]`."""

from __future__ import annotations

import json
import subprocess
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from latefusion import VisionSchedule
from latefusion.data.motion import make_clip, render
from latefusion.data.videos import Video, load_video

pytestmark = [
    pytest.mark.extra,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),
]
FAMILIES = ["qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl", "smolvlm"]
SIDE = {"qwen2_5_vl": 56, "qwen3_vl": 64}
FRAMES, ENTER, EXIT = 4, 2, 4
BAND = f"_target_: latefusion.models.schedule.VisionSchedule\nenter: {ENTER}\nexit: {EXIT}\n"
ANSWER = "red and 2"
QUESTIONS = ["how many?", "what color is it?", "is it red?", "how many red?"]
TASK = """
task: films
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_visual: !function films.visual
doc_to_text: question
doc_to_target: answer
output_type: generate_until
generation_kwargs: {{max_new_tokens: {longest}, temperature: 0}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """
from PIL import Image

def visual(document, settings=None):
    pictures = [Image.open(file).convert("RGB") for file in document["images"] or []]
    films = list(document["videos"] or [])
    if document["end"]:
        films = [{"type": "video", "path": films[0], "video_start": 0, "video_end": document["end"]}]
    return [*films, *pictures]
"""


def write_film(path: Path, index: int, side: int, *, again: int = 3) -> Path:
    """A film of moving shapes, four pictures that each stand for some frames, without loss."""
    import av
    import numpy as np

    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=2)
        stream.width, stream.height, stream.pix_fmt = side, side, "bgr0"
        for frame in render(make_clip("test", index)):
            picture = np.asarray(frame.resize((side, side)))
            for _ in range(again):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Films and a picture, of the two sizes that families take."""
    folder = tmp_path_factory.mktemp("films")
    for side in (28, 56, 64):
        for i in range(3):
            write_film(folder / f"{side}-{i}.mkv", i, side)
        render(make_clip("test", 7))[0].resize((side, side)).save(folder / f"{side}.png")
    return folder


@cache
def speaking(family: str) -> tuple[Any, Any]:
    """A tiny random model that says nothing but words, and its processor."""
    from helpers.video_models import video_model

    model, processor = video_model(family)
    model = deepcopy(model)
    tokenizer = processor.tokenizer
    words = {i for word, i in tokenizer.get_vocab().items() if word.isalpha()}
    everything = range(model.config.get_text_config().vocab_size)
    model.generation_config.suppress_tokens = [i for i in everything if i not in words]
    return model, processor


@cache
def saved(family: str, folder: Path) -> Path:
    model, processor = speaking(family)
    model.save_pretrained(folder / family)
    processor.save_pretrained(folder / family)
    (folder / "band.yaml").write_text(BAND)
    return folder / family


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def documents(family: str, shown: Path) -> list[dict[str, Any]]:
    """Films, a part of one, a picture, both in either order, and a text, as tasks of lmms-eval give them."""
    side = SIDE.get(family, 28)
    films, picture = [str(shown / f"{side}-{i}.mkv") for i in range(3)], Image.open(shown / f"{side}.png")
    part = {"type": "video", "path": films[0], "video_start": 1.5, "video_end": 4}
    return [
        {"question": "how many?", "shown": [films[0]]},
        {"question": "what color is it?", "shown": [part]},
        {"question": "is it red?", "shown": [picture]},
        {"question": "is <image> red and <video>?", "shown": [films[1], picture]},
        {"question": "how many red?", "shown": [films[2], films[1]]},
        {"question": "how many?", "shown": []},
        {"question": "is it red?", "shown": [str(shown / f"{side}.png")]},  # a file's name, but of an image
    ]


def own_rows(family: str, shown: Path) -> list[dict[str, Any]]:
    """The same, as rows of our own commands."""
    side = SIDE.get(family, 28)
    films = [load_video(shown / f"{side}-{i}.mkv", max_frames=FRAMES) for i in range(3)]
    whole = load_video(shown / f"{side}-0.mkv", max_frames=99)
    kept = [3, 5, 6, 8]  # from 1.5 to 4 seconds, two a second
    part = Video(whole.frames[kept], (0, 2, 3, 5), 6, whole.rate, FRAMES)
    picture = Image.open(shown / f"{side}.png")

    def row(*parts: Any) -> dict[str, Any]:
        content = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "video" if isinstance(part, Video) else "image"}
            for part in parts
        ]
        videos = [part for part in parts if isinstance(part, Video)]
        images = [part for part in parts if isinstance(part, Image.Image)]
        return {"messages": [{"role": "user", "content": content}], "images": images, "videos": videos}

    return [
        row(films[0], "how many?"),
        row(part, "what color is it?"),
        row(picture, "is it red?"),
        row("is ", picture, " red and ", films[1], "?"),
        row(films[2], films[1], "how many red?"),
        row("how many?"),
        row(picture, "is it red?"),
    ]


def plugin(base: Path, rows: list[dict[str, Any]], *, chat: bool = False, **more: Any) -> Any:
    from latefusion.eval.lmms_eval_plugin import LateFusion, LateFusionSimple

    kind = LateFusion if chat else LateFusionSimple
    model = kind(pretrained=str(base), dtype="float32", device="cpu", max_frames=FRAMES, **more)
    model.task_dict = {"t": {"test": rows}}
    return model


def requests(
    rows: list[dict[str, Any]], *, chat: bool = False, answers: list[str] | None = None
) -> list[Any]:
    from lmms_eval.api.instance import Instance
    from lmms_eval.api.task import ConfigurableMessagesTask

    def messages(row: dict[str, Any]) -> list[Any]:
        return ConfigurableMessagesTask._build_user_turn(row["shown"], row["question"])

    made = []
    for i, row in enumerate(rows):
        place = (i, "t", "test")
        settings: dict[str, Any] = {"max_new_tokens": 5}
        arguments: Any = (row["question"], settings, lambda row: row["shown"], *place)
        if answers is not None:
            arguments = (row["question"], answers[i], lambda row: row["shown"], *place)
        elif chat:
            arguments = (row["question"], messages, settings, *place)
        kind = "generate_until" if answers is None else "loglikelihood"
        about = {"task": "t", "doc_id": i, "repeats": 1}
        made.append(Instance(request_type=kind, arguments=arguments, idx=i, metadata=about))
    return made


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "simple"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_our_own_rows(family: str, chat: bool, shown: Path, models: Path) -> None:
    """One batch of films, pictures, both and neither; under a band each answer is that of the row asked alone."""
    from latefusion.data.prompts import prompt_inputs
    from latefusion.models.attach import attach

    base, rows = saved(family, models), documents(family, shown)
    model = plugin(base, rows, chat=chat, policy=str(models / "band.yaml"), batch_size=4)
    answers = [answer.text for answer in model.generate_until(requests(rows, chat=chat))]
    own, processor = speaking(family)
    expected, dense = [], []
    for row in own_rows(family, shown):
        inputs = prompt_inputs(own, processor, [row])
        for policy, texts in ((VisionSchedule(enter=ENTER, exit=EXIT), expected), (VisionSchedule(), dense)):
            with attach(own, policy), torch.no_grad():
                out = own.generate(**inputs, max_new_tokens=5, do_sample=False)
            new = out[:, inputs["input_ids"].shape[1] :]
            texts += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    assert answers == expected and all(answers)
    assert answers != dense and answers[5] == dense[5]  # nothing is hidden from a text


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_cost_what_masks_on_the_whole_model_say(family: str, shown: Path, models: Path) -> None:
    """Losses under a band against the full-length model whose masks hide every vision token outside of it."""
    from helpers.families import LAYERS
    from helpers.oracle import band, masked

    from latefusion.data.prompts import images_of, prompt_text, videos_of
    from latefusion.data.videos import video_arguments
    from latefusion.models.executor.vision import vision_token_ids

    base, rows = saved(family, models), documents(family, shown)
    answers_given = ["red and 2", "2", "yes", "no", "how many", "red", "yes"]
    model = plugin(base, rows, policy=str(models / "band.yaml"), batch_size=4)
    losses = [loss for loss, _ in model.loglikelihood(requests(rows, answers=answers_given))]
    plain = plugin(base, rows, batch_size=4).loglikelihood(requests(rows, answers=answers_given))
    own, processor = speaking(family)
    for i, (row, answer) in enumerate(zip(own_rows(family, shown), answers_given, strict=True)):
        images, videos = images_of(row), videos_of(row)
        if images and videos and family == "smolvlm":
            continue  # its processor cannot show both by itself
        inputs = processor(
            text=[prompt_text(processor, row) + answer],
            images=[images] if images else None,
            **video_arguments(videos, family),
            return_tensors="pt",
        )
        ids = inputs["input_ids"]
        vision = torch.isin(ids, torch.tensor([*vision_token_ids(own.config).values()]))
        with masked(own, vision, band(vision, LAYERS, ENTER, EXIT)), torch.no_grad():
            logits = own(**inputs, use_cache=False).logits.double()
        n = len(processor.tokenizer(answer, add_special_tokens=False).input_ids)
        each = logits[0, -n - 1 : -1].log_softmax(-1).gather(-1, ids[0, -n:, None])
        assert losses[i] == pytest.approx(-float(each.mean()), abs=1e-5)
        dense, _ = plain[i]
        assert (abs(dense - losses[i]) > 1e-3) == bool(row["images"] or row["videos"])


def test_what_cannot_be_shown_is_one_sentence(
    shown: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = saved("qwen2_5_vl", models)

    def answered(*parts: Any, question: str = "how many?", **more: Any) -> Any:
        rows = [{"question": question, "shown": list(parts)}]
        return plugin(base, rows, **more).generate_until(requests(rows, chat=more.get("chat", False)))

    film = str(shown / "56-0.mkv")
    (shown / "cut.mkv").write_bytes(Path(film).read_bytes()[:900])
    with pytest.raises(ValueError, match=r"^document t 0 has a bad video: .*cut\.mkv is cut off"):
        answered(str(shown / "cut.mkv"))
    with pytest.raises(ValueError, match=r"^document t 0 has a bad video: .* no frame from video_start=90"):
        answered({"type": "video", "path": film, "video_start": 90, "video_end": 91}, chat=True)
    with pytest.raises(ValueError, match=r"^document t 0 has a bad image: none\.png cannot be read"):
        answered("none.png", chat=True)
    with pytest.raises(ValueError, match=r"^this task has sound, which latefusion cannot read"):
        answered("a.wav", chat=True)
    with pytest.raises(ValueError, match=r"^document t 0 has 1 image\(s\) but 2 times <\|image_pad\|>"):
        answered(Image.new("RGB", (56, 56)), question="<|image_pad|>")
    with pytest.raises(ValueError, match=r"^a model of type llava is shown no videos"):
        from latefusion.eval.lmms_eval_plugin import LateFusionSimple

        llava = LateFusionSimple(pretrained="embedded", dtype="float32", device="cpu")
        llava.task_dict = {"t": {"test": [{"question": "?", "shown": [film]}]}}
        llava.generate_until(requests(llava.task_dict["t"]["test"]))
    with pytest.raises(ValueError, match=r"^max_frames=0 must be at least 1"):
        LateFusionSimple(pretrained="embedded", device="cpu", max_frames="0")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(
        ValueError, match=r"^video files are decoded by PyAV, .* pip install 'latefusion\[video\]'"
    ):
        answered(film)


def answers_of(folder: Path) -> dict[str, str]:
    """What lmms-eval wrote down with `--log_samples`, by document."""
    (file,) = folder.rglob("*samples_films.jsonl")
    return {
        str(row["doc_id"]): row["filtered_resps"][0]
        if isinstance(row["filtered_resps"], list)
        else row["filtered_resps"]
        for row in map(json.loads, file.read_text().splitlines())
    }


def test_a_student_trained_on_films_answers_by_the_command_as_in_our_evaluation(
    shown: Path, models: Path
) -> None:
    """`lmms-eval eval` on a local task of films and pictures against `eval/evaluate.py` on the same rows."""
    from helpers.data_rows import turn, write_rows
    from helpers.quick_runs import QUICK, run_config
    from helpers.tiny_base import SMALL, composed

    from latefusion.eval.evaluate import Arguments, evaluate

    base, film = saved("qwen2_5_vl", models), {"type": "video"}
    rows = [
        {
            "messages": [turn("user", film, QUESTIONS[i]), turn("assistant", "2")],
            "videos": [f"{shown}/56-{i}.mkv"],
        }
        for i in range(3)
    ]
    write_rows(models, *rows, name="rows.jsonl")
    words = [
        *(*QUICK, *SMALL, "data=dataset", f"data.path={models}/rows.jsonl", f"data.max_frames={FRAMES}"),
        *(
            "train.batch_size=3",
            "train.learning_rate=1e-4",
            "teacher=none",
            f"schedule.enter={ENTER}",
            f"schedule.exit={EXIT}",
        ),
        *("schedule.keep=null", f"model.path={base}", f"output_dir={models}/student"),
    ]
    run_config(composed(*words))
    film_rows = [
        {
            "question": QUESTIONS[i],
            "videos": [f"{shown}/56-{i}.mkv"],
            "images": [],
            "answer": ANSWER,
            "end": 0.0,
        }
        for i in range(3)
    ]
    film_rows.append({**film_rows[0], "end": 2.0})
    film_rows.append({**film_rows[2], "videos": [], "images": [f"{shown}/56.png"]})
    film_rows.append({**film_rows[1], "images": [f"{shown}/56.png"]})
    film_rows.append({**film_rows[1], "videos": []})
    own = []
    for i, row in enumerate(film_rows):
        films = [{"path": one, "video_end": row["end"] or None} for one in row["videos"]]
        own.append(
            {
                "id": str(i),
                "question": row["question"],
                "answers": [ANSWER],
                "image": row["images"],
                "videos": films,
            }
        )
    write_rows(models, *film_rows, name="films.jsonl")
    write_rows(models, *own, name="own.jsonl")
    (models / "films.py").write_text(FUNCTIONS)
    tokenizer = speaking("qwen2_5_vl")[1].tokenizer
    longest = len(tokenizer(ANSWER, add_special_tokens=False).input_ids) + 1  # as our evaluation has it
    (models / "films.yaml").write_text(TASK.format(data=models / "films.jsonl", longest=longest))
    evaluate(
        Arguments(
            checkpoint=str(models / "student"),
            data=str(models / "own.jsonl"),
            output=str(models / "report"),
            batch_size=4,
            controls=False,
            batches=[],
            lengths=[],
        )
    )
    lines = map(json.loads, (models / "report" / "predictions.jsonl").read_text().splitlines())
    expected: dict[str, dict[str, str]] = {}
    for line in lines:
        expected.setdefault(line["system"], {})[line["id"]] = line["prediction"]
    systems = {"": "student", ",policy=dense": "dense"}
    for more, system in systems.items():
        output = models / f"out{len(more)}"
        arguments = f"checkpoint={models}/student,dtype=float32{more}"
        words = ["--model", "latefusion", "--model_args", arguments, "--tasks", "films", "--log_samples"]
        words += ["--include_path", str(models), "--batch_size", "4", "--output_path", str(output)]
        done = subprocess.run(
            [sys.executable, "-m", "lmms_eval", *words], capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        assert answers_of(output) == {name: text.strip() for name, text in expected[system].items()}
    assert expected["student"] != expected["dense"]
