"""Parsing is total: any bytes give the payload that was written, or a BadMessage that names whose.

The byte offsets here are those of the table in ``wire``; they are a format, not an implementation.
"""

import dataclasses
import hashlib
import re
import struct

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.errors import Refused
from fedjax_llm.secure.frames import frame, unframe
from fedjax_llm.secure.sums import BadMessage
from fedjax_llm.secure.wire import (
    KINDS,
    Header,
    UploadWriter,
    parameters_digest,
    read_chunk,
    upload_bytes,
)

KEY = bytes(range(32))
HEADER = Header("threshold", b"p" * 16, b"e" * 16, 7, 1000, "ålice")
NAME = "ålice".encode()
PAYLOADS = (b"first payload", b"", b"third, longer payload" * 9)
FAST = settings(max_examples=200, deadline=None)


def written(header=HEADER, key=KEY, payloads=PAYLOADS):
    writer = UploadWriter(header, key, len(payloads))
    return [writer.write(payload) for payload in payloads]


def read(data, chunk=0, upload_id=None, header=HEADER, key=KEY, payloads=PAYLOADS):
    size = len(payloads[chunk])
    return read_chunk(header, key, upload_id, chunk, len(payloads), size, data)


CHUNKS = written()


@FAST
@given(
    st.sampled_from(sorted(KINDS)),
    st.binary(min_size=16, max_size=16),
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**63 - 1),
    st.text(min_size=1, max_size=40).filter(str.isprintable),
    st.lists(st.binary(max_size=60), min_size=1, max_size=5),
)
def test_what_is_written_is_read(kind, digest, round_number, count, client, payloads):
    header = Header(kind, digest, digest[::-1], round_number, count, client)
    chunks = written(header, KEY, payloads)
    assert sum(map(len, chunks)) == upload_bytes(client, [len(p) for p in payloads])
    upload_id = None
    for number, (data, payload) in enumerate(zip(chunks, payloads, strict=True)):
        found, upload_id = read(data, number, upload_id, header, KEY, payloads)
        assert found == payload


def test_the_bytes_are_those_of_the_table():
    """Written here once more, with other functions of the library than the module's."""
    data = CHUNKS[2]
    upload_id = data[40:56]
    head = b"FJS2" + struct.pack("<HBB", 1, 3, 0) + b"p" * 16 + b"e" * 16 + upload_id
    head += struct.pack("<QQIIQH", 7, 1000, 2, 3, len(PAYLOADS[2]), len(NAME)) + NAME
    info = b"fedjax-llm upload" + b"p" * 16 + b"e" * 16 + struct.pack("<Q", 7) + NAME
    key = HKDF(SHA256(), 32, upload_id, info).derive(KEY)
    mac = AESGCM(key).encrypt(struct.pack("<Q4x", 2), b"", head + PAYLOADS[2])
    assert data == head + PAYLOADS[2] + mac
    assert {chunk[40:56] for chunk in CHUNKS} == {upload_id}
    assert written()[0][40:56] != upload_id


def test_the_payload_is_not_copied_when_read():
    payload, _ = read(CHUNKS[2], 2)
    assert payload.obj is CHUNKS[2]
    assert payload.readonly


@pytest.mark.parametrize(
    "payload",
    [
        np.arange(12, dtype=np.uint8),
        np.arange(12, dtype="<i2").reshape(3, 4),
        np.zeros((0, 3)),
        memoryview(b"abc"),
        bytearray(b"abc"),
    ],
)
def test_any_buffer_is_a_payload(payload):
    (data,) = written(payloads=[payload])
    expected = payload.tobytes() if hasattr(payload, "tobytes") else bytes(payload)
    assert read(data, payloads=[expected])[0] == expected


@FAST
@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data):
    for start in (b"", b"FJS2", b"FJS2\1\0\3\0" + b"p" * 16 + b"e" * 16):
        with pytest.raises(BadMessage, match="message of 'ålice' refused"):
            read(start + data)


@FAST
@given(st.integers(0, 2), st.data())
def test_one_changed_byte_anywhere_is_refused(number, data):
    changed = bytearray(CHUNKS[number])
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(BadMessage):
        read(bytes(changed), number)


@FAST
@given(st.integers(0, 2), st.data())
def test_cut_extended_and_spliced_chunks_are_refused(number, data):
    good = CHUNKS[number]
    cut = good[: data.draw(st.integers(0, len(good) - 1))]
    at = data.draw(st.integers(0, len(good)))
    more = good[:at] + data.draw(st.binary(min_size=1, max_size=20)) + good[at:]
    other = written()[number]
    # Of equal length, so that only the MAC tells.
    spliced = good[:at] + other[at:]
    wrongs = [cut, more, *([spliced] if spliced not in (good, other) else [])]
    for wrong in wrongs:
        with pytest.raises(BadMessage):
            read(wrong, number)


@pytest.mark.parametrize(
    ("at", "content", "reason"),
    [
        (0, b"FJS1", "it is no chunk"),
        (4, b"\2\0", "format version 2 with flags 0; this is version 1, 0"),
        (6, b"\1", "it is of kind plain, expected threshold"),
        (6, b"\0", "it is of kind an unknown kind, expected threshold"),
        (7, b"\1", "version 1 with flags 1"),
        (8, b"q", "other parameters"),
        (24, b"E", "other keys than this run's"),
        (56, b"\x08", "it belongs to round 8, this is 7"),
        (64, b"\x01", "it holds 769 integers, expected 1000"),
        (72, b"\1", "chunk 1 came where 0 was expected: missing, repeated or reordered"),
        (76, b"\4", "upload of 4 chunks, expected 3"),
        (80, b"\xff" * 8, "truncated or too long"),
        (88, b"\xff\xff", "truncated"),
        (88, b"\4", "written by 'åli'"),
        (91, b"\xff", "written by '\ufffd\ufffdlice'"),
        (100, b"?", "damaged or forged"),
    ],
)
def test_every_field_that_differs_is_named(at, content, reason):
    wrong = CHUNKS[0][:at] + content + CHUNKS[0][at + len(content) :]
    with pytest.raises(BadMessage) as caught:
        read(wrong)
    assert reason in str(caught.value)
    assert caught.value.sender == "ålice"
    assert "\n" not in str(caught.value)


def test_a_chunk_serves_at_its_place_only():
    _, upload_id = read(CHUNKS[0])
    again = written()
    for wrong, chunk, reason in (
        (CHUNKS[0], 1, "repeated"),
        (CHUNKS[2], 1, "missing"),
        (again[1], 1, "another upload"),
    ):
        with pytest.raises(BadMessage, match=reason):
            read(wrong, chunk, upload_id)
    # Renumbered, among payloads of one length: only the MAC tells.
    same = written(payloads=[b"x", b"x"])
    forged = same[0][:72] + b"\1" + same[0][73:]
    with pytest.raises(BadMessage, match="MAC differs"):
        read(forged, 1, same[0][40:56], payloads=[b"x", b"x"])


@pytest.mark.parametrize(
    "field", ["kind", "parameters", "epoch", "round_number", "count", "client"]
)
def test_what_was_written_for_something_else_is_refused(field):
    other = {
        "kind": "plain",
        "parameters": b"q" * 16,
        "epoch": b"f" * 16,
        "round_number": 8,
        "count": 1001,
        "client": "bob",
    }[field]
    data = written(dataclasses.replace(HEADER, **{field: other}))[0]
    with pytest.raises(BadMessage) as caught:
        read(data)
    assert "damaged" not in str(caught.value)
    with pytest.raises(BadMessage, match="damaged or forged"):
        read(CHUNKS[0], key=bytes(32))


def test_only_immutable_bytes_are_read():
    for data in (bytearray(CHUNKS[0]), memoryview(CHUNKS[0]), "text", None, 3):
        with pytest.raises(BadMessage, match="it is no chunk"):
            read(data)


def test_a_writer_writes_what_it_announced_and_no_more():
    writer = UploadWriter(HEADER, KEY, 1)
    writer.write(b"x")
    with pytest.raises(Refused, match="all 1 chunks are written"):
        writer.write(b"y")
    with pytest.raises(ValueError, match="32 bytes"):
        UploadWriter(HEADER, b"short", 1)
    for chunks in (0, 2**32):
        with pytest.raises(ValueError, match="chunks"):
            UploadWriter(HEADER, KEY, chunks)


@pytest.mark.parametrize("size", [1, 167, 168, 255])
def test_the_bound_of_a_forgery_covers_the_longest_names(size):
    """SP 800-38D's is (16-byte blocks under the MAC, and one for their length) / 2^128."""
    (stated,) = re.findall(r"\(L / 16 \+ (\d+)\) / 2\^128", UploadWriter.__doc__)
    header = dataclasses.replace(HEADER, client="x" * size)
    for payload in (b"", b"1", bytes(15), bytes(16), bytes(17)):
        (chunk,) = written(header, payloads=[payload])
        blocks = -(-(len(chunk) - 16) // 16) + 1
        assert blocks <= len(payload) / 16 + int(stated)


@pytest.mark.parametrize("client", ["", "x" * 256, "ä" * 128, "a\nb", "\ud800", "a\0"])
def test_names_that_cannot_stand_in_a_chunk_are_refused(client):
    with pytest.raises(Refused, match="1 to 255 bytes"):
        dataclasses.replace(HEADER, client=client)


@pytest.mark.parametrize("number", [-1, 2**63, 1.5, "1"])
def test_rounds_that_cannot_stand_in_a_chunk_are_refused(number):
    with pytest.raises(Refused, match=r"round number must be in \[0, 2\^63\)"):
        dataclasses.replace(HEADER, round_number=number)


def test_parameters_differ_wherever_a_part_does():
    parts = ("plain", 12, 3, 4, "a", b"bc", 5)
    others = [
        ("masked", *parts[1:]),
        ("plain", 1, 23, 4, *parts[4:]),
        (*parts[:4], "ab", b"c", 5),
        (*parts[:4], b"a", b"bc", 5),
        (*parts[:6], "5"),
        parts[:6],
    ]
    digests = {parameters_digest(*p) for p in (parts, *others)}
    assert len(digests) == len(others) + 1
    assert {len(d) for d in digests} == {16}
    assert parameters_digest(*parts) == parameters_digest(*parts)


@FAST
@given(st.text("abcdef", min_size=1, max_size=16), st.lists(st.binary(max_size=40), max_size=4))
def test_frames_come_back_and_their_damage_is_found(kind, fields):
    data = frame(kind, *fields)
    assert unframe(kind, len(fields), data, "p") == fields
    for wrong in (data[:-1], data + b"\0", data[:30] + bytes([data[30] ^ 1]) + data[31:], b""):
        with pytest.raises(BadMessage, match="'p' refused"):
            unframe(kind, len(fields), wrong, "p")


@FAST
@given(st.binary(max_size=200), st.integers(0, 5))
def test_any_framed_bytes_give_fields_or_a_refusal(data, fields):
    """With a right digest, as an attacker can make one."""
    for start in (b"", b"FJS1", b"FJS1" + b"kind".ljust(16, b"\0") + bytes([fields, 0])):
        body = start + data
        whole = body + hashlib.sha256(body).digest()
        try:
            parts = unframe("kind", fields, whole, "p")
        except BadMessage:
            continue
        assert frame("kind", *parts) == whole
