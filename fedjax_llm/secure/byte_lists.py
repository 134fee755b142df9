"""Any number of byte strings as one, and back: for names, rosters and keys inside of frames."""

import struct
from collections.abc import Iterable

from fedjax_llm.secure.sums import BadMessage


def join(items: Iterable[bytes]) -> bytes:
    """Each item behind its length, little-endian uint32. Injective; the empty list is ``b""``.

    >>> join([b"ab", b""])
    b'\\x02\\x00\\x00\\x00ab\\x00\\x00\\x00\\x00'
    """
    return b"".join(struct.pack("<I", len(item)) + item for item in items)


def split(data: bytes, sender: str) -> list[bytes]:
    """The inverse of ``join``.

    Raises:
        BadMessage: naming ``sender``: the lengths do not add up.
    """
    items, at = [], 0
    while at < len(data):
        end = at + 4
        if end <= len(data):
            end += struct.unpack_from("<I", data, at)[0]
        if end > len(data):
            raise BadMessage(sender, "the lengths of its list do not add up")
        items.append(data[at + 4 : end])
        at = end
    return items


def split_names(data: bytes, sender: str) -> tuple[str, ...]:
    """The names of a joined list of UTF-8 strings; ``BadMessage`` where it is none."""
    try:
        return tuple(item.decode() for item in split(data, sender))
    except UnicodeDecodeError as err:
        raise BadMessage(sender, "a name in its list is not UTF-8") from err


def join_names(names: Iterable[str]) -> bytes:
    """The inverse of ``split_names``."""
    return join(name.encode() for name in names)
