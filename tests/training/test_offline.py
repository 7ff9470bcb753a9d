"""Distillation without a teacher in the loop: the same loss, and a cache that knows when it is out of date."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from helpers.launch import TEACH, launch
from helpers.quick_runs import run_config, teach_config
from helpers.tiny_base import BAND, SMALL, composed, save_tiny_base, tiny_student
from PIL import Image
from safetensors.torch import load_file, save_file

from latefusion.data.load import training_data
from latefusion.recipes.check import check_config
from latefusion.training import assemble
from latefusion.training.loss import distillation, distillation_from
from latefusion.training.offline import Taught, expected, write

VOCABULARY = 10_000  # more than there are tokens: all of them
QUICK = (
    *(
        "train.dtype=float32",
        "train.threads=1",
        "train.log_every=1",
        "train.learning_rate=1e-2",
        "train.steps=2",
    ),
    *("train.batch_size=4", "data.scenes=3", "eval.enabled=false", "model.visipruner.boundary=1"),
)


def options(base, cache, *overrides):
    where = (f"model.path={base}", f"kl.cache={cache}", f"kl.top_k={VOCABULARY}")
    return composed(*QUICK, *SMALL, *BAND, *where, *overrides)


@pytest.fixture(scope="module")
def cache(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    teach_config(options(base, folder))
    return folder


def logged(output):
    entries = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [[e[name] for name in ("loss", "ce", "kl", "grad_norm")] for e in entries if "loss" in e]


def test_offline_gives_the_losses_of_online(base, cache, tmp_path, capsys):
    for name, value in (("offline", cache), ("online", "null")):
        run_config(options(base, value, f"output_dir={tmp_path / name}"))
    online, offline = logged(tmp_path / "online"), logged(tmp_path / "offline")
    assert len(online) == 2 and all(kl > 0.01 for _, _, kl, _ in online)
    for a, b in zip(online, offline, strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    assert "teacher visipruner (offline)" in capsys.readouterr().out


def test_no_teacher_runs(base, cache):
    config, student = tiny_student(f"kl.cache={cache}")
    assert assemble.objective_of(config, student).kl.policy is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "kl.temperature=2",
            r"were written with kl\.temperature=1\.0, but this run has 2\.0; write it with python",
        ),
        (
            "model.visipruner.tokens_threshold=0.3",
            r"written with visipruner\.tokens_threshold=0\.\d+, but this run has 0\.3; write",
        ),
        ("teacher=dense", r"written with teacher=visipruner, but this run has dense; write it"),
        ("kl.top_k=5", r"written with kl\.top_k=\d+, but this run has 5"),
        ("data.isolate=false", r"written with data\.isolate=True, but this run has False"),
        (
            "data.scenes=4",
            r"are to the \d+ rows of other data, but this run has \d+; write it with .* overwrite=true",
        ),
        (
            "data.scenes=1 data.seed=1",
            r"written with data\.seed=0, but this run has 1; write it with .* overwrite=true",
        ),
        ("data.noise=0.2", r"written with data\.noise=0\.0, but this run has 0\.2; write it with"),
        ("data.scenes=1 data.turns=5", r"written with data\.turns=\d+, but this run has 5; write it with"),
    ],
)
def test_a_stale_cache_is_refused_before_training(base, cache, tmp_path, change, message):
    with pytest.raises(SystemExit, match=rf"^error: .*{message}"):
        run_config(options(base, cache, f"output_dir={tmp_path}", *change.split(), "train.steps=9"))
    assert not list(tmp_path.glob("checkpoint-*"))


def test_another_ranking_of_the_vision_tokens_is_noticed(base, cache):
    """Answers of a teacher that pruned by another token of the prompt are not this run's."""
    config = check_config(options(base, cache, "output_dir=x"))
    plain = assemble.collator_of(assemble.student_of(config), config)

    class Later:
        processor = plain.processor

        def __call__(self, samples):
            batch = plain(samples)
            return {**batch, "queries": batch["queries"] + 1}

    samples = [training_data(config.data)[0]]
    answers = expected(config, plain.processor)
    assert "teacher_tokens" in Taught(plain, str(cache), answers)(samples)
    with pytest.raises(ValueError, match="for another prompt, ranking, tokenizer or image"):
        Taught(Later(), str(cache), answers)(samples)
    with pytest.raises(
        ValueError, match=r"sample other: the teacher's answers in .* were written without it"
    ):
        Taught(plain, str(cache), answers)([{**samples[0], "id": "other"}])


def test_a_changed_chat_template_is_noticed(base, cache):
    config, student = check_config(options(base, cache, "output_dir=x")), None
    student = assemble.student_of(config)
    answers = expected(config, student.processor)
    Taught(assemble.collator_of(student), str(cache), answers)
    student.processor.chat_template += " "
    with pytest.raises(
        ValueError, match=r"were written with another processor \(image settings, chat template or tok"
    ):
        Taught(assemble.collator_of(student), str(cache), expected(config, student.processor))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "+model.processor.image_mean=[0.1,0.1,0.1]",
            r"written with another processor .* than this run",
        ),
        ("train.dtype=bfloat16", r"written with train\.dtype=float32, but this run has bfloat16;"),
    ],
)
def test_answers_to_other_pixels_or_in_another_dtype_are_refused(base, cache, tmp_path, change, message):
    """The sample's own pixels and tokens are the same; what the model sees and computes is not."""
    with pytest.raises(SystemExit, match=rf"^error: .*{message}"):
        run_config(options(base, cache, f"output_dir={tmp_path}", change, "train.steps=9"))


def test_other_weights_in_the_same_place_are_noticed(base, cache, tmp_path):
    """A base that was trained further and saved again in its place."""
    config = check_config(options(base, cache, "output_dir=x"))
    student = assemble.student_of(config)
    answers = expected(config, student.processor)
    again = tmp_path / "base"
    shutil.copytree(base, again)
    config.model.path = str(again)
    moved = expected(config, student.processor)
    assert moved == {**answers, "model": str(again)}, "it is what the folder holds that counts"
    (file,) = again.glob("*.safetensors")
    weights = load_file(file)
    weights[max(weights)].view(-1)[0] += 1
    save_file(weights, file, metadata={"format": "pt"})
    changed = {**expected(config, student.processor), "model": answers["model"]}
    with pytest.raises(
        ValueError, match=rf"were written with other weights than this run's \({answers['weights']}, not"
    ):
        Taught(assemble.collator_of(student), str(cache), changed)


def test_an_unfinished_cache_is_refused(base, cache, tmp_path):
    with pytest.raises(
        SystemExit, match=r"no teacher's answers in kl.cache=.*; write it with python training/teach.py"
    ):
        run_config(options(base, tmp_path / "none", f"output_dir={tmp_path}"))
    (tmp_path / "teacher.json").write_text(
        (cache / "teacher.json").read_text().replace('"files": 1', '"files": 2')
    )
    with pytest.raises(SystemExit, match=r"0 of 2 files are in kl.cache="):
        run_config(options(base, tmp_path, f"output_dir={tmp_path / 'out'}"))


ROWS = "teacher-00000-of-00001.arrow"


@pytest.mark.parametrize(
    ("file", "change"),
    [
        (ROWS, lambda whole: whole[: len(whole) // 2]),
        (ROWS, lambda whole: whole[:-90]),
        (ROWS, lambda whole: b""),
        (ROWS, lambda whole: b"hello\n"),
        ("teacher.json", lambda whole: whole[:100]),
        ("teacher.json", lambda whole: b"[]"),
        ("teacher.json", lambda whole: b'["files"]'),
        ("teacher.json", lambda whole: b"{}"),
        ("teacher.json", lambda whole: b"3"),
    ],
)
def test_a_damaged_cache_is_named(base, cache, tmp_path, file, change):
    folder = tmp_path / "cache"
    shutil.copytree(cache, folder)
    (folder / file).write_bytes(change((cache / file).read_bytes()))
    with pytest.raises(SystemExit, match=rf"^error: .*{file} is damaged; write it with python") as error:
        run_config(options(base, folder, f"output_dir={tmp_path / 'out'}"))
    assert "\n" not in str(error.value)


def test_a_finished_cache_is_replaced_only_with_overwrite(base, cache, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(cache, folder)
    with pytest.raises(SystemExit, match=r"teacher\.json is there already; replace it with overwrite=true"):
        teach_config(options(base, folder, "kl.temperature=2"))
    assert (folder / ROWS).read_bytes() == (cache / ROWS).read_bytes()
    with pytest.raises(SystemExit, match=r"resume=true would not be read"):
        teach_config(options(base, folder, "resume=true"))
    teach_config(options(base, folder, "kl.temperature=2", "overwrite=true"))
    assert json.loads((folder / "teacher.json").read_text())["kl.temperature"] == 2


def test_a_process_that_stops_leaves_none_of_its_older_answers(tmp_path):
    """Its file would otherwise count as one of the new teacher's."""
    row = {"sample": "a", "prompt": "b", "tokens": [1], "logprobs": [0.0]}
    write(tmp_path, iter([[row]]), rank=1, world=2)

    def stopped():
        yield [row]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, stopped(), rank=1, world=2)
    assert not list(tmp_path.glob("*.arrow"))


@pytest.mark.parametrize("override", ["kl.weight=0", "teacher=none"])
def test_a_cache_without_a_teacher_is_refused_before_anything_is_loaded(base, tmp_path, override):
    with pytest.raises(SystemExit, match=r"kl.cache needs a teacher; .* or leave out kl.cache"):
        teach_config(options(base, tmp_path, override))


def test_processes_share_the_samples(base, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        teach_config(options(base, tmp_path))
    monkeypatch.undo()
    config = check_config(options(base, cache, "output_dir=x"))
    student = assemble.student_of(config)
    answers = expected(config, student.processor)
    isolated = assemble.collator_of(student, config)
    whole, shared = (Taught(isolated, str(folder), answers) for folder in (cache, tmp_path))
    assert sorted(whole.index) == sorted(shared.index) and whole.index != shared.index
    rows = training_data(config.data)
    samples = [rows[i] for i in (3, 0)]
    a, b = whole(samples), shared(samples)
    assert torch.equal(a["teacher_tokens"], b["teacher_tokens"])
    assert torch.allclose(a["teacher_logprobs"], b["teacher_logprobs"], atol=1e-4)


@pytest.fixture(scope="module")
def larger(base, tmp_path_factory):
    """What a larger teacher says of 7 samples, some without images and one that cannot be used, in one process."""
    folder = tmp_path_factory.mktemp("larger")
    save_tiny_base(folder / "model", layers=9, seed=3)
    Image.new("RGB", (20, 30), (200, 0, 0)).save(folder / "a.jpg")
    questions = ["<image>\nwhat color is it?", "how many?", "is it?"] * 2
    records = [
        {
            "id": f"r{i}",
            **({"image": "a.jpg" if i < 6 else "none.jpg"} if "<image>" in question else {}),
            "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "red"}],
        }
        for i, question in enumerate([*questions, "<image>\nwhat?"])
    ]
    (folder / "mix.json").write_text(json.dumps(records))
    options = (
        *("data=llava_mix665k", f"data.path={folder / 'mix.json'}", f"data.images={folder}"),
        *(f"kl.model={folder / 'model'}", "kl.visipruner.boundary=2", "data.on_error=skip"),
        *("train.batch_size=1", "train.dtype=float32", "kl.top_k=5"),
    )
    teach_config(
        composed(*QUICK, *SMALL, *BAND, f"model.path={base}", f"kl.cache={folder / 'one'}", *options)
    )
    return folder / "one", options


def cached(folder):
    files = sorted(folder.glob("teacher-*.arrow"))
    rows = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
    return len(files), {(row["sample"], row["prompt"]): row for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["deepspeed_zero3", "fsdp2"])
def test_a_teacher_in_shards_says_the_same(base, larger, tmp_path, engine):
    one, options = larger
    where = (f"kl.cache={tmp_path / 'two'}", f"engine={engine}")
    printed = launch("torchrun", base, tmp_path / "out", *options, *where, script=TEACH)
    assert "samples answered by the first of 2 processes" in printed
    (files, expected), (both, sharded) = cached(one), cached(tmp_path / "two")
    assert (files, both) == (1, 2) and sharded.keys() == expected.keys() and len(sharded) == 6
    for key, row in expected.items():
        assert sharded[key]["tokens"] == row["tokens"]
        assert sharded[key]["logprobs"] == pytest.approx(row["logprobs"], abs=1e-4)
    assert (
        json.loads((tmp_path / "two" / "teacher.json").read_text())["model"] == options[3].partition("=")[2]
    )


@pytest.mark.slow
def test_the_own_base_in_shards_teaches_as_it_does_whole(base, tmp_path):
    """The cache says the same of its teacher, so that a run without `kl.model` takes it."""
    overrides = (*QUICK, *SMALL, *BAND, f"model.path={base}", "kl.top_k=5")
    teach_config(composed(*overrides, f"kl.cache={tmp_path / 'one'}"))
    launch(
        "torchrun",
        base,
        tmp_path / "out",
        *overrides,
        f"kl.cache={tmp_path / 'two'}",
        "engine=deepspeed_zero3",
        script=TEACH,
    )
    (_, expected), (both, sharded) = cached(tmp_path / "one"), cached(tmp_path / "two")
    assert both == 2 and sharded.keys() == expected.keys() and sharded
    for key, row in expected.items():
        assert sharded[key]["tokens"] == row["tokens"]
        assert sharded[key]["logprobs"] == pytest.approx(row["logprobs"], abs=1e-4)
    one, two = (json.loads((tmp_path / n / "teacher.json").read_text()) for n in ("one", "two"))
    assert {**one, "files": 2} == two


def test_a_row_that_must_not_be_left_out_ends_the_pass_and_others_are_counted(base, tmp_path, capsys):
    rows = [
        {"id": f"r{i}", "messages": [lines_of("user", "how many?"), lines_of("assistant", "2")]}
        for i in range(9)
    ]
    rows.append({"id": "last", "messages": [lines_of("user", "how many?")]})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    overrides = options(base, tmp_path / "cache", "data=dataset", f"data.path={tmp_path / 'rows.jsonl'}")
    with pytest.raises(
        SystemExit, match=r"^error: row last .*; leave such rows out with data\.on_error=skip\.$"
    ):
        teach_config(overrides)
    assert not (tmp_path / "cache" / "teacher.json").exists()
    overrides.data.on_error = "skip"
    teach_config(overrides)
    assert "9 samples answered" in (printed := capsys.readouterr().out)
    assert "1 row(s) could not be used and were left out: " in printed
    assert json.loads((tmp_path / "cache" / "skipped_rows.jsonl").read_text())["id"] == "last"


def lines_of(role, text):
    return {"role": role, "content": [{"type": "text", "text": text}]}


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("adapter_config.json", "holds a model already"),
        ("config.yaml", "holds a run already"),
        ("schedule.yaml", "holds a profile already"),
    ],
)
def test_answers_are_not_written_into_the_folder_of_a_run(tmp_path, file, message):
    """They would take the list of its rows that could not be used with them."""
    (tmp_path / file).write_text("{}")
    with pytest.raises(SystemExit, match=rf"{tmp_path} {message}; choose another kl\.cache=FOLDER\.$"):
        teach_config(composed(*QUICK, f"kl.cache={tmp_path}"))


def test_a_stream_is_not_taught(tmp_path):
    with pytest.raises(
        SystemExit, match=r"^error: data\.streaming=true has no end .*; use data\.streaming=false\.$"
    ):
        teach_config(
            options("embedded", tmp_path, "data=dataset", "data.path=x.jsonl", "data.streaming=true")
        )


def logits(seed, n=6, vocabulary=11):
    return torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 4, 11])
def test_what_is_not_kept_counts_as_one_token(k, temperature):
    """Against plain sums in numpy; with the whole vocabulary it is the usual distillation."""
    student, teacher = logits(0).requires_grad_(), logits(1)
    logprobs, tokens = (teacher / temperature).log_softmax(-1).topk(k)
    kl = distillation_from(student, tokens, logprobs, temperature)
    total = 0.0
    for s, t in zip(student.detach().numpy() / temperature, teacher.numpy() / temperature, strict=True):
        q, p = np.exp(s) / np.exp(s).sum(), np.exp(t) / np.exp(t).sum()
        kept = np.argsort(-p)[:k]
        total += sum(p[i] * np.log(p[i] / q[i]) for i in kept)
        rest = [i for i in range(len(p)) if i not in kept]
        if rest:
            total += p[rest].sum() * np.log(p[rest].sum() / q[rest].sum())
    assert kl.item() == pytest.approx(temperature**2 * total, rel=1e-9)
    whole = distillation(student, teacher, temperature)
    assert kl.item() <= whole.item() + 1e-9
    if k == 11:
        (a,), (b,) = (torch.autograd.grad(loss, student) for loss in (kl, whole))
        assert torch.allclose(a, b)
    assert (
        torch.autograd.grad(distillation_from(student, tokens, logprobs, temperature), student)[0]
        .isfinite()
        .all()
    )
