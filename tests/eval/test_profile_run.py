"""A profile from its command line to its files, what training makes of it, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from helpers.quick_runs import run_config
from helpers.tiny_base import composed, save_tiny_base, tiny_base
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from latefusion.eval import profile_model
from latefusion.eval.fusion.measure import Measurer
from latefusion.models import profile_folder, profile_schedule
from latefusion.models.attach import attach
from latefusion.models.fingerprint import model_fingerprint
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.entry import CalibratedEntry

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SMALL = ("data=scenes", "samples=6", "confirm=6", "images=16", "batch_size=4", "dtype=float32")
SMALL += ("bound=0.02", "cross=true")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"), layers=4)


@pytest.fixture(scope="module")
def profiled(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    arguments, config = profile_model.parse([*SMALL, f"model={base}", f"output={folder}"])
    return folder, profile_model.run(arguments, config)


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.refers, self.ids, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.refers += [values[name] for name in ("src", "href", "data") if values.get(name)]
        self.ids += [values["id"]] if "id" in values else []


def test_a_profile_writes_page_pictures_and_numbers(profiled) -> None:
    folder, result = profiled
    text = (folder / "report.html").read_text()
    page = Page(text)
    sections = {"stages", "decision", "reading", "agreement", "attention", "examples", "lenses", "method"}
    assert sections <= set(page.ids) and len(page.ids) == len(set(page.ids)) and page.tags.count("svg") == 8
    assert all(reference.startswith(("data:image/png;base64,", "#")) for reference in page.refers)
    assert "http:" not in text and "https:" not in text and not {"script", "link", "iframe"} & set(page.tags)
    assert len(text) < 1_500_000
    for name in (
        "stages",
        "vision_side",
        "attention",
        "contribution",
        "sinks",
        "settling",
        "agreement",
        "pareto",
    ):
        assert (folder / f"{name}.png").stat().st_size > 5000
    stored = json.loads((folder / "profile.json").read_text())
    assert stored["schema"] == 4 and stored["chosen"] == json.loads(json.dumps(result["chosen"]))
    whole = (stored["chosen"]["flops"] + stored["outside"]) / (1 + stored["outside"])
    share = f"{100 * stored['chosen']['flops']:.1f}% of the dense decoder's FLOPs ({100 * whole:.1f}% of the whole"
    assert 0 < stored["outside"] < 10 and share in (folder / "schedule.yaml").read_text().replace("\n# ", " ")
    assert "whole prefill, %" in text and "% of the whole prefill" in text[: text.index("<section")]
    rows = list(csv.DictReader((folder / "layers.csv").open()))
    assert [float(row["prefix_kl"]) for row in rows] == pytest.approx(
        [r["kl"] for r in result["curves"]["prefix"]]
    )
    assert len(list(csv.DictReader((folder / "samples.csv").open()))) == 6
    assert len(list(csv.DictReader((folder / "schedules.csv").open()))) == len(result["points"])
    schedule = yaml.safe_load((folder / "schedule.yaml").read_text())
    assert schedule["enter"] == result["chosen"]["schedule"]["enter"]
    for where in (folder, folder / "schedule.yaml", folder / "profile.json"):
        assert profile_schedule.read_schedule(where).to_dict() == result["chosen"]["schedule"]


def test_an_entry_says_which_weights_and_processor_it_was_fitted_with(base, tmp_path) -> None:
    weights = model_fingerprint(str(base))
    profile_folder.write_entry(tmp_path, CalibratedEntry(hidden_size=32, places=4), weights, "a")
    assert profile_folder.read_entry(tmp_path, weights) is not None
    assert profile_folder.read_entry(tmp_path, weights, "a") is not None
    with pytest.raises(ValueError, match="other weights"):
        profile_folder.read_entry(tmp_path, model_fingerprint("embedded"))
    with pytest.raises(ValueError, match="with another processor than this run's"):
        profile_folder.read_entry(tmp_path, weights, "b")


def test_the_cost_is_stated_before_anything_is_spent(base, tmp_path, monkeypatch) -> None:
    batches: list[int] = []

    def spent(self: Measurer) -> None:
        batches.append(len(self.groups))
        raise KeyboardInterrupt

    monkeypatch.setattr(Measurer, "looks", spent)
    words = [f"model={base}", "samples=3", "confirm=4", "images=4", "dtype=float32", f"output={tmp_path}"]
    arguments, config = profile_model.parse(words)
    output = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        profile_model.run(arguments, config, console=Console(file=output, width=200))
    first = output.getvalue().splitlines()[0]
    announced = re.match(
        r"3 samples, 4 layers: up to ([\d,]+) prefills' worth of FLOPs, (\d+) a sample .*"
        r"at most (\d+) for each of 4 other prompts",
        first,
    )
    assert announced is not None, first
    assert batches == [2], "of one batch nothing can be left out"
    total, each, confirming = (int(number.replace(",", "")) for number in announced.groups())
    assert 2 * 4 <= each <= 2 * 4 + 70 and abs(total - 3 * each - 4 * confirming) <= 3


@pytest.mark.slow
def test_a_profile_that_was_cut_off_leaves_the_same_files(profiled, base, tmp_path) -> None:
    """Every byte of every file: what one run says, another says."""
    folder, _ = profiled
    lines = (folder / "measured.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "measured.jsonl").write_text("".join(lines[: len(lines) // 2]) + lines[-1][:30])
    words = [*SMALL, f"model={base}", f"output={tmp_path}"]
    arguments, config = profile_model.parse(words)
    output = io.StringIO()
    profile_model.run(arguments, config, console=Console(file=output, width=200))
    assert f"{len(lines) // 2 - 1} measurements are there already; going on from them." in output.getvalue()
    names = sorted(file.name for file in folder.iterdir())
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    different = [name for name in names if (tmp_path / name).read_bytes() != (folder / name).read_bytes()]
    assert different == []


def test_its_numbers_are_those_of_the_stock_model(profiled, base) -> None:
    """Late entry at layer 2, sample by sample, through the plain processor and `attach`."""
    _, result = profiled
    model, processor = tiny_base(layers=4)
    arguments, config = profile_model.parse([f"model={base}", "samples=6", "confirm=6", "images=16"])
    rows = profile_model.draw(config.data, arguments).measured
    assert len({row["scene"] for row in rows}) == 6
    for i, row in enumerate(rows):
        text = processor.apply_chat_template(row["messages"])
        n = len(processor.tokenizer(row["answer"]).input_ids) + 1
        inputs = processor(text=text, images=row["images"], return_tensors="pt")
        with torch.no_grad():
            dense = model(**inputs).logits.double().log_softmax(-1)
            with attach(model, VisionSchedule(enter=2)):
                late = model(**inputs).logits.double().log_softmax(-1)
        ends = inputs["input_ids"][0].tolist()
        last = len(ends) - ends[::-1].index(2) - 1  # of <eos>
        at = range(last - n, last)
        kl = sum((dense[0, t].exp() * (dense[0, t] - late[0, t])).sum().item() for t in at) / n
        assert result["effects"]["late 2"]["kl"][i] == pytest.approx(kl, rel=1e-3, abs=1e-6)


def test_training_takes_schedule_and_entry_from_a_profile(profiled, base, tmp_path) -> None:
    folder, _ = profiled
    (tmp_path / "p").mkdir()
    for name in ("schedule.yaml", "entry.safetensors"):
        if (folder / name).exists():
            (tmp_path / "p" / name).write_bytes((folder / name).read_bytes())
    entry = CalibratedEntry(hidden_size=32, places=4)
    entry.weight.normal_(0, 0.2)
    save_file(dict(entry.state_dict()), tmp_path / "p" / "entry.safetensors")
    (tmp_path / "p" / "schedule.yaml").write_text("enter: 1\nexit: 3\nkeep: {2: 2}\nranking: question\n")
    small = ["train.dtype=float32", "train.threads=1", "train.batch_size=2", "train.steps=1", "data.scenes=2"]
    small += [
        "eval.enabled=false",
        "model.visipruner.boundary=1",
        "lora.r=2",
        "entry.rank=2",
        f"model.path={base}",
    ]
    run_config(
        composed(
            *small,
            f"schedule.profile={tmp_path / 'p'}",
            "entry.init=calibrated",
            f"output_dir={tmp_path / 'run'}",
        )
    )
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    (stored,) = (weight for name, weight in weights.items() if name.endswith("start.weight"))
    assert torch.equal(stored, entry.weight)
    schedule = json.loads((tmp_path / "run" / "vision_schedule.json").read_text())
    assert schedule == {"enter": 1, "exit": 3, "keep": {"2": 2}, "ranking": "question"}
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["schedule"]["enter"] == 1
    save_file(dict(entry.state_dict()), tmp_path / "p" / "entry.safetensors", metadata={"weights": "others"})
    with pytest.raises(
        SystemExit, match=r"error: the entry in .* was fitted to other weights .*\(others, not"
    ):
        run_config(
            composed(
                *small,
                f"schedule.profile={tmp_path / 'p'}",
                "entry.init=calibrated",
                f"output_dir={tmp_path / 'third'}",
            )
        )
    with pytest.raises(SystemExit, match=r"error: no profile at nowhere"):
        run_config(composed(*small, "schedule.profile=nowhere", f"output_dir={tmp_path / 'other'}"))


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model=nowhere/at/all"], "nowhere/at/all"),
        (["model=lava"], "model=lava does not exist; model can be"),
        (["samples=0", "model=embedded"], "samples=0"),
        (["samples=1", "model=embedded"], "samples=1 does not show"),
        (["confirm=0", "model=embedded"], "confirm=0 must be at least 1"),
        (["bound=-1", "model=embedded"], "bound=-1"),
        (["bound=inf", "model=embedded"], "bound=inf"),
        (
            ["data.scenes=4", "model=embedded"],
            "data.scenes=4 would not be read: a profile on data=scenes draws",
        ),
        (["model.load_in_4bit=true", "model=embedded"], "error: model.load_in_4bit=true is for large models"),
        (["data=", "model=embedded"], "data.path is empty; name the data with data.path="),
        (["data=none.jsonl", "model=embedded"], "no file or folder at none.jsonl; name the data"),
        (["model="], "the model's name is empty; name a folder, or a hub id"),
        (["seed=-1", "model=embedded"], "seed=-1 must not be negative"),
        (
            ["output=file", "model=embedded"],
            "output=file cannot be written (Not a directory); choose another output=",
        ),
        (["budget=3", "model=embedded"], "budget=3"),
        (
            ["sampels=3", "model=embedded"],
            "sampels does not exist (did you mean samples?); the keys are model",
        ),
        (["train.steps=3", "model=embedded"], "train.steps does not exist"),
        (["samples=999999", "model=embedded"], "samples=999999 is more than"),
        (["data=no/such/folder", "model=embedded"], "no/such/folder"),
    ],
)
def test_what_cannot_work_is_one_sentence(words, says, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as error:
        profile_model.main(words)
    assert says in str(error.value) and len(str(error.value).splitlines()) == 1


def test_the_schedule_that_a_recipe_holds_for_a_model_is_measured_beside(base) -> None:
    _, config = profile_model.parse(["model=embedded"])
    deep, shallow = tiny_base(layers=16)[0], tiny_base(layers=4)[0]
    held = config.model.schedule
    assert profile_model.schedule_by_hand(config, deep) == VisionSchedule(
        enter=held.enter, exit=held.exit, keep=held.keep
    )
    assert profile_model.schedule_by_hand(config, shallow) is None  # another model under that name
    assert profile_model.schedule_by_hand(profile_model.parse([f"model={base}"])[1], deep) is None


def test_a_schedule_by_hand_of_more_tokens_than_there_are_is_refused(base, tmp_path) -> None:
    words = [f"model={base}", "samples=2", "confirm=2", "images=2", f"output={tmp_path / 'out'}"]
    by_hand = ["model.schedule.enter=1", "model.schedule.keep={2: 50}"]
    with pytest.raises(ValueError, match=r"^keep=\{2: 50\} is more than the 4 vision tokens of any prompt"):
        profile_model.run(*profile_model.parse([*words, *by_hand]))


def test_settings_of_another_model_are_not_compared_with(base) -> None:
    _, config = profile_model.parse(["model=embedded", f"model.path={base}"])
    assert profile_model.schedule_by_hand(config, tiny_base(layers=16)[0]) is None


def test_a_decoder_of_one_layer_is_refused(tmp_path) -> None:
    path = save_tiny_base(tmp_path / "base", layers=1)
    arguments, config = profile_model.parse(
        [f"model={path}", "samples=2", "confirm=2", f"output={tmp_path / 'out'}"]
    )
    with pytest.raises(ValueError, match="1 layer leaves nothing to choose"):
        profile_model.run(arguments, config)


def test_a_decoder_of_several_states_a_token_is_refused(tmp_path) -> None:
    """The measurements index a batch, which is the second axis of Gemma 3n's states."""
    path = save_tiny_base(tmp_path / "base")
    file = path / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["altup_num_inputs"] = 4
    file.write_text(json.dumps(config))
    words = [f"model={path}", "samples=2", "confirm=2", f"output={tmp_path / 'out'}"]
    with pytest.raises(ValueError, match=r"carries 4 \(AltUp\): give the schedule yourself"):
        profile_model.run(*profile_model.parse(words))


def test_a_model_without_images_is_refused(tmp_path) -> None:
    LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, vocab_size=20).save_pretrained(
        tmp_path
    )
    (tmp_path / "model.safetensors").touch()
    arguments, config = profile_model.parse([f"model={tmp_path}", "samples=2", "confirm=2"])
    with pytest.raises(ValueError, match="not a model that reads images") as error:
        profile_model.run(arguments, config)
    assert "\n" not in str(error.value)
