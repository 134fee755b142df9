"""Which coordinates of a message are encrypted, where not all of them are.

Choosing coordinates by a map of sensitivities is FedML-HE's idea (arXiv 2303.10837). The choice is
public: the server sees who sends what in which form. One that was computed from private data would
betray something of them.

Notation: P coordinates of a message, E of them encrypted.
"""

import fnmatch
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.errors import UserError

_LAYER = re.compile(r"\blayers\.(\d+)\.")


class Block(NamedTuple):
    """Consecutive coordinates of a message that share a name.

    Attributes:
        name: such as ``layers.3.self_attn.o_proj.lora_B``.
        shape: of the matrix that they are; row-major.
    """

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Coordinates."""
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Selection:
    """Which coordinates of a message are encrypted.

    Attributes:
        mask_P: bool, true where encrypted; some are and some are not.
        blocks: the coordinates by name, in order.
        reason: how they were chosen, in words.
    """

    mask_P: NDArray[np.bool_]
    blocks: tuple[Block, ...]
    reason: str

    def __post_init__(self) -> None:
        """Checks that both parts hold something."""
        size = sum(block.size for block in self.blocks)
        if self.mask_P.dtype != np.bool_ or self.mask_P.shape != (size,):
            raise ValueError(f"a mask of {size} bools, not {self.mask_P.shape}")
        if self.encrypted in (0, size):
            what = "every" if self.encrypted else "no"
            cure = "leave selective out" if self.encrypted else "choose more"
            raise UserError(f"{self.reason} encrypts {what} parameter; {cure}")

    @property
    def encrypted(self) -> int:
        """E."""
        return int(np.count_nonzero(self.mask_P))

    @property
    def digest(self) -> bytes:
        """32 bytes that name P and the mask; not the names of blocks, nor the reason."""
        shape = f"fedjax-llm selection {self.mask_P.size} ".encode()
        return hashlib.sha256(shape + np.packbits(self.mask_P).tobytes()).digest()

    @property
    def fraction(self) -> float:
        """E / P."""
        return self.encrypted / self.mask_P.size

    def in_the_clear(self) -> str:
        """What is left open, by kind of matrix and by layer.

        >>> blocks = [Block(f"layers.{k}.{name}", (2,)) for name in "ab" for k in range(3)]
        >>> by_layers(blocks, ["*.a", "layers.1.b"]).in_the_clear()
        '67 % of b (all of layers 0, 2)'
        """
        kinds: dict[str, list[tuple[int | None, int, int]]] = {}
        ends = np.cumsum([block.size for block in self.blocks])
        for block, end in zip(self.blocks, ends, strict=True):
            clear = block.size - int(np.count_nonzero(self.mask_P[end - block.size : end]))
            layer = _LAYER.search(block.name)
            kind = _LAYER.sub("", block.name, count=1)
            kinds.setdefault(kind, []).append((int(layer[1]) if layer else None, clear, block.size))
        parts = []
        for kind, counted in kinds.items():
            clear, size = (sum(column) for column in list(zip(*counted, strict=True))[1:])
            whole = [k for k, found, of in counted if found == of and k is not None]
            if clear == size:
                parts.append(f"all of {kind}")
            elif clear:
                plural = "s" if len(whole) > 1 else ""
                where = f" (all of layer{plural} {_ranges(whole)})" if whole else ""
                parts.append(f"{percent(clear / size)} of {kind}{where}")
        return ", ".join(parts)


def by_layers(blocks: Sequence[Block], patterns: Sequence[str]) -> Selection:
    """Encrypts the blocks whose names match one of the shell-style patterns.

    Raises:
        UserError: a pattern that matches nothing, or patterns that leave nothing in the clear.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(block.name, pattern) for block in blocks):
            raise UserError(
                f"selective layers: {pattern!r} matches no trained parameter; there are "
                f"{blocks[0].name} to {blocks[-1].name}"
            )
    parts = [
        np.full(block.size, any(fnmatch.fnmatchcase(block.name, pattern) for pattern in patterns))
        for block in blocks
    ]
    return Selection(np.concatenate(parts), tuple(blocks), f"layers {', '.join(patterns)}")


def by_sensitivity(
    blocks: Sequence[Block], sensitivity_P: NDArray[np.floating], fraction: float, source: str
) -> Selection:
    """Encrypts the given fraction of the coordinates, the most sensitive ones, rounded up.

    | sensitivities | effect |
    |---|---|
    | equal at the border | the earlier coordinates are encrypted |
    | all zero | the first coordinates are encrypted |
    | NaN, infinite, negative, another number of them | UserError |

    Args:
        blocks: the coordinates by name.
        sensitivity_P: one number of at least 0 for each coordinate; only their order counts.
        fraction: in (0, 1).
        source: where the map comes from, in words.
    """
    size = sum(block.size for block in blocks)
    if sensitivity_P.shape != (size,):
        raise UserError(
            f"the sensitivity map {source} has shape {sensitivity_P.shape}, the run trains {size} "
            "parameters; make the map for this model, adapter and rule"
        )
    if not np.isfinite(sensitivity_P).all() or (sensitivity_P < 0).any():
        raise UserError(
            f"the sensitivity map {source} holds a value that is negative or not finite; "
            "give the magnitude of each parameter's sensitivity"
        )
    if not 0 < fraction < 1:
        raise UserError(f"selective fraction must be between 0 and 1, got {fraction:g}")
    order = np.argsort(-sensitivity_P, kind="stable")
    mask_P = np.zeros(size, np.bool_)
    mask_P[order[: math.ceil(fraction * size)]] = True
    return Selection(
        mask_P, tuple(blocks), f"the most sensitive {percent(fraction)} by the map {source}"
    )


def percent(fraction: float) -> str:
    """Two digits, without claiming all or nothing.

    >>> percent(0.3), percent(0.9999), percent(0.00001)
    ('30 %', '99.99 %', '0.001 %')
    """
    percent = 100 * fraction
    if 99 < percent < 100:
        return f"{min(percent, 99.99):.2f} %"
    return f"{percent:.2g} %" if percent < 1 else f"{percent:.0f} %"


def _ranges(numbers: Sequence[int]) -> str:
    """Consecutive numbers as ranges.

    >>> _ranges([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
