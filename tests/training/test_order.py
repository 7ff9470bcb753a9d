"""Which samples a step takes, however it is divided among processes and accumulation."""

from collections import Counter

import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from latefusion.data.bad_rows import Checked
from latefusion.recipes.schema import Group, TrainConfig
from latefusion.training.order import Order, order_of


@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 12), st.integers(0, 3))
def test_epochs_follow_each_other_and_each_holds_every_sample_once(n, steps, size, seed):
    order = Order(n, steps=steps, size=size, seed=seed)
    run = list(order)
    assert len(run) == len(order) == steps * size
    for start in range(0, len(run), n):
        counts = Counter(run[start : start + n])
        assert set(counts.values()) == {1} and set(counts) <= set(range(n))
    assert order.epoch(steps) == pytest.approx(len(run) / n)


def test_every_epoch_of_every_seed_has_an_order_of_its_own():
    """Also epoch 1 of seed 0 and epoch 0 of seed 1: runs of several seeds must be independent."""
    n, epochs, seeds = 50, 4, 4
    runs = [list(Order(n, steps=epochs, size=n, seed=seed)) for seed in range(seeds)]
    orders = {tuple(run[start : start + n]) for run in runs for start in range(0, epochs * n, n)}
    assert len(orders) == epochs * seeds and tuple(range(n)) not in orders


@pytest.mark.parametrize(("world", "micro"), [(1, 8), (1, 2), (2, 4), (2, 2), (4, 1)])
def test_a_step_takes_the_same_samples_however_it_is_divided(world, micro):
    """13 samples and steps of 8: the second step begins in one epoch and ends in the next."""
    steps, size = 4, 8
    order = Order(13, steps=steps, size=size, seed=3)
    whole = list(order)
    batches = BatchSampler(order, micro, drop_last=False)
    dealt = [list(BatchSamplerShard(batches, world, rank)) for rank in range(world)]  # by accelerate
    each = size // (world * micro)
    for step in range(steps):
        shares = [order.share(step, rank, world, micro) for rank in range(world)]
        for rank, share in enumerate(shares):
            assert share == dealt[rank][step * each : (step + 1) * each]
        taken = sorted(i for share in shares for batch in share for i in batch)
        assert taken == sorted(whole[step * size : (step + 1) * size])


def test_samples_of_like_length_share_a_step():
    lengths = [7 * i % 101 for i in range(1000)]
    order = Order(1000, steps=250, size=8, seed=0, lengths=lengths)
    run = list(order)
    assert sorted(run[:1000]) == sorted(run[1000:]) == list(range(1000)) and run[:1000] != run[1000:]
    spread = [max(s) - min(s) for s in ([lengths[i] for i in run[k : k + 8]] for k in range(0, 2000, 8))]
    assert sum(spread) / len(spread) < 10  # 80 if they were mixed
    firsts = [lengths[run[k]] for k in range(0, 400, 8)]
    assert firsts != sorted(firsts, reverse=True)


def test_a_step_holds_one_modality_and_every_sample_comes_once():
    shows = [i % 3 == 0 for i in range(100)]
    order = Order(100, steps=12, size=8, seed=0, lengths=[i % 7 for i in range(100)], kinds=shows)
    run = [order.at(i) for i in range(100)]
    assert sorted(run) == list(range(100))
    steps = [{shows[i] for i in run[k : k + 8]} for k in range(0, 100, 8)]
    assert sum(len(kinds) == 1 for kinds in steps) == 12 and {len(kinds) for kinds in steps[:12]} == {1}


class Sized(list):
    def sizes(self):
        return [(10, 0), (500, 0), (3, 1), (9, 2)]


def test_images_outweigh_text_when_samples_are_grouped():
    train = TrainConfig(steps=1, batch_size=2)
    order = order_of(train, Checked(Sized("abcd"), Group.length), 1)
    assert sorted(map(sorted, (list(order)[:2], [order.at(2), order.at(3)]))) == [[0, 1], [2, 3]]
    assert order_of(train, Checked(Sized("abcd"), Group.modality), 2).kinds == [False, False, True, True]
    assert order_of(train, Checked(Sized("abcd")), 2).lengths is None
