"""Framed messages between parties (key ceremony, decryption, key files): a kind, fields, a digest.

| offset | bytes | field |
|---|---|---|
| 0 | 4 | magic, ``FJS1`` |
| 4 | 16 | kind, ASCII, filled up with zeros |
| 20 | 2 | number of fields |
| | 8 | length of the first field, and so on |
| | | the first field, and so on |
| | 32 | SHA-256 of all that |

Numbers are unsigned and little-endian. The digest finds damage on the way and length mistakes. It
does not stop an attacker, who can compute it too; that is what the checks of the content, and
signatures, are for. A client's upload, which is long, has another format (``wire``).
"""

import hashlib
import struct

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
