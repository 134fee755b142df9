"""MinHash with banding: short signatures by which like texts are found without comparing all pairs.

A signature holds, for each of K hash functions, the least hash of a text's shingles. Two texts
agree in one of them with probability J, their Jaccard similarity (Broder 1997, section 3). Cut into
b bands of r values, two texts agree in a whole band with probability J^r, hence in at least one
with probability 1 - (1 - J^r)^b, a steep S-curve (Leskovec, Rajaraman and Ullman, "Mining of
Massive Datasets", section 3.4.2).

Everything follows from a public seed, so that clouds that never see each other's text make the same
signatures.

Letters: N texts, K hash functions, b bands of r rows (K >= b r).
"""

import math
from dataclasses import dataclass

import numpy as np

from fedjax_llm.data.harmonise.shingles import Shingles, mix64
from fedjax_llm.data.splitting import keyed_hash
from fedjax_llm.errors import UserError

MAX_HASHES = 1024
# Shingles hashed at once: small enough to stay in a processor's cache.
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Bands:
    """How signatures are cut.

    Attributes:
      bands: b, number of bands.
      rows: r, values of a band.
    """

    bands: int
    rows: int

    def probability(self, similarity: float, shared: int = 1) -> float:
        """The probability that two texts of a similarity agree in at least so many bands.

        Bands are independent, as they use different hash functions.

        >>> round(Bands(20, 5).probability(0.8), 4)
        0.9996
        """
        p = similarity**self.rows
        below = sum(
            math.comb(self.bands, n) * p**n * (1 - p) ** (self.bands - n) for n in range(shared)
        )
        return max(0.0, 1.0 - below)

    def shared_at(self, threshold: float, recall: float) -> int:
        """The largest number of bands in which a pair at the threshold agrees with this recall.

        Where texts cannot be compared, counting bands takes the place of comparing them: the count
        asked for is what tells 0.8 from 0.5.
        """
        counts = range(self.bands, 0, -1)
        return next((n for n in counts if self.probability(threshold, n) >= recall), 1)


def choose_bands(hashes: int, threshold: float, recall: float) -> Bands:
    """The cut with the longest bands that still finds a pair at the threshold with this recall.

    Long bands make few false candidates; recall at the threshold is the least recall of all pairs
    that count as duplicates, since it grows with similarity.

    Args:
      hashes: K, from 1 to 1024.
      threshold: Least similarity of a duplicate, in (0, 1].
      recall: In (0, 1).

    Raises:
      UserError: A value out of range, or too few hashes for the recall.
    """
    if not 1 <= hashes <= MAX_HASHES:
        raise UserError(f"hashes must be in [1, {MAX_HASHES}], got {hashes}")
    if not 0.0 < threshold <= 1.0:
        raise UserError(f"threshold must be above 0 and at most 1, got {threshold:g}")
    for rows in range(hashes, 0, -1):
        found = Bands(hashes // rows, rows)
        if found.probability(threshold) >= recall:
            return found
    raise UserError(
        f"{hashes} hashes find a pair of similarity {threshold:g} with less than {recall:g}; "
        "raise hashes or threshold"
    )


def signatures(shingles: Shingles, hashes: int, seed: int) -> np.ndarray:
    """The MinHash signatures of texts.

    The hash functions are multiply-shift, (a x + b mod 2^64) >> 32 with odd a (Dietzfelbinger et
    al. 1997), of shingle hashes that are scrambled already.

    Args:
      shingles: The sets of N texts.
      hashes: K.
      seed: Of the hash functions; public, and the same at every cloud.

    Returns:
      uint32 [N, K].
    """
    a_K, b_K = _functions(hashes, seed)
    signature_NxK = np.empty((len(shingles), hashes), np.uint32)
    start = 0
    while start < len(shingles):
        limit = shingles.offsets[start] + _BLOCK
        stop = max(start + 1, int(np.searchsorted(shingles.offsets, limit, side="right")) - 1)
        first = shingles.offsets[start]
        block_S = shingles.hashes_S[first : shingles.offsets[stop]]
        starts = shingles.offsets[start:stop] - first
        for k in range(hashes):
            hashed_S = ((a_K[k] * block_S + b_K[k]) >> np.uint64(32)).astype(np.uint32)
            signature_NxK[start:stop, k] = np.minimum.reduceat(hashed_S, starts)
        start = stop
    return signature_NxK


def band_values(signature_NxK: np.ndarray, bands: Bands) -> list[list[bytes]]:
    """The bands of each text as bytes: the number of the band, then its values.

    Two texts have an equal value exactly if they agree in all rows of one band.
    """
    cut_NxBxR = _cut(signature_NxK, bands).astype("<u4")
    names = [number.to_bytes(2, "big") for number in range(bands.bands)]
    return [
        [name + row.tobytes() for name, row in zip(names, cut_BxR, strict=True)]
        for cut_BxR in cut_NxBxR
    ]


def band_keys(signature_NxK: np.ndarray, bands: Bands) -> np.ndarray:
    """The bands of each text as 64-bit hashes, uint64 [N, b], for finding candidates at home."""
    cut_NxBxR = _cut(signature_NxK, bands).astype(np.uint64)
    key_NxB = np.zeros(cut_NxBxR.shape[:2], np.uint64)
    for row in range(bands.rows):
        key_NxB = mix64(key_NxB ^ cut_NxBxR[:, :, row])
    return key_NxB


def _cut(signature_NxK: np.ndarray, bands: Bands) -> np.ndarray:
    used = bands.bands * bands.rows
    return signature_NxK[:, :used].reshape(len(signature_NxK), bands.bands, bands.rows)


def _functions(hashes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Multipliers and addends, uint64 [K] each, from BLAKE2b, which no version of NumPy changes."""
    stream = b"".join(keyed_hash(f"minhash\0{k}", seed) for k in range(hashes))
    a_Kx2 = np.frombuffer(stream, "<u8").reshape(hashes, 2).astype(np.uint64)
    return a_Kx2[:, 0] | np.uint64(1), a_Kx2[:, 1]
