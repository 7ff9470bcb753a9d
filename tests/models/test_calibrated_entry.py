"""The calibrated entry: its fit against plain least squares, how a run comes by it, what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.families import build, prompt, shared, text_tokens, vision_tokens
from helpers.forwards import generate
from helpers.oracle import band, masked
from helpers.tiny_base import configured, save_tiny_base, shake, tiny_base
from safetensors.torch import load_file, save_file

from latefusion.data.collate import collator_without_weights
from latefusion.data.draw import distinct_images
from latefusion.data.load import training_data
from latefusion.data.scenes import load_scenes
from latefusion.eval.fusion import run as profile_run
from latefusion.models.attach import attach
from latefusion.models.profile_folder import ENTRY_FILE, read_entry, write_entry
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.build import Lora, build_student
from latefusion.models.student.entry import CalibratedEntry, entry_of
from latefusion.models.student.entry_fit import (
    RIDGE,
    Calibration,
    Moments,
    TooFew,
    _Sums,
    fit_entry,
    installed,
)
from latefusion.models.student.restore import load
from latefusion.models.student.save import merge, save_student
from latefusion.training import assemble, prepare
from latefusion.training.prepare import FITTED, settle_entry

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"), layers=4)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "lfm2_vl", "qwen3_5"])
def test_an_affine_dense_model_is_calibrated_to_the_ceiling(family: str) -> None:
    """Dense states that are an affine map with a bias a place are reached."""
    model = shared(family)
    generator = torch.Generator().manual_seed(0)
    inputs = prompt(family, ["tt I ttt"] * 20, seed=3)
    vision = vision_tokens(inputs)
    weight = torch.randn(32, 32, generator=generator) * 0.2
    bias = torch.randn(4, 32, generator=generator)

    def shift(layer, args, output):
        if output.shape[:2] != vision.shape:  # late entry: text alone is computed here
            return output
        rows = state[vision].unflatten(0, (-1, 4))
        moved = output.clone()
        moved[vision] = (rows @ weight + bias).flatten(0, 1)
        return moved

    def look(layer, args):
        nonlocal state
        state = args[0]

    state = torch.empty(0)
    layer = model.get_decoder().layers[0]
    handles = [layer.register_forward_pre_hook(look), layer.register_forward_hook(shift)]
    try:
        with attach(model, VisionSchedule()) as attachment:
            entry = fit_entry(attachment, [(inputs, vision)], 1)
    finally:
        for handle in handles:
            handle.remove()
    assert entry.explained > 0.9999 and entry.tokens == 80 and len(entry.entry.bias) == 4
    mapped = entry.entry(state[vision].unflatten(0, (-1, 4)), torch.arange(4))
    torch.testing.assert_close(
        mapped, state[vision].unflatten(0, (-1, 4)) @ weight + bias, atol=5e-3, rtol=5e-3
    )


def test_a_late_token_gets_the_bias_of_its_place() -> None:
    """Rows of no, one and two images side by side, against the masked oracle."""
    model, inputs = shared("llava"), prompt("llava", ["tt I ttt", "tttt", "t I t I tt"])
    vision = vision_tokens(inputs)
    entry = CalibratedEntry(hidden_size=32, places=4)
    generator = torch.Generator().manual_seed(1)
    entry.weight.normal_(0, 0.3, generator=generator)
    entry.bias.normal_(0, 1, generator=generator)

    def by_hand(rows: torch.Tensor) -> torch.Tensor:
        mapped = rows.clone()
        for b in range(len(rows)):
            for n, t in enumerate(vision[b].nonzero().flatten().tolist()):
                mapped[b, t] = rows[b, t] @ entry.weight + entry.bias[n % 4]
        return mapped

    with torch.no_grad():
        with installed(model, entry), attach(model, VisionSchedule(enter=2, exit=4)):
            late = model(**inputs).logits
        seen = band(vision, 6, 2, 4)
        with masked(model, vision, seen, padding=inputs["attention_mask"], entry=by_hand):
            expected = model(**inputs).logits
    text = text_tokens(inputs)
    torch.testing.assert_close(late[text], expected[text], atol=2e-5, rtol=1e-4)
    assert entry_of(model) is None


@pytest.mark.parametrize("schedule", [VisionSchedule(enter=2, exit=4), VisionSchedule(cross=(1, 3, 4))])
def test_a_chunk_that_cuts_an_image_is_refused(schedule) -> None:
    """Its tokens would be counted from the wrong place; chunks of whole images, and one bias for all, are exact."""
    model, inputs, later = build("llava"), prompt("llava", ["t I t I tt"]), (schedule.cross or ())[1:]
    entry = CalibratedEntry(hidden_size=32, places=4, later=later)
    one = CalibratedEntry(hidden_size=32, places=1, later=later)
    for fitted in (entry, *entry.later.values(), one, *one.later.values()):
        fitted.bias.normal_(0, 1, generator=torch.Generator().manual_seed(0))

    def logits(**settings):
        return torch.stack(generate(model, copy.deepcopy(inputs), **settings).logits, 1)

    with torch.no_grad(), attach(model, schedule):
        with installed(model, entry):
            torch.testing.assert_close(logits(prefill_chunk_size=5), logits(), atol=2e-5, rtol=1e-4)
            with pytest.raises(
                ValueError, match="each of the 4 places in an image, but this forward begins or ends"
            ):
                logits(prefill_chunk_size=3)
        with installed(model, one):
            torch.testing.assert_close(logits(prefill_chunk_size=3), logits(), atol=2e-5, rtol=1e-4)


def test_images_of_different_sizes_share_one_bias_and_too_few_are_refused() -> None:
    model = shared("llava")
    inputs = prompt("llava", ["tt I ttt", "t I I tt"] * 10)
    with attach(model, VisionSchedule()) as attachment:
        assert len(fit_entry(attachment, [(inputs, vision_tokens(inputs))], 2).entry.bias) == 1
        few = prompt("llava", ["tt I ttt"])
        with pytest.raises(ValueError, match="use more images"):
            fit_entry(attachment, [(few, vision_tokens(few))], 2)


@pytest.mark.parametrize(("cross", "rank"), [(None, None), ((1, 2, 3), None), ((1, 2, 3), 5)])
def test_a_calibrated_student_is_saved_loaded_and_merged(tmp_path, base, cross, rank) -> None:
    model, processor = tiny_base(layers=4)
    entry = CalibratedEntry(hidden_size=32, places=4, later=(cross or ())[1:], later_rank=rank)
    for name, value in entry.state_dict().items():
        value.normal_(0, 1 if name.endswith("bias") else 0.3)
    schedule = VisionSchedule(enter=1, exit=3) if cross is None else VisionSchedule(cross=cross)
    student = build_student(
        model, processor, base=str(base), schedule=schedule, lora=Lora(rank=2, alpha=4),
        entry_rank=2, calibrated=entry,
    )  # fmt: skip
    assert not any(
        "start" in name for name, weight in student.model.named_parameters() if weight.requires_grad
    )
    shake(student, 0.1)
    row = load_scenes("test", 1)[0]
    inputs = processor(
        text=f"<image><user>{row['question']}<assistant>", images=row["image"], return_tensors="pt"
    )
    with torch.no_grad():
        expected = student.model.eval()(**inputs).logits
    save_student(student, tmp_path / "student")
    merge(tmp_path / "student", tmp_path / "merged", dtype=torch.float32)
    for name in ("student", "merged"):
        again, _ = load(tmp_path / name, dtype=torch.float32)
        assert list(entry_of(again).later) == [str(layer) for layer in (cross or ())[1:]]
        saved = {key: value for key, value in again.state_dict().items() if "down" in key and "later" in key}
        assert [value.shape for value in saved.values()] == ([(32, rank)] * 2 if rank else [])
        with torch.no_grad():
            torch.testing.assert_close(again(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


def states(model, inputs, vision, layers) -> list[torch.Tensor]:
    """The dense model's vision rows before these layers, `[N, D]` each, float64."""
    recorded: list[torch.Tensor] = []
    decoder = model.get_decoder()
    handles = [
        decoder.layers[layer].register_forward_pre_hook(
            lambda m, args: recorded.append(args[0][vision].double())
        )
        for layer in layers
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return recorded


@pytest.mark.parametrize("kinds", [("tt I ttt",), ("tt I ttt", "t I I tt")])
def test_what_is_explained_is_what_least_squares_explains(kinds) -> None:
    """Row by row, without sums: of all batches, and of the last under a map of those before it."""
    model = shared("llava")
    batches = [prompt("llava", [*kinds] * 9, seed=seed) for seed in range(3)]
    with attach(model, VisionSchedule()) as attachment:
        entry = fit_entry(attachment, [(inputs, vision_tokens(inputs)) for inputs in batches], 2)
    rows, places = [], len(entry.entry.bias)
    assert places == (4 if len(kinds) == 1 else 1)
    for inputs in batches:
        x, y = states(model, inputs, vision_tokens(inputs), (0, 2))
        rows.append((x, y, torch.arange(len(x)) % places))

    def fitted(some):
        x, y, place = (torch.cat(part) for part in zip(*some, strict=True))
        means = [torch.stack([part[place == p].mean(0) for p in range(places)]) for part in (x, y)]
        x, y = x - means[0][place], y - means[1][place]
        ridge = (RIDGE * x.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
        weight = torch.linalg.lstsq(torch.cat([x, ridge]), torch.cat([y, 0 * ridge])).solution
        return weight, means

    def share(some, weight, means, mapped=None):
        x, y, place = (torch.cat(part) for part in zip(*some, strict=True))
        guess = (x - means[0][place]) @ weight + means[1][place] if mapped is None else mapped(x)
        return float(1 - (y - guess).square().sum() / (y - means[1][place]).square().sum())

    assert entry.explained == pytest.approx(share(rows, *fitted(rows)), rel=1e-6)
    before = fitted(rows[:2])
    assert entry.unseen == pytest.approx(share(rows[2:], *before), rel=1e-6)
    assert entry.raw == pytest.approx(share(rows[2:], *before, mapped=lambda x: x), rel=1e-6)
    assert entry.unseen < entry.explained


def test_later_layers_are_fitted_to_what_the_maps_before_have_made() -> None:
    """Row by row, without sums; in the last batch by maps of those before it."""
    model = shared("llava")
    batches = [prompt("llava", ["tt I ttt"] * 9, seed=seed) for seed in range(3)]
    with attach(model, VisionSchedule()) as attachment:
        pairs = [(inputs, vision_tokens(inputs)) for inputs in batches]
        fit = fit_entry(attachment, pairs, 2, later=[3, 5])
        alone = fit_entry(attachment, pairs, 2)
    rows = [states(model, inputs, vision, (0, 2, 3, 5)) for inputs, vision in pairs]
    assert torch.equal(fit.entry.weight, alone.entry.weight) and fit.unseen == alone.unseen

    def fitted(x, y):
        place = torch.arange(len(x)) % 4
        means = [torch.stack([part[place == p].mean(0) for p in range(4)])[place] for part in (x, y)]
        x, y = x - means[0], y - means[1]
        ridge = (RIDGE * x.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
        weight = torch.linalg.lstsq(torch.cat([x, ridge]), torch.cat([y, 0 * ridge])).solution
        return weight, (means[1] - means[0] @ weight)[:4]

    x, *layers = (torch.cat(part) for part in zip(*rows, strict=True))
    order = torch.arange(len(x)) % 4
    for y, module in zip(layers, (fit.entry, *fit.entry.later.values()), strict=True):
        weight, bias = fitted(x, y)
        torch.testing.assert_close(module.weight, weight.float(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(module.bias, bias.float(), atol=1e-4, rtol=1e-4)
        x = x @ weight + bias[order]
    x, *layers = (torch.cat(part) for part in zip(*rows[:2], strict=True))
    z, *tested = rows[2]
    for y, test, share in zip(layers, tested, (fit.unseen, *fit.later), strict=True):
        weight, bias = fitted(x, y)
        x, z = x @ weight + bias[order[: len(x)]], z @ weight + bias[order[: len(z)]]
        mean = torch.stack([y[order[: len(y)] == p].mean(0) for p in range(4)])[order[: len(test)]]
        assert share == pytest.approx(
            float(1 - (test - z).square().sum() / (test - mean).square().sum()), rel=1e-5
        )


@pytest.mark.parametrize("rank", [3, 15])
def test_maps_of_a_low_rank_come_as_close_as_that_rank_can(rank) -> None:
    """Row by row, by the singular values of the change of whitened rows (Eckart and Young)."""
    model = shared("llava")
    batches = [prompt("llava", ["tt I ttt"] * 9, seed=seed) for seed in range(3)]
    with attach(model, VisionSchedule()) as attachment:
        pairs = [(inputs, vision_tokens(inputs)) for inputs in batches]
        fit = fit_entry(attachment, pairs, 2, later=[3, 5], later_rank=rank)
        whole = fit_entry(attachment, pairs, 2, later=[3, 5], later_rank=16)
    rows = [states(model, inputs, vision, (0, 3, 5)) for inputs, vision in pairs]
    x, *layers = (torch.cat(part) for part in zip(*rows, strict=True))
    place = torch.arange(len(x)) % 4
    assert isinstance(whole.entry.later["3"], CalibratedEntry) and whole.entry.later_rank is None

    def centred(rows):
        return rows - torch.stack([rows[place == p].mean(0) for p in range(4)])[place]

    x = x @ fit.entry.weight.double() + fit.entry.bias.double()[place]
    for y, module in zip(layers, fit.entry.later.values(), strict=True):
        assert module.down.shape == (32, rank) and module.up.shape == (rank, 32)
        ridge = (RIDGE * centred(x).square().sum(0).mean()).sqrt() * torch.eye(32, dtype=x.dtype)
        q, r = torch.linalg.qr(torch.cat([centred(x), ridge]))
        u, s, v = torch.linalg.svd(q.T @ torch.cat([centred(y) - centred(x), 0 * ridge]))
        change = torch.linalg.solve(r, u[:, :rank] * s[:rank] @ v[:rank])
        moved = x + centred(x) @ change
        moved = moved + torch.stack([(y - moved)[place == p].mean(0) for p in range(4)])[place]
        given = module(x.float(), place)
        torch.testing.assert_close(given, moved.float(), atol=2e-4, rtol=1e-3)
        x = moved


@pytest.mark.parametrize(("planted", "chosen"), [(10, 16), (20, 32), (60, None)])
def test_the_fit_takes_the_smallest_rank_that_loses_nothing(planted, chosen) -> None:
    """In states of 80 numbers, of which a layer changes a planted rank; 60 is best held as a whole matrix."""
    generator = torch.Generator().manual_seed(planted)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    start, down, up = drawn(80, 80) / 9, drawn(80, planted) / 9, drawn(planted, 80) / 9

    def sums(n):
        x, order = drawn(n, 80), torch.arange(n) % 4
        y = x @ start
        return _Sums.of(x, [y, y + y @ down @ up + 0.01 * drawn(n, 80)], order, [4])

    before, last = sums(2000), sums(400)
    together = [one.plus(other) for one, other in zip(before, last, strict=True)]
    fit = Moments((5,), together, before, last).fit()
    assert fit.entry.later_rank == chosen
    assert fit.later[0] > 0.99
    assert fit.entry.numbers() == 4 * 80 + (2 * 80 * chosen if chosen else 80 * 80)


def test_an_entry_of_low_rank_is_read_from_its_file_and_a_damaged_one_refused(tmp_path) -> None:
    entry = CalibratedEntry(hidden_size=32, places=4, later=(3, 5), later_rank=3)
    for value in entry.state_dict().values():
        value.normal_()
    write_entry(tmp_path, entry, "weights", "processor")
    again = read_entry(tmp_path, "weights")
    assert again is not None and again.sizes() == {"places": 4, "later": [3, 5], "later_rank": 3}
    assert all(torch.equal(value, entry.state_dict()[name]) for name, value in again.state_dict().items())
    values = load_file(tmp_path / ENTRY_FILE)
    values["later.5.down"] = values["later.5.down"][:, :2].contiguous()
    save_file(values, tmp_path / ENTRY_FILE)
    with pytest.raises(ValueError, match="is damaged; profile the model again"):
        read_entry(tmp_path, "weights")


def test_one_batch_leaves_nothing_unseen() -> None:
    inputs = prompt("llava", ["tt I ttt"] * 20)
    with attach(shared("llava"), VisionSchedule()) as attachment:
        entry = fit_entry(attachment, [(inputs, vision_tokens(inputs))], 1)
    assert entry.unseen is None and entry.raw is None


OPTIONS = (
    "train.dtype=float32",
    "train.threads=1",
    "schedule.enter=1",
    "schedule.exit=3",
    "schedule.keep=null",
)


def made(config, rows=None, resumed=None) -> Path:
    """The entry's file, when it is settled."""
    rows = rows if rows is not None else training_data(config.data)
    settle_entry(
        config, collator_without_weights(config), lambda: assemble.base_of(config)[0], lambda: rows, resumed
    )
    return Path(config.output_dir) / FITTED / ENTRY_FILE


def test_a_run_that_freezes_them_fits_every_layer_that_reads(base, tmp_path, capsys) -> None:
    words = (
        "recipe=cross_only",
        "entry.later=true",
        "train.dtype=float32",
        "train.threads=1",
        "model.cross=[1,2,3]",
        "entry.images=64",
    )
    config = configured(*words, f"model.path={base}", f"output_dir={tmp_path}")
    file = made(config)
    printed = " at the layers that read them later, by whole matrices with 2,304 numbers."
    assert printed in capsys.readouterr().out
    entry = entry_of(assemble.student_of(config).model)
    assert list(entry.later) == ["2", "3"]
    assert torch.equal(entry.start.later["3"].bias, load_file(file)["later.3.bias"])
    config.entry.later_rank = 5
    made(config)
    assert " by maps of rank 5 with 896 numbers." in capsys.readouterr().out
    assert entry_of(assemble.student_of(config).model).sizes()["later_rank"] == 5
    config.entry.later = False  # as the embedded model has it
    assert set(load_file(made(config))) == {"weight", "bias"}


def test_a_run_fits_its_entry_once_and_a_resumed_one_reads_it(base, tmp_path, capsys) -> None:
    options = (*OPTIONS, f"model.path={base}", f"output_dir={tmp_path}", "entry.images=64")
    config = configured(*options)
    assert config.entry.init.value == "calibrated"  # what the recipe says, of any model
    file = made(config)
    assert (
        "Entry calibrated on 64 images: fitted without the last 16, it explains " in capsys.readouterr().out
    )
    first = load_file(file)
    student = assemble.student_of(config)
    assert torch.equal(entry_of(student.model).start.weight, first["weight"])

    def never():
        raise AssertionError("fitted again")

    settle_entry(config, collator_without_weights(config), never, never, tmp_path / "checkpoint-1")
    config.entry.images = 32
    assert not torch.equal(load_file(made(config))["weight"], first["weight"])  # fitted again, not resumed


@pytest.mark.parametrize("without", ["schedule.enter=0", "entry.kind=none", "entry.init=identity"])
def test_where_there_is_nothing_to_calibrate_nothing_is_fitted(base, tmp_path, without) -> None:
    config = configured(*OPTIONS, f"model.path={base}", f"output_dir={tmp_path}", without)
    assert not made(config).exists() and assemble.student_of(config).model is not None


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (0, "none of the training set's samples has one; use entry.init=identity"),
        (1, "too few to fit the calibrated entry's map"),
        (10, "10 images are too few to calibrate the entry at layer 1"),
    ],
)
def test_too_few_images_are_refused_before_training(base, tmp_path, images, message) -> None:
    config = configured(*OPTIONS, f"model.path={base}", f"output_dir={tmp_path}")
    rows = [training_data(config.data)[i] for i in range(0, 10 * images, 10)]
    turns = [{"role": role, "content": [{"type": "text", "text": "hm?"}]} for role in ("user", "assistant")]
    rows += [{"id": "t", "messages": turns, "images": []}]
    with pytest.raises(ValueError, match=message) as error:
        made(config, rows)
    assert "\n" not in str(error.value) and "entry.init=identity" in str(error.value)


def test_a_profile_keeps_no_entry_that_holds_on_no_other_image(base) -> None:
    """By the rule of a run. The images are all in one batch of the size that the profile computes in."""
    config = configured(*OPTIONS, f"model.path={base}")
    rows = training_data(config.data)
    collator = collator_without_weights(config)
    collator.isolate = None
    with attach(assemble.base_of(config)[0], VisionSchedule()) as attachment:

        def calibrate(images: int) -> Calibration:
            samples = distinct_images(rows, images, lambda row: True)
            return profile_run.calibrate(attachment, collator, samples, 1, batch_size=64)

        with pytest.raises(TooFew, match="10 images are too few to calibrate the entry at layer 1: "):
            calibrate(10)
        assert calibrate(60).unseen is not None


def test_maps_to_later_layers_that_explain_nothing_are_refused(base, tmp_path, monkeypatch) -> None:
    """Of images that they were not fitted to; the map to the first layer needs fewer images."""
    words = ("recipe=cross_only", "entry.later=true", "model.cross=[1,2,3]", *OPTIONS[:2])
    config = configured(*words, f"model.path={base}", f"output_dir={tmp_path}")

    def poor(*args, **options):
        return replace(fit_entry(*args, **options), later=(0.2, -0.1))

    monkeypatch.setattr(prepare, "fit_entry", poor)
    with pytest.raises(
        ValueError, match=r"the maps to the layers that read later: .* those to layers 3 are no"
    ) as error:
        made(config)
    assert "\n" not in str(error.value) and "entry.later=false" in str(error.value)


def test_a_process_that_does_not_see_the_entry_says_so(base, tmp_path) -> None:
    config = configured(*OPTIONS, f"model.path={base}", f"output_dir={tmp_path}")
    with pytest.raises(FileNotFoundError, match="output_dir=FOLDER that all machines share"):
        assemble.student_of(config)
