"""A client's upload on the wire: chunks that are numbered, named and under a MAC.

All integers are unsigned and little-endian. n is the length of the client's name in
bytes, L that of the payload.

| offset | bytes | field |
|---|---|---|
| 0 | 4 | magic, ``FJS2`` |
| 4 | 2 | version, 1 |
| 6 | 1 | kind: 1 plain, 2 masked, 3 threshold, 4 bfv, 5 ckks |
| 7 | 1 | flags, 0 |
| 8 | 16 | parameters: ``parameters_digest`` of kind, count, bound, summands and the mode's own |
| 24 | 16 | epoch: names the keys that the payload is encrypted under; 0 where there are none |
| 40 | 16 | upload: random, the same in all chunks of one upload |
| 56 | 8 | round |
| 64 | 8 | count: integers of the whole upload |
| 72 | 4 | chunk: number of this chunk, from 0 |
| 76 | 4 | chunks: how many chunks the upload has |
| 80 | 8 | L |
| 88 | 2 | n |
| 90 | n | the client's name in UTF-8 |
| 90 + n | L | payload |
| 90 + n + L | 16 | MAC |

The MAC is AES-256-GMAC (the tag of AES-GCM over no plaintext) over all bytes before it, with the
chunk number as nonce (12 bytes) and the key HKDF-SHA256(channel key, salt = upload, info =
"fedjax-llm upload" | parameters | epoch | round | client). The channel key is known to this
client and the server only; see ``channels``.
"""

import hashlib
import hmac
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedjax_llm.errors import Refused
from fedjax_llm.secure.sums import BadMessage, checked_round

KINDS = {"plain": 1, "masked": 2, "threshold": 3, "bfv": 4, "ckks": 5}
NO_EPOCH = bytes(16)
MAC_BYTES = 16
_NAMES = {number: kind for kind, number in KINDS.items()}
_CHUNK_MAGIC, _VERSION = b"FJS2", 1
_HEAD = struct.Struct("<4sHBB16s16s16sQQIIQH")
_MAX_NAME_BYTES = 255

type Payload = bytes | bytearray | memoryview | NDArray[np.generic]


@dataclass(frozen=True)
class Header:
    """What all chunks of an upload say of themselves, and what a receiver expects them to say.

    Attributes:
        kind: one of ``KINDS``.
        parameters: 16 bytes, from ``parameters_digest``.
        epoch: 16 bytes.
        round_number: in [0, 2^63).
        count: integers of the whole upload.
        client: its name, printable, 1 to 255 bytes of UTF-8.
    """

    kind: str
    parameters: bytes
    epoch: bytes
    round_number: int
    count: int
    client: str

    def __post_init__(self) -> None:
        """Refuses what the wire cannot carry."""
        checked_round(self.round_number)
        client_bytes(self.client)
        if self.kind not in KINDS or not 0 <= self.count < 2**63:
            raise ValueError(f"no message of kind {self.kind!r} with {self.count} integers")
        if len(self.parameters) != 16 or len(self.epoch) != 16:
            raise ValueError("parameters and epoch take 16 bytes each")


def client_bytes(client: str) -> bytes:
    """A client's name as it stands in a chunk, or a refusal if it cannot stand there."""
    try:
        name = client.encode()
    except UnicodeEncodeError:
        name = b""
    if not (0 < len(name) <= _MAX_NAME_BYTES and client.isprintable()):
        raise Refused(
            f"a client's name must be printable, of 1 to {_MAX_NAME_BYTES} bytes, got "
            f"{client[:80]!r}"
        )
    return name


def parameters_digest(
    kind: str, count: int, max_abs: int, summands: int, *scheme: int | str | bytes
) -> bytes:
    """16 bytes that name everything client and server must agree on before keys.

    Args:
        kind: one of ``KINDS``.
        count: integers per client.
        max_abs: bound of every integer's absolute value.
        summands: most clients of one sum.
        *scheme: the mode's own parameters, in a fixed order.
    """
    digest = hashlib.sha256(b"fedjax-llm parameters")
    for part in (kind, count, max_abs, summands, *scheme):
        text = part if isinstance(part, bytes) else f"{type(part).__name__} {part}".encode()
        digest.update(struct.pack("<Q", len(text)) + text)
    return digest.digest()[:16]


def upload_bytes(client: str, payload_bytes: Sequence[int]) -> int:
    """Length of all chunks of an upload with payloads of these lengths."""
    head = _HEAD.size + len(client_bytes(client)) + MAC_BYTES
    return head * len(payload_bytes) + sum(payload_bytes)


class UploadWriter:
    """Puts header and MAC around the payloads of one upload.

    Formal guarantee. Who does not hold the channel key makes the server accept one chunk that
    this writer did not write, at its place, with a probability of at most
    (L / 16 + 24) / 2^128 per attempt, plus the advantage against AES-256 as a pseudorandom
    function and HKDF (NIST SP 800-38D; the nonce argument below is its condition). So the chunks
    of an upload cannot be altered, reordered, repeated, exchanged with those of another upload,
    or moved to another round, client or key. The server holds the key as well: to a third party
    the MAC proves nothing.

    A nonce never repeats under a key: the key depends on 16 random bytes drawn here, and within
    the upload the writer itself counts the chunks.

    | case | result |
    |---|---|
    | more payloads than announced | Refused, for a nonce would have to be invented |
    | fewer | the receiver refuses the upload as incomplete |
    | empty payload | a chunk like any other |
    """

    def __init__(self, header: Header, channel_key: bytes, chunks: int) -> None:
        """Draws the upload's identity.

        Args:
            header: what the chunks say of themselves.
            channel_key: 32 bytes that only this client and the server hold.
            chunks: how many there will be, in [1, 2^32).
        """
        if not 0 < chunks < 2**32:
            raise ValueError(f"an upload has 1 to 2^32 - 1 chunks, not {chunks}")
        self._header, self._chunks, self._next = header, chunks, 0
        self._upload_id = secrets.token_bytes(16)
        self._key = _upload_key(header, channel_key, self._upload_id)

    def write(self, payload: Payload) -> bytes:
        """The next chunk. The payload, of any contiguous buffer, is copied once, into the chunk.

        Raises:
            Refused: all chunks that were announced have been written.
        """
        if self._next == self._chunks:
            raise Refused(
                f"upload of {self._header.client!r}: all {self._chunks} chunks are written"
            )
        body = _flat(payload)
        header, chunk, name = self._header, self._next, self._header.client.encode()
        self._next += 1
        head = _HEAD.pack(
            _CHUNK_MAGIC,
            _VERSION,
            KINDS[header.kind],
            0,
            header.parameters,
            header.epoch,
            self._upload_id,
            header.round_number,
            header.count,
            chunk,
            self._chunks,
            len(body),
            len(name),
        )
        return b"".join((head, name, body, _mac(self._key, chunk, head + name, body)))


def read_chunk(
    expected: Header,
    channel_key: bytes,
    upload_id: bytes | None,
    chunk: int,
    chunks: int,
    payload_bytes: int,
    data: bytes,
) -> tuple[memoryview, bytes]:
    """Checks one chunk and returns its payload without copying it.

    Total: any ``data`` gives a payload or a BadMessage. The MAC is checked last, so that honest
    mistakes are named; whoever is without the key can at most choose which reason is given.

    Args:
        expected: what the chunk must say of itself.
        channel_key: 32 bytes that only this client and the server hold.
        upload_id: that of the chunks before, None for the first.
        chunk: its number.
        chunks: how many the upload has.
        payload_bytes: length of its payload.
        data: what arrived. Only ``bytes``, which nobody can change after the check.

    Returns:
        The payload and the upload's identity.

    Raises:
        BadMessage: naming the client and the first difference.
    """

    def bad(reason: str) -> BadMessage:
        return BadMessage(expected.client, reason)

    if not isinstance(data, bytes) or len(data) < _HEAD.size + MAC_BYTES:
        raise bad("it is no chunk (too short, or another format)")
    fields = _HEAD.unpack_from(data)
    magic, version, kind, flags, parameters, epoch, found_id, round_number, count = fields[:9]
    found_chunk, found_chunks, size, name_bytes = fields[9:]
    start = _HEAD.size + name_bytes
    if magic != _CHUNK_MAGIC:
        raise bad("it is no chunk (too short, or another format)")
    if (version, flags) != (_VERSION, 0):
        raise bad(f"format version {version} with flags {flags}; this is version {_VERSION}, 0")
    if kind != KINDS[expected.kind]:
        found = _NAMES.get(kind, "an unknown kind")
        raise bad(f"it is of kind {found}, expected {expected.kind}")
    if parameters != expected.parameters:
        raise bad("it was made for other parameters (length, bound, summands or scheme)")
    if epoch != expected.epoch:
        raise bad("it is encrypted under other keys than this run's")
    if len(data) < start + MAC_BYTES:
        raise bad("truncated")
    name = data[_HEAD.size : start]
    if name != expected.client.encode():
        raise bad(f"it was written by {name[:64].decode('utf-8', 'replace')!r}")
    if round_number != expected.round_number:
        raise bad(f"it belongs to round {round_number}, this is {expected.round_number}")
    if count != expected.count:
        raise bad(f"it holds {count} integers, expected {expected.count}")
    if found_chunks != chunks:
        raise bad(f"it is an upload of {found_chunks} chunks, expected {chunks}")
    if found_chunk != chunk:
        raise bad(
            f"chunk {found_chunk} came where {chunk} was expected: missing, repeated or reordered"
        )
    if upload_id is not None and found_id != upload_id:
        raise bad(f"chunk {chunk} is from another upload of this client")
    if size != payload_bytes or len(data) != start + size + MAC_BYTES:
        raise bad(
            f"chunk {chunk} is truncated or too long ({len(data)} bytes, expected "
            f"{start + payload_bytes + MAC_BYTES})"
        )
    signed = memoryview(data)[:-MAC_BYTES]
    mac = _mac(_upload_key(expected, channel_key, found_id), chunk, signed)
    if not hmac.compare_digest(mac, data[-MAC_BYTES:]):
        raise bad(f"chunk {chunk} is damaged or forged (MAC differs)")
    return signed[start:], found_id


def _upload_key(header: Header, channel_key: bytes, upload_id: bytes) -> bytes:
    if len(channel_key) != 32:
        raise ValueError(f"a channel key has 32 bytes, not {len(channel_key)}")
    number = struct.pack("<Q", header.round_number)
    info = b"fedjax-llm upload" + header.parameters + header.epoch + number + header.client.encode()
    return HKDF(SHA256(), 32, upload_id, info).derive(channel_key)


def _mac(key: bytes, chunk: int, *parts: bytes | memoryview) -> bytes:
    encryptor = Cipher(algorithms.AES256(key), modes.GCM(struct.pack("<Q4x", chunk))).encryptor()
    for part in parts:
        encryptor.authenticate_additional_data(part)
    encryptor.finalize()
    return encryptor.tag


def _flat(payload: Payload) -> memoryview:
    view = memoryview(payload)
    return view.cast("B") if view.nbytes else memoryview(b"")
