"""Where the executor ends: it works there, or says in one sentence why not and what to do."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from helpers.families import MIXED, build, close, prompt, shared, text_tokens, vision_tokens
from helpers.oracle import Fixed
from torch import Tensor

from latefusion import VisionSchedule
from latefusion.models.attach import attach
from latefusion.models.executor.selections import Selections
from latefusion.models.policies import named
from latefusion.models.policies.base import Prompt, Selection
from latefusion.models.policies.visipruner.settings import VisiPruner

BAND = VisionSchedule(enter=2, exit=4)
KEEPS = VisionSchedule(enter=1, exit=5, keep={2: 3, 4: 2})
CROSS = VisionSchedule(cross=(1, 3))

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, **options}
    with torch.no_grad():
        return model.generate(**copy.deepcopy(inputs), return_dict_in_generate=True, **options)


# ---------------------------------------------------------------- 4-D masks


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_found_in_a_mask_of_four_dimensions(side: str, kind: str) -> None:
    """The same choices, tokens and logits as under the 2-D mask it was made of."""
    attention = "sdpa" if kind == "bool" else "eager"
    model, inputs = shared("llava", attention), prompt("llava", MIXED, side)
    real, text = inputs["attention_mask"].bool(), text_tokens(inputs)
    cells = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril() & real[:, None, None, :]
    if kind == "additive":
        cells = torch.zeros(cells.shape).masked_fill(~cells, torch.finfo(torch.float32).min)
    results = []
    for mask in (inputs["attention_mask"], cells):
        with torch.no_grad(), attach(model, KEEPS) as attachment:
            logits = model(**{**inputs, "attention_mask": mask}).logits[text]
            results.append((logits, attachment.trace))
    assert results[0][1] == results[1][1] and close(results[0][0], results[1][0])


# ---------------------------------------------------------------- chunked prefill


def test_keeps_refuse_a_chunk_that_ends_or_begins_inside_an_image() -> None:
    model, inputs = build("llava"), prompt("llava", ["tt I ttt"])
    sentence = r"^keep=\{2: 3, 4: 2\} ranks .* begins or ends inside an image: prefill the prompt at once"
    layers: list[int] = []
    model.get_decoder().layers[0].register_forward_hook(lambda *a: layers.append(1))
    with attach(model, KEEPS) as attachment:
        with pytest.raises(ValueError, match=sentence):
            generate(model, inputs, prefill_chunk_size=4)
        assert not layers
        with attachment.using(BAND):
            generate(model, inputs, prefill_chunk_size=4)  # a band decides nothing by the prompt
        generate(model, inputs)


@pytest.mark.parametrize("name", ["keep", "fastv", "visipruner", "divprune"])
def test_generate_in_chunks_is_refused_where_the_whole_prompt_chooses(name: str) -> None:
    """The image is whole in the first chunk, but the question is not."""
    policy = {
        "keep": KEEPS,
        "fastv": named("fastv", layer=1),
        "visipruner": named("visipruner", boundary=1),
        "divprune": named("divprune"),
    }[name]
    model, inputs = build("llava"), prompt("llava", ["tt I tttttt"])
    with attach(model, policy):
        with pytest.raises(
            ValueError, match="by the whole prompt, which comes in chunks here: leave prefill_"
        ):
            generate(model, inputs, prefill_chunk_size=8)
        generate(model, inputs, prefill_chunk_size=12)


# ---------------------------------------------------------------- tokens that return


def seen(vision: Tensor, *numbers: int) -> list[Tensor]:
    """The first COUNT vision tokens of each sample, a count per layer."""
    order = vision.cumsum(1)
    return [vision & (order <= n) for n in numbers]


@pytest.mark.parametrize(
    ("numbers", "layer"), [((4, 2, 3, 3, 3, 3), 2), ((0, 4, 0, 0, 4, 4), 4), ((4, 4, 4, 4, 1, 2), 5)]
)
@pytest.mark.parametrize("counted", [True, False])
def test_a_policy_that_brings_tokens_back_is_refused(
    numbers: tuple[int, ...], layer: int, counted: bool
) -> None:
    model, inputs = build("llava"), prompt("llava", ["ttttttttt", "tt I ttt"])
    calls: list[int] = []
    model.get_decoder().layers[layer].register_forward_hook(lambda *a: calls.append(1))
    policy = Fixed(seen(vision_tokens(inputs), *numbers), counted)
    sentence = (
        rf"^the policy brings back vision tokens of sample 1 in layer {layer} that were computed and left"
    )
    with torch.no_grad(), attach(model, policy), pytest.raises(ValueError, match=sentence):
        model(**inputs)
    assert not calls


def test_an_exchange_of_tokens_is_found_too() -> None:
    model, inputs = build("llava"), prompt("llava", ["tt I ttt"])
    vision = vision_tokens(inputs)
    first, second = seen(vision, 2, 4)
    policy = Fixed([vision, first, first, second & ~first, vision & False, vision & False])
    with (
        torch.no_grad(),
        attach(model, policy),
        pytest.raises(ValueError, match=r"brings back .* in layer 3"),
    ):
        model(**inputs)


def test_tokens_that_were_only_read_may_return_and_late_ones_may_come() -> None:
    model, inputs = build("llava"), prompt("llava", ["tt I ttt"])
    vision = vision_tokens(inputs)
    n = int(vision.sum())
    for policy, numbers in (
        (CROSS, [0, n, 0, n, 0, 0]),
        (Fixed(seen(vision, 0, 2, 4, 4, 3, 0)), [0, 2, 4, 4, 3, 0]),
        (Fixed(seen(vision, 2, 2, 4, 0, 0, 0)), [2, 2, 4, 0, 0, 0]),
    ):
        with torch.no_grad(), attach(model, policy) as attachment:
            model(**inputs)
            (record,) = attachment.trace
        assert record.vision == numbers


def test_without_a_look_at_the_tokens_the_counts_tell() -> None:
    """As on a GPU, where a look would make the host wait."""

    def fresh() -> Selections:
        mask = torch.zeros(2, 9, dtype=torch.bool, device="meta")
        rows = torch.zeros(2, 1, dtype=torch.long, device="meta")
        no_text = {"n_text": (0, 0), "n_answer": (0, 0), "tail": 0}
        return Selections(
            Prompt(
                vision=mask,
                real=mask,
                queries=rows,
                text=mask,
                n_vision=(4, 4),
                n_real=(9, 9),
                num_layers=6,
                **no_text,
            )
        )

    def go(*steps: tuple[int, tuple[int, int], bool]) -> None:
        selections = fresh()
        for layer, counts, frozen in steps:
            selections.add(layer, Selection(selections.prompt.vision, counts, frozen))

    go((1, (2, 3), False), (2, (2, 1), False), (3, (0, 0), False))
    go((0, (0, 0), False), (2, (2, 1), False), (3, (4, 4), False))  # two more came late
    go((0, (0, 0), True), (2, (4, 4), True), (3, (0, 0), True), (5, (4, 4), True))  # only read
    for steps in (
        ((1, (2, 3), False), (2, (2, 4), False)),
        ((0, (0, 0), False), (2, (4, 4), False), (3, (4, 0), False), (5, (4, 1), False)),
    ):
        with pytest.raises(ValueError, match="of sample 1 in layer"):
            go(*steps)


# ---------------------------------------------------------------- weights and caches elsewhere


@pytest.mark.parametrize("schedule", [KEEPS, CROSS], ids=["keeps", "cross"])
def test_layers_whose_weights_are_on_the_disk(schedule: VisionSchedule, tmp_path: Any) -> None:
    """As `device_map="auto"` leaves a model that is too large: accelerate fetches each layer as it runs."""
    inputs = prompt("llava", MIXED)
    expected = None
    for offloaded in (False, True):
        model = build("llava")
        if offloaded:
            inner = model.model.language_model
            places = {f"model.language_model.layers.{i}": "disk" for i in range(len(inner.layers))}
            places |= {f"model.language_model.{n}": "cpu" for n in ("embed_tokens", "norm", "rotary_emb")}
            places |= dict.fromkeys(("model.vision_tower", "model.multi_modal_projector", "lm_head"), "cpu")
            model = dispatch_model(
                model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
            )
            assert next(model.get_decoder().layers[0].parameters()).device.type == "meta"
        with attach(model, schedule):
            out = torch.stack(generate(model, inputs).logits)
        expected = out if expected is None else expected
    assert torch.equal(out, expected)


def test_a_decoder_on_several_devices_is_refused() -> None:
    model = build("llava")
    layers = {f"model.language_model.layers.{i}": 0 if i < 3 else 1 for i in range(6)}
    model.hf_device_map = {"model.vision_tower": 1, "lm_head": 1, **layers}
    sentence = (
        r"^the decoder's layers are on several devices \(0, 1\), .* with device_map=\{\"\": 0\}; weights on"
    )
    with pytest.raises(ValueError, match=sentence):
        attach(model, BAND)
    for fine in (
        {"": 0},
        {"model.language_model": 1, "model.vision_tower": 0},
        {**layers, **dict.fromkeys(layers, "disk")},
    ):
        model.hf_device_map = fine
        attach(model, BAND).detach()


class NoStream:
    """Stands in for a CUDA stream, without which transformers offloads no cache."""

    def wait_stream(self, other: object) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


@pytest.mark.parametrize("schedule", [KEEPS, CROSS, VisionSchedule(enter=2, exit=4)])
def test_an_offloaded_cache_holds_the_same(schedule: VisionSchedule, monkeypatch: Any) -> None:
    """Its bookkeeping, on a CPU; that the copies between devices are right, a GPU must show."""
    model, inputs = build("llava"), prompt("llava", MIXED)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: NoStream())
    monkeypatch.setattr(torch, "Stream", NoStream)
    with attach(model, schedule):
        kept = generate(model, inputs)
        offloaded = generate(model, inputs, cache_implementation="offloaded")
    assert offloaded.past_key_values.offloading and not kept.past_key_values.offloading
    assert torch.equal(torch.stack(kept.logits), torch.stack(offloaded.logits))


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", [KEEPS, CROSS], ids=["keeps", "cross"])
def test_an_offloaded_cache_on_a_gpu(schedule: VisionSchedule) -> None:
    model, inputs = build("llava").cuda(), prompt("llava", MIXED)
    features = inputs["mm_encoder_outputs"]["image"]
    features.pooler_output = [image.cuda() for image in features.pooler_output]
    inputs = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with attach(model, schedule):
        kept = generate(model, inputs)
        offloaded = generate(model, inputs, cache_implementation="offloaded")
    assert torch.equal(torch.stack(kept.logits), torch.stack(offloaded.logits))


# ---------------------------------------------------------------- torch.export, torch.compile


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_is_refused_in_a_sentence(strict: bool) -> None:
    model, inputs = build("llava"), prompt("llava", ["tt I ttt"])
    with torch.no_grad(), attach(model, BAND) as attachment:
        sentence = r"^a model under a policy cannot be exported: .* \(docs/serving.md\)\.$"
        with pytest.raises(ValueError, match=sentence):
            torch.export.export(model, (), {**inputs, "use_cache": False}, strict=strict)
        assert "input_ids" in inspect.signature(model.forward).parameters  # as trainers ask it
        with pytest.raises(ValueError, match=sentence):
            torch.jit.trace(lambda ids: model(**{**inputs, "input_ids": ids}).logits, inputs["input_ids"])
        attachment.detach()
        if not strict:
            assert torch.export.export(model, (), {**inputs, "use_cache": False}) is not None


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_logits() -> None:
    """Traced by dynamo and run as it is (`backend="eager"`): what code a backend makes of it is not our affair."""
    model, inputs = build("llava"), prompt("llava", MIXED)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), attach(model, BAND):
        expected = model(**inputs, use_cache=False).logits
        assert close(compiled(**inputs, use_cache=False).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    [KEEPS, VisiPruner(boundary=1, layer_threshold=0.99, tokens_threshold=0.7)],
    ids=["keeps", "visipruner"],
)
def test_compiled_layers_are_watched(policy: Any) -> None:
    model, inputs = build("llava"), prompt("llava", MIXED)
    torch._dynamo.reset()
    with torch.no_grad(), attach(model, policy) as attachment:
        expected, trace = model(**inputs, use_cache=False).logits, attachment.trace
        for layer in model.get_decoder().layers:
            layer.compile(backend="eager")
        assert close(model(**inputs, use_cache=False).logits, expected)
        assert attachment.trace == trace and trace[0].vision[-1] < trace[0].n_vision
