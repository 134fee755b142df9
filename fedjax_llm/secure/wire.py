"""Framed messages: a kind, fields of bytes and a digest.

The digest finds damage on the way and length mistakes. It does not stop an attacker, who can
compute it too; that is what the checks of the content, and signatures, are for.
"""

import hashlib
import struct

from fedjax_llm.errors import Refused
from fedjax_llm.secure.sums import BadMessage

MAGIC = b"FJS1"
_DIGEST_BYTES = 32
_MAX_FIELDS = 1024


def frame(kind: str, *fields: bytes) -> bytes:
    """One message: magic, kind, number of fields, each with its length, SHA-256 of all that."""
    head = [MAGIC, struct.pack("<16sH", kind.encode("ascii"), len(fields))]
    for content in fields:
        head += [struct.pack("<Q", len(content)), content]
    digest = hashlib.sha256()
    for part in head:
        digest.update(part)
    return b"".join([*head, digest.digest()])


def unframe(kind: str, fields: int, data: bytes, sender: str) -> list[bytes]:
    """The fields of a message of this kind.

    Raises:
        BadMessage: naming ``sender``: not such a message, truncated, or damaged.
    """
    if not isinstance(data, bytes) or len(data) < 22 + _DIGEST_BYTES or data[:4] != MAGIC:
        raise BadMessage(sender, f"no {kind} message (too short, or another format)")
    body = memoryview(data)[:-_DIGEST_BYTES]
    if hashlib.sha256(body).digest() != data[-_DIGEST_BYTES:]:
        raise BadMessage(sender, "truncated or damaged (digest differs)")
    found, count = struct.unpack_from("<16sH", data, 4)
    name = found.rstrip(b"\0")
    if name != kind.encode("ascii"):
        raise BadMessage(sender, f"a {name!r} message where {kind!r} was expected")
    if count != fields or count > _MAX_FIELDS:
        raise BadMessage(sender, f"{count} fields instead of {fields}")
    parts: list[bytes] = []
    at = 22
    for _ in range(count):
        if at + 8 > len(body):
            raise BadMessage(sender, "lengths do not add up")
        (size,) = struct.unpack_from("<Q", data, at)
        at += 8
        if size > len(body) - at:
            raise BadMessage(sender, "lengths do not add up")
        parts.append(bytes(body[at : at + size]))
        at += size
    if at != len(body):
        raise BadMessage(sender, "lengths do not add up")
    return parts


def message(
    kind: str, client: str, round_number: int, epoch: bytes, count: int, body: bytes
) -> bytes:
    """A client's upload: who, which round, under which keys, how many integers, and the body."""
    if not 0 <= round_number < 2**63:
        raise Refused(f"a round number must be in [0, 2^63), got {round_number}")
    numbers = struct.pack("<QQ", round_number, count)
    return frame(kind, client.encode(), numbers, epoch, body)


def open_message(
    kind: str, client: str, round_number: int, epoch: bytes, count: int, data: bytes
) -> bytes:
    """The body of an upload, once everything in front of it is what it should be.

    Raises:
        BadMessage: naming the client and what is wrong: sender, round, keys or length.
    """
    name, numbers, found_epoch, body = unframe(kind, 4, data, client)
    if name != client.encode():
        raise BadMessage(client, f"it was written by {name.decode('utf-8', 'replace')!r}")
    if len(numbers) != 16:
        raise BadMessage(client, "damaged header")
    found_round, found_count = struct.unpack("<QQ", numbers)
    if found_round != round_number:
        raise BadMessage(client, f"it belongs to round {found_round}, this is {round_number}")
    if found_epoch != epoch:
        raise BadMessage(client, "it is encrypted under other keys than this run's")
    if found_count != count:
        raise BadMessage(client, f"it holds {found_count} integers, expected {count}")
    return body
