"""Commands on rows with video files: validate, train, teach, evaluate and generate, on tiny random models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from helpers.data_rows import turn, write_rows
from helpers.quick_runs import QUICK, metrics_entries, run_config, teach_config
from helpers.tiny_base import SMALL, composed
from helpers.video_files import write
from helpers.video_models import video_model
from PIL import Image
from rich.console import Console

from latefusion.data.validate import validate
from latefusion.eval import generate
from latefusion.eval.evaluate import Arguments, evaluate
from latefusion.recipes.check import check_config

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "llava_onevision"])
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, two videos, rows to train on, one of them bad, and questions."""
    folder = tmp_path_factory.mktemp(request.param)
    model, processor = video_model(request.param)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    write(folder / "a.mp4", size=(56, 56))
    write(folder / "a.gif", frames=5, size=(56, 56))
    (folder / "cut.mp4").write_bytes((folder / "a.mp4").read_bytes()[:900])
    rows = [
        {
            "id": str(i),
            "messages": [
                {"role": "user", "content": "<video>how many?" if i % 3 else "how many?"},
                {"role": "assistant", "content": ["2", "red", "yes and no"][i % 3]},
            ],
            **({"videos": ["a.mp4" if i % 2 else "a.gif"]} if i % 3 else {}),
        }
        for i in range(8)
    ]
    write_rows(folder, *rows, {**rows[1], "id": "bad", "videos": ["cut.mp4"]}, name="rows.jsonl")
    questions = [
        {"id": f"q{i}", "video": name, "question": "how many?", "answers": ["2"]}
        for i, name in enumerate(("a.mp4", "a.gif", "a.mp4"))
    ]
    write_rows(
        folder,
        *questions,
        {"id": "bare", "question": "is it red?", "answers": ["no"], "image": None},
        name="questions.jsonl",
    )
    return folder


def words_of(home: Path, *more: str) -> list[str]:
    return [
        *(
            *QUICK,
            *SMALL,
            "data=dataset",
            f"data.path={home / 'rows.jsonl'}",
            "data.max_frames=4",
            "data.group=modality",
        ),
        *("data.on_error=skip", "train.batch_size=3", "teacher=dense", "schedule.enter=2", "schedule.exit=4"),
        *("schedule.keep={3: 2}", f"model.path={home / 'model'}", "eval.batch_size=2", *more),
    ]


def test_validate_names_the_bad_video(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = check_config(composed(*words_of(home)))
    assert validate(config, console=Console(quiet=True)) == 1
    name, reason = capsys.readouterr().out.strip().split("\t")
    assert name == "bad" and reason.startswith("has a bad video: cut.mp4 cannot be decoded")


def test_a_student_is_trained_resumed_taught_and_evaluated(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_config(composed(*words_of(home, f"output_dir={home / 'student'}")))
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("Video: ")]
    assert "in the decoder under the schedule; a policy chooses among the tokens of all frames" in line
    tower = float(re.search(r"costs (\S+) GFLOPs in vision tower and projector", line)[1])
    assert float(re.search(r"and (\S+) GFLOPs in the decoder", line)[1]) > 0
    assert "with vision tower, projector and head" in printed
    losses = [entry["loss"] for entry in metrics_entries(home / "student") if "loss" in entry]
    assert len(losses) == 3 and all(torch.tensor(losses).isfinite())
    assert "cut.mp4" in (home / "student" / "skipped_rows.jsonl").read_text()

    cached = [f"kl.cache={home / 'answers'}", "kl.top_k=8"]
    teach_config(composed(*words_of(home, *cached)))
    run_config(composed(*words_of(home, *cached, f"output_dir={home / 'offline'}")))
    offline = [entry["loss"] for entry in metrics_entries(home / "offline") if "loss" in entry]
    assert offline[0] == pytest.approx(losses[0], rel=0.2)

    capsys.readouterr()
    report = evaluate(
        Arguments(
            checkpoint=str(home / "student"),
            data=str(home / "questions.jsonl"),
            output=str(home / "report"),
            batch_size=2,
            controls=False,
            batches=[],
            lengths=[],
        )
    )
    assert report is not None
    (films,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Video: ")]
    assert films.startswith("Video: 12 frames shown of 65, ") and films in report["note"]
    assert "GFLOPs in the dense decoder" in films
    assert float(re.search(r"costs (\S+) GFLOPs in vision", films)[1]) == pytest.approx(tower, rel=0.02)
    lines = (home / "report" / "predictions.jsonl").read_text().splitlines()
    dense = [answer for answer in map(json.loads, lines) if answer["system"] == "dense"]
    seen = {answer["id"]: answer["tokens"][0] - answer["text_tokens"] for answer in dense}
    n = {"qwen2_5_vl": 8, "llava_onevision": 5}[home.name.rstrip("0123456789")]
    assert seen == {"q0": n, "q1": n, "q2": n, "bare": 0}  # the four frames that the student was trained on


def test_generate_prints_answers_tokens_a_frame_and_savings(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate.main(
        [
            *(f"model={home / 'model'}", f"video={home / 'a.mp4'}", "prompt=how many?", "policy=dense,fastv"),
            *("fastv.layer=2", "max_frames=4", "max_new_tokens=2", f"picture={home / 'kept.svg'}"),
        ]
    )
    printed = " ".join(capsys.readouterr().out.split())
    n = {
        "qwen2_5_vl": "8 vision tokens. A frame has 2.0",
        "llava_onevision": "5 vision tokens. A frame has 1.2",
    }
    assert f"Video: 4 frames shown of 30, {n[home.name.rstrip('0123456789')]} and costs " in printed
    assert "vision tower included" in printed and (home / "kept.svg").is_file()
    with pytest.raises(SystemExit, match=r"error: no video at none\.mp4; name a file with video=FILE"):
        generate.main([f"model={home / 'model'}", "video=none.mp4", "prompt=how many?"])
    with pytest.raises(SystemExit, match="error: a model of type llava is shown no videos; use one of"):
        generate.main(["model=embedded", f"video={home / 'a.mp4'}", "prompt=how many?"])


def test_smolvlm_trains_on_images_and_videos_in_one_batch(tmp_path: Path) -> None:
    """The first loss of mixed rows is that of the rows trained apart, by their tokens; ungrouped, under a band."""
    model, processor = video_model("smolvlm")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    write(tmp_path / "a.mp4", size=(56, 56))
    Image.new("RGB", (28, 28), (200, 10, 10)).save(tmp_path / "a.png")
    film, picture = {"type": "video"}, {"type": "image"}
    pictures = {"images": ["a.png"]}
    films = {"videos": ["a.mp4"]}
    rows = [
        {"messages": [turn("user", film, "how many?"), turn("assistant", "2")], **films},
        {
            "messages": [turn("user", picture, "what color is it?"), turn("assistant", "red and 2")],
            **pictures,
        },
        {"messages": [turn("user", film, "is it red?"), turn("assistant", "yes")], **films},
        {"messages": [turn("user", picture, "is it red?"), turn("assistant", "yes and no")], **pictures},
    ]
    both = {"messages": [turn("user", picture, film, "red?"), turn("assistant", "no")], **pictures, **films}
    sets = {"mixed": [*rows, both], "films": rows[::2], "images": rows[1::2], "both": [both]}
    losses = {}
    for name, kept in sets.items():
        write_rows(tmp_path, *kept, name=f"{name}.jsonl")
        words = [
            *(*QUICK, *SMALL, "data=dataset", f"data.path={tmp_path / name}.jsonl", "data.max_frames=4"),
            *(f"train.batch_size={len(kept)}", "train.steps=1", "teacher=none", "data.group=none"),
            *(
                "schedule.enter=2",
                "schedule.exit=4",
                "schedule.keep=null",
                f"model.path={tmp_path / 'model'}",
            ),
        ]
        run_config(composed(*words, f"output_dir={tmp_path / name}"))
        (losses[name],) = [entry["loss"] for entry in metrics_entries(tmp_path / name) if "loss" in entry]
    tokens = {"films": 2 + 2, "images": 4 + 4, "both": 2}  # answers and what ends them
    expected = sum(losses[name] * n for name, n in tokens.items()) / sum(tokens.values())
    assert losses["mixed"] == pytest.approx(expected, rel=1e-5)
    assert abs(losses["films"] - losses["images"]) > 1e-3
