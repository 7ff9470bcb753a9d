"""What a run watches and tells: losses that are no numbers, metrics, trackers."""

import json

import pytest
import torch
from helpers.quick_runs import QUICK, metrics_entries, train
from helpers.tiny_base import BAND, SMALL, composed, configured
from safetensors.torch import load_file

from latefusion.data.collate import IGNORE
from latefusion.data.load import training_data
from latefusion.models.schedule import VisionSchedule
from latefusion.recipes.check import check_config
from latefusion.training import assemble
from latefusion.training.describe import schedules_of, unknown_words
from latefusion.training.embedded.vocabulary import build_processor
from latefusion.training.monitor import Monitor, line, trackers
from latefusion.training.nonfinite import MOST_SKIPS, NonFinite, Watch, replay
from latefusion.training.objective import Objective
from latefusion.training.order import Order

# ---------------------------------------------------------------- numbers that are none


def test_a_loss_that_is_no_number_stops_the_run_and_can_be_seen_again(base, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        train(base, tmp_path, "train.learning_rate=1e30", "train.max_grad_norm=1e9", "lora.dropout=0")
    message = str(stopped.value)
    assert message.startswith("error: step 2 is not finite: loss ") and "go on with resume=true" in message
    (folder,) = tmp_path.glob("nonfinite-*")
    assert folder.name == "nonfinite-step-2-rank-0" and str(folder) in message
    (batch,) = json.loads((folder / "rows.json").read_text())["batches"]
    assert len(batch["rows"]) == 4 and all(row["id"] in message for row in batch["rows"])
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert not torch.tensor(replay(folder)).isfinite().any()


def test_the_named_samples_are_those_of_the_step(base, tmp_path, monkeypatch):
    """Their questions are what the poisoned batch spells."""
    poison(monkeypatch, {4})  # the second micro-batch of the second step
    with pytest.raises(SystemExit, match="step 2 is not finite: loss nan"):
        train(base, tmp_path, "train.batch_size=2", "train.accumulation=2")
    (folder,) = tmp_path.glob("nonfinite-*")
    batches = json.loads((folder / "rows.json").read_text())["batches"]
    assert [b["loss"] == "nan" for b in batches] == [False, True]
    config = check_config(composed(*QUICK, *SMALL, *BAND, f"model.path={base}", "output_dir=x"))
    rows, tokenizer = training_data(config.data), assemble.student_of(config).processor.tokenizer
    saved = torch.load(folder / "batches.pt", weights_only=True)["batches"]
    for named, inputs in zip(batches, saved, strict=True):
        for row, ids in zip(named["rows"], inputs["input_ids"], strict=True):
            sample, text = rows[row["index"]], tokenizer.decode(ids)
            assert sample["id"] == row["id"]
            for message in sample["messages"]:
                assert message["content"][-1]["text"] in text
    assert torch.tensor(replay(folder)).isfinite().all()  # nothing is wrong with these without the poison


def poison(monkeypatch, calls):
    """These calls of the objective give nan."""
    call, count = Objective.__call__, []

    def poisoned(self, *args, **kwargs):
        count.append(1)
        loss, terms = call(self, *args, **kwargs)
        return (loss * float("nan") if len(count) in calls else loss), terms

    monkeypatch.setattr(Objective, "__call__", poisoned)


@pytest.mark.parametrize("engine", ["accelerate", pytest.param("lightning", marks=pytest.mark.slow)])
def test_such_a_step_can_be_skipped(base, tmp_path, monkeypatch, capsys, engine):
    poison(monkeypatch, {2})
    train(base, tmp_path, "train.on_nonfinite=skip", f"engine={engine}")
    assert "step 2 skipped: loss nan" in capsys.readouterr().out
    one, two = (load_file(tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (1, 2))
    three = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any((two[name] != three[name]).any() for name in two)
    assert all(weight.isfinite().all() for weight in three.values())


def test_skipping_ends_when_nothing_else_happens(tmp_path):
    samples = [{"id": f"row {i}"} for i in range(40)]
    order = Order(40, steps=20, size=2, seed=0)
    watch = Watch(tmp_path, dataset=samples, order=order, rank=0, world=1, micro=2, skip=True, student=None)

    def take(step, loss, norm):
        watch.begin()
        watch.saw({"input_ids": torch.zeros(2, 3)}, torch.tensor(loss), 7)
        return watch.passes(step, norm)

    assert not take(0, float("inf"), float("inf")) and take(
        1, 1.0, torch.tensor(2.0)
    )  # a good step resets the count
    assert not any(take(step, 1.0, float("nan")) for step in range(2, 2 + MOST_SKIPS))
    with pytest.raises(
        NonFinite, match=rf"step 13 is not finite \({MOST_SKIPS} steps in a row were skipped\)"
    ):
        take(12, 1.0, float("nan"))
    assert watch.skipped == MOST_SKIPS + 2


# ---------------------------------------------------------------- logs


@pytest.mark.parametrize("engine", ["accelerate", "lightning"])
def test_metrics_hold_every_log_entry_and_the_console_shows_them(base, tmp_path, capsys, engine):
    train(base, tmp_path, "train.steps=2", f"engine={engine}")
    first, second = (e for e in metrics_entries(tmp_path) if "loss" in e)
    assert (first["step"], second["step"]) == (1, 2)
    for name in (
        "ce",
        "kl",
        "grad_norm",
        "learning_rate",
        "tokens_per_second",
        "samples_per_second",
        "memory_gb",
    ):
        assert first[name] > 0
    assert second["eta_seconds"] == 0 < first["eta_seconds"] and second["epoch"] == pytest.approx(
        8 / 7, rel=0.2
    )
    printed = capsys.readouterr().out
    assert f" left  loss {first['loss']:.4f}  ce {first['ce']:.4f}  kl {first['kl']:.4f}" in printed
    assert "samples/s" in printed and "2/2  0:00 left" in printed


@pytest.mark.parametrize(("columns", "named"), [("80", False), ("160", True)])
def test_a_narrow_terminal_shows_numbers_rather_than_a_bar(tmp_path, monkeypatch, capsys, columns, named):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monitor = Monitor(tmp_path, name="run", steps=90, first=0, samples=8, dtype=torch.float32, main=True)
    values = {"loss": 1.2345, "ce": 0.9876, "kl": 0.2469, "memory_gb": 1.1}
    monitor.log(20, values | {"tokens_per_second": 3200, "samples_per_second": 14.1, "eta_seconds": 52})
    monitor.close()
    shown = capsys.readouterr().err
    assert ("run" in shown) == named
    assert "20/90  0:52 left  loss 1.2345  ce 0.9876  kl 0.2469" in shown and "14.1 s" in shown


def test_rates_are_what_was_done_by_the_time_it_took(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("latefusion.training.monitor.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("latefusion.training.monitor.peak_flops", lambda dtype: 1e12)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monitor = Monitor(tmp_path, name="x", steps=10, first=2, samples=8, dtype=torch.float32, main=True)
    clock[0] += 4
    rates = monitor.rates(4, 1000, 16e10)
    assert rates["tokens_per_second"] == 250 and rates["samples_per_second"] == 4
    assert rates["eta_seconds"] == 12 and rates["mfu"] == pytest.approx(16e10 / 4 / 2e12)
    text = line(
        4, 10, {"loss": 1.5, "ce": 1.25, "kl": 0.0, **rates, "tokens_per_second": 2500.0, "memory_gb": 3.0}
    )
    assert text == " 4/10  0:12 left  loss 1.5000  ce 1.2500  2.5k tokens/s  4 samples/s  3.0 GB  MFU 2%"


def test_answers_in_words_that_the_tokenizer_does_not_know_are_reported():
    tokenizer = build_processor(patch_size=24).tokenizer
    in_vocabulary, strange = ([IGNORE, *tokenizer(text).input_ids] for text in ("red", "photograph"))
    assert strange[1:] == [tokenizer.unk_token_id] != in_vocabulary[1:]

    def sample(question, answer):
        return {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ]
        }

    plain = sample("what color is the circle ?", "red")
    assert unknown_words([plain], tokenizer) == []
    (warning,) = unknown_words(
        [plain, sample("what color is the hedgehog ?", "a lilac photograph")], tokenizer
    )
    assert (
        "1 of 12 words in the questions and" in warning and "hedgehog" in warning and "photograph" in warning
    )
    assert "learns to answer with it" in warning
    (warning,) = unknown_words([plain, sample("what color is the hedgehog ?", "red")], tokenizer)
    assert "0 of 2 in the answers" in warning and "learns" not in warning


def test_a_band_that_narrows_is_described_by_its_widest_and_its_mean(tmp_path):
    """The peak is that of all tokens in every layer, the FLOPs the mean of what the steps compute."""
    final, layers = VisionSchedule(enter=2, exit=4), 6
    moments = schedules_of(final, 0.5, layers)
    assert moments[0][1].vision_tokens(layers, 9) == [9] * layers and moments[-1] == (0.5, final)
    assert sum(share for share, _ in moments) == pytest.approx(1)
    assert schedules_of(final, 0, layers) == [(1.0, final)]


def test_trackers_are_named_or_refused(monkeypatch, capsys):
    for module in ("training.monitor", "recipes.check"):
        monkeypatch.setattr(f"latefusion.{module}.find_spec", lambda name: name == "wandb" or None)
    assert trackers(["tensorboard", "wandb"], main=True) == ["wandb"]
    assert "TensorBoard is not installed" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"train.trackers=trackio is not installed; pip install trackio"):
        configured("train.trackers=[trackio]")
    with pytest.raises(
        ValueError, match=r"train.trackers names 'mlflow'; there are tensorboard, wandb, trackio"
    ):
        configured("train.trackers=[mlflow]")
