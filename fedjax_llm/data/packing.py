"""Packing: rendered examples as rows of one rectangular batch."""

from collections.abc import Sequence

import numpy as np

from fedjax_llm.data.rendering import Rendered
from fedjax_llm.errors import UserError
from fedjax_llm.models.batch import Batch


def to_batch(rendered: Sequence[Rendered], length: int, packing: bool, pad_id: int) -> Batch:
    """Lays examples out as rows of `length` tokens.

    Args:
      rendered: N examples of 1 to `length` tokens.
      length: T, tokens per row.
      packing: False puts example i alone in row i, as example-level privacy needs (a row is then
        the unit that is clipped). True packs several examples into a row, first fit in order of
        decreasing length; `segments_BxT` numbers them from 1 within the row.
      pad_id: Token of the padding; its segment is 0.

    Returns:
      A batch of numpy arrays: int32 tokens, bool loss mask, int32 segments, each [B, T]. The loss
      mask is false on padding and on the first token of each segment, which nothing predicts.

    Raises:
      UserError: `length` is not positive, or an example is empty or longer than `length`.
    """
    if length < 1:
        raise UserError(f"length must be at least 1 token, got {length}")
    for number, example in enumerate(rendered, start=1):
        if not 1 <= len(example.tokens) <= length:
            raise UserError(
                f"example {number} has {len(example.tokens)} tokens, but a row holds 1 to "
                f"{length}; render with max_length = {length}"
            )
    rows = (
        _first_fit_decreasing(rendered, length) if packing else [[i] for i in range(len(rendered))]
    )
    tokens_BxT = np.full((len(rows), length), pad_id, np.int32)
    loss_mask_BxT = np.zeros((len(rows), length), np.bool_)
    segments_BxT = np.zeros((len(rows), length), np.int32)
    for row, members in enumerate(rows):
        start = 0
        for segment, member in enumerate(members, start=1):
            example = rendered[member]
            stop = start + len(example.tokens)
            tokens_BxT[row, start:stop] = example.tokens
            loss_mask_BxT[row, start + 1 : stop] = example.loss_mask[1:]
            segments_BxT[row, start:stop] = segment
            start = stop
    return Batch(tokens_BxT, loss_mask_BxT, segments_BxT)


def _first_fit_decreasing(rendered: Sequence[Rendered], length: int) -> list[list[int]]:
    """Returns the indices of each row's examples; ties keep the order of `rendered`."""
    rows: list[list[int]] = []
    free_B = np.zeros(len(rendered), np.int64)  # at most one row per example
    for index in sorted(range(len(rendered)), key=lambda i: -len(rendered[i].tokens)):
        need = len(rendered[index].tokens)
        fits_B = free_B[: len(rows)] >= need
        row = int(np.argmax(fits_B)) if fits_B.any() else len(rows)
        if row == len(rows):
            rows.append([])
            free_B[row] = length
        rows[row].append(index)
        free_B[row] -= need
    return rows
