"""Bytes of a secure sum from its parameters alone: no key is made and no context is opened.

A sum that is set up counts its own bytes (``SecureSum.upload_bytes``, ``opening``). Whoever
compares many settings before one is set up gets the same numbers here, from what is public.

| kind | an upload is | where the numbers come from |
|---|---|---|
| plain | integers of 2, 4 or 8 bytes | ``plain`` |
| masked | words of as many bits as the sum needs | ``masked_layout`` |
| threshold | a BFV ciphertext of the secret, then ring elements | ``key_layer``, ``ring_table`` |
| bfv, ckks | ciphertexts, every residue in its prime's bits | ``parameters``, ``ckks_parameters`` |
"""

from dataclasses import dataclass
from functools import lru_cache

from fedjax_llm.secure import ckks_parameters, parameters, ring_table
from fedjax_llm.secure.masked_layout import Layout, opening_bytes
from fedjax_llm.secure.plain import PlainSum
from fedjax_llm.secure.ring_message import RingLayout
from fedjax_llm.secure.sums import Opening
from fedjax_llm.secure.wire import upload_bytes
from fedjax_llm_kernels.ring_parameters import CBD_ETA


@dataclass(frozen=True)
class SumSizes:
    """Bytes of one sum.

    Attributes:
        payload_bytes: of each chunk of an upload, without headers.
        opening: what opening the total takes.
    """

    payload_bytes: tuple[int, ...]
    opening: Opening

    def upload_bytes(self, client: str) -> int:
        """Exact length of one upload of this client, headers and MACs included."""
        return upload_bytes(client, self.payload_bytes)


@lru_cache(maxsize=1024)
def sum_sizes(
    kind: str, clients: int, threshold: int, count: int, max_abs: int, summands: int
) -> SumSizes:
    """The sizes of a sum.

    Args:
        kind: one of ``wire.KINDS``.
        clients: that hold a key share, or mask each other.
        threshold: of them open a total together.
        count: integers per client.
        max_abs: bound of every integer's absolute value.
        summands: most clients of one sum.

    Raises:
        UserError: as setting up that sum: no parameters for these bounds.

    >>> sum_sizes("masked", 3, 2, 1000, 127, 3).payload_bytes
    (1252,)
    """
    if kind == "plain":
        return SumSizes(PlainSum(count, max_abs, summands).payload_bytes, Opening())
    if kind == "masked":
        payload = Layout(count, max_abs, summands).payload_bytes
        return SumSizes(payload, Opening(threshold, *opening_bytes(clients)))
    parties = max(2, clients)
    if kind == "threshold":
        ring = ring_table.choose(max_abs, summands, count)
        layout, size = RingLayout(ring, count), ring.ring.size
        sealed = parameters.choose(CBD_ETA, summands, parties, size, one_ciphertext=True)
        key = sealed.ciphertext_bytes
        payload = (key, *[layout.chunk_bytes] * layout.chunks)
        return SumSizes(payload, Opening(threshold, key // 2, key // 2))
    if kind == "bfv":
        bfv = parameters.choose(max_abs, summands, parties, count)
        payload = (bfv.ciphertext_bytes,) * bfv.ciphertexts(count)
    elif kind == "ckks":
        ckks = ckks_parameters.choose_ckks(max_abs, summands, parties)
        payload = (ckks.ciphertext_bytes,) * ckks.ciphertexts(count)
    else:
        raise ValueError(f"no sum of kind {kind!r}")
    half = sum(payload) // 2
    return SumSizes(payload, Opening(threshold, half, half))
