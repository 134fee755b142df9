"""How integers lie in a masked upload: words modulo 2^m, in chunks, in m bits each.

| symbol | name | meaning |
|---|---|---|
| P | ``count`` | integers per client |
| M | ``max_abs`` | bound of every integer's absolute value |
| S | ``summands`` | most clients of one sum |
| m | ``bits`` | the fewest with 2^m > 2 S M: no sum of S clients wraps |
| E | ``elements`` | words of a chunk: the canary, then at most 2^18 - 1 integers |

The first word of every chunk is the canary, 1 from every client; in the sum it is the number of
clients. It fits: S <= 2 S M.

On the wire a chunk is a row of planes, one per binary digit of m: for m = 21 = 16 + 4 + 1 all
words' low 16 bits, then all next 4 bits, two words to a byte, then all last bits, eight words to a
byte. Planes are read and written by a few numpy operations over whole arrays, where a stream of
21-bit fields would have to be shifted together word by word.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedjax_llm.secure.sums import WrongSum, checked_plan

CHUNK_WORDS = 2**18

type Words = NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Layout:
    """P, M and S, and what follows from them."""

    count: int
    max_abs: int
    summands: int

    def __post_init__(self) -> None:
        """Raises UserError for sizes below 1 and for sums beyond int64."""
        checked_plan(self.count, self.max_abs, self.summands, minimum_clients=1)

    @property
    def bits(self) -> int:
        """m."""
        return (2 * self.max_abs * self.summands).bit_length()

    @property
    def word(self) -> np.dtype[np.unsignedinteger]:
        """The type that words are computed in; its overflow is a multiple of 2^m."""
        return np.dtype("<u4") if self.bits <= 32 else np.dtype("<u8")

    @property
    def chunks(self) -> int:
        """Chunks of one upload."""
        return -(-self.count // (CHUNK_WORDS - 1))

    def values(self, chunk: int) -> slice:
        """Which of the P integers this chunk holds."""
        first = chunk * (CHUNK_WORDS - 1)
        return slice(first, min(first + CHUNK_WORDS - 1, self.count))

    def elements(self, chunk: int) -> int:
        """E."""
        where = self.values(chunk)
        return where.stop - where.start + 1

    @property
    def payload_bytes(self) -> tuple[int, ...]:
        """Length of every chunk's payload."""
        sizes = {
            n: sum(_plane_bytes(n, width) for width in _planes(self.bits))
            for n in {self.elements(0), self.elements(self.chunks - 1)}
        }
        return tuple(sizes[self.elements(chunk)] for chunk in range(self.chunks))

    def words(self, ints_P: NDArray[np.integer], chunk: int) -> Words:
        """The canary and this chunk's integers, modulo the word."""
        words = np.empty(self.elements(chunk), self.word)
        words[0] = 1
        words[1:] = ints_P[self.values(chunk)].astype(np.int64).view(np.uint64)
        return words

    def integers(self, words: Words, clients: int) -> NDArray[np.int64]:
        """The sums in one chunk, once all masks are gone.

        Raises:
            WrongSum: the canary is not the number of clients, or a sum lies beyond their bound.
        """
        canary = int(words[0]) & ((1 << self.bits) - 1)
        if canary != clients:
            raise WrongSum(
                f"the canary of the sum is {canary}, not the {clients} of its clients: a client "
                "sent an upload under other masks than it had agreed on; repeat the round"
            )
        # To the top of the word and back, which extends the sign.
        unused = 8 * words.itemsize - self.bits
        shifted = (words[1:] << words.dtype.type(unused)).view(f"<i{words.itemsize}")
        values = (shifted >> shifted.dtype.type(unused)).astype(np.int64)
        worst = max(int(values.max(initial=0)), -int(values.min(initial=0)))
        if worst > clients * self.max_abs:
            raise WrongSum(
                f"a sum of {clients} clients has an entry of size {worst}, beyond their bound "
                f"{clients * self.max_abs}; repeat the round"
            )
        return values


def opening_bytes(clients: int) -> tuple[int, int]:
    """About what a client receives and sends around an upload, in all steps of a round: keys, deals
    and shares, with names and signatures. For plans; a round counts what it sends.

    Measured for groups of 2 to 16 clients with short names, from which it is off by 1 percent.
    """
    return 205 + 598 * clients, 458 + 257 * clients


def pack(words: Words, bits: int) -> NDArray[np.uint8]:
    """The low ``bits`` bits of every word, plane by plane; fill is 0."""
    parts = []
    done = 0
    for width in _planes(bits):
        plane = words >> words.dtype.type(done)
        done += width
        if width >= 8:
            parts.append(plane.astype(f"<u{width // 8}").view(np.uint8))
            continue
        per_byte = 8 // width
        small = np.zeros(-(-words.size // per_byte) * per_byte, np.uint8)
        small[: words.size] = plane & words.dtype.type((1 << width) - 1)
        packed = small[::per_byte].copy()
        for place in range(1, per_byte):
            packed |= small[place::per_byte] << np.uint8(width * place)
        parts.append(packed)
    return np.concatenate(parts)


def add_packed(words: Words, payload: memoryview, bits: int) -> None:
    """Adds what ``pack`` has written to ``words``, in place."""
    data = np.frombuffer(payload, np.uint8)
    at = done = 0
    for width in _planes(bits):
        size = _plane_bytes(words.size, width)
        plane = data[at : at + size]
        at += size
        values: Words
        if width >= 8:
            values = plane.view(f"<u{width // 8}").astype(words.dtype)
        else:
            per_byte = 8 // width
            small = np.empty((size, per_byte), np.uint8)
            for place in range(per_byte):
                small[:, place] = (plane >> np.uint8(width * place)) & np.uint8((1 << width) - 1)
            values = small.reshape(-1)[: words.size].astype(words.dtype)
        values <<= words.dtype.type(done)
        words += values
        done += width


def _planes(bits: int) -> list[int]:
    """The powers of two that add up to ``bits``, largest first."""
    return [1 << place for place in reversed(range(7)) if bits >> place & 1]


def _plane_bytes(words: int, width: int) -> int:
    return -(-words * width // 8)
