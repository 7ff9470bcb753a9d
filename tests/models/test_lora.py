"""What trains: LoRA and its variants on the layers wanted, alignment, everything; and what is saved of each."""

import pytest
import torch
from helpers.families import FAMILIES, build, shared
from helpers.tiny_base import (
    BAND,
    SMALL,
    configured,
    save_tiny_base,
    shake,
    student_inputs,
    student_logits,
    tiny_base,
    tiny_student,
)
from transformers.quantizers.quantizers_utils import should_convert_module

from latefusion.data import sources
from latefusion.models.attach import attach
from latefusion.models.base_model import unquantised
from latefusion.models.flops import decoder_flops
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.entry import CalibratedEntry, entry_of
from latefusion.models.student.restore import load
from latefusion.models.student.save import load_student, merge, save_student
from latefusion.recipes.schema import Layers, LoraConfig
from latefusion.training import assemble
from latefusion.training.prepare import entry_start, settle_entry
from latefusion.training.step_cost import (
    activation_bytes,
    backward_ends,
    logit_bytes,
    training_flops,
    weight_bytes,
)


@pytest.fixture(scope="module")
def samples():
    rows = sources.scenes("validation", n_scenes=1)
    return [rows[i] for i in range(3)]


def student_on(base, *overrides):
    options = (f"model.path={base}", "model.attention=sdpa", "entry.init=identity")
    return assemble.student_of(configured(*BAND, *SMALL, *options, *overrides))


def trainable(student) -> set[str]:
    return {name for name, p in student.model.named_parameters() if p.requires_grad}


VARIANTS = [
    ("lora.variant=lora", "lora.train_projector=true"),
    ("lora.variant=rslora",),
    ("lora.variant=dora", "lora.targets=[q_proj,down_proj]"),
    ("lora.layers=busy", "entry.kind=scale"),
    ("tune=align",),
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: options[0])
def test_save_load_merge_load_keeps_the_logits(tmp_path, base, samples, options):
    student = student_on(base, *options)
    shake(student, 0.1)
    inputs = student_inputs(student, samples)
    expected = student_logits(student.model, inputs)
    save_student(student, tmp_path / "adapter")
    loaded, _ = load(tmp_path / "adapter", dtype=torch.float32, merge=False)
    assert torch.equal(student_logits(loaded, inputs), expected)
    done = merge(tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    assert 0 < done.changed < done.total
    merged, _ = load(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(student_logits(merged, inputs), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(student_logits(student_on(base, *options).model, inputs), expected, rtol=1e-2)


def test_what_each_variant_trains():
    names = trainable(tiny_student("lora.layers=busy")[1])
    layers = {int(name.split(".layers.")[1].split(".")[0]) for name in names if "lora_" in name}
    assert layers == {2, 3, 4} and any("vision_entry" in name for name in names)
    assert any("lora_magnitude_vector" in name for name in trainable(tiny_student("lora.variant=dora")[1]))
    scaled = [tiny_student(f"lora.variant={v}", "lora.r=4")[1] for v in ("lora", "rslora")]
    factors = [
        next(m.scaling["default"] for m in s.model.modules() if hasattr(m, "lora_A") and m.lora_A)
        for s in scaled
    ]
    assert factors == [8.0, 16.0]
    aligned = trainable(tiny_student("tune=align")[1])
    assert aligned and all("vision_entry" in name or "multi_modal_projector" in name for name in aligned)
    for kind, expected in (
        ("none", set()),
        ("scale", {"scale"}),
        ("low_rank", {"scale", "down.weight", "up.weight"}),
    ):
        entry = entry_of(tiny_student(f"entry.kind={kind}")[1].model)
        trained = (
            set() if entry is None else {n for n, _ in entry.modules_to_save["default"].named_parameters()}
        )
        assert trained == expected


@pytest.mark.parametrize(
    ("options", "ends"),
    [
        (("lora.layers=busy",), 2),
        (("lora.layers=busy", "schedule.enter=0"), 0),
        (("lora.layers=busy", "lora.train_projector=true"), 0),
        (("lora.layers=all",), 0),
    ],
)
def test_the_backward_pass_ends_where_nothing_below_trains(samples, options, ends):
    _, student = tiny_student(*options)
    assert backward_ends(student.model) == ends
    learns = []
    layers = student.model.get_base_model().get_decoder().layers
    hooks = [
        layer.register_forward_hook(lambda module, args, output: learns.append(output.requires_grad))
        for layer in layers
    ]
    batch = assemble.collator_of(student)(samples)
    with student.attachment.queries(batch["queries"]):
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "queries")}
        student.model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    assert learns == [False] * ends + [True] * (6 - ends)
    config, schedule = student.model.config, student.schedule
    dense, spared = (training_flops(config, schedule, 10, 4, first=first) for first in (0, ends))
    assert dense - spared == decoder_flops(config, [10] * ends)


def test_lora_goes_to_the_busy_layers_by_default():
    assert LoraConfig().layers is Layers.busy
    assert configured("model=llava_1_5_7b").lora.layers is Layers.busy
    assert configured("model=embedded").lora.layers is Layers.all
    schedule = VisionSchedule(enter=8, exit=24, keep={10: 215, 14: 10, 16: 5, 18: 1})
    config = configured("model=llava_1_5_7b")
    assert assemble.adapted_layers(config, schedule, 32) == list(range(8, 24))
    assert assemble.adapted_layers(config, VisionSchedule(), 32) == list(range(32))  # recipe=dense


def test_nothing_to_align_is_a_sentence():
    with pytest.raises(
        ValueError, match=r"tune=align trains projector and entry adapter, but .*model\.projector=NAME"
    ):
        tiny_student("tune=align", "model.projector=null", "schedule.enter=0")


def test_a_second_stage_starts_from_the_first_and_its_teacher_does_not(tmp_path, samples):
    first = tiny_student("tune=align")[1]
    shake(first, 0.1)
    save_student(first, tmp_path / "align")
    inputs = student_inputs(first, samples)
    options = ("lora.train_projector=true", f"init={tmp_path / 'align'}")
    second = tiny_student(*options)[1]
    assert torch.equal(student_logits(second.model, inputs), student_logits(first.model, inputs))
    plain, _ = tiny_base()
    with torch.no_grad(), second.model.disable_adapter(), second.attachment.using(VisionSchedule()):
        assert torch.equal(second.model(**inputs).logits, plain(**inputs).logits)
    with pytest.raises(
        ValueError, match=r"trained multi_modal_projector, which this one does not; set lora\.train_pr"
    ):
        tiny_student(f"init={tmp_path / 'align'}")
    with pytest.raises(ValueError, match=r"trained vision_entry, which this one does not; set entry\.kind"):
        tiny_student(*options, "entry.kind=none")
    with pytest.raises(
        ValueError, match=r"vision_entry\.\S+ of shape \(.*; set lora\.r and entry\.rank as there"
    ):
        tiny_student(*options, "entry.rank=2")
    with pytest.raises(FileNotFoundError, match="no student at nowhere: it has no adapter_config"):
        tiny_student("lora.train_projector=true", "init=nowhere")


def test_a_student_may_start_from_one_that_trained_less(tmp_path, samples):
    """What the earlier one did not train (projector, LoRA, entry adapter) starts as in any new student."""
    first = tiny_student("entry.kind=none")[1]
    shake(first, 0.1)
    save_student(first, tmp_path / "first")
    inputs = student_inputs(first, samples)
    second = tiny_student("lora.train_projector=true", f"init={tmp_path / 'first'}")[1]
    assert entry_of(second.model) is not None
    assert torch.equal(student_logits(second.model, inputs), student_logits(first.model, inputs))
    with pytest.raises(
        ValueError, match=r"lora_A\S+, which this one does not have; set lora\.layers, lora\.targets"
    ):
        tiny_student(f"init={tmp_path / 'first'}", "lora.targets=[q_proj]")


def test_a_calibrated_entry_comes_from_the_student_to_start_from(tmp_path, base, samples):
    """It is not fitted a second time, whatever the new run's `entry.init` says; its sizes are the earlier one's."""
    calibrated = CalibratedEntry(hidden_size=32, places=4)
    calibrated.weight.normal_(generator=torch.Generator().manual_seed(2))
    folder, output = tmp_path / "first", f"output_dir={tmp_path / 'out'}"
    first = assemble.student_from(configured(*BAND, *SMALL), *tiny_base(), calibrated)
    shake(first, 0.1)
    save_student(first, folder)

    def never():
        raise AssertionError("fitted again")

    for init in ("calibrated", "identity"):
        config = configured(
            *BAND, *SMALL, f"entry.init={init}", f"init={folder}", f"model.path={base}", output
        )
        settle_entry(config, assemble.collator_of(first), never, never)
        second = assemble.student_from(config, *tiny_base(), entry_start(config))
        inputs = student_inputs(first, samples)
        assert torch.equal(student_logits(second.model, inputs), student_logits(first.model, inputs))


def test_an_entry_that_was_made_for_another_layer_is_said(tmp_path, base, capsys):
    folder, output = tmp_path / "first", f"output_dir={tmp_path / 'out'}"
    calibrated = CalibratedEntry(hidden_size=32, places=4)
    first = assemble.student_from(configured(*BAND, *SMALL), *tiny_base(), calibrated)
    save_student(first, folder)
    more = ("entry.init=calibrated", f"init={folder}", f"model.path={base}", output)
    moved = "It was made for layer 2, and enters at layer 3 here."
    cross = ("schedule.enter=0", "schedule.exit=null", "schedule.keep=null", "schedule.cross=[2,4]")
    later = "It has no maps to the layers that read later"
    for words, says, lacks in (
        ((), False, False),
        (("schedule.enter=3",), True, False),
        ((*cross, "entry.later=true"), False, True),
        ((*cross, "entry.later=false"), False, False),
    ):
        settle_entry(configured(*BAND, *SMALL, *words, *more), assemble.collator_of(first), None, None)
        printed = capsys.readouterr().out
        assert "nothing is calibrated." in printed and (moved in printed) == says
        assert (later in printed) == lacks


def test_all_weights_train_and_are_saved_as_a_plain_checkpoint(tmp_path, base, samples):
    student = student_on(base, "tune=full", "teacher=none")
    names = trainable(student)
    assert not any("vision_tower" in name for name in names)
    for part in ("embed_tokens", "layers.0.", "multi_modal_projector", "vision_entry"):
        assert any(part in name for name in names), part
    shake(student, 0.2)
    inputs = student_inputs(student, samples)
    save_student(student, tmp_path)
    loaded, _ = load(tmp_path, dtype=torch.float32)
    assert torch.equal(student_logits(loaded, inputs), student_logits(student.model, inputs))
    assert entry_of(loaded) is not None
    config = configured(*BAND, *SMALL, "tune=full", "teacher=none")
    batch = assemble.collator_of(student)(samples)
    student.model.zero_grad()
    assemble.objective_of(config, student)(student.model, batch, count=3)[0].backward()
    missing = {n for n, p in student.model.named_parameters() if p.requires_grad and p.grad is None}
    assert missing == set()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["tune=full"], "tune=full changes the base, which is the teacher=visipruner; use teacher=none"),
        (
            ["tune=full", "teacher=none", "init=x"],
            "init=x needs adapters to put its weights in, and tune=full",
        ),
        (["model.load_in_4bit=true", "engine=deepspeed_zero3"], "does not go with ZeRO-3"),
        (["train.narrow=1.5"], r"train.narrow=1.5 must lie in"),
    ],
)
def test_what_contradicts_itself_is_refused(overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        configured(*overrides)


def test_merging_what_never_trained_is_an_error(tmp_path, base):
    student = student_on(base)
    save_student(student, tmp_path / "fresh")
    with pytest.raises(
        ValueError, match="changed no weight of its base: its adapters never trained, or their changes"
    ):
        merge(tmp_path / "fresh", tmp_path / "merged", dtype=torch.float32)
    shake(student, 1e-5)  # too little for bfloat16's 8 bits
    save_student(student, tmp_path / "faint")
    with pytest.raises(ValueError, match="too small for bfloat16; merge in float32"):
        merge(tmp_path / "faint", tmp_path / "merged", dtype=torch.bfloat16)
    assert merge(tmp_path / "faint", tmp_path / "merged", dtype=torch.float32).changed > 0


def test_merging_over_a_model_or_a_file_is_an_error_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("latefusion.models.student.save.load_student", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match="adapter holds a model already; choose another folder to merge into"
    ):
        merge(tmp_path / "adapter", tmp_path / "adapter")
    with pytest.raises(ValueError, match="file is a file; choose another folder to merge into"):
        merge(tmp_path / "adapter", tmp_path / "file")


def test_the_band_narrows_from_all_layers_to_the_schedule():
    target = VisionSchedule(enter=4, exit=8, keep={6: 3})
    steps = [target.widened(p, 12).vision_tokens(12, 10) for p in (0, 0.25, 0.5, 0.75, 1, 1.5)]
    assert steps[0] == [10] * 12 and steps[4] == steps[5] == target.vision_tokens(12, 10)
    assert steps[2] == [0] * 2 + [10] * 4 + [6] * 4 + [0] * 2
    totals = [sum(tokens) for tokens in steps]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == 5
    for p in range(100):
        target.widened(p / 100, 12).validate(12)
    config, student = tiny_student("train.narrow=0.5")
    objective = assemble.objective_of(config, student)
    seen = []
    for moment in (0.0, 0.25, 0.5, 0.9):
        objective.at(round(100 * moment), 100)
        seen.append(student.attachment.policy.vision_tokens(6, 4))
    assert seen == [[4] * 6, [0, 4, 4, 4, 4, 4], [0, 0, 4, 4, 2, 0], [0, 0, 4, 4, 2, 0]]
    config, student = tiny_student()
    assemble.objective_of(config, student).at(0, 100)
    assert student.attachment.policy is student.schedule


# ---------------------------------------------------------------------------- estimates


@pytest.mark.parametrize("cross", [None, (1, 2, 4)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_of_activations_is_near_what_autograd_keeps(checkpointing, cross):
    """Within a factor of 1.7, on a Llama-like decoder in float32, where embeddings and vision do not count."""
    model = build("llava").train()
    model.requires_grad_(True)
    ids = torch.randint(3, 90, (1, 200))
    if checkpointing:
        model.gradient_checkpointing_enable()
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    schedule, vision = VisionSchedule(cross=cross), (torch.arange(200) // 150 == 0)[None]
    with (
        attach(model, schedule, vision_mask=vision),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        output = model.model(input_ids=ids, use_cache=False).last_hidden_state
    kept_bytes = sum(size for pointer, size in kept.items() if pointer not in weights)
    tokens = [50 + n for n in schedule.vision_tokens(6, 150)]
    frozen = schedule.vision_tokens(6, 150) if cross else [0] * 6
    estimate = activation_bytes(
        model.config, tokens, frozen, dtype=torch.float32, checkpointing=checkpointing, eager=False
    )
    if checkpointing:
        estimate -= activation_bytes(
            model.config, tokens[:1], frozen[:1], dtype=torch.float32, checkpointing=False, eager=False
        )
    assert 1 / 1.7 < kept_bytes / estimate < 1.7, (kept_bytes, estimate)
    assert output.requires_grad


def test_the_other_estimates_are_counts():
    _, student = tiny_student()
    learning = sum(p.numel() for p in student.model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in student.model.parameters())
    assert weight_bytes(student.model) == 4 * everything + 12 * learning
    vocabulary = student.model.config.get_text_config().vocab_size
    assert logit_bytes(student.model.config, 5, teacher=False) == 3 * 4 * 5 * vocabulary


@pytest.mark.parametrize("family", FAMILIES)
def test_four_bits_are_for_the_decoders_layers_alone(family):
    """By the function with which transformers picks the layers that bitsandbytes replaces."""
    model = shared(family)
    kept = unquantised(model)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    replaced = {name for name in linear if should_convert_module(name, kept)}
    inside = {id(module) for module in model.get_decoder().layers.modules()}
    assert replaced == {name for name, m in model.named_modules() if id(m) in inside and name in linear}
    assert any("vision" in name or "visual" in name for name in linear - replaced)


@pytest.mark.gpu
def test_a_decoder_in_four_bits_trains_and_merges(tmp_path, samples):
    """`pip install bitsandbytes`, then `pytest -m gpu tests/models/test_lora.py`."""
    base = save_tiny_base(tmp_path / "base")
    student = student_on(base, "model.load_in_4bit=true", "teacher=dense")
    model = student.model.get_base_model()
    kinds = {type(m.base_layer).__name__ for m in model.get_decoder().modules() if hasattr(m, "base_layer")}
    assert kinds == {"Linear4bit"} and type(model.lm_head).__name__ == "Linear"
    if torch.cuda.is_available():
        student.model.cuda()
    device = next(student.model.parameters()).device
    batch = {name: value.to(device) for name, value in assemble.collator_of(student)(samples).items()}
    config = configured(*BAND, *SMALL, "teacher=dense")
    assemble.objective_of(config, student)(student.model, batch, count=3)[0].backward()
    assert all(p.grad is not None for p in student.model.parameters() if p.requires_grad)
    shake(student, 0.1)
    save_student(student, tmp_path / "adapter")
    assert merge(tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32).changed > 0
    assert load_student(tmp_path / "adapter", dtype=torch.float32).schedule.exit == 5
