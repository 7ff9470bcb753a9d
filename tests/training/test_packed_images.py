"""Packed rows with images: each sample's loss and gradient are those of a row of its own, under every policy."""

import pytest
import torch
from helpers.families import FAMILIES, HYBRID_FAMILIES, build, prompt
from helpers.models_with_processors import model_and_processor
from helpers.tiny_base import shake
from transformers import DynamicCache

from latefusion.data.collate import IGNORE
from latefusion.data.packing import Packed, in_order, isolates_images
from latefusion.models.attach import attach
from latefusion.models.executor.packed import Samples
from latefusion.models.policies.visipruner.settings import VisiPruner
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.build import Lora, build_student
from latefusion.models.student.entry import CalibratedEntry
from latefusion.training.objective import Distillation, Objective

ROWS = ["tt I tttt", "ttttt", "t I t I ttt", "I tttttt", "tt I ttttt"]  # one, none, two, at the start, one


def batch_of(family: str, rows: list[str]) -> dict:
    """A right-padded batch whose last two text tokens are learnt."""
    inputs = prompt(family, rows, side="right")
    last = inputs["attention_mask"].sum(1) - 1
    labels = torch.full_like(inputs["input_ids"], IGNORE)
    for row, at in enumerate(last.tolist()):
        labels[row, at - 1 : at + 1] = inputs["input_ids"][row, at - 1 : at + 1]
    return {**inputs, "labels": labels, "queries": (last - 2)[:, None]}


def alone(family: str, rows: list[str], at: int) -> dict:
    """Sample `at` of `batch_of`, in a batch of its own."""
    batch = batch_of(family, rows)
    length = int(batch["attention_mask"][at].sum())
    images = [row.count("I") for row in rows]
    first, count = sum(images[:at]), images[at]
    out = {
        name: value[at : at + 1, :length]
        for name, value in batch.items()
        if isinstance(value, torch.Tensor) and value.shape == batch["input_ids"].shape
    }
    out["queries"] = batch["queries"][at : at + 1]
    if count:
        features = batch["mm_encoder_outputs"]["image"]
        features.pooler_output = features.pooler_output[first : first + count]
        if family == "qwen3_vl":
            deep = [torch.stack(list(level)) for level in features.deepstack_features]
            features.deepstack_features = [list(level[first : first + count]) for level in deep]
        out["mm_encoder_outputs"] = {"image": features}
        if "image_grid_thw" in batch:
            out["image_grid_thw"] = batch["image_grid_thw"][first : first + count]
    return out


def objective_on(family: str, schedule, teacher, attention: str = "sdpa") -> tuple[Objective, list]:
    model = build(family, attention)
    width = model.config.get_text_config().hidden_size
    entry = CalibratedEntry(hidden_size=width, places=3, later=(schedule.cross or ())[1:])
    for fitted in (entry, *entry.later.values()):
        fitted.bias.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
        fitted.weight.mul_(1.1)
    options = {"lora": Lora(rank=2, alpha=2), "entry_rank": 2, "calibrated": entry}
    student = build_student(model, None, base=family, schedule=schedule, **options)
    shake(student, 0.2)
    objective = Objective(
        model=student.model,
        attachment=student.attachment,
        kl=Distillation(policy=teacher, temperature=1.5),
        share_images=True,
    )
    return objective, [p for p in student.model.parameters() if p.requires_grad]


def learnt(objective: Objective, weights: list, batch: dict) -> tuple[dict, list[torch.Tensor]]:
    loss, terms = objective(objective.model, batch, count=10)
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    zeros = [torch.zeros_like(w) if g is None else g for g, w in zip(gradients, weights, strict=True)]
    return {"loss": loss.item(), **{name: value.item() for name, value in terms.items()}}, zeros


def assert_packed_is_alone(family: str, schedule, teacher, attention: str = "sdpa", rows=ROWS) -> None:
    objective, weights = objective_on(family, schedule, teacher, attention)
    packed = Packed.of(objective.attachment.model, lambda samples: batch_of(family, rows))([])
    assert packed["input_ids"].shape[0] < len(rows) and (packed["samples"].amax() == len(rows) - 1)
    together, gradients = learnt(objective, weights, packed)
    by_sample = objective.attachment.sizes
    total: dict[str, float] = {}
    sums = [torch.zeros_like(w) for w in weights]
    for at in range(len(rows)):
        terms, each = learnt(objective, weights, alone(family, rows, at))
        assert objective.attachment.sizes[0] == by_sample[at]  # what each layer computed of it
        total = {name: total.get(name, 0) + value for name, value in terms.items()}
        sums = [a + b for a, b in zip(sums, each, strict=True)]
    assert together == pytest.approx(total, rel=1e-4, abs=1e-6)
    assert sum(bool(g.any()) for g in sums) > 10
    for packed_gradient, own in zip(gradients, sums, strict=True):
        torch.testing.assert_close(packed_gradient, own, rtol=2e-3, atol=2e-6)


BAND = VisionSchedule(enter=2, exit=5)
POLICIES = {
    "dense": VisionSchedule(),
    "band": BAND,
    "keep": VisionSchedule(enter=2, exit=5, keep={4: 2}),
    "two keeps": VisionSchedule(enter=1, keep={3: 3, 4: 1}),
    "reading": VisionSchedule(keep={3: 2}, ranking="reading"),
    "hidrop": VisionSchedule(enter=1, exit=5, keep={3: 2}, ranking="hidrop"),
    "cross": VisionSchedule(cross=[1, 3, 4]),
    "cross and keep": VisionSchedule(cross=[1, 3, 4], keep={4: 2}),
    "silent prefix": VisionSchedule(cross=[1, 3], freeze_prefix=True),
    "blind": VisionSchedule(cross=[]),
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_packed_sample_learns_what_it_learns_alone(name):
    assert_packed_is_alone("llava", POLICIES[name], None)


@pytest.mark.parametrize("teacher", [VisiPruner(boundary=1), VisiPruner(boundary=2, sink_rule="half")])
def test_visipruner_teaches_each_sample_by_its_own_question(teacher):
    assert_packed_is_alone("llava", POLICIES["keep"], teacher)


@pytest.mark.parametrize("name", ["keep", "cross and keep"])
def test_under_eager_attention(name):
    assert_packed_is_alone("llava", POLICIES[name], VisiPruner(boundary=1), "eager")


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f not in ("llava", "gemma3", "paligemma", *HYBRID_FAMILIES)]
)
def test_every_family(family):
    assert_packed_is_alone(family, POLICIES["keep"], VisiPruner(boundary=1))


def test_one_sample_left_over_in_a_row_of_its_own():
    rows = ["tt I tttt", "tt I ttttttttttttt", "t I tt"]
    assert in_order([10, 19, 7], 20) == [[0], [1], [2]]
    assert_packed_is_alone("llava", POLICIES["keep"], None, rows=[*rows, *rows])


def test_ranking_of_a_packed_sample_does_not_depend_on_its_neighbours():
    """A keep that mixed the samples of a row would give most of its tokens to one of them."""
    objective, _ = objective_on("llava", POLICIES["two keeps"], None)
    batch = Packed.of(objective.attachment.model, lambda samples: batch_of("llava", ROWS))([])
    objective(objective.model, batch, count=1)
    assert [record.vision[-1] for record in objective.attachment.trace] == [1, 0, 1, 1, 1]


def test_rows_that_a_model_mixes_stay_as_they_are():
    """Beside an image, tokens of another sample in a Gemma 3 row would see those after them."""
    for family, apart in (("llava", True), ("qwen2_5_vl", True), ("gemma3", False)):
        assert isolates_images(*model_and_processor(family)) is apart
    batch = batch_of("gemma3", ROWS)
    assert Packed.of(build("gemma3"), lambda samples: batch, pictures=False)([]) is batch


def test_samples_that_cannot_be_told_apart_are_refused():
    with pytest.raises(ValueError, match="side by side"):
        Samples(torch.tensor([[0, 1, 0]]))
    model = build("llava")
    batch = Packed.of(model, lambda samples: batch_of("llava", ROWS))([])
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "mm_encoder_outputs")}
    cache = DynamicCache(config=model.config)
    first = {**inputs, "input_ids": inputs["input_ids"][:, :0]}
    with attach(model, POLICIES["keep"]) as attachment, torch.no_grad():
        with attachment.queries(batch["queries"], samples=batch["samples"]):
            model(**{**inputs, "mm_encoder_outputs": dict(inputs["mm_encoder_outputs"])})
        model(input_ids=first["input_ids"].new_ones(len(batch["input_ids"]), 2), past_key_values=cache)
        with (
            attachment.queries(batch["queries"], samples=batch["samples"]),
            pytest.raises(ValueError, match="in one forward"),
        ):
            model(**inputs, past_key_values=cache)


def test_a_sample_without_a_query_of_its_own_does_not_ask_with_its_answer():
    """-1 fills a row of queries with fewer; it is no query, least of all the last token."""
    model = build("llava")
    inputs = prompt("llava", ["tt I tttttt"])
    kept = []
    for queries in ([[8]], [[8, -1]], [[-1, 8]]):
        with (
            attach(model, POLICIES["keep"]) as attachment,
            attachment.queries(torch.tensor(queries)),
            torch.no_grad(),
        ):
            model(**{**inputs, "mm_encoder_outputs": dict(inputs["mm_encoder_outputs"])})
            kept.append((attachment.last.prompt.queries.unique().tolist(), attachment.trace[0].kept))
    assert kept[0] == kept[1] == kept[2] and kept[0][0] == [8]
