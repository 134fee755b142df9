"""Random numbers with an address: (seed, purpose, cloud, index) names one number, in any order.

A simulation asks for the jitter of transfer 7 before that of transfer 3, or twice; both times it
must get the same number, on every machine. So numbers are not drawn one after the other but
looked up: Philox is a counter-based generator (Salmon et al., SC'11), which computes the block at
any position directly. NumPy promises a stable stream for the raw output of a bit generator, not for
the distributions made of it (NEP 19), so uniforms are made of the raw output here.
"""

import hashlib
from array import array

import numpy as np

# Uniforms computed at a time: starting the generator costs as much as this many of them.
_BLOCK = 128
_WORDS = 4  # 64-bit words for each step of Philox's counter


class Uniforms:
    """Independent uniform numbers in (0, 1], by index.

    Blocks already computed are kept; they do not change what is returned.
    """

    __slots__ = ("_block", "_blocks", "_first", "_key")

    def __init__(self, seed: int, purpose: str, cloud: str) -> None:
        """Addresses a sequence.

        Args:
            seed: of the simulation.
            purpose: what the numbers are for, so that two uses never share one.
            cloud: whose they are.
        """
        # A length before each part keeps ("a", "bc") and ("ab", "c") apart.
        parts = (str(seed), purpose, cloud)
        text = "".join(f"{len(part)}:{part}" for part in parts)
        self._key = np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], "<u8")
        # Bare doubles: of thousands of clouds, objects would not fit into a processor's cache.
        self._blocks: dict[int, array[float]] = {}
        # The block of the last answer, and its first index.
        self._block = array("d")
        self._first = -_BLOCK  # none yet: no index is in it

    def __call__(self, index: int) -> float:
        """The number at `index`, from 0."""
        place = index - self._first
        if not 0 <= place < _BLOCK:
            block, place = divmod(index, _BLOCK)
            if block not in self._blocks:
                self._blocks[block] = self._compute(block)
            self._block, self._first = self._blocks[block], block * _BLOCK
        return self._block[place]

    def _compute(self, block: int) -> "array[float]":
        counter = np.array([block * (_BLOCK // _WORDS), 0, 0, 0], np.uint64)
        raw = np.random.Philox(key=self._key, counter=counter).random_raw(_BLOCK)
        # The top 53 bits plus one: (0, 1] and never 0, whose logarithm is not finite.
        uniform = ((raw >> np.uint64(11)) + np.uint64(1)).astype(np.float64) * 2.0**-53
        return array("d", uniform.tobytes())
