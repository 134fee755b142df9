"""Which symbol versions an ELF library asks for, and the few bytes that make it ask for less.

Pure: bytes in, bytes out; nothing here opens a file. Only what the dynamic loader itself reads is
consulted (the tables that ``PT_DYNAMIC`` points at), so stripped libraries work as well.
Sources: System V ABI (gABI) chapter 5; the GNU symbol-versioning tables in the Linux Standard
Base 5.0, section 10.7; ``VER_FLG_WEAK`` as glibc's ``elf/dl-version.c`` applies it.
"""

import struct
from dataclasses import dataclass

from fedjax_llm.errors import UserError

PT_LOAD, PT_DYNAMIC = 1, 2
DT_NULL, DT_PLTRELSZ, DT_HASH, DT_STRTAB, DT_SYMTAB = 0, 2, 4, 5, 6
DT_RELA, DT_RELASZ, DT_STRSZ, DT_JMPREL = 7, 8, 10, 23
DT_GNU_HASH, DT_VERSYM, DT_VERNEED, DT_VERNEEDNUM = 0x6FFFFEF5, 0x6FFFFFF0, 0x6FFFFFFE, 0x6FFFFFFF
SYMBOL_BYTES, RELA_BYTES = 24, 24
VER_NDX_GLOBAL = 1
VER_NDX_MASK = 0x7FFF  # the top bit of a version index only hides a symbol
VER_FLG_WEAK = 2


class NotElf(UserError):
    """The bytes are not a complete little-endian 64-bit ELF library."""


@dataclass(frozen=True)
class Recipe:
    """What may be changed, by name; everything else that is too new is refused.

    Attributes:
        versions: version names the machine lacks, to be marked weak.
        rename: undefined symbol -> older symbol with the same behaviour. The new name must be a
            tail of the old one, so that it already stands in the string table.
        unused: undefined symbols that carry such a version but that no relocation refers to.
    """

    versions: frozenset[str]
    rename: dict[str, str]
    unused: frozenset[str]


@dataclass(frozen=True)
class Edit:
    """Bytes to write at an offset of the file, and why."""

    offset: int
    data: bytes
    reason: str


@dataclass(frozen=True)
class _Image:
    data: bytes
    loads: tuple[tuple[int, int, int], ...]  # (virtual address, file offset, bytes in the file)
    dynamic: dict[int, int]

    def unpack(self, layout: str, offset: int) -> tuple[int, ...]:
        try:
            return struct.unpack_from("<" + layout, self.data, offset)
        except (struct.error, OverflowError) as err:
            raise NotElf(f"ELF table at offset {offset} runs past the end of the file") from err

    def offset(self, address: int) -> int:
        for start, file_offset, size in self.loads:
            if start <= address < start + size:
                return file_offset + address - start
        raise NotElf(f"address {address:#x} lies in no loaded segment of the file")

    def table(self, tag: int) -> int:
        if tag not in self.dynamic:
            raise NotElf(f"the dynamic section lacks entry {tag:#x}")
        return self.offset(self.dynamic[tag])

    def string(self, index: int) -> str:
        start = self.table(DT_STRTAB) + index
        end = self.data.find(b"\0", start)
        if index >= self.dynamic.get(DT_STRSZ, 0) or end < 0:
            raise NotElf(f"string index {index} lies outside of the string table")
        return self.data[start:end].decode("utf-8", "replace")


def _read(data: bytes) -> _Image:
    if len(data) < 64 or data[:6] != b"\x7fELF\x02\x01":
        raise NotElf("not a little-endian 64-bit ELF file")
    bare = _Image(data, (), {})
    (program,) = bare.unpack("Q", 0x20)
    entry_bytes, entries = bare.unpack("HH", 0x36)
    loads: list[tuple[int, int, int]] = []
    dynamic_at = -1
    for number in range(entries):
        at = program + number * entry_bytes
        kind, _flags, offset, address, _physical, file_bytes = bare.unpack("IIQQQQ", at)
        if kind in (PT_LOAD, PT_DYNAMIC) and offset + file_bytes > len(data):
            raise NotElf("a segment runs past the end of the file: it is truncated")
        if kind == PT_LOAD:
            loads.append((address, offset, file_bytes))
        elif kind == PT_DYNAMIC:
            dynamic_at = offset
    if dynamic_at < 0:
        raise NotElf("no dynamic section: not a shared library")
    dynamic: dict[int, int] = {}
    while True:
        tag, value = bare.unpack("QQ", dynamic_at + 16 * len(dynamic))
        if tag == DT_NULL:
            break
        # Repeated tags (DT_NEEDED) are of no interest; a synthetic key keeps the count right.
        dynamic[tag if tag not in dynamic else -1 - len(dynamic)] = value
    return _Image(data, tuple(loads), dynamic)


def _symbol_count(image: _Image) -> int:
    """No table states it directly: it is read off whichever hash table there is."""
    if DT_HASH in image.dynamic:
        return image.unpack("II", image.table(DT_HASH))[1]
    at = image.table(DT_GNU_HASH)
    buckets, first, bloom_words, _shift = image.unpack("IIII", at)
    buckets_at = at + 16 + 8 * bloom_words
    last = max(image.unpack(f"{buckets}I", buckets_at), default=0)
    if last < first:
        return first
    chains_at = buckets_at + 4 * buckets
    while not image.unpack("I", chains_at + 4 * (last - first))[0] & 1:
        last += 1
    return last + 1


def _relocated_symbols(image: _Image) -> set[int]:
    """Indices of the symbols that a relocation refers to, hence that loading resolves."""
    used: set[int] = set()
    for table, size in ((DT_RELA, DT_RELASZ), (DT_JMPREL, DT_PLTRELSZ)):
        if table in image.dynamic:
            at = image.table(table)
            count = image.dynamic.get(size, 0) // RELA_BYTES
            if at + count * RELA_BYTES > len(image.data):
                raise NotElf("the relocation table runs past the end of the file")
            view = memoryview(image.data)[at : at + count * RELA_BYTES]
            used.update(info >> 32 for _, info, _ in struct.iter_unpack("<QQQ", view))
    return used


def plan(data: bytes, recipe: Recipe) -> list[Edit]:
    """The edits after which ``data`` loads without the recipe's versions.

    Args:
        data: a whole ELF64 little-endian shared library.
        recipe: the versions to do without, and what to do about their symbols.

    Returns:
        The edits, none if nothing asks for these versions any longer. Their effect is limited to
        ``st_name`` and version index of renamed symbols and to ``vna_flags`` of the versions.

    Raises:
        NotElf: the bytes are not a complete library; nothing can be said about them.
        UserError: an undefined symbol that is not in the recipe carries one of the versions, or
            one listed as unused is used: loading would bind it to another behaviour, or to none.
    """
    image = _read(data)
    if DT_VERNEED not in image.dynamic:
        return []
    edits: list[Edit] = []
    wanted: dict[int, str] = {}
    need_at = image.table(DT_VERNEED)
    for _ in range(image.dynamic.get(DT_VERNEEDNUM, 0)):
        _, count, _, aux, next_need = image.unpack("HHIII", need_at)
        aux_at = need_at + aux
        for _ in range(count):
            _, flags, index, name_index, next_aux = image.unpack("IHHII", aux_at)
            version = image.string(name_index)
            if version in recipe.versions:
                wanted[index & VER_NDX_MASK] = version
                if not flags & VER_FLG_WEAK:
                    weak = struct.pack("<H", flags | VER_FLG_WEAK)
                    edits.append(Edit(aux_at + 4, weak, f"{version} made weak"))
            aux_at += next_aux
        need_at += next_need
    if not wanted:
        return []

    symbols_at, versions_at = image.table(DT_SYMTAB), image.table(DT_VERSYM)
    relocated = _relocated_symbols(image)
    # A hash table without any entry does not count the undefined symbols; relocations do.
    for number in range(1, max(_symbol_count(image), max(relocated, default=0) + 1)):
        at = symbols_at + SYMBOL_BYTES * number
        name_index, _info, _other, section = image.unpack("IBBH", at)
        (index,) = image.unpack("H", versions_at + 2 * number)
        if section != 0 or (index & VER_NDX_MASK) not in wanted:
            continue
        name, version = image.string(name_index), wanted[index & VER_NDX_MASK]
        if name in recipe.rename:
            new = recipe.rename[name]
            shifted = name_index + len(name) - len(new)
            if image.string(shifted) != new:
                raise UserError(f"{new!r} is not the tail of {name!r}: it cannot be renamed")
            edits.append(Edit(at, struct.pack("<I", shifted), f"{name} -> {new}"))
            unversioned = struct.pack("<H", VER_NDX_GLOBAL)
            edits.append(Edit(versions_at + 2 * number, unversioned, f"{new} unversioned"))
        elif name not in recipe.unused or number in relocated:
            raise UserError(
                f"symbol {name} needs {version}, which this system lacks and which has no known "
                "equivalent: use a system with a newer C/C++ runtime (glibc 2.38, GCC 13)"
            )
    return edits


def apply(data: bytes, edits: list[Edit]) -> bytes:
    """``data`` with the edits written; the length never changes."""
    image = bytearray(data)
    for edit in edits:
        image[edit.offset : edit.offset + len(edit.data)] = edit.data
    return bytes(image)
