"""How often the host waits for the device in a prefill: never for what cannot change the next layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.reference_visipruner import Settings
from helpers.visipruner_prompts import build, collate, layout_mask, oracle, policy_of, prompts, settings_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from latefusion.models.attach import attach
from latefusion.models.executor import layout, selections
from latefusion.models.policies.base import Policy
from latefusion.models.policies.divprune import DivPrune
from latefusion.models.policies.fastv import FastV
from latefusion.models.policies.random import Random
from latefusion.models.policies.visipruner import decision as fusion
from latefusion.models.schedule import VisionSchedule

OPERATORS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim"}


class Operators(TorchDispatchMode):
    """Counts operators whose result's size or value the host has to know, also inside others."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)
        if name in OPERATORS or by_mask:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The reads of a tensor inside, by name: `tolist` and `numpy`, which are no operators, and all that are."""
    operations: list[str] = []

    def spied(name: str, read: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            operations.append(name)
            return read(*args, **kwargs)

        return call

    with patch.context() as inside, Operators() as operators:
        for name in ("tolist", "numpy"):
            inside.setattr(Tensor, name, spied(name, getattr(Tensor, name)))
        yield operations
    operations += operators.names


def waits(policy: Policy | None, samples: list[tuple[Tensor, Tensor]], patch: pytest.MonkeyPatch) -> int:
    """Of one prefill beyond those of the stock model; whatever is sent to the host is also waited for."""
    model, batch = build(), collate(samples, "left")
    counts, sent = [], []
    on_the_way = fusion._OnTheWay
    with patch.context() as inside, torch.no_grad():
        for module in (layout, selections):
            inside.setattr(module, "looking_is_free", lambda mask: False)  # as on a GPU
        inside.setattr(fusion, "_OnTheWay", lambda *a: (sent.append(a), on_the_way(*a))[1])
        for chosen in (None, policy):
            attachment = None if chosen is None else attach(model, chosen, vision_mask=batch.vision)
            with counted(patch) as operations:
                model(**batch.inputs, use_cache=True)
            counts.append(len(operations))
            if attachment is not None:
                attachment.detach()
    assert counts[1] - counts[0] == 1 + len(sent)
    return counts[1] - counts[0]


def fused_in(settings: Settings, sample: tuple[Tensor, Tensor]) -> int:
    """The fusion layer of one prompt, said by the oracle."""
    run = oracle(build()).run(sample[0].numpy(), sample[1].numpy(), settings, 1)
    assert run.margin > 1e-4 and run.fusion_layer is not None
    return run.fusion_layer


ALWAYS, NEVER = 1e-3, 1.0  # exit thresholds: every layer passes, none does


@pytest.mark.parametrize(
    ("stages", "exit_threshold", "after"),
    [
        (("middle",), 0.999, lambda left: 0),
        (("middle", "deep"), ALWAYS, lambda left: 1),  # two layers have to pass: one wait for both
        (("shallow", "middle", "deep"), ALWAYS, lambda left: 1),
        (("middle", "deep"), NEVER, lambda left: left // 2),  # no pass is known: again two layers
    ],
)
def test_waits_of_one_prompt(
    stages: tuple[str, ...],
    exit_threshold: float,
    after: Callable[[int], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layers 3 to 8 can change what comes after them: once at the start, each of them up to fusion, then in twos."""
    for sample in prompts()[:2]:
        settings = replace(settings_of(stages), exit_threshold=exit_threshold)
        fusion = fused_in(settings, sample)
        assert 3 <= fusion <= 6
        assert waits(policy_of(settings), [sample], monkeypatch) == 1 + (fusion - 2) + after(8 - fusion)


def test_waits_of_a_batch_are_those_of_its_latest_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(("middle",))
    samples = [sample for sample in prompts() if sample[1].any()]
    latest = max(fused_in(settings, sample) for sample in samples)
    assert waits(policy_of(settings), prompts(), monkeypatch) == 1 + min(latest, 8) - 2


def test_waits_where_nothing_can_change(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(("middle", "deep"))
    text = (torch.randn(9, 32), layout_mask("t9"))
    ends_in_vision = (torch.randn(12, 32), layout_mask("t3 v9"))
    never = policy_of(replace(settings, layer_threshold=1e-6))
    assert waits(policy_of(settings), [text], monkeypatch) == 1
    assert waits(policy_of(settings), [ends_in_vision], monkeypatch) == 2  # the first layer looked at says so
    assert waits(never, [prompts()[0]], monkeypatch) == 1 + 6  # any of six layers could have fused


@pytest.mark.parametrize(
    "policy", [FastV(layer=2), Random(layer=3), DivPrune(keep_ratio=0.5), VisionSchedule(enter=2, exit=7)]
)
def test_what_is_decided_by_counts_waits_at_the_start_alone(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert waits(policy, prompts(), monkeypatch) == 1
