"""Selective encryption: some coordinates of a message go through a sum that hides, the rest not.

This is the "hybrid encrypted and plaintext aggregation" of arXiv 2503.12226; choosing coordinates
by a map of sensitivities is FedML-HE's idea (arXiv 2303.10837). What stays in the clear is read
by the server, client by client. Whether that may be is not for this module to say: a federation
allows it only where every client has noised its own update (``federation.promises``).

Which coordinates are encrypted is public: the server sees who sends what in which form. A choice
that was computed from private data would betray something of them.

Notation: P coordinates of a message, E of them encrypted.
"""

import fnmatch
import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.errors import Refused, UserError
from fedjax_llm.secure.channels import Channels
from fedjax_llm.secure.plain import PlainSum
from fedjax_llm.secure.sums import Costs, Opening, RoundSum, SecureSum, checked_ints, collect

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
                parts.append(f"{_percent(clear / size)} of {kind}{where}")
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
        mask_P, tuple(blocks), f"the most sensitive {_percent(fraction)} by the map {source}"
    )


class SelectiveSum:
    """One sum out of two: a hiding one for the selected coordinates, a plain one for the rest.

    Formal guarantee. The total is that of either kind of sum, bit for bit. The selected coordinates
    have the guarantee of ``hidden``, the others none: the server reads them for every client. An
    upload is added as a whole or not at all. The parameters of the plain part, which comes first,
    name the selection: an upload that was made for another one, though of the same sizes, is
    refused. Each part carries its own MAC; the two parts of one upload are not bound to each other
    beyond client, round and parameters, so that a client that sends two uploads in a round may
    find one part of each added.

    | upload | result |
    |---|---|
    | a bad or missing chunk in either part | BadMessage, neither part is added |
    | the two parts in the other order | BadMessage |
    | for another selection | BadMessage |
    | one whose adding broke off between the parts, or in one of them | the round refuses all else |
    """

    def __init__(
        self, hidden: SecureSum, selection: Selection, channels: Channels | None = None
    ) -> None:
        """Puts a plain sum for the rest beside ``hidden``.

        Args:
            hidden: a sum of as many integers as the selection encrypts.
            selection: which coordinates those are.
            channels: MAC keys of the plain part, as a rule the same that ``hidden`` has; None
                simulates all parties in this process.
        """
        if hidden.count != selection.encrypted:
            raise ValueError(f"{hidden.count} integers are summed, {selection.encrypted} selected")
        self._hidden, self._selection = hidden, selection
        self._clear = PlainSum(
            selection.mask_P.size - selection.encrypted,
            hidden.max_abs,
            hidden.summands,
            hidden.minimum_clients,
            channels,
            selection.digest,
        )

    @property
    def kind(self) -> str:
        """That of the hiding sum."""
        return self._hidden.kind

    @property
    def count(self) -> int:
        """P."""
        return self._selection.mask_P.size

    @property
    def max_abs(self) -> int:
        """Bound of every integer's absolute value."""
        return self._hidden.max_abs

    @property
    def summands(self) -> int:
        """Most clients of one sum."""
        return self._hidden.summands

    @property
    def minimum_clients(self) -> int:
        """Fewest clients of one sum."""
        return self._hidden.minimum_clients

    def statement(self) -> str:
        """Who can decrypt what, which part that is about, and what the rest leaves open."""
        chosen = self._selection
        return (
            f"{self._hidden.statement()}. Selective: only {_percent(chosen.fraction)} of the "
            f"parameters ({chosen.encrypted:,} of {self.count:,}; {chosen.reason}) are encrypted. "
            f"In the clear, read by the server for every client: {chosen.in_the_clear()}"
        )

    def check_alive(self, alive: Sequence[str]) -> None:
        """Raises BelowThreshold if these parties could not decrypt the encrypted part."""
        self._hidden.check_alive(alive)

    def upload(self, client: str, round_number: int, ints_P: Any) -> Iterator[bytes]:
        """The chunks of the plain part, then those of the encrypted one."""
        ints = checked_ints(client, ints_P, self.count, self.max_abs)
        mask_P = self._selection.mask_P
        return itertools.chain(
            self._clear.upload(client, round_number, ints[~mask_P]),
            self._hidden.upload(client, round_number, ints[mask_P]),
        )

    def upload_bytes(self, client: str) -> int:
        """Exact length of one upload."""
        return self._clear.upload_bytes(client) + self._hidden.upload_bytes(client)

    @property
    def opening(self) -> Opening:
        """Of the hidden part."""
        return self._hidden.opening

    def begin(self, round_number: int) -> "SelectiveRound":
        """The server's side of this round."""
        return SelectiveRound(
            round_number,
            self._hidden.begin(round_number),
            self._clear.begin(round_number),
            len(self._clear.payload_bytes),
            self._selection.mask_P,
        )


class SelectiveRound:
    """The server of one round of a ``SelectiveSum``."""

    def __init__(
        self,
        round_number: int,
        hidden: RoundSum,
        clear: RoundSum,
        clear_chunks: int,
        mask_P: NDArray[np.bool_],
    ) -> None:
        """Nothing is added yet."""
        self._round, self._hidden, self._clear = round_number, hidden, clear
        self._clear_chunks, self._mask_P = clear_chunks, mask_P

    @property
    def participants(self) -> tuple[str, ...]:
        """Whose uploads have been added, sorted."""
        return self._hidden.participants

    @property
    def costs(self) -> Costs:
        """Of both parts."""
        hidden, clear = self._hidden.costs, self._clear.costs
        stages = {**hidden.seconds, **clear.seconds}
        seconds = {s: hidden.seconds.get(s, 0.0) + clear.seconds.get(s, 0.0) for s in stages}
        return Costs(dict(hidden.bytes_up), dict(hidden.bytes_down), seconds)

    def add(self, client: str, upload: Iterable[bytes]) -> None:
        """Adds both parts or neither; see ``RoundSum``."""
        self._require_same_participants()
        chunks = iter(upload)

        def clear() -> Iterator[bytes]:
            taken = 0
            for chunk in itertools.islice(chunks, self._clear_chunks):
                taken += 1
                yield chunk
            # The plain sum has verified its last chunk and asks for the end: nothing that a client
            # sends can fail in it any more. What the other sum raises here passes through it and
            # leaves it as it was. If its disk fails after that, the participants differ.
            if taken == self._clear_chunks:
                self._hidden.add(client, chunks)

        self._clear.add(client, clear())

    def pieces(self, alive: Sequence[str] = ()) -> Iterator[NDArray[np.int64]]:
        """The total, one piece for each of the encrypted part with what lies between and before."""
        self._require_same_participants()
        clear_P: NDArray[np.int64] | None = None
        start = clear_start = found = 0
        encrypted = int(np.count_nonzero(self._mask_P))
        places = np.flatnonzero(self._mask_P)
        for piece in self._hidden.pieces(alive):
            if not piece.size:
                continue
            if clear_P is None:
                # Not before the other sum is sure to open: this one opens once only.
                clear_P = collect(self._clear).total_P
            found += piece.size
            stop = self._mask_P.size if found == encrypted else int(places[found - 1]) + 1
            mask = self._mask_P[start:stop]
            out = np.empty(stop - start, np.int64)
            out[mask] = piece
            clear_stop = clear_start + mask.size - piece.size
            out[~mask] = clear_P[clear_start:clear_stop]
            start, clear_start = stop, clear_stop
            yield out

    def _require_same_participants(self) -> None:
        for client in set(self._hidden.participants) ^ set(self._clear.participants):
            raise Refused(
                f"round {self._round} broke off while adding {client!r}: one part of its upload is "
                "in the sum, the other is not; start it anew"
            )


def _percent(fraction: float) -> str:
    """Two digits, without claiming all or nothing.

    >>> _percent(0.3), _percent(0.9999), _percent(0.00001)
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
