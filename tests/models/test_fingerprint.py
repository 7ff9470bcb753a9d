"""Fingerprints: what a model, a processor and rows are named by, and the results that are kept under those names."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
from helpers.processors import PROCESSORS
from helpers.processors import processor as make_processor
from helpers.tiny_base import save_tiny_base
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from latefusion.eval import calibrate, evaluate
from latefusion.eval.comparison import run
from latefusion.eval.thresholds import questions
from latefusion.eval.thresholds.search import Search
from latefusion.models import fingerprint as module
from latefusion.models.attach import attach
from latefusion.models.base_model import load_base, load_processor
from latefusion.models.fingerprint import (
    fingerprint,
    model_fingerprint,
    processor_fingerprint,
    rows_fingerprint,
)
from latefusion.models.locate import EMBEDDED_WEIGHTS
from latefusion.models.schedule import VisionSchedule


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    return tmp_path / "model"


def test_a_folder_is_named_by_its_weights_and_by_nothing_else(folder: Path, tmp_path: Path) -> None:
    first = model_fingerprint(folder)
    (folder / "README.md").write_text("x")
    (folder / "report.json").write_text("x")
    other = folder.rename(tmp_path / "elsewhere")
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    weights.write_bytes(content)  # another time
    assert model_fingerprint(other) == model_fingerprint(str(other)) == first
    fingerprints = {first}
    for at in (0, 5000, len(content) - 1):
        changed = bytearray(content)
        changed[at] ^= 1
        weights.write_bytes(changed)
        fingerprints.add(model_fingerprint(other))
    weights.write_bytes(content)
    (other / "config.json").write_text('{"rope_theta": 1}')
    fingerprints.add(model_fingerprint(other))
    weights.rename(other / "model-00001-of-00002.safetensors")
    assert len({*fingerprints, model_fingerprint(other)}) == 6


def test_a_long_file_is_read_whole_once_and_again_when_it_changes(
    folder: Path, tmp_path, monkeypatch
) -> None:
    """Two channels of an entry adapter are a few bytes in a file of gigabytes."""
    monkeypatch.setattr(module, "LONG", 1024)
    monkeypatch.setattr(module, "MEMORY", tmp_path / "memory")
    monkeypatch.setattr(module, "SETTLED", -1.0)
    reads = []
    digest = module.hashlib.file_digest
    monkeypatch.setattr(module.hashlib, "file_digest", lambda *a: reads.append(1) or digest(*a))
    weights = folder / "model.safetensors"
    first = model_fingerprint(folder)
    once = len(reads)
    assert model_fingerprint(folder) == first
    assert len(reads) == once + 1  # config.json; the weights are remembered
    content = bytearray(weights.read_bytes())
    for at in (0, 4321, len(content) - 1):
        with weights.open("r+b") as file:  # in place: the same file, of the same size
            file.seek(at)
            file.write(bytes([content[at] ^ 1]))
        assert model_fingerprint(folder) != first, at
        weights.write_bytes(content)
    assert model_fingerprint(folder) == first


def test_a_file_that_has_just_changed_is_not_remembered(folder: Path, tmp_path, monkeypatch) -> None:
    """The clock of a file system may not tell a change from another one a moment later."""
    monkeypatch.setattr(module, "LONG", 1024)
    monkeypatch.setattr(module, "MEMORY", tmp_path / "memory")
    model_fingerprint(folder)
    assert not (tmp_path / "memory").exists()


def test_adapters_are_named_with_their_base(folder: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    student.mkdir()
    (student / "adapter_model.safetensors").write_bytes(b"adapters")
    (student / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    first = model_fingerprint(student)
    (folder / "model.safetensors").write_bytes(b"others")
    second = model_fingerprint(student)
    (student / "adapter_model.safetensors").write_bytes(b"adaptera")
    assert len({first, second, model_fingerprint(student)}) == 3


def test_a_hub_id_is_named_by_its_commit(tmp_path: Path, monkeypatch) -> None:
    held = {None: "c1", "v2": "c2"}

    def cached(name: str, file: str, revision: str | None = None) -> str | None:
        return f"/cache/{name}/snapshots/{held[revision]}/{file}" if name == "a/b" else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert (model_fingerprint("a/b"), model_fingerprint("a/b", "v2")) == ("c1", "c2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="no model at a/c") as error:
        model_fingerprint("a/c")
    assert "\n" not in str(error.value)


def test_the_model_that_ships_here_has_a_name() -> None:
    assert model_fingerprint("embedded") == model_fingerprint(EMBEDDED_WEIGHTS)


def test_generation_settings_and_a_schedule_belong_to_a_model(folder: Path) -> None:
    seen = {model_fingerprint(folder)}
    for name in ("generation_config.json", "vision_schedule.json"):
        (folder / name).write_text("{}")
        seen.add(model_fingerprint(folder))
    assert len(seen) == 3


# ---------------------------------------------------------------- settings


def test_no_two_values_have_one_fingerprint() -> None:
    values: list[Any] = [
        None, False, 0, 0.0, "", "0", b"", b"0", [], {}, ["a", "b"], ["ab"], [["a"], "b"], {"a": "b"}, {"b": "a"},
        Image.new("RGB", (2, 3)), Image.new("RGB", (3, 2)), Image.new("L", (2, 3)),
    ]  # fmt: skip
    assert len({fingerprint(value) for value in values}) == len(values)


def test_equal_values_have_one_fingerprint() -> None:
    assert fingerprint({"a": 1, "b": (2, 3)}) == fingerprint({"b": [2, 3], "a": 1})
    assert fingerprint({"x", "y", "z"}) == fingerprint({"z", "y", "x"})
    assert fingerprint(VisionSchedule(enter=2)) == fingerprint(VisionSchedule(enter=2))
    assert fingerprint(VisionSchedule(enter=2)) != fingerprint(VisionSchedule(enter=3))
    with pytest.raises(TypeError, match="object has no fingerprint"):
        fingerprint([object()])


# ---------------------------------------------------------------- processors


@pytest.mark.parametrize("family", PROCESSORS)
def test_a_processor_is_named_by_what_it_does(family: str) -> None:
    processor = deepcopy(make_processor(family))
    processor.video_processor = None  # a stand-in of these tests
    first = processor_fingerprint(processor)
    processor.tokenizer(
        ["a", "a a a"], padding=True, truncation=True, max_length=2
    )  # leaves its state behind
    assert processor_fingerprint(processor) == first
    processor.image_processor.image_mean = [0.4, 0.4, 0.4]
    second = processor_fingerprint(processor)
    processor.chat_template = "{{ messages }}"
    third = processor_fingerprint(processor)
    processor.tokenizer.add_tokens(["<another>"])
    assert len({first, second, third, processor_fingerprint(processor)}) == 4


def test_a_saved_processor_keeps_its_name(tmp_path: Path) -> None:
    processor = load_processor("embedded")
    processor.save_pretrained(tmp_path)
    assert processor_fingerprint(AutoProcessor.from_pretrained(tmp_path)) == processor_fingerprint(processor)


# ---------------------------------------------------------------- rows


def pictures(*colours: str) -> list[bytes]:
    """PNG files, of one size in bytes each."""
    files = []
    for colour in colours:
        content = io.BytesIO()
        Image.new("RGB", (4, 4), colour).save(content, format="PNG", compress_level=0)
        files.append(content.getvalue())
    return files


def stored(folder: Path, kind: str, images: list[bytes]) -> Any:
    """Three questions about images that are held in `kind`."""
    for number, content in enumerate(images):
        (folder / f"{number}.png").write_bytes(content)
    held: dict[str, Any] = {
        "path": [f"{number}.png" for number in range(len(images))],
        "dictionary": [{"bytes": content, "path": None} for content in images],
        "picture": [Image.open(io.BytesIO(content)) for content in images],
        "data set": images,
    }
    if kind == "data set":
        columns = {
            "question": ["a", "b", "c"],
            "images": [[{"bytes": image, "path": None}] for image in images],
        }
        features = datasets.Features(
            question=datasets.Value("string"), images=datasets.List(datasets.Image())
        )
        return datasets.Dataset.from_dict(columns, features=features)
    return [{"question": q, "images": [image]} for q, image in zip("abc", held[kind], strict=True)]


@pytest.mark.parametrize("kind", ["path", "dictionary", "picture", "data set"])
@pytest.mark.parametrize("whole", [True, False])
def test_swapped_images_and_lost_or_reordered_rows_are_other_rows(
    kind: str, whole: bool, tmp_path: Path
) -> None:
    def name(*colours: str, order: Sequence[int] = (0, 1, 2)) -> str:
        rows = stored(tmp_path, kind, pictures(*colours))
        rows = rows.select(list(order)) if kind == "data set" else [rows[i] for i in order]
        return rows_fingerprint(rows, tmp_path, whole=whole)

    first = name("red", "green", "blue")
    assert name("red", "green", "blue") == first
    others = [
        name("red", "blue", "green"),
        name("red", "green", "black"),
        name("red", "green", "blue", order=(0, 2, 1)),
        name("red", "green", "blue", order=(0, 1)),
    ]
    assert len({first, *others}) == 5


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("held", ["a.png", {"url": "a.png"}], ids=["path", "url"])
def test_images_in_message_parts_count_by_their_contents(table: bool, held: Any, tmp_path: Path) -> None:
    key = "image" if isinstance(held, str) else "image_url"
    content = [{"type": key, key: held}, {"type": "text", "text": "which colour?"}]
    rows: Any = [{"messages": [{"role": "user", "content": content}]}]
    if table:
        rows = datasets.Dataset.from_list(rows)
    names = []
    for image in pictures("red", "green"):
        (tmp_path / "a.png").write_bytes(image)
        names.append(rows_fingerprint(rows, tmp_path))
    assert names[0] != names[1]


@pytest.mark.parametrize("kind", ["path", "dictionary", "data set"])
def test_of_a_huge_set_sizes_count_where_contents_are_not_read(
    kind: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(module, "READ_BLOCKS", 0)
    monkeypatch.setattr(module, "BLOCK", 1)  # the first row is read, as every 64th is
    red, green, blue = pictures("red", "green", "blue")

    def name(*images: bytes) -> str:
        return rows_fingerprint(stored(tmp_path, kind, list(images)), tmp_path, whole=False)

    first = name(red, green, blue)
    assert name(red, green, blue) == first
    assert name(red, green, blue + b"0") != first
    assert name(green, green, blue) != first
    assert name(red, blue, blue) == first  # as the docstring says: of the same number of bytes
    monkeypatch.setattr(module, "READ_BLOCKS", 3)
    assert name(red, green, blue) != name(red, blue, blue)


def test_a_row_without_an_image_and_a_missing_file_count(tmp_path: Path) -> None:
    rows = [{"question": "a", "images": None}, {"question": "b", "image": "gone.png"}]
    first = rows_fingerprint(rows, tmp_path)
    (tmp_path / "gone.png").write_bytes(b"x")
    assert rows_fingerprint(rows, tmp_path) != first


# ---------------------------------------------------------------- what is kept under that name


def saved_anew(base: Path) -> None:
    """Other weights in the same place, of the same size."""
    (file,) = base.glob("*.safetensors")
    size, weights = file.stat().st_size, load_file(file)
    weights[max(weights)].view(-1)[0] += 1
    save_file(weights, file, metadata={"format": "pt"})
    assert file.stat().st_size == size


def test_an_interrupted_evaluation_goes_on_with_the_same_weights_alone(tmp_path: Path, monkeypatch) -> None:
    base, sources = save_tiny_base(tmp_path / "base"), []
    monkeypatch.setattr(run, "run_comparison", lambda settings: sources.append(settings.base))
    chosen = evaluate.Arguments(model=str(base), policies=["fastv"], samples=2)
    for change in (lambda: None, lambda: saved_anew(base), lambda: None):
        evaluate.evaluate(chosen)
        change()
    assert sources[0] == sources[1] != sources[2]


def test_a_calibration_goes_on_with_the_same_weights_alone(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    arguments = calibrate.Arguments(
        model=str(base), samples=2, max_new_tokens=1, boundaries=[1], layer_thresholds=[0.9], tokens_thresholds=[1.0]
    )  # fmt: skip
    (rows, others), prefills = questions.read(arguments), []
    for change in (lambda: None, lambda: saved_anew(base), lambda: None):
        model, processor = load_base(str(base), dtype=torch.float32)
        with attach(model, VisionSchedule()) as attachment:
            prefills.append(Search(arguments, attachment, processor, rows, others).fingerprint())
        change()
    assert prefills[0] == prefills[1] != prefills[2]
