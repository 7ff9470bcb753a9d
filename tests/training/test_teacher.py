"""Another, larger model as the teacher: what it teaches, which models cannot, and that it is in no checkpoint."""

import json

import pytest
import torch
from helpers.families import CONFIGS, build_from, prompt, text_tokens
from helpers.quick_runs import run_config, teach_config
from helpers.tiny_base import BAND, SMALL, composed, save_tiny_base, shake, tiny_base, tiny_student
from safetensors import safe_open

from latefusion.data import sources
from latefusion.models.attach import attach
from latefusion.models.policies.configured import visipruner
from latefusion.models.policies.visipruner.settings import VisiPruner
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.build import Lora, build_student
from latefusion.training import assemble
from latefusion.training.embedded.vocabulary import build_processor
from latefusion.training.objective import IGNORE, Distillation, Objective
from latefusion.training.teacher import OtherTeacher

LAYERS = 9  # of the teacher; the student has 6
LOSS = 1e-4


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("larger"), layers=LAYERS, seed=3)


def textbook(student, teacher, labels, temperature):
    """Sum over label tokens of temperature^2 KL(teacher || student), in float64, from whole logits `[B, T, V]`."""
    total = 0.0
    for b, p in (labels != IGNORE).nonzero().tolist():
        p_t, p_s = ((x[b, p - 1].double() / temperature).softmax(-1) for x in (teacher, student))
        total += temperature**2 * (p_t * (p_t / p_s).log()).sum().item()
    return total


@pytest.mark.parametrize("teacher", ["dense", "visipruner"])
def test_kl_is_to_the_other_model_under_its_policy(base, larger, teacher):
    thresholds = ("kl.visipruner.boundary=2", "model.visipruner.boundary=1")
    config, student = tiny_student(
        f"teacher={teacher}", f"model.path={base}", f"kl.model={larger}", "kl.temperature=1.5", *thresholds
    )
    shake(student)
    rows = sources.scenes("validation", n_scenes=2)
    batch = assemble.collator_of(student)([rows[i] for i in range(5)])
    objective = assemble.objective_of(config, student)
    _, terms = objective(student.model, batch, count=1)

    model, _ = tiny_base(layers=LAYERS, seed=3)
    policy = VisionSchedule() if teacher == "dense" else visipruner(config.kl.visipruner)
    attachment = attach(model, policy)
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "queries")}
    places = (batch["queries"], batch["labels"] != IGNORE)
    with torch.no_grad(), student.attachment.queries(*places), attachment.queries(*places):
        s, t = student.model(**inputs).logits, model(**inputs).logits
    assert terms["kl"].item() == pytest.approx(textbook(s, t, batch["labels"], 1.5), rel=1e-4)
    assert terms["kl"].item() > 0.1
    assert not any(p.requires_grad for p in objective.kl.other.model.parameters())
    assert not objective.kl.other.model.training


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl", "gemma3"])
def test_every_family_can_be_taught_by_its_larger_sibling(family):
    """Of more layers, and with an output padded to more tokens, which the student has no score for."""
    config = CONFIGS[family]()
    config.text_config.num_hidden_layers = LAYERS
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = (config.text_config.layer_types * 2)[:LAYERS]
    config.text_config.vocab_size += 8
    larger = build_from(config)
    rows = ["tt I tttt", "ttttt", "t I t I tttt"]
    inputs = prompt(family, rows, side="right")
    last = text_tokens(inputs).int().cumsum(1).argmax(1)
    labels = torch.full_like(inputs["input_ids"], IGNORE)
    for row, at in enumerate(last.tolist()):
        labels[row, at] = inputs["input_ids"][row, at]
    queries = (last - 1)[:, None]
    base_model = build_from(CONFIGS[family]())
    student = build_student(
        base_model,
        None,
        base=family,
        schedule=VisionSchedule(enter=2, exit=5),
        lora=Lora(rank=2, alpha=2),
        entry_rank=2,
    )
    policy = VisiPruner(boundary=2)
    objective = Objective(
        model=student.model,
        attachment=student.attachment,
        kl=Distillation(
            policy=policy,
            other=OtherTeacher(model=larger, attachment=attach(larger, policy)),
            vocabulary=base_model.config.text_config.vocab_size,
        ),
        share_images=True,
    )
    _, terms = objective(student.model, {**inputs, "labels": labels, "queries": queries}, count=1)

    again = build_from(config)
    attachment = attach(again, policy)
    places = (queries, labels != IGNORE)
    with torch.no_grad(), student.attachment.queries(*places), attachment.queries(*places):
        s = student.model(**prompt(family, rows, side="right")).logits
        t = again(**prompt(family, rows, side="right")).logits[..., : s.shape[-1]]
    assert terms["kl"].item() == pytest.approx(textbook(s, t, labels, 1.0), rel=1e-3) and terms["kl"] > 0.01


def refused(base, folder, *overrides):
    where = (f"model.path={base}", f"kl.model={folder}", f"output_dir={folder / 'run'}")
    with pytest.raises(SystemExit) as error:
        run_config(composed(*BAND, *SMALL, "model.visipruner.boundary=1", *where, *overrides))
    assert not (folder / "run").exists()
    return str(error.value)


def test_a_teacher_of_another_vocabulary_is_refused(base, tmp_path):
    model, processor = tiny_base(layers=LAYERS)
    processor.tokenizer.add_tokens(["zebra"])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    number = len(processor.tokenizer) - 1
    message = refused(base, tmp_path)
    assert f"has another vocabulary: 'zebra' is token {number} there and None in {base}; choose" in message


def test_a_teacher_that_sees_images_otherwise_is_refused(base, tmp_path):
    model, _ = tiny_base(layers=LAYERS)
    model.save_pretrained(tmp_path)
    build_processor(image_size=32, patch_size=8).save_pretrained(tmp_path)
    message = refused(base, tmp_path)
    assert (
        "not see images as the student does: vision tokens of an image of 96x64 pixels: 16 there, 4"
        in message
    )
    _, processor = tiny_base()
    processor.image_processor.image_mean = [0.1, 0.1, 0.1]
    processor.save_pretrained(tmp_path)
    assert "mean value of an image of 96x64 pixels: " in refused(base, tmp_path)


def test_a_teacher_that_is_not_there_or_would_not_teach_is_refused(base, larger, tmp_path):
    assert f"no model at {tmp_path / 'x'}: there is no such folder" in refused(base, tmp_path / "x")
    assert "would teach nothing; use teacher=visipruner" in refused(base, larger, "teacher=none")
    message = refused(base, larger, "kl.visipruner.boundary=9")
    assert f"kl.model={larger} cannot run under its policy: boundary=9" in message


QUICK = (
    *(
        "train.threads=1",
        "train.log_every=1",
        "train.learning_rate=1e-2",
        "train.steps=2",
        "train.batch_size=4",
    ),
    *("data.scenes=3", "eval.enabled=false", "model.visipruner.boundary=1", "kl.visipruner.boundary=2"),
)


def logged(output):
    entries = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [e[name] for e in entries if "loss" in e for name in ("loss", "ce", "kl", "grad_norm")]


def test_online_and_offline_it_teaches_the_same_and_stays_out_of_the_checkpoints(
    base, larger, tmp_path, capsys
):
    def options(*more):
        where = (f"model.path={base}", f"kl.model={larger}", "train.save_every=1")
        return composed(*QUICK, *SMALL, *BAND, *where, *more)

    cache = f"kl.cache={tmp_path / 'cache'}"
    run_config(options(f"output_dir={tmp_path / 'online'}"))
    assert f"teacher visipruner of {larger}, float32" in capsys.readouterr().out
    teach_config(options(cache, "kl.top_k=10000"))
    run_config(options(cache, "kl.top_k=10000", f"output_dir={tmp_path / 'offline'}"))
    assert logged(tmp_path / "offline") == pytest.approx(logged(tmp_path / "online"), rel=LOSS)
    written = list(tmp_path.glob("online/**/*.safetensors"))
    assert len(written) == 3  # two checkpoints, the result
    for path in written:
        with safe_open(path, framework="pt") as weights:
            assert not any(f"layers.{LAYERS - 1}." in name for name in weights.keys())  # noqa: SIM118
    with pytest.raises(SystemExit, match=f"were written with model={larger}, but this run has {base}"):
        run_config(options(cache, "kl.top_k=10000", "kl.model=null", f"output_dir={tmp_path / 'stale'}"))
