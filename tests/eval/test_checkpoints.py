"""Several checkpoints in one run: each answers as it does alone, and one base in memory serves them all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers.tiny_base import save_tiny_base, tiny_base

from latefusion.data.prompts import prompt_inputs
from latefusion.eval.comparison.systems import Students, System, further, running
from latefusion.eval.evaluate import Arguments, main, settings_of
from latefusion.eval.ledger import Processes
from latefusion.models.base_model import load_base, twin
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.build import Lora, Student, build_student
from latefusion.models.student.save import load_student, merge, save_student
from latefusion.recipes.compose import compose_config
from latefusion.recipes.named_models import named_model

SCHEDULES = (VisionSchedule(enter=1, exit=5, keep={3: 2}), VisionSchedule(enter=2, exit=4))
REST = {"data": {"source": "scenes"}, "engine": {"trainer": "accelerate"}, "output_dir": "outputs/whole"}
REST["train"] = {"learning_rate": 1e-4, "batch_size": 8}
ROW = {"question": "what colour is the red circle ?", "images": []}


def trained(base: Path, folder: Path, schedule: VisionSchedule, *, rank: int, seed: int) -> None:
    """A student whose every adapter differs from another seed's."""
    model, processor = load_base(str(base), dtype=torch.float32)
    student = build_student(
        model, processor, base=str(base), schedule=schedule, lora=Lora(rank=rank, alpha=4), entry_rank=rank,
        train=["multi_modal_projector"],
    )  # fmt: skip
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in student.model.parameters():
            if weight.requires_grad:
                weight.normal_(0, 0.3)
    save_student(student, folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base and two students of it: other schedules, other ranks, other weights."""
    home = tmp_path_factory.mktemp("students")
    base = save_tiny_base(home / "base")
    for i, (name, schedule) in enumerate(zip("ab", SCHEDULES, strict=True)):
        trained(base, home / name / "late_fusion", schedule, rank=2 + i, seed=i)
    return base, home / "a/late_fusion", home / "b/late_fusion"


def logits(student: Student, *, adapters: bool) -> torch.Tensor:
    from latefusion.data.scenes import load_scenes

    row = {**ROW, "images": [load_scenes("test", 1)[0]["image"].resize((16, 16))]}
    system = System(name="", policy=student.schedule, adapters=adapters)
    with running(student.model, student.attachment, system) as model:
        return model(**prompt_inputs(student.model, student.processor, [row])).logits


def storages(*students: Student) -> dict[int, int]:
    """Bytes of every weight in memory, by where it lies."""
    tensors = [t for student in students for t in student.model.parameters()]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def test_students_of_one_base_share_it_and_answer_as_they_do_alone(folders: tuple[Path, Path, Path]) -> None:
    base, *two = folders
    model, _ = load_base(str(base), dtype=torch.float32)
    students = Students({str(base): model})
    together = [students.load(folder) for folder in two]
    alone = [load_student(folder, dtype=torch.float32) for folder in two]
    for shared, separate in zip(together, alone, strict=True):
        for adapters in (True, False):
            assert torch.equal(logits(shared, adapters=adapters), logits(separate, adapters=adapters))
    assert not torch.allclose(logits(together[0], adapters=True), logits(together[1], adapters=True))
    whole = sum(t.untyped_storage().nbytes() for t in model.parameters())  # each once
    each = [sum(storages(student).values()) for student in alone]
    assert sum(storages(*together).values()) == sum(each) - whole
    assert len({id(student.attachment) for student in together}) == 2


def test_a_twin_has_hooks_of_its_own_and_no_weights_of_its_own() -> None:
    model, _ = tiny_base()
    other = twin(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    called = []
    other.get_decoder().layers[0].register_forward_hook(lambda *_: called.append(1))
    ids = torch.tensor([[5, 6]])
    assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits) and called == [1]


@pytest.mark.slow
def test_two_checkpoints_beside_a_policy_from_the_command_line(
    folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, first, second = folders
    words = [f"model={base}", "policies=[{vtw: {layer: 3}}]", f"checkpoints=[{first},{second}]", "samples=6"]
    main([*words, "controls=false", "batches=[2]", "lengths=[]", f"output={tmp_path}"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["systems"]) == ["dense", "vtw", str(first), str(second)]
    names = [system["name"] for system in report["systems"].values()]
    assert names == ["Dense base", "VTW (layer=3)", "a/late_fusion", "b/late_fusion"]
    for key, schedule in zip((str(first), str(second)), SCHEDULES, strict=True):
        system = report["systems"][key]
        tokens = system["vision_tokens"]["per_layer"]
        enter, exit = schedule.enter, schedule.exit
        assert [n > 0 for n in tokens] == [enter <= layer < exit for layer in range(6)]
        assert system["ttft"]["median"] > 0 and len(system["source"]) == 16
        assert key in report["sweeps"]["batch"][0]["systems"]
    by_system: dict[str, list[str]] = {}
    for line in (tmp_path / "predictions.jsonl").read_text().splitlines():
        answer = json.loads(line)
        by_system.setdefault(answer["system"], []).append(answer["prediction"])
    assert len({tuple(answers) for answers in by_system.values()}) == 4


def test_names_do_not_collide_and_other_prompts_are_refused(
    folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    _, first, _ = folders
    students = Students()
    _, processor = tiny_base()
    assert further(students, [first], processor)[str(first)].name == "late_fusion"
    assert further(students, [first], processor, taken="late_fusion")[str(first)].name == "a/late_fusion"
    shutil.copytree(first, tmp_path / "other")
    settings = tmp_path / "other/processor_config.json"
    values = json.loads(settings.read_text())
    values["image_processor"]["size"] = {"height": 32, "width": 32}
    settings.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="reads prompts in another way") as error:
        further(students, [tmp_path / "other"], processor)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        further(students, [tmp_path], processor)


@pytest.mark.slow
def test_a_checkpoint_without_adapters_is_compared_with_its_base(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged here; a run that trains all weights writes the same kind of folder. In float32: bfloat16 rounds twice."""
    for place in (
        "models.base_model",
        "models.student.save",
        "models.student.restore",
        "eval.comparison.systems",
    ):
        monkeypatch.setattr(f"latefusion.{place}.compute_dtype", lambda: torch.float32)
    base, first, _ = folders
    whole = tmp_path / "whole"
    merge(first, whole, dtype=torch.float32)
    (whole / "config.yaml").write_text(
        yaml.safe_dump({"name": "whole", "model": {"path": str(base), "visipruner": {"boundary": 1}}} | REST)
    )
    words = [f"checkpoint={whole}", f"checkpoints=[{first}]", "tasks=[scenes]", "samples=4", "controls=false"]
    main([*words, "batches=[2]", "lengths=[]", f"output={tmp_path / 'out'}"])
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert list(report["systems"]) == ["dense", "pruned", str(first), "student"]
    merged, adapted = report["systems"]["student"], report["systems"][str(first)]
    assert merged["name"] == "whole" and not merged["adapters"] and adapted["adapters"]
    for name in ("flops", "vision_tokens", "kv_bytes"):  # the entry adapter's work counts for both
        assert merged[name] == adapted[name]
    assert report["systems"]["dense"]["vision_tokens"]["per_layer"] == [4.0] * 6
    agreed = report["paired"][str(first)]["agreement"]["value"]
    assert agreed == 1 and report["paired"]["dense"]["agreement"]["value"] < 1


@pytest.mark.parametrize("by_name", [True, False])
def test_rows_of_visipruner_have_the_thresholds_of_the_recipe_or_of_the_run(by_name, folders, tmp_path):
    """Those of the paper are for LLaVA-1.5-7B: on another model they prune before it has looked."""
    arguments = Arguments(policies=["visipruner", {"visipruner": {"exit_patience": 9}}], samples=2)
    if by_name:
        arguments.model, config = "embedded", None
        expected = named_model("embedded")[1]["visipruner"]
    else:
        arguments.checkpoint, config = str(folders[1]), compose_config(["model=embedded"])
        expected = {"boundary": 2}
        config.model.visipruner.boundary = 2
    systems = settings_of(arguments, config, None, Processes()).systems
    rows = {s.name: vars(s.policy) for s in systems.values() if s.name.startswith("VisiPruner")}
    assert len([s for s in systems.values() if s.name.startswith("VisiPruner")]) == len(rows) == 2
    assert [row["exit_patience"] for row in rows.values()] == [2, 9]
    for row in rows.values():
        assert all(row[name] == value for name, value in expected.items() if name != "stages")
