"""The name of the weights at a path, and what is kept under it."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers.tiny_base import save_tiny_base
from safetensors.torch import load_file, save_file

from latefusion.data import prompts as questions
from latefusion.eval import calibrate, evaluate
from latefusion.eval.comparison import settings as compared
from latefusion.eval.thresholds.search import Search
from latefusion.models import fingerprint as module
from latefusion.models.attach import attach
from latefusion.models.base_model import load_base
from latefusion.models.fingerprint import identity
from latefusion.models.schedule import VisionSchedule


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    return tmp_path / "model"


def test_a_folder_is_named_by_its_weights_and_by_nothing_else(folder: Path, tmp_path: Path) -> None:
    first = identity(folder)
    (folder / "README.md").write_text("x")
    (folder / "report.json").write_text("x")
    other = folder.rename(tmp_path / "elsewhere")
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    weights.write_bytes(content)  # another time
    assert identity(other) == identity(str(other)) == first
    found = {first}
    for at in (0, 5000, len(content) - 1):
        changed = bytearray(content)
        changed[at] ^= 1
        weights.write_bytes(changed)
        found.add(identity(other))
    weights.write_bytes(content)
    (other / "config.json").write_text('{"rope_theta": 1}')
    found.add(identity(other))
    weights.rename(other / "model-00001-of-00002.safetensors")
    assert len({*found, identity(other)}) == 6


def test_of_a_long_file_pieces_are_read_everywhere(folder: Path, monkeypatch) -> None:
    """No change longer than the gap between two pieces is missed, nor one at either end, nor another length."""
    monkeypatch.setattr(module, "WHOLE", 1024)
    monkeypatch.setattr(module, "BLOCK", 64)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    first, gap = identity(folder), len(content) // 15
    for start in [*range(0, len(content) - gap, 500), len(content) - gap]:
        changed = bytearray(content)
        changed[start : start + gap] = bytes(255 - value for value in changed[start : start + gap])
        weights.write_bytes(changed)
        assert identity(folder) != first, start
    for changed in (content + b"\0", bytes([1]) + content[1:], content[:-1] + bytes([7])):
        weights.write_bytes(changed)
        assert identity(folder) != first


def test_adapters_are_named_with_their_base(folder: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    student.mkdir()
    (student / "adapter_model.safetensors").write_bytes(b"adapters")
    (student / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    first = identity(student)
    (folder / "model.safetensors").write_bytes(b"others")
    second = identity(student)
    (student / "adapter_model.safetensors").write_bytes(b"adaptera")
    assert len({first, second, identity(student)}) == 3


def test_a_hub_id_is_named_by_its_commit(tmp_path: Path, monkeypatch) -> None:
    held = {None: "c1", "v2": "c2"}

    def cached(name: str, file: str, revision: str | None = None) -> str | None:
        return f"/cache/{name}/snapshots/{held[revision]}/{file}" if name == "a/b" else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert (identity("a/b"), identity("a/b", "v2")) == ("c1", "c2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="no model at a/c") as error:
        identity("a/c")
    assert "\n" not in str(error.value)


def test_the_model_that_ships_here_has_a_name() -> None:
    assert identity("embedded") == identity(module.WEIGHTS)


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
    monkeypatch.setattr(compared, "evaluate_run", lambda **given: sources.append(given["source"]))
    chosen = evaluate.Arguments(model=str(base), policies=["visipruner"], samples=2)
    for change in (lambda: None, lambda: saved_anew(base), lambda: None):
        compared.compared(chosen, None, None, None)
        change()
    assert sources[0] == sources[1] != sources[2]


def test_a_calibration_goes_on_with_the_same_weights_alone(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    asked = calibrate.Arguments(
        model=str(base), samples=2, max_new_tokens=1, boundaries=[1], layer_thresholds=[0.9], tokens_thresholds=[1.0]
    )  # fmt: skip
    rows, found = questions.read(asked), []
    for change in (lambda: None, lambda: saved_anew(base), lambda: None):
        model, processor = load_base(str(base), dtype=torch.float32)
        with attach(model, VisionSchedule()) as attachment:
            found.append(Search(asked, attachment, processor, rows).fingerprint())
        change()
    assert found[0] == found[1] != found[2]
