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
    _check_lengths(rendered, length)
    rows = (
        _first_fit_decreasing(rendered, length) if packing else [[i] for i in range(len(rendered))]
    )
    return _laid_out(rendered, rows, length, pad_id)


def to_batch_by_user(rendered: Sequence[Rendered], length: int, pad_id: int) -> tuple[Batch, int]:
    """Lays examples out as one row a user, the unit that is then clipped.

    A row holds a user's examples in their order, each as a segment of its own, as long as they fit;
    what does not is left out, whatever others have.

    Args:
      rendered: N examples of 1 to `length` tokens, each with a user.
      length: T, tokens per row.
      pad_id: Token of the padding; its segment is 0.

    Returns:
      The batch, as `to_batch`, in the order in which users first occur, and how many examples did
      not fit.

    Raises:
      UserError: as `to_batch`; an example without a user.
    """
    _check_lengths(rendered, length)
    rows: dict[str, list[int]] = {}
    free: dict[str, int] = {}
    left_out = 0
    for index, example in enumerate(rendered):
        if not example.user:
            raise UserError(
                f"example {index + 1} does not say whose it is; map user to a column that is "
                "never empty, or use another privacy unit"
            )
        own = rows.setdefault(example.user, [])
        room = free.get(example.user, length)
        if len(example.tokens) > room:
            left_out += 1
            continue
        own.append(index)
        free[example.user] = room - len(example.tokens)
    return _laid_out(rendered, list(rows.values()), length, pad_id), left_out


def _check_lengths(rendered: Sequence[Rendered], length: int) -> None:
    if length < 1:
        raise UserError(f"length must be at least 1 token, got {length}")
    for number, example in enumerate(rendered, start=1):
        if not 1 <= len(example.tokens) <= length:
            raise UserError(
                f"example {number} has {len(example.tokens)} tokens, but a row holds 1 to "
                f"{length}; render with max_length = {length}"
            )


def _laid_out(
    rendered: Sequence[Rendered], rows: Sequence[Sequence[int]], length: int, pad_id: int
) -> Batch:
    """The examples of each row one after the other."""
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
