"""The rows of a step against a mask oracle: attention written down naively, request by request, over all its tokens."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latefusion.serving.rows import step_rows


@st.composite
def steps(draw):
    """Requests as one bool a token (a vision token), with the tokens that are done and scheduled of each."""
    requests = []
    for _ in range(draw(st.integers(1, 4))):
        stretches = draw(st.lists(st.tuples(st.booleans(), st.integers(1, 6)), min_size=1, max_size=5))
        vision = np.concatenate([np.full(length, kind) for kind, length in stretches])
        done = draw(st.integers(0, len(vision) - 1))
        new = draw(st.integers(1, len(vision) - done))
        requests.append((vision, done, new))
    return requests


def ranges_of(vision):
    """First and last positions of the stretches of vision tokens; split at random places, as two images that touch."""
    at = np.flatnonzero(vision)
    return [
        (int(run[0]), int(run[-1])) for run in np.split(at, np.flatnonzero(np.diff(at) != 1) + 1) if len(run)
    ]


def rows_of(requests):
    starts = np.concatenate([[0], np.cumsum([new for _, _, new in requests])])[:-1]
    done, new = ([request[i] for request in requests] for i in (1, 2))
    return step_rows(starts, done, new, [ranges_of(vision) for vision, _, _ in requests]), starts


def keys_read(sequences, n_text):
    """For each text row its request and how many keys it reads: causal over the last keys of its sequence."""
    read = []
    for i, request in enumerate(sequences.requests):
        queries = range(sequences.starts[i], sequences.starts[i + 1])
        read += [
            (int(request), int(sequences.lengths[i]) - (len(queries) - 1 - j)) for j in range(len(queries))
        ]
    assert len(read) == n_text == sequences.starts[-1]
    return read


@settings(max_examples=300, deadline=None)
@given(steps())
def test_every_row_reads_what_a_mask_would_let_it_read(requests):
    rows, starts = rows_of(requests)
    compact, runs = keys_read(rows.compact, len(rows.text)), keys_read(rows.runs, len(rows.text))
    text, vision = iter(range(len(rows.text))), iter(range(len(rows.vision)))
    for i, (kinds, done, new) in enumerate(requests):
        for position in range(done, done + new):
            row = starts[i] + position - done
            if kinds[position]:
                at = next(vision)
                assert rows.vision[at] == row and rows.order[at] == kinds[:position].sum()
                continue
            at = next(text)
            assert rows.text[at] == row and rows.request[at] == i
            before = [other for other in range(position + 1) if not kinds[other]]  # text, itself included
            assert rows.place[at] == len(before) - 1
            assert compact[at] == (i, len(before))
            assert runs[at] == (i, position + 1)
    assert next(text, None) is None and next(vision, None) is None
    assert rows.all_text == (not any(k[d : d + n].any() for k, d, n in requests))


@settings(max_examples=100, deadline=None)
@given(steps(), st.integers(1, 5))
def test_chunks_write_every_key_once_into_its_own_slot(requests, budget):
    """Prefilled in chunks of any size, the text keys of a request fill its slots from the first on, without gaps."""
    for vision, _, _ in requests:
        places, orders = [], []
        for done in range(0, len(vision), budget):
            new = min(budget, len(vision) - done)
            rows = step_rows([0], [done], [new], [ranges_of(vision)])
            places += rows.place.tolist()
            orders += rows.order.tolist()
        assert places == list(range((~vision).sum())) and orders == list(range(vision.sum()))


@pytest.mark.parametrize("done", [4, 7])
def test_a_decode_step_reads_all_text_and_no_image(done):
    rows = step_rows([0], [done], [1], [[(1, 3)]])
    assert rows.all_text and rows.place.tolist() == [done - 3]
    assert rows.compact.lengths.tolist() == [done - 2] and rows.runs.lengths.tolist() == [done + 1]


def test_two_images_that_touch_are_one_stretch():
    rows = step_rows([0], [0], [6], [[(1, 2), (3, 4)]])
    assert rows.vision.tolist() == [1, 2, 3, 4] and rows.order.tolist() == [0, 1, 2, 3]
    assert rows.runs.lengths.tolist() == [1, 6] and rows.compact.lengths.tolist() == [2]
