"""The repair changes what it names and nothing else, or nothing at all."""

import contextlib
import os
import stat
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.errors import UserError
from fedjax_llm.secure import openfhe_repair
from fedjax_llm.secure.elf_versions import NotElf, apply, plan
from fedjax_llm.secure.openfhe_repair import RECIPE, import_openfhe, mendable, repair

NEW_C, NEW_CXX, OLD = "GLIBC_2.38", "GLIBCXX_3.4.32", "GLIBC_2.2.5"


def library(symbols, versions=(OLD, NEW_C, NEW_CXX), relocated=()):
    """A minimal shared library: one segment and the tables that the loader reads.

    Args:
        symbols: (name, version or None) of the undefined symbols.
        versions: the versions asked for.
        relocated: names of the symbols that a relocation refers to.
    """
    strings = b"\0"
    at = {}
    for name in [*(name for name, _ in symbols), *versions, "libc.so.6"]:
        if name not in at:
            at[name] = len(strings)
            strings += name.encode() + b"\0"
    index = {version: number + 2 for number, version in enumerate(versions)}
    symtab = bytes(24)
    versym = struct.pack("<H", 0)
    for name, version in symbols:
        symtab += struct.pack("<IBBHQQ", at[name], 0x12, 0, 0, 0, 0)
        versym += struct.pack("<H", index[version] if version else 1)
    need = struct.pack("<HHIII", 1, len(versions), at["libc.so.6"], 16, 0)
    for number, version in enumerate(versions):
        last = number == len(versions) - 1
        need += struct.pack("<IHHII", 0, 0, index[version], at[version], 0 if last else 16)
    names = [name for name, _ in symbols]
    rela = b"".join(struct.pack("<QQQ", 0, (names.index(n) + 1) << 32, 0) for n in relocated)
    hashes = struct.pack("<IIII", 1, len(symbols) + 1, 0, 0)
    base = 0x10000  # the segment's address differs from its offset on purpose
    tables = [(5, strings), (6, symtab), (0x6FFFFFF0, versym), (0x6FFFFFFE, need)]
    tables += [(4, hashes), (7, rela)]
    offset = 64 + 2 * 56
    body = b""
    dynamic = []
    for tag, content in tables:
        dynamic.append((tag, base + offset + len(body)))
        body += content + bytes(-len(content) % 8)
    dynamic += [(10, len(strings)), (8, len(rela)), (0x6FFFFFFF, 1), (0, 0)]
    dynamic_at = offset + len(body)
    body += b"".join(struct.pack("<QQ", *entry) for entry in dynamic)
    size = offset + len(body)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 6, 0, base, base, size, size, 4096)
    dyn_bytes = 16 * len(dynamic)
    where = base + dynamic_at
    dyn = struct.pack("<IIQQQQQQ", 2, 6, dynamic_at, where, where, dyn_bytes, dyn_bytes, 8)
    return header + load + dyn + body


SYMBOLS = [
    ("__isoc23_strtol", NEW_C),
    ("puts", OLD),
    ("__isoc23_strtoull", NEW_C),
    ("_ZSt21ios_base_library_initv", NEW_CXX),
    ("own", None),
]


def installed(folder: Path, **files: bytes) -> Path:
    """A package folder with libraries of the given contents."""
    package = folder / "openfhe"
    (package / "lib").mkdir(parents=True)
    for name, data in files.items():
        (package / "lib" / f"{name}.so.1").write_bytes(data)
    return package


def nothing(_folder):
    """A verification that is content."""


def test_plan_names_every_edit_and_applying_it_twice_changes_nothing_more():
    before = library(SYMBOLS)
    edits = plan(before, RECIPE)
    assert sorted(edit.reason for edit in edits) == sorted(
        [
            f"{NEW_C} made weak",
            f"{NEW_CXX} made weak",
            "__isoc23_strtol -> strtol",
            "strtol unversioned",
            "__isoc23_strtoull -> strtoull",
            "strtoull unversioned",
        ]
    )
    after = apply(before, edits)
    assert plan(after, RECIPE) == []
    assert len(after) == len(before)
    allowed = {e.offset + i for e in edits for i in range(len(e.data))}
    changed = {i for i, (x, y) in enumerate(zip(before, after, strict=True)) if x != y}
    assert changed <= allowed and len(allowed) == 2 * 2 + 2 * (4 + 2)


def test_library_that_asks_for_nothing_new_is_left_alone():
    assert plan(library([("puts", OLD)], versions=(OLD,)), RECIPE) == []


@pytest.mark.parametrize("version", [NEW_C, NEW_CXX])
def test_another_symbol_of_those_versions_is_refused_by_name(version):
    with pytest.raises(UserError, match=f"fgetwhatever needs {version}"):
        plan(library([*SYMBOLS, ("fgetwhatever", version)]), RECIPE)


def test_unused_symbol_that_is_relocated_after_all_is_refused():
    with pytest.raises(UserError, match="ios_base_library_initv"):
        plan(library(SYMBOLS, relocated=["_ZSt21ios_base_library_initv"]), RECIPE)


def test_symbols_that_the_hash_table_does_not_count_are_found_by_their_relocations(monkeypatch):
    monkeypatch.setattr("fedjax_llm.secure.elf_versions._symbol_count", lambda image: 1)
    with pytest.raises(UserError, match="fgetwhatever"):
        plan(library([("fgetwhatever", NEW_C)], relocated=["fgetwhatever"]), RECIPE)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_truncated_or_damaged_bytes_never_raise_anything_but_user_errors(data):
    whole = library(SYMBOLS)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(NotElf):
        plan(whole[:cut], RECIPE)
    beyond = bytearray(whole)
    beyond[0x27] ^= 0x80  # the program headers' offset no longer fits a signed integer
    with pytest.raises(NotElf):
        plan(bytes(beyond), RECIPE)
    where = data.draw(st.integers(0, 0x40 + 111))
    damaged = bytearray(whole)
    damaged[where] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(UserError):
        plan(bytes(damaged), RECIPE)


def test_repair_writes_keeps_the_mode_and_reports(tmp_path):
    package = installed(tmp_path, one=library(SYMBOLS), two=library([("puts", OLD)], (OLD,)))
    path = package / "lib" / "one.so.1"
    path.chmod(0o751)
    report = repair(package, verify=nothing)
    assert [file.path for file in report.files] == [path]
    assert "__isoc23_strtol -> strtol" in str(report) and openfhe_repair.UNDO in str(report)
    assert stat.S_IMODE(path.stat().st_mode) == 0o751
    repaired = path.read_bytes()
    assert repair(package, verify=nothing).files == ()
    assert path.read_bytes() == repaired
    assert sorted(p.name for p in (package / "lib").iterdir()) == ["one.so.1", "two.so.1"]


def test_one_refused_library_leaves_all_unchanged(tmp_path):
    bad = library([*SYMBOLS, ("unknown", NEW_C)])
    package = installed(tmp_path, a=library(SYMBOLS), b=bad, c=b"\x7fELF garbage")
    with pytest.raises(UserError, match="unknown"):
        repair(package, verify=nothing)
    assert (package / "lib" / "a.so.1").read_bytes() == library(SYMBOLS)


def test_failed_verification_puts_everything_back(tmp_path):
    package = installed(tmp_path, a=library(SYMBOLS), b=library(SYMBOLS))

    def fails(folder):
        raise UserError("does not load")

    with pytest.raises(UserError, match="does not load"):
        repair(package, verify=fails)
    assert all(path.read_bytes() == library(SYMBOLS) for path in (package / "lib").iterdir())


def test_read_only_installation_names_the_cure(tmp_path, monkeypatch):
    package = installed(tmp_path, a=library(SYMBOLS))

    def refuse(*_args, **_kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(openfhe_repair.tempfile, "mkstemp", refuse)
    with pytest.raises(UserError, match=r"Read-only.*virtual environment") as caught:
        repair(package)
    assert "\n" not in str(caught.value)


def test_only_the_version_errors_are_mendable():
    assert mendable(ImportError("libstdc++.so.6: version `GLIBCXX_3.4.32' not found (required)"))
    assert mendable(ImportError("libc.so.6: version `GLIBC_2.38' not found"))
    assert not mendable(ImportError("version `GLIBC_2.39' not found"))
    assert not mendable(ImportError("libgomp.so: cannot open shared object file"))


def test_the_installed_openfhe_imports_and_needs_no_further_repair():
    module = import_openfhe()
    assert repair(Path(module.__file__).parent, verify=nothing).files == ()
    assert os.environ["OMP_NUM_THREADS"] == "1"
