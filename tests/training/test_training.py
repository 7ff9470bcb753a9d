"""Whole runs on a tiny model: every recipe and engine, resuming, accumulation, refusals."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.quick_runs import metrics_entries, run_config
from helpers.tiny_base import BAND, SMALL, composed, configured, save_tiny_base, tiny_base
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainingArguments

from latefusion.data.load import check_questions, evaluation_questions
from latefusion.eval.evaluate import Arguments, tasks_of
from latefusion.eval.tasks.base import exact_match
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.restore import load
from latefusion.models.student.save import load_student
from latefusion.recipes.schema import RECIPES
from latefusion.training import run
from latefusion.training.describe import keeps_in_words, positions_in_words
from latefusion.training.engines import accelerate

QUICK = (
    *("train.dtype=float32", "train.threads=1", "train.log_every=1", "train.learning_rate=1e-2"),
    *(
        "train.batch_size=4",
        "train.steps=2",
        "data.scenes=4",
        "eval.enabled=false",
        "model.visipruner.boundary=1",
    ),
)


def train(base: Path, output: Path, *overrides: str, band: tuple[str, ...] = BAND) -> Path:
    run_config(composed(*QUICK, *SMALL, *band, f"model.path={base}", f"output_dir={output}", *overrides))
    return output


def history(output: Path, step: int) -> list[dict]:
    return json.loads((output / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter_model.safetensors")


ALL_RECIPES = sorted(
    path.stem
    for path in (RECIPES / "recipe").glob("*.yaml")
    if not path.stem.startswith(("hidrop", "vica"))  # for models of a fixed size: test_published_recipes.py
)


@pytest.mark.parametrize("recipe", [name for name in ALL_RECIPES if name != "late_fusion_qlora"])
def test_every_recipe_trains_and_its_student_loads(base, tmp_path, recipe, capsys):
    band = {"dense": (), "cross_only": ("model.cross=[2,4]",)}.get(recipe, BAND)
    train(base, tmp_path, f"recipe={recipe}", band=band)
    model, processor = load(tmp_path)
    prompt = processor(
        text="<image><user>how many?<assistant>", images=Image.new("RGB", (16, 16)), return_tensors="pt"
    )
    assert model.generate(**prompt, max_new_tokens=2).shape[1] > prompt["input_ids"].shape[1]
    printed = capsys.readouterr().out
    assert f"{recipe}: 0.0" in printed and "vision tokens by layer: 0-" in printed
    assert "are those of model=embedded, chosen for it; for " in printed  # the base is another
    assert (tmp_path / "README.md").read_text().count("## Schedule") == 1  # our card, not PEFT's template
    assert ("no teacher" in printed) == (recipe in ("late_fusion_no_teacher", "align"))
    schedule = load_student(tmp_path).schedule
    tokens = {"dense": [4] * 6, "cross_only": [0, 0, 4, 0, 4, 0]}.get(recipe, [0, 0, 4, 4, 2, 0])
    assert schedule.vision_tokens(6, 4) == tokens
    assert bool(schedule.cross) == (recipe == "cross_only") == ("frozen: keys and values alone" in printed)


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("schedule.exit=9", r"the schedule of model\.path=.* does not fit: exit names layer 9"),
        ("model.visipruner.boundary=5", "boundary=5 leaves no layer to fuse in"),
    ],
)
def test_what_is_deeper_than_the_model_is_refused_without_its_weights(base, tmp_path, option, sentence):
    shutil.copytree(base, tmp_path / "light", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "light/model.safetensors").touch()
    with pytest.raises(SystemExit, match=f"^error: {sentence}"):
        train(tmp_path / "light", tmp_path / "out", option, "entry.init=calibrated")
    assert not (tmp_path / "out").exists()


def test_a_keep_of_more_tokens_than_a_picture_has_is_refused(base, tmp_path):
    """A picture of a question set has always 4 tokens here; rows of other data differ, so there it is a note."""
    sentence = (
        r"^error: schedule\.keep=\{4: 50\} is more than the 4 vision tokens of a picture of data=scenes"
    )
    with pytest.raises(SystemExit, match=sentence):
        train(base, tmp_path / "out", "schedule.keep={4: 50}")
    assert not (tmp_path / "out").exists()
    (tmp_path / "schedule.yaml").write_text("enter: 2\nexit: 5\nkeep: {4: 50}\n")
    with pytest.raises(SystemExit, match=sentence):
        train(base, tmp_path / "out", f"schedule.profile={tmp_path}")
    notes = keeps_in_words(VisionSchedule(keep={2: 50, 4: 3}), 4)
    assert (
        len(notes) == 1
        and "keep={2: 50} removes nothing from the first samples, which have at most 4" in notes[0]
    )
    assert (
        keeps_in_words(VisionSchedule(keep={2: 4}), 4) == keeps_in_words(VisionSchedule(keep={2: 4}), 0) == []
    )


def test_samples_that_are_longer_than_the_positions_are_told():
    config = tiny_base()[0].config
    limit = config.get_text_config().max_position_embeddings
    batch = {"attention_mask": torch.ones(1, limit + 1)}
    assert (
        f"up to {limit + 1} tokens, vision included, and the model {limit} positions"
        in positions_in_words(config, batch)[0]
    )
    restarting = {"position_ids": torch.arange(limit)[None]}  # turns that see the image and themselves alone
    assert positions_in_words(config, batch | restarting) == []


def test_a_model_of_which_no_reading_layers_are_known_is_refused(base, tmp_path):
    with pytest.raises(SystemExit, match=r"^error: schedule\.cross=\[\] names no layer; say which layers"):
        train(base, tmp_path, "recipe=cross_only", "model.cross=[]", band=())


def test_a_package_that_a_processor_misses_is_named(base, tmp_path, monkeypatch):
    def missing(path, **settings):
        raise ImportError("Package `num2words` is required to run SmolVLM processor.\nInstall it.")

    monkeypatch.setattr("latefusion.models.base_model.AutoProcessor.from_pretrained", missing)
    with pytest.raises(
        SystemExit,
        match=r"^error: the processor of .* needs a package that is not here .*: Package `num2words` .* Install it\.$",
    ):
        train(base, tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", r"the weights of .* cannot be read \(.*\); download them again"),
        ("config.json", r".*config\.json is not a model configuration"),
        ("processor_config.json", r"the processor in .* cannot be read \("),
    ],
)
def test_a_damaged_model_is_a_sentence(base, tmp_path, name, message):
    model = shutil.copytree(base, tmp_path / "model")
    os.truncate(model / name, 9)
    with pytest.raises(SystemExit, match=rf"^error: {message}"):
        train(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("eval.split=tset",),
            r"on scenes after training cannot be: split 'tset' does not exist; choose one of train",
        ),
        (
            ("data.eval_path={here}/rows.csv",),
            r"on .*rows\.csv after training cannot be: .*rows that cannot be used: row 0 \(no 'image'\)",
        ),
    ],
)
def test_questions_that_cannot_be_asked_are_refused_before_training(
    base, tmp_path, options, message, monkeypatch
):
    (tmp_path / "rows.csv").write_text("question\nwhat?\n")
    monkeypatch.delattr(run, "student_of")
    with pytest.raises(SystemExit, match=rf"^error: the evaluation {message}"):
        train(
            base, tmp_path / "out", "eval.enabled=true", *(option.format(here=tmp_path) for option in options)
        )


def test_the_recipe_in_four_bits_says_what_it_needs(base, tmp_path, monkeypatch):
    """What it does with it is a test for a GPU: `test_lora.py`."""
    monkeypatch.setattr("latefusion.models.locate.find_spec", lambda name: None)
    with pytest.raises(
        SystemExit, match=r"^error: model\.load_in_4bit=true needs bitsandbytes: pip install bits"
    ):
        train(base, tmp_path, "recipe=late_fusion_qlora")
    with pytest.raises(
        SystemExit, match=r"^error: model\.load_in_4bit=true is for large models; model=embedded"
    ):
        train("embedded", tmp_path, "recipe=late_fusion_qlora", band=())


def test_training_lowers_the_loss_and_logs_both_terms(base, tmp_path):
    train(base, tmp_path, "train.steps=12", "train.save_every=12", "data.scenes=1", "train.batch_size=8")
    log = [entry for entry in history(tmp_path, 12) if "loss" in entry]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    for entry in log:
        assert entry["ce"] + entry["kl"] == pytest.approx(entry["loss"], rel=1e-3) and entry["kl"] > 0


@pytest.mark.slow
def test_accumulation_does_not_change_the_run(base, tmp_path):
    """Losses, gradient norms and what they lead to, for 1 x 8, 2 x 4 and 4 x 2 samples a step."""
    results = []
    for accumulation in (1, 2, 4):
        output = tmp_path / str(accumulation)
        train(
            base,
            output,
            f"train.accumulation={accumulation}",
            f"train.batch_size={8 // accumulation}",
            "train.save_every=2",
        )
        results.append([(e["loss"], e["grad_norm"], e["ce"]) for e in history(output, 2) if "loss" in e])
    assert len(results[0]) == 2
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert b == pytest.approx(a, rel=1e-3)


def test_a_resumed_run_is_the_same_run(base, tmp_path):
    """Bit-identical losses and weights, dropout on."""
    options = ("train.steps=4", "train.save_every=2", "lora.dropout=0.2")
    whole = train(base, tmp_path / "whole", *options)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    cut = train(base, tmp_path / "cut", *options, "resume=true")
    losses = [[e["loss"] for e in history(output, 4) if "loss" in e] for output in (whole, cut)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(cut)[name]), name
    assert any(
        (weight != weights(whole / "checkpoint-2")[name]).any() for name, weight in weights(cut).items()
    )


def test_a_finished_run_is_overwritten_only_with_overwrite(base, tmp_path):
    train(base, tmp_path, "train.steps=1")
    with pytest.raises(SystemExit, match=r"error: .* holds a run already; continue it with resume=true"):
        train(base, tmp_path)
    train(base, tmp_path, "overwrite=true")
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_checkpoints_are_students_too(base, tmp_path):
    train(base, tmp_path, "train.save_every=1", "train.steps=3", "train.keep_checkpoints=2")
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert load_student(tmp_path / "checkpoint-2").schedule.to_dict() == {
        "enter": 2,
        "exit": 5,
        "keep": {"4": 2},
        "ranking": "question",
    }


def test_bfloat16_trains_float32_adapters_on_a_bfloat16_base(base, tmp_path):
    train(base, tmp_path, "train.dtype=bfloat16", "lora.train_projector=true")
    assert {weight.dtype for weight in weights(tmp_path).values()} == {torch.float32}
    loaded = load_student(tmp_path, dtype=torch.bfloat16).model.get_base_model()
    assert loaded.model.multi_modal_projector.original_module.linear_1.weight.dtype == torch.bfloat16


def test_gradient_checkpointing_changes_nothing(base, tmp_path):
    results = []
    for on in ("false", "true"):
        train(base, tmp_path / on, f"train.gradient_checkpointing={on}", "train.save_every=2")
        results.append([e["loss"] for e in history(tmp_path / on, 2) if "loss" in e])
    assert results[0] == pytest.approx(results[1], rel=1e-4)


@pytest.fixture
def llava(tmp_path):
    """A 32-layer model for LLaVA-1.5's published schedule, and a conversation file."""
    Image.new("RGB", (20, 30), (200, 0, 0)).save(tmp_path / "a.jpg")
    turns = [{"from": "human", "value": "<image>\nwhat color is it?"}, {"from": "gpt", "value": "red"}]
    records = [{"id": i, "image": "a.jpg", "conversations": turns} for i in range(4)]
    (tmp_path / "mix.json").write_text(json.dumps(records))
    return (
        save_tiny_base(tmp_path / "base", layers=32),
        f"data.path={tmp_path / 'mix.json'}",
        f"data.images={tmp_path}",
    )


def test_the_llava_configuration_runs_on_a_shrunk_model(llava, tmp_path, capsys):
    base, *data = llava
    run_config(
        composed(
            *("model=llava_1_5_7b", "data=llava_mix665k", *data, f"model.path={base}"),
            "recipe=late_fusion_pyramid",
            *("train.steps=1", "train.batch_size=2", "train.dtype=float32", "train.threads=1"),
            "entry.init=identity",
            f"output_dir={tmp_path / 'out'}",
        )
    )
    printed = capsys.readouterr().out
    assert "vision tokens by layer: 0-7: 0, 8-17: 4, 18-23: 1, 24-31: 0" in printed
    assert "No evaluation: data.eval_path names no data set" in printed
    assert load_student(tmp_path / "out").schedule.enter == 8


def test_what_a_gpu_user_types_fails_in_one_sentence_without_weights_or_data(llava, monkeypatch, tmp_path):
    message = (
        "model=llava_1_5_7b",
        "data=llava_mix665k",
        "engine=deepspeed_zero3",
        f"output_dir={tmp_path / 'out'}",
    )

    def unreachable(self, repo, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    with pytest.raises(
        SystemExit, match=r"^error: the weights of llava-hf/llava-1.5-7b-hf are not on this machine"
    ):
        run_config(composed(*message))
    with pytest.raises(
        SystemExit, match=r"^error: no conversation file at data/llava_v1_5_mix665k.json; .*data.path="
    ):
        run_config(composed(*message, f"model.path={llava[0]}"))
    assert not (tmp_path / "out").exists()


def test_lightning_runs_the_same_objective_and_resumes_bit_for_bit(base, tmp_path):
    options = (
        "engine=lightning",
        "train.steps=4",
        "train.save_every=2",
        "train.accumulation=2",
        "lora.dropout=0.2",
    )
    whole = train(base, tmp_path / "whole", *options)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    cut = train(base, tmp_path / "cut", *options, "resume=true")
    state = torch.load(whole / "checkpoint-4" / "lightning.ckpt", weights_only=True)
    assert state["global_step"] == 4 and all("lora" in n or "vision_entry" in n for n in state["state_dict"])
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(cut)[name]), name
    assert load_student(cut).schedule.exit == 5


def test_what_decays_does_not_depend_on_the_engine(base, tmp_path):
    """Matrices do, norms and biases do not."""
    options = (
        "tune=full",
        "teacher=none",
        "train.weight_decay=0.5",
        "train.steps=3",
        "train.learning_rate=1e-2",
    )
    runs = [train(base, tmp_path / name, *options, f"engine={name}") for name in ("accelerate", "lightning")]
    losses = [[entry["loss"] for entry in metrics_entries(run) if "loss" in entry] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_one_process_uses_one_device(tmp_path, monkeypatch):
    """`Trainer` would wrap the model in DataParallel where one process sees several GPUs."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    config = configured(f"output_dir={tmp_path}", "train.dtype=float32", "train.trackers=[]")
    assert accelerate.prepare(config, dtype=torch.float32)._n_gpu == 1
    trainer = SimpleNamespace(
        config=config,
        args=SimpleNamespace(world_size=1),
        model_wrapped=torch.nn.DataParallel(torch.nn.Linear(1, 1)),
    )
    with pytest.raises(RuntimeError, match=r"One process on one device .* is a DataParallel in each of 1"):
        accelerate.check_strategy(trainer)
    trainer.model_wrapped = torch.nn.Linear(1, 1)
    accelerate.check_strategy(trainer)


def test_the_evaluation_asks_the_questions_of_a_json_file(base, tmp_path, capsys):
    """`data.eval_path` takes the rows that `eval/evaluate.py data=` takes."""
    Image.new("RGB", (28, 28), "red").save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "what color is the circle ?", "answers": ["red", "blue"]}
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({**row, "id": name}) + "\n" for name in "ab"))
    config = configured(*QUICK, *SMALL, f"model.path={base}", f"data.eval_path={tmp_path / 'mine.jsonl'}")
    questions = evaluation_questions(config)
    check_questions(questions)
    assert questions["id"] == ["a", "b"] and questions[0]["answers"] == ["red", "blue"]
    (task,) = tasks_of(Arguments(checkpoint="x", split="validation"), config)
    assert task.rows["answer"] == ["red", "red"] and exact_match("Blue", task.rows[0]) == 1
