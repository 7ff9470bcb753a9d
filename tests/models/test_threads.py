"""Nothing of a forward outlives it or reaches another thread: interrupts anywhere, threads, scopes in threads."""

from __future__ import annotations

import contextvars
import copy
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.families import MIXED, build, close, prompt
from transformers import AttentionInterface

from latefusion import VisionSchedule
from latefusion.models.attach import attach, attached
from latefusion.models.policies.fastv import FastV
from latefusion.models.policies.visipruner.settings import VisiPruner

POLICIES = {
    "band": VisionSchedule(enter=2, exit=4),
    "keeps": VisionSchedule(enter=1, exit=5, keep={2: 3, 4: 2}),
    "cross": VisionSchedule(cross=(1, 3, 4), keep={3: 2}),
    "visipruner": VisiPruner(boundary=3, layer_threshold=0.9999, tokens_threshold=0.2),
    "fastv": FastV(layer=1),
}
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    inputs = {**inputs, "mm_encoder_outputs": dict(inputs.get("mm_encoder_outputs", {}))}
    with torch.no_grad():
        return model(**inputs).logits


# ---------------------------------------------------------------- interrupted forwards


class Interrupt(BaseException):
    """As a KeyboardInterrupt, for which torch does not run hooks that it always runs after an Exception."""


PLACES: dict[str, Callable[[Any], torch.nn.Module]] = {
    "the projector": lambda model: model.get_decoder(),  # before its first layer
    "rope": lambda model: model.get_decoder().rotary_emb,
    "layer 1": lambda model: model.get_decoder().layers[1].mlp,
    "attention of layer 3": lambda model: model.get_decoder().layers[3].self_attn.k_proj,
    "output of layer 3": lambda model: model.get_decoder().layers[3].self_attn.o_proj,
    "the norm": lambda model: model.get_decoder().norm,
}


def interrupted(model: Any, inputs: dict[str, Any], place: torch.nn.Module) -> None:
    def stop(*args: Any) -> None:
        raise Interrupt

    handle = place.register_forward_pre_hook(stop)
    with pytest.raises(Interrupt):
        logits(model, inputs)
    handle.remove()


@every_policy
@pytest.mark.parametrize("place", PLACES.values(), ids=list(PLACES))
def test_an_interrupted_forward_leaves_nothing_behind(policy: Any, place: Any) -> None:
    model = build("llava")
    first, same_shape, text = (
        prompt("llava", rows) for rows in (["ttt I ttttt"], ["t I ttttttt"], ["tttttttttttt"])
    )
    stock = [logits(model, inputs) for inputs in (same_shape, text)]
    attachment = attach(model, policy)
    pruned = [logits(model, inputs) for inputs in (same_shape, text)]
    table = dict(AttentionInterface._global_mapping)
    decoder, rows = model.get_decoder(), torch.randn(1, 12, 32)
    with attachment.using(VisionSchedule()), torch.no_grad():
        alone = decoder(inputs_embeds=rows).last_hidden_state

    interrupted(model, first, place(model))
    with torch.no_grad():
        assert torch.equal(decoder(inputs_embeds=rows).last_hidden_state, alone)  # no image comes with it
    interrupted(model, first, place(model))
    assert torch.equal(decoder.layers[3].mlp(rows), decoder.layers[3].mlp.forward(rows))
    assert torch.equal(logits(copy.deepcopy(model), same_shape), pruned[0])
    for inputs, expected in zip((same_shape, text), pruned, strict=True):
        assert torch.equal(logits(model, inputs), expected)
        interrupted(model, first, place(model))
    attachment.detach()
    assert attached(model) is None and table == AttentionInterface._global_mapping
    for inputs, expected in zip((same_shape, text), stock, strict=True):
        assert torch.equal(logits(model, inputs), expected)


def test_an_interrupted_generation_ranks_the_next_prompt_as_ever() -> None:
    model, inputs = build("llava"), prompt("llava", MIXED)

    def stop(*args: Any) -> None:
        raise Interrupt

    with attach(model, POLICIES["keeps"]):
        expected = logits(model, inputs)
        handle = model.get_decoder().norm.register_forward_pre_hook(stop)
        with pytest.raises(Interrupt):
            model.generate(**prompt("llava", ["tIt"]), max_new_tokens=2)
        handle.remove()
        assert torch.equal(logits(model, inputs), expected)


# ---------------------------------------------------------------- threads


@pytest.fixture
def impatient() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-5)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(before)
    torch.set_num_threads(threads)


ROUNDS = 12


def together(*works: Callable[[], torch.Tensor]) -> None:
    """Each work in a thread of its own gives what it gives alone, every time."""
    expected = [work() for work in works]
    wrong: list[Any] = []

    def repeat(work: Callable[[], torch.Tensor], right: torch.Tensor) -> None:
        for _ in range(ROUNDS):
            try:
                result = work()
                if result.shape != right.shape or not close(result, right):
                    wrong.append("another result")
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=repeat, args=pair) for pair in zip(works, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(close(work(), right) for work, right in zip(works, expected, strict=True))


ROWS = (["tt I ttt", "t I tttt"], ["tttt I tttttt"], ["ttttt"])


@every_policy
def test_one_model_in_several_threads(policy: Any, impatient: None) -> None:
    model = build("llava")
    with attach(model, policy):
        together(*(lambda rows=rows: logits(model, prompt("llava", rows)) for rows in ROWS))  # type: ignore[misc]


@every_policy
def test_two_models_a_thread_each_and_one_without_a_policy(policy: Any, impatient: None) -> None:
    models = [build("llava"), build("llava_qwen2", "eager"), build("llava_mistral")]
    with attach(models[0], policy), attach(models[1], POLICIES["keeps"]):
        together(
            *(
                lambda model=model, rows=rows: logits(model, prompt("llava", rows))  # type: ignore[misc]
                for model, rows in zip(models, ROWS, strict=True)
            )
        )


def test_generation_in_threads(impatient: None) -> None:
    model = build("llava")

    def write(rows: list[str]) -> torch.Tensor:
        with torch.no_grad():
            return model.generate(**prompt("llava", rows), max_new_tokens=4, do_sample=False)

    with attach(model, POLICIES["visipruner"]):
        together(*(lambda rows=rows: write(rows) for rows in ROWS[:2]))  # type: ignore[misc]


def test_a_policy_comes_and_goes_while_threads_are_answered(impatient: None) -> None:
    """`detach` waits for the forwards and generations of others: each answer is one with the policy or one without."""
    model, inputs, one = build("llava"), prompt("llava", MIXED), prompt("llava", ["ttt I ttttt"])

    def generated() -> torch.Tensor:
        with torch.no_grad():
            output = model.generate(
                **copy.deepcopy(one),
                max_new_tokens=4,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        return torch.stack(output.logits)

    works = {"forward": lambda: logits(model, inputs), "generate": generated}
    stock = {name: work() for name, work in works.items()}
    with attach(model, POLICIES["keeps"]):
        pruned = {name: work() for name, work in works.items()}
    assert not any(torch.equal(pruned[name], stock[name]) for name in works)
    seen: list[tuple[str, str]] = []
    over = threading.Event()

    def answer(name: str) -> None:
        while not over.is_set():
            try:
                output = works[name]()
            except Exception as error:
                seen.append((name, repr(error)))
                return
            kinds = {"pruned": pruned, "stock": stock}
            kind = next(
                (k for k, expected in kinds.items() if torch.equal(output, expected[name])), "neither"
            )
            seen.append((name, kind))

    threads = [threading.Thread(target=answer, args=(name,)) for name in works]
    for thread in threads:
        thread.start()
    try:
        for _ in range(12):
            with attach(model, POLICIES["keeps"]):
                assert torch.equal(works["forward"](), pruned["forward"])
            assert torch.equal(works["forward"](), stock["forward"])
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert attached(model) is None
    assert {kind for _, kind in seen} <= {"pruned", "stock"}
    assert ("forward", "pruned") in seen or ("generate", "pruned") in seen


def test_detach_inside_of_generate_is_refused() -> None:
    model, inputs = build("llava"), prompt("llava", ["ttt I ttttt"])
    attachment = attach(model, POLICIES["keeps"])

    def stop(*args: Any) -> bool:
        attachment.detach()
        return False

    with pytest.raises(RuntimeError, match="detach was called inside of generate"):
        model.generate(**copy.deepcopy(inputs), max_new_tokens=2, stopping_criteria=[stop])
    attachment.detach()
    assert attached(model) is None


def test_using_holds_in_its_own_thread(impatient: None) -> None:
    model, inputs = build("llava"), prompt("llava", ROWS[0])
    last = torch.tensor([[7], [8]])  # the first row's prompt ends earlier
    with attach(model, POLICIES["fastv"]) as attachment:

        def under(policy: Any) -> torch.Tensor:
            with attachment.using(policy):
                return logits(model, inputs)

        def earlier_prompts() -> torch.Tensor:
            with attachment.queries(last):
                return logits(model, inputs)

        plain = logits(model, inputs)
        assert not close(earlier_prompts(), plain)
        together(
            lambda: under(POLICIES["band"]),
            lambda: under(VisionSchedule()),
            earlier_prompts,
            lambda: logits(model, inputs),
        )
        inside: list[torch.Tensor] = []
        with attachment.using(VisionSchedule()):
            thread = threading.Thread(target=lambda: inside.append(logits(model, inputs)))
            thread.start()
            thread.join()
        assert torch.equal(inside[0], plain)  # a thread started inside runs under the attached policy


def test_each_thread_has_its_own_trace() -> None:
    model = build("llava")
    with attach(model, POLICIES["band"]) as attachment:
        worker = threading.Thread(target=lambda: logits(model, prompt("llava", ROWS[1])))
        worker.start()
        worker.join()
        assert len(attachment.trace) == 1  # nothing ran here yet: what the other thread did
        logits(model, prompt("llava", ROWS[0]))
        worker = threading.Thread(target=lambda: logits(model, prompt("llava", ROWS[1])))
        worker.start()
        worker.join()
        assert len(attachment.trace) == 2


# ---------------------------------------------------------------- generators that hold a `using`


def test_generators_that_end_in_another_order_leave_no_policy_behind() -> None:
    """Each is closed half-way; the first ends inside the second."""

    def held(attachment: Any, policy: Any) -> Iterator[None]:
        with attachment.using(policy):
            yield
            yield

    model = build("llava")
    with attach(model, VisionSchedule()) as attachment:
        first, second = held(attachment, POLICIES["keeps"]), held(attachment, POLICIES["band"])
        next(first)
        next(second)
        with pytest.raises(RuntimeError, match="ended in another order, thread or task than they began"):
            first.close()
        assert attachment.policy is POLICIES["band"]
        second.close()
        assert attachment.policy == VisionSchedule()


def test_a_generator_that_goes_on_in_another_context_says_so() -> None:
    """As a web server runs each step of a streamed answer."""

    def steps(attachment: Any) -> Iterator[torch.Tensor]:
        with attachment.using(POLICIES["band"]):
            yield logits(model, inputs)

    model, inputs = build("llava"), prompt("llava", ROWS[0])
    with attach(model, VisionSchedule()) as attachment:
        stream = steps(attachment)
        contextvars.copy_context().run(next, stream)
        with pytest.raises(RuntimeError, match="put them around calls of the model, not around a yield"):
            contextvars.copy_context().run(next, stream)
        assert attachment.policy == VisionSchedule()
