"""VisiPruner's settings, the maths of one row, and one layer of the shallow rule."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers.reference_visipruner import ReferenceLlama
from helpers.visipruner_prompts import layout_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latefusion.models.policies.base import AttentionCall, Prompt
from latefusion.models.policies.visipruner.decision import removal_effect
from latefusion.models.policies.visipruner.settings import VisiPruner

# ---------------------------------------------------------------- the settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stages": ("deep",)}, r"^stages=\('deep',\) has 'deep' without 'middle', .*add 'middle'\.$"),
        ({"stages": ("shallow", "deep")}, r"has 'deep' without 'middle'"),
        ({"stages": ("mid",)}, r"^stages names 'mid'; use 'shallow', 'middle', 'deep'\.$"),
        ({"stages": ()}, r"^stages=\(\) prunes nothing; name at least one"),
        ({"boundary": -1}, r"^boundary=-1 must not be negative"),
        ({"layer_threshold": 0.0}, r"^layer_threshold=0.0 is a cosine; choose it above 0 and at most 1\.$"),
        ({"layer_threshold": 1.5}, r"^layer_threshold=1.5 is a cosine"),
        ({"exit_threshold": float("nan")}, r"^exit_threshold=nan is a cosine"),
        ({"tokens_threshold": -0.1}, r"^tokens_threshold=-0.1 is a norm; choose it 0 or above\.$"),
        ({"exit_patience": 0}, r"^exit_patience=0 counts layers; choose it 1 or above\.$"),
        ({"sink_rule": "13b"}, r"^sink_rule='13b' is unknown; use 'first' or 'half'\.$"),
    ],
)
def test_bad_settings_are_one_sentence(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        VisiPruner(**values)
    assert "\n" not in str(error.value)


def test_boundary_must_leave_a_layer_to_fuse_in() -> None:
    VisiPruner(boundary=10).validate(12)
    with pytest.raises(ValueError, match=r"^boundary=11 leaves no layer .* 0 to 11; choose at most 10\.$"):
        VisiPruner(boundary=11).validate(12)
    VisiPruner(boundary=12, stages=("shallow",)).validate(12)
    with pytest.raises(ValueError, match=r"^boundary=13 is beyond the end .* 0 to 11; choose at most 12\.$"):
        VisiPruner(boundary=13, stages=("shallow",)).validate(12)


def test_stages_may_come_from_a_list() -> None:
    assert VisiPruner(stages=["middle", "deep"]) == VisiPruner(stages=("middle", "deep"))  # type: ignore[arg-type]


# ---------------------------------------------------------------- the maths of one row


@settings(deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4)]),
    keys=st.integers(2, 12),
    sharpness=st.floats(0.1, 8.0),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_removal_effect_equals_explicit_contributions(heads, keys, sharpness, dtype, seed) -> None:
    """Float32 however the values are stored: the oracle sees the same stored values, in float64."""
    torch.manual_seed(seed)
    n_heads, n_kv = heads
    weights = (sharpness * torch.randn(2, n_heads, 3, keys)).softmax(-1)
    value = torch.randn(2, n_kv, keys, 6).to(dtype)
    cosine, norm = removal_effect(weights, value)
    assert cosine.dtype == norm.dtype == torch.float32
    for b in range(2):
        for r in range(3):
            a = weights[b, :, r].double().numpy()
            v = value[b].double().repeat_interleave(n_heads // n_kv, dim=0).numpy()
            contributions = np.concatenate(
                [a[h][:, None] * v[h] for h in range(n_heads)], axis=-1
            )  # [K, H * D]
            output = contributions.sum(0)
            for i in range(keys):
                rest = output - contributions[i]
                assert norm[b, r, i].item() == pytest.approx(np.linalg.norm(contributions[i]), abs=1e-5)
                if np.linalg.norm(rest) > 0.05 * np.linalg.norm(output):
                    expected = rest @ output / np.linalg.norm(rest) / np.linalg.norm(output)
                    assert cosine[b, r, i].item() == pytest.approx(expected, abs=1e-4)


def test_removal_effect_of_the_only_key_is_finite() -> None:
    cosine, norm = removal_effect(torch.ones(1, 2, 1, 1), torch.randn(1, 2, 1, 8))
    assert cosine.isfinite().all() and norm.isfinite().all()
    cosine, _ = removal_effect(torch.zeros(1, 2, 1, 3), torch.randn(1, 2, 3, 8))
    assert not (cosine < 1).any(), "a row that attends to nothing turns nothing"


# ---------------------------------------------------------------- one layer of the shallow rule


LAYOUTS = {  # of two samples or three
    "text between images, a sample without": ("t1 v3 t2 v2 t3", "t1 v3 t2 v2 t3", "t11"),
    "text between images": ("t1 v3 t2 v2 t3", "t1 v3 t2 v2 t3"),
    "text at the end": ("t1 v5 t5", "t2 v4 t5"),
}


@dataclass
class Layer:
    """Random attention over a padded batch in compact order (row 0 of sample 1 is padding), in float64."""

    vision: Tensor  # [B, T]
    index: Tensor  # [B, T]
    weights: Tensor  # [B, H, T, T]
    value: Tensor  # [B, H, T, D]
    runs: list[int]  # query rows of each call of the kernel

    @classmethod
    def random(cls, layouts: tuple[str, ...]) -> Layer:
        torch.manual_seed(0)
        vision = torch.stack([layout_mask(layout) for layout in layouts])
        batch = len(vision)
        index = torch.arange(11).repeat(batch, 1)
        index[1, 0] = -1
        scores = torch.randn(batch, 2, 11, 11, dtype=torch.float64)
        scores.masked_fill_((index < 0)[:, None, None], -1e9).masked_fill_(
            ~torch.ones(11, 11).tril().bool(), -1e9
        )
        return cls(vision, index, scores.softmax(-1), torch.randn(batch, 2, 11, 4, dtype=torch.float64), [])

    def prompt(self, last: int) -> Prompt:
        """As it is if answers stand after the column `last`."""
        real, after = self.index >= 0, self.vision.cumsum(1) > 0
        ends = torch.arange(11) > last
        text = real & ~self.vision & after & ~ends
        return Prompt(
            vision=self.vision,
            real=real,
            queries=torch.full((len(real), 1), last),
            text=text,
            n_vision=tuple(self.vision.sum(1).tolist()),
            n_real=tuple(real.sum(1).tolist()),
            n_text=tuple(text.sum(1).tolist()),
            n_answer=tuple((real & after & ends).sum(1).tolist()),
            tail=next(n for n in range(12) if not text[:, 10 - n].all()),
            num_layers=4,
        )

    def call(self) -> AttentionCall:
        def run(value: Tensor, rows: Tensor | int | None) -> Tensor:
            output = (self.weights @ value).transpose(1, 2)  # [B, T, H, D]
            if isinstance(rows, Tensor):
                output = output[torch.arange(len(rows))[:, None], rows]
            output = output[:, : rows if isinstance(rows, int) else None]
            self.runs.append(output.shape[1])
            return output

        batch = len(self.vision)
        return AttentionCall(
            query=torch.zeros(batch, 2, 11, 4),
            key=torch.zeros(batch, 2, 11, 4),
            value=self.value,
            query_index=self.index,
            key_index=self.index,
            scaling=1.0,
            run=run,
            weights=lambda rows: pytest.fail("the shallow rule needs no attention map"),
            scores=lambda rows, keys: pytest.fail("nor scores"),
        )


@pytest.mark.parametrize("sink_rule", ["first", "half"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("last", [10, 9])
@pytest.mark.parametrize("layouts", LAYOUTS)
def test_shallow_rule_equals_edited_weights(layouts: str, layer: int, sink_rule: str, last: int) -> None:
    """Also in training, where tokens follow the query (`last`): they are left alone."""
    data = Layer.random(LAYOUTS[layouts])
    policy = VisiPruner(boundary=2, stages=("shallow",), sink_rule=sink_rule)
    decision = policy.begin(data.prompt(last))
    assert set(decision.watch) == {0, 1}
    got = decision.attended(layer, data.call())
    assert got is not None
    for b in range(len(data.vision)):
        for h in range(2):
            a = data.weights[b, h].numpy().copy()
            edited = ReferenceLlama._shallow(a, data.vision[b].numpy(), layer, sink_rule)
            edited[last + 1 :] = a[last + 1 :]
            rows = data.index[b] >= 0
            torch.testing.assert_close(
                got[b, rows, h], (torch.from_numpy(edited) @ data.value[b, h])[rows], rtol=0, atol=1e-12
            )
    if last == 10:  # text at the end of all samples is not computed twice
        others, text = {1: (11, 5), 2: (8, 5), 3: (6, 5)}[1 + list(LAYOUTS).index(layouts)]
    else:
        others, text = 11, 4
    unruled = 1 + 10 - last  # text before the image, and answers: in layer 0 in a run of their own
    assert data.runs == ([others, unruled, text] if layer == 0 else [others, text])
