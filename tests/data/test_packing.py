"""Batches hold every token once, in segments that do not touch each other's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.data import Rendered, to_batch
from fedjax_llm.errors import UserError

LENGTH = 12


@st.composite
def examples(draw: st.DrawFn) -> list[Rendered]:
    """Examples whose tokens are all different, so that each can be traced."""
    sizes = draw(st.lists(st.integers(1, LENGTH), max_size=20))
    result, first = [], 1
    for size in sizes:
        mask = draw(st.lists(st.booleans(), min_size=size, max_size=size))
        result.append(Rendered(list(range(first, first + size)), mask))
        first += size
    return result


@given(rendered=examples(), packing=st.booleans())
def test_every_example_is_one_contiguous_segment(rendered: list[Rendered], packing: bool) -> None:
    batch = to_batch(rendered, LENGTH, packing, pad_id=0)
    assert batch.tokens_BxT.dtype == batch.segments_BxT.dtype == np.int32
    assert batch.loss_mask_BxT.dtype == np.bool_
    found = []
    for tokens_T, mask_T, segments_T in zip(*map(np.asarray, batch), strict=True):
        used = int((segments_T > 0).sum())
        # Segments 1, 2, ... stand side by side from the left; padding fills the rest.
        assert np.all(np.diff(segments_T[:used]) >= 0) and not segments_T[used:].any()
        assert set(segments_T[:used]) == set(range(1, segments_T.max(initial=0) + 1))
        assert not tokens_T[used:].any() and not mask_T[used:].any()
        for segment in range(1, segments_T.max(initial=0) + 1):
            inside_T = segments_T == segment
            found.append((tuple(tokens_T[inside_T].tolist()), tuple(mask_T[inside_T].tolist())))
    expected = [(tuple(e.tokens), (False, *e.loss_mask[1:])) for e in rendered]
    assert sorted(found) == sorted(expected)
    if not packing:
        assert found == expected


@given(rendered=examples())
def test_no_row_could_have_taken_the_first_example_of_a_later_row(rendered: list[Rendered]) -> None:
    # First fit opens a row only when no earlier row has room for the example.
    segments_BxT = np.asarray(to_batch(rendered, LENGTH, True, pad_id=0).segments_BxT)
    free_B = (segments_BxT == 0).sum(axis=1)
    first_B = (segments_BxT == 1).sum(axis=1)
    for row in range(1, len(segments_BxT)):
        assert np.all(free_B[:row] < first_B[row])


def test_packing_fills_rows_where_it_can() -> None:
    rendered = [Rendered([1] * size, [True] * size) for size in (3, 6, 9, 6)]
    assert to_batch(rendered, LENGTH, True, 0).tokens_BxT.shape == (2, LENGTH)
    assert to_batch(rendered, LENGTH, False, 0).tokens_BxT.shape == (4, LENGTH)


def test_no_examples_make_an_empty_batch() -> None:
    assert to_batch([], LENGTH, True, 0).tokens_BxT.shape == (0, LENGTH)


def test_examples_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="example 2 has 13 tokens"):
        to_batch([Rendered([1], [True]), Rendered([1] * 13, [True] * 13)], LENGTH, False, 0)
    with pytest.raises(UserError, match="example 1 has 0 tokens"):
        to_batch([Rendered([], [])], LENGTH, False, 0)
    with pytest.raises(UserError, match="length must be at least 1"):
        to_batch([], 0, False, 0)
