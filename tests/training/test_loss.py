"""The loss in parts is the plain one over all logits: value, terms and gradients, whatever comes after the head."""

import copy

import pytest
import torch
from helpers.families import build, prompt
from helpers.tiny_base import configured, shake, tiny_base, tiny_student
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlavaForConditionalGeneration

from latefusion.data import sources
from latefusion.models.attach import attach
from latefusion.models.schedule import VisionSchedule
from latefusion.training import assemble, loss, readout
from latefusion.training.loss import Teaching, Terms, answer_loss
from latefusion.training.objective import IGNORE, Distillation, Objective
from latefusion.training.readout import Readout


def plain(logits, labels, weight, *, taught=None, kept=None, temperature=1.0, vocabulary=None):
    """Loss, ce, kl and right first choices by the definitions, token by token, from all logits in float64."""
    ce = kl = 0.0
    right = 0
    for n, label in enumerate(labels.tolist()):
        ce = ce - torch.log(torch.exp(logits[n]) / torch.exp(logits[n]).sum())[label]
        if taught is None and kept is None:
            continue
        scaled = torch.exp(logits[n][:vocabulary] / temperature)
        q = scaled / scaled.sum()
        if taught is not None:
            scaled = torch.exp(taught[n][:vocabulary] / temperature)
            p = scaled / scaled.sum()
            right += int(p.argmax()) == label
            divergence = (p * (p / q).log()).sum()
        else:
            tokens, p = kept[0][n], kept[1][n].exp()
            right += int(tokens[0]) == label
            divergence = (p * (p / q[tokens]).log()).sum()
            others = [i for i in range(len(q)) if i not in tokens.tolist()]
            if others:
                divergence = divergence + (1 - p.sum()) * ((1 - p.sum()) / q[others].sum()).log()
        kl = kl + temperature**2 * divergence
    return ce + weight * kl, ce, kl, right


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 9),
    vocabulary=st.integers(5, 12),
    fewer=st.integers(0, 2),
    at_once=st.integers(1, 120),
    teacher=st.sampled_from(["none", "online", "cached"]),
    temperature=st.sampled_from([0.7, 1.0, 2.0]),
    weight=st.sampled_from([0.3, 4.0]),
    cap=st.sampled_from([None, 1.5]),
    trains=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_in_parts_as_at_once(n, vocabulary, fewer, at_once, teacher, temperature, weight, cap, trains, seed):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, head, bias = (x.requires_grad_() for x in (random(n, 3), random(vocabulary, 3), random(vocabulary)))
    shared = vocabulary - fewer
    labels = torch.randint(0, shared, (n,), generator=generator)
    taught_rows, base = random(n, 2), random(vocabulary, 2)
    tokens = torch.stack([torch.randperm(shared, generator=generator)[:3] for _ in range(n)]) if n else None
    logprobs = (random(n, 4).softmax(-1)[:, :3] * 0.9).log()
    says = {
        "none": None,
        "online": {"rows": taught_rows, "read": lambda chunk: chunk @ base.T},
        "cached": {"tokens": tokens if n else torch.zeros(0, 3, dtype=torch.long), "logprobs": logprobs},
    }[teacher]

    def read(chunk):
        product = chunk @ head.T + bias
        return product if cap is None else cap * torch.tanh(product / cap)

    how = {"temperature": temperature, "vocabulary": shared}
    teaching = None if says is None else Teaching(**says, **how)
    sums, trained = Terms(rows.device), (head, bias) if trains else ()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "LOGITS", at_once)
        value = answer_loss(
            rows, labels, read, teaching, sums, weight=weight, width=vocabulary, trained=trained
        )
    gradients = torch.autograd.grad(3 * value, [rows, *trained])

    parts = {"taught": taught_rows @ base.T} if teacher == "online" else {}
    parts |= {"kept": (tokens, logprobs)} if teacher == "cached" else {}
    expected, ce, kl, right = plain(read(rows), labels, weight, **parts, **how)
    values = [float(torch.as_tensor(x).detach()) for x in (expected, ce, kl)]
    assert [value.item(), sums.ce.item(), sums.kl.item()] == pytest.approx(values, rel=1e-9, abs=1e-12)
    assert sums.right.item() == right
    assert all(g.shape == x.shape for g, x in zip(gradients, [rows, *trained], strict=True))
    if n:
        for got, want in zip(gradients, torch.autograd.grad(3 * expected, [rows, *trained]), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_no_more_logits_at_once_than_the_limit(monkeypatch):
    monkeypatch.setattr(loss, "LOGITS", 50)
    sizes = []
    head = torch.randn(7, 3)

    def read(chunk):
        sizes.append(chunk.shape[0] * 7)
        return chunk @ head.T

    rows, labels = torch.randn(23, 3, requires_grad=True), torch.zeros(23, dtype=torch.long)
    answer_loss(rows, labels, read, None, Terms(rows.device), weight=1.0, width=7).backward()
    assert sum(sizes) == 23 * 7 and max(sizes) <= 50 and len(sizes) == 4


class Capped(LlavaForConditionalGeneration):
    """A family that does something after its output head: scales, caps, and forbids a token."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 3 * torch.tanh(output.logits * 2.5 / 3)
        output.logits[..., 5] = -50.0
        return output


def capped() -> Capped:
    model = build("llava")
    model.__class__ = Capped
    return model


def hidden_and_logits(model, inputs):
    kept = []
    with model.get_output_embeddings().register_forward_pre_hook(lambda m, args: kept.append(args[0])):
        logits = model(**inputs).logits
    return kept[0], logits


def test_what_a_family_does_after_its_head_is_its_own_code():
    model, inputs = capped(), prompt("llava", ["tt I ttt", "tttt"])
    way = Readout(model)
    assert way.splits and way.changes and not Readout(build("llava")).changes
    with torch.no_grad():
        hidden, logits = hidden_and_logits(model, inputs)
        learnt = torch.rand(hidden.shape[:2]) > 0.5
        assert torch.equal(way.finished(way.head(hidden[learnt])), logits[learnt])
        with way.ending_before_head(learnt, lambda rows: rows):
            assert torch.equal(model(**prompt("llava", ["tt I ttt", "tttt"])), hidden[learnt])
        again = model(**prompt("llava", ["tt I ttt", "tttt"])).logits
    assert torch.equal(again, logits)  # nothing is left on the model


def test_a_model_whose_head_is_not_its_own_part_is_read_by_its_logits():
    model = build("llava")
    model.get_output_embeddings = lambda: nn.Linear(32, 120)
    assert not Readout(model).splits
    adapted = get_peft_model(build("llava"), LoraConfig(target_modules=["lm_head"]))
    assert Readout(adapted.get_base_model()).splits
    assert not Readout(adapted.get_base_model(), sharded=True).splits


@pytest.mark.parametrize("kind", ["plain", "capped", "lora", "saved", "tied"])
@pytest.mark.parametrize("teacher", ["dense", "none"])
@pytest.mark.parametrize("splits", [True, False])
def test_objective_of_any_head(kind, teacher, splits, monkeypatch):
    """Against whole logits of two separate models: also where the head trains, has adapters, or is the embedding."""
    monkeypatch.setattr(loss, "LOGITS", 250)  # two rows at a time
    model = capped() if kind == "capped" else build("llava")
    if kind == "tied":
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
        model.lm_head.weight = model.get_input_embeddings().weight
    base = copy.deepcopy(model)
    options = {"target_modules": r".*language_model.*q_proj"}
    if kind == "lora":
        options["target_modules"] += "|lm_head"
    if kind == "saved":
        options["modules_to_save"] = ["lm_head"]
    student = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.0, **options))
    if kind == "tied":
        model.lm_head.weight.requires_grad_(True)
        teacher = "none"  # the base itself changes
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in student.parameters():
            if weight.requires_grad:
                weight.add_(torch.empty(weight.shape).normal_(0, 0.2, generator=generator))
    schedule = VisionSchedule(enter=2, exit=5)
    attachment, other = attach(model, schedule), attach(base, VisionSchedule())

    def inputs():
        return prompt("llava", ["tt I tttt", "ttttt"], side="right")

    labels = inputs()["input_ids"].clone()
    labels[:, :7], labels[1] = IGNORE, torch.where(labels[1] > 0, labels[1], IGNORE)
    labels[1, :2] = IGNORE
    queries = torch.tensor([[6], [1]])
    policy = VisionSchedule() if teacher == "dense" else None
    objective = Objective(
        model=student,
        attachment=attachment,
        kl=Distillation(policy=policy, weight=0.6, temperature=1.3),
        share_images=True,
    )
    objective.readout.splits = splits
    value, terms = objective(student, {**inputs(), "labels": labels, "queries": queries}, count=4)
    trained = [p for p in student.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(value, trained)

    learnt = labels[:, 1:] != IGNORE
    s = student(**inputs()).logits[:, :-1][learnt].double()
    with torch.no_grad():
        t = base(**inputs()).logits[:, :-1][learnt].double()
    expected, ce, _, right = plain(
        s, labels[:, 1:][learnt], 0.6, taught=t if policy else None, temperature=1.3
    )
    assert terms["ce"].item() == pytest.approx(ce.item(), rel=1e-5)
    assert value.item() == pytest.approx(expected.item() / 4, rel=1e-5)
    assert policy is None or terms["teacher_right"].item() == right
    expected_gradients = torch.autograd.grad(expected / 4, trained)
    for got, want in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-6)
    other.detach()


def test_parts_add_up_under_autocast_and_in_accumulated_steps(monkeypatch):
    """In bfloat16 as engines run it; a head that trains gets the sum of all parts, in float32."""
    config, student = tiny_student("teacher=dense", "kl.temperature=1.5")
    shake(student)
    student.attachment.model.lm_head.weight.requires_grad_(True)
    objective = assemble.objective_of(config, student)
    objective.readout.of_base = lambda read: lambda chunk: read(chunk).detach()
    rows = sources.scenes("validation", n_scenes=2)
    collate = assemble.collator_of(student)
    results = []
    for limit in (2**24, 700):
        monkeypatch.setattr(loss, "LOGITS", limit)
        student.model.zero_grad()
        for i in range(0, 6, 3):
            with torch.autocast("cpu", torch.bfloat16):
                value, _ = objective(student.model, collate([rows[j] for j in range(i, i + 3)]), count=9)
            value.backward()
        results.append({n: p.grad.clone() for n, p in student.model.named_parameters() if p.grad is not None})
    whole, parts = results
    assert whole.keys() == parts.keys() and any("embed_tokens" in name for name in whole)  # tied
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=0.03, atol=0.01 * gradient.abs().max().item())


def test_a_process_without_answers_gives_zero_and_a_gradient_everywhere():
    _, student = tiny_student()
    config = configured("teacher=dense")
    batch = assemble.collator_of(student)([sources.scenes("validation", n_scenes=1)[0]])
    batch["labels"] = torch.full_like(batch["labels"], IGNORE)
    value, terms = assemble.objective_of(config, student)(student.model, batch, count=1)
    value.backward()
    assert value.item() == 0 and terms["tokens"] == 0
    assert all(p.grad is not None for p in student.model.parameters() if p.requires_grad)


def test_the_base_stays_as_it_was():
    base, _ = tiny_base()
    before = set(vars(base))
    with readout.Readout(base).ending_before_head(torch.ones(1, 1, dtype=torch.bool), lambda rows: rows):
        pass
    assert set(vars(base)) == before and not base.lm_head._forward_pre_hooks
