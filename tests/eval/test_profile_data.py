"""Profiles and calibrations of any data: every source, rows that are of no use, rows without an answer."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.tiny_base import save_tiny_base
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from latefusion.data.samples import first_exchange
from latefusion.eval import calibrate, profile_model
from latefusion.eval.fusion.measure import Measurer
from latefusion.models import base_model as bases

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
IMAGES, ROWS = 12, 20  # every image but the last four has a second row


def turns(i: int, answered: bool = True) -> list[dict[str, Any]]:
    messages = [{"role": "user", "content": f"<image>\nwhat color is it {i} ?"}]
    return [*messages, {"role": "assistant", "content": "red"}] if answered else messages


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images, and rows about them in every form; among them a text and a row whose image is not there."""
    home = tmp_path_factory.mktemp("data")
    (home / "images").mkdir()
    random = np.random.default_rng(0)
    for i in range(IMAGES):
        Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(home / f"images/{i}.png")
    rows = [{"messages": turns(i), "images": [f"{i % IMAGES}.png"]} for i in range(ROWS)]
    text = {
        "messages": [{"role": "user", "content": "hm"}, {"role": "assistant", "content": "no"}],
        "images": [],
    }
    rows += [text, {"messages": turns(0), "images": ["missing.png"]}]
    bare = [{**row, "messages": row["messages"][:-1]} for row in rows]
    for name, written in (("rows", rows), ("bare", bare)):
        (home / f"{name}.jsonl").write_text("\n".join(map(json.dumps, written)))
    llava = [
        {
            "id": str(i),
            "image": f"{i % IMAGES}.png",
            "conversations": [{"from": "human", "value": f"<image>\n{i}"}, {"from": "gpt", "value": "red"}],
        }
        for i in range(ROWS)
    ]
    (home / "llava.json").write_text(json.dumps(llava))
    held = [
        {**row, "images": [{"path": str(home / "images" / n)} for n in row["images"]]} for row in rows[:ROWS]
    ]
    Dataset.from_list(held).to_parquet(home / "rows.parquet")
    return home


def sources(home: Path) -> dict[str, list[str]]:
    images = f"data.images={home}/images"
    part = f"{{path: {home}/rows.jsonl, images: {home}/images}}"
    return {
        "lines": ["data=dataset", f"data.path={home}/rows.jsonl", images],
        "no answers": ["data=dataset", f"data.path={home}/bare.jsonl", images],
        "parquet": [f"data={home}/rows.parquet"],
        "llava": ["data=llava_mix665k", f"data.path={home}/llava.json", images],
        "mixture": ["data=mixture", f"data.parts=[{part}, {part}]"],
        "stream": ["data=dataset", f"data.path={home}/rows.jsonl", images, "data.streaming=true"],
    }


def numbers(rows: list[dict[str, Any]]) -> list[bytes]:
    return [row["images"][0].tobytes() for row in rows]


@pytest.mark.parametrize("source", ["lines", "no answers", "parquet", "llava", "mixture", "stream"])
def test_rows_of_any_data_are_drawn(source: str, folder: Path) -> None:
    arguments, config = profile_model.parse(
        ["model=embedded", *sources(folder)[source], "samples=5", "images=4"]
    )
    drawn = profile_model.draw(config.data, arguments)
    measured, fitted = numbers(drawn.measured), numbers(drawn.calibrating)
    assert (len(measured), len(fitted)) == (5, 4)
    assert len({*measured, *fitted}) == 9, "no image twice where there are enough"
    last = {row["messages"][-1]["role"] for row in drawn.measured}
    assert last == {"user" if source == "no answers" else "assistant"}


def test_few_images_are_repeated_and_none_calibrates_its_own_measurement(
    folder: Path,
) -> None:
    words = ["model=embedded", *sources(folder)["lines"]]
    arguments, config = profile_model.parse([*words, "samples=10", "images=50"])
    drawn = profile_model.draw(config.data, arguments)
    assert len(set(numbers(drawn.measured))) == 10 and len(drawn.calibrating) == 2
    assert not set(numbers(drawn.measured)) & set(numbers(drawn.calibrating))
    left_out, few = drawn.remarks
    assert left_out.startswith("A row that cannot be used was left out: row 21 has a bad image")
    assert few.startswith(f"The data have only {len(drawn.confirming)} prompts beside the samples")
    arguments, config = profile_model.parse([*words, "samples=15", "images=50"])
    drawn = profile_model.draw(config.data, arguments)
    assert len(set(numbers(drawn.measured))) == IMAGES == len(set(numbers(drawn.calibrating)))
    assert len(drawn.calibrating) == IMAGES and "calibrated on them" in drawn.remarks[-1]
    arguments, config = profile_model.parse([*words, "samples=21"])
    with pytest.raises(ValueError, match=r"samples=21 is more than the 20 samples .*; choose at most 20\."):
        profile_model.draw(config.data, arguments)


def test_what_cannot_be_drawn_from_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    lines = sources(folder)["lines"]
    (tmp_path / "text.jsonl").write_text((folder / "rows.jsonl").read_text().splitlines()[-2])
    for words, says in (
        ([*lines[:2], "data.images=nowhere"], "no image folder at nowhere"),
        ([*sources(folder)["mixture"], "split=test"], "split=test is for a data set"),
        (
            [f"data={tmp_path}/text.jsonl"],
            "the 0 samples with images that the data has; name data with images.",
        ),
    ):
        arguments, config = profile_model.parse(["model=embedded", *words, "samples=2"])
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            profile_model.run(arguments, config)
        assert says in str(error.value) and "\n" not in str(error.value)


def test_a_sample_ends_at_its_first_answer_with_the_images_shown_until_then() -> None:
    image, text = {"type": "image"}, {"type": "text", "text": "?"}
    messages = [
        {"role": "user", "content": [image, text, image]},
        {"role": "assistant", "content": [text]},
        {"role": "user", "content": [image, text]},
        {"role": "assistant", "content": [text]},
    ]
    sample = first_exchange({"messages": messages, "images": ["a", "b", "c"], "id": 1})
    assert sample == {"messages": messages[:2], "images": ["a", "b"], "id": 1}
    alone = {"messages": messages[:1], "images": ["a", "b"]}
    assert first_exchange(alone) == alone


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"), layers=4)


def test_rows_without_an_answer_get_the_models_own(base: Path, folder: Path) -> None:
    """By the model, in the place of what some rows may have."""
    model, processor = bases.load_base(str(base), dtype=torch.float32)
    arguments, config = profile_model.parse(
        ["model=embedded", *sources(folder)["no answers"], "samples=3", "images=1"]
    )
    bare = profile_model.draw(config.data, arguments).measured
    stored_answer = {"role": "assistant", "content": [{"type": "text", "text": "what the data say"}]}
    mixed = [{**bare[0], "messages": [*bare[0]["messages"], stored_answer]}, *bare[1:]]
    answered = profile_model.model_answers(model, processor, mixed, 2, Console(quiet=True))
    for row, prompt in zip(answered, bare, strict=True):
        text = processor.apply_chat_template(prompt["messages"], add_generation_prompt=True)
        inputs = processor(text=text, images=prompt["images"], return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=2, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        *question, answer = row["messages"]
        assert question == prompt["messages"] and answer["role"] == "assistant"
        assert answer["content"][0]["text"] == (
            processor.decode(ids, skip_special_tokens=True).strip() or "."
        )


def test_measurements_of_four_bits_are_not_those_of_sixteen(
    base: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A profile goes on from what was measured only if the weights are held in the same way."""
    load = bases.load_base
    monkeypatch.setattr(profile_model, "check_four_bits", lambda path: None)  # no bitsandbytes here
    monkeypatch.setattr(bases, "load_base", lambda path, dtype, **more: load(path, dtype=dtype))
    monkeypatch.setattr("latefusion.eval.fusion.run.profile", lambda about, **more: about)
    words = [f"model={base}", *sources(folder)["no answers"], "samples=3", "images=1", "dtype=float32"]
    arguments, config = profile_model.parse([*words, "new_tokens=1", f"output={tmp_path}"])
    about = {}
    for config.model.load_in_4bit in (False, True):
        about[config.model.load_in_4bit] = profile_model.run(arguments, config, Console(quiet=True))
    assert (about[False]["dtype"], about[True]["dtype"]) == ("float32", "nf4")


@pytest.mark.slow
def test_prompts_without_answers_are_profiled_on_the_models_own(
    base: Path, folder: Path, tmp_path: Path
) -> None:
    words = [f"model={base}", *sources(folder)["no answers"], "samples=4", "images=20", "new_tokens=2"]
    arguments, config = profile_model.parse([*words, "dtype=float32", "bound=1e-6", f"output={tmp_path}"])
    output = io.StringIO()
    profile = profile_model.run(arguments, config, console=Console(file=output, width=200))
    assert not profile["labelled"] and profile["dense_accuracy"] is None
    assert "left out" in profile["note"] and (tmp_path / "report.html").is_file()
    assert "The data have no answers: the model writes its own first, up to 2 tokens" in output.getvalue()


def test_a_calibration_takes_any_data(base: Path, folder: Path, tmp_path: Path) -> None:
    """Answers where there are any, images found in the folder of the file."""
    for name in ("rows", "bare"):
        rows = (folder / f"{name}.jsonl").read_text().replace('["', '["images/')
        (folder / f"beside_{name}.jsonl").write_text(rows)
        arguments = calibrate.Arguments(
            model=str(base), data=f"{folder}/beside_{name}.jsonl", split="train", samples=4, batch_size=2,
            layer_thresholds=[0.9], tokens_thresholds=[0.5], boundaries=[1], max_new_tokens=2, kl=50,
            output=str(tmp_path / name),
        )  # fmt: skip
        calibration = calibrate.calibrate(arguments, Console(quiet=True))
        assert calibration["prompts"] == 4 and (tmp_path / name / "policy.yaml").is_file()


# ---------------------------------------------------------------- what a model is loaded with, what a ledger is of


def test_the_models_own_settings_are_those_of_its_profile(folder: Path, monkeypatch) -> None:
    """Revision, resolution, 4 bits: `schedule=auto` profiles the model that it trains."""
    settings: dict[str, Any] = {}

    def load(path: str, **options: Any) -> None:
        settings.update(options, path=path)
        raise KeyboardInterrupt

    monkeypatch.setattr(bases, "load_base", load)
    monkeypatch.setattr(profile_model, "check_four_bits", lambda path: None)  # which refuses a small model
    words = ["model.revision=abc", "+model.processor.max_pixels=784", "model.load_in_4bit=true"]
    arguments, config = profile_model.parse(
        [
            "model=embedded",
            *words,
            "model.trust_remote_code=true",
            *sources(folder)["lines"],
            "samples=2",
            "images=2",
        ]
    )
    with pytest.raises(KeyboardInterrupt):
        profile_model.run(arguments, config)
    del settings["dtype"]
    assert settings == {
        "path": "embedded",
        "revision": "abc",
        "processor": {"max_pixels": 784},
        "four_bits": True,
        "trust_remote_code": True,
    }


def test_measurements_are_of_these_weights_and_prompts_alone(
    folder: Path, tmp_path: Path, monkeypatch
) -> None:
    """What was saved again in the same place is measured again; the rest is reused."""
    home, model = tmp_path / "home", tmp_path / "base"
    (home / "images").mkdir(parents=True)
    for file in [*folder.glob("images/*"), folder / "rows.jsonl"]:
        (home / file.relative_to(folder)).write_bytes(file.read_bytes())
    save_tiny_base(model, layers=4)

    def about() -> str:
        """What the first line of the ledger says when measuring begins."""
        seen: list[str] = []

        def looks(self: Measurer) -> None:
            seen.append(self.ledger.identity)
            raise KeyboardInterrupt

        monkeypatch.setattr(Measurer, "looks", looks)
        words = [
            f"model={model}",
            *sources(home)["lines"],
            "samples=3",
            "images=2",
            f"output={tmp_path / 'out'}",
        ]
        with pytest.raises(KeyboardInterrupt):
            profile_model.run(*profile_model.parse(words), console=Console(quiet=True))
        return seen[0]

    first = about()
    assert about() == first
    (file,) = model.glob("*.safetensors")
    size, weights = file.stat().st_size, load_file(file)
    weights[max(weights)].view(-1)[-1] += 1
    save_file(weights, file, metadata={"format": "pt"})
    assert file.stat().st_size == size
    second = about()
    for name in [f"{i}.png" for i in range(IMAGES)]:  # each in the place of the one before
        Image.open(home / "images" / name).transpose(Image.Transpose.ROTATE_90).save(home / "images" / name)
    third = about()
    rows = home / "rows.jsonl"
    rows.write_text(rows.read_text().replace('"red"', '"blue"'))
    fourth = about()
    seen = json.loads((model / "processor_config.json").read_text())
    seen["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]  # the same images in other colours
    (model / "processor_config.json").write_text(json.dumps(seen))
    fifth = about()
    assert len({first, second, third, fourth, fifth}) == 5


def test_prompts_that_confirm_are_others_and_show_no_image_that_calibrates(folder: Path) -> None:
    words = ["model=embedded", *sources(folder)["lines"], "samples=4", "confirm=5", "images=3"]
    arguments, config = profile_model.parse(words)
    drawn = profile_model.draw(config.data, arguments)
    texts = [[str(row["messages"][0]) for row in rows] for rows in (drawn.measured, drawn.confirming)]
    assert (len(texts[0]), len(texts[1])) == (4, 5) and not set(texts[0]) & set(texts[1])
    assert not set(numbers(drawn.calibrating)) & set(numbers([*drawn.measured, *drawn.confirming]))
    assert not any("confirm" in remark for remark in drawn.remarks)


def test_too_few_prompts_to_confirm_a_schedule_on_are_a_remark(folder: Path) -> None:
    for samples, says in ((15, "only 5 prompts beside the samples"), (20, "no prompts beside the samples")):
        words = ["model=embedded", *sources(folder)["lines"], f"samples={samples}"]
        arguments, config = profile_model.parse(words)
        assert any(says in remark for remark in profile_model.draw(config.data, arguments).remarks)
