"""Signatures bind name, purpose and fields; two agree on secrets that no third one knows."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.errors import Refused, UserError
from fedjax_llm.secure import byte_lists
from fedjax_llm.secure.identity import Identity, PublicIdentity, Roster
from fedjax_llm.secure.sums import BadMessage

ANN, BOB, EVE = (Identity.generate(name) for name in ("ann", "bob", "eve"))
ROSTER = Roster([BOB.public, ANN.public])
# Points whose multiples by any X25519 key are zero (RFC 7748, section 6.1; cr.yp.to/ecdh.html).
LOW_ORDER = [
    bytes(32),
    b"\1" + bytes(31),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    bytes.fromhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
]


def test_a_signature_serves_for_its_own_message_only():
    signature = ANN.sign("purpose", b"one", b"two")
    ROSTER.verify("ann", "purpose", [b"one", b"two"], signature)
    other = [
        ("ann", "another", [b"one", b"two"]),
        ("ann", "purpose", [b"onetwo"]),
        ("ann", "purpose", [b"on", b"etwo"]),
        ("ann", "purpose", [b"two", b"one"]),
        ("ann", "purpose", [b"one", b"two", b""]),
        ("ann", "purpose" + "x" * 20, [b"one", b"two"]),
        ("bob", "purpose", [b"one", b"two"]),
    ]
    for name, purpose, fields in other:
        with pytest.raises(BadMessage, match=f"'{name}' refused: its signature"):
            ROSTER.verify(name, purpose, fields, signature)
    with pytest.raises(BadMessage, match="'eve' refused: a stranger"):
        ROSTER.verify("eve", "purpose", [b"one", b"two"], EVE.sign("purpose", b"one", b"two"))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=8), max_size=4), st.integers(0, 511), st.binary(max_size=80))
def test_no_changed_or_invented_signature_passes(fields, bit, invented):
    signature = bytearray(ANN.sign("p", *fields))
    ROSTER.verify("ann", "p", fields, bytes(signature))
    signature[bit // 8] ^= 1 << bit % 8
    for forged in (bytes(signature), invented):
        with pytest.raises(BadMessage, match="'ann' refused"):
            ROSTER.verify("ann", "p", fields, forged)


def test_two_agree_and_nobody_else():
    secret = ANN.agree(BOB.public, "masks", b"round 1")
    assert secret == BOB.agree(ANN.public, "masks", b"round 1")
    assert len(secret) == 32
    others = [
        ANN.agree(BOB.public, "masks", b"round 2"),
        ANN.agree(BOB.public, "channel", b"round 1"),
        ANN.agree(EVE.public, "masks", b"round 1"),
        EVE.agree(ANN.public, "masks", b"round 1"),
    ]
    assert secret not in others
    # Another name or signing key for the same exchange key is another party.
    renamed = PublicIdentity("bobby", BOB.public.verify_key, BOB.public.exchange_key)
    rekeyed = PublicIdentity("bob", EVE.public.verify_key, BOB.public.exchange_key)
    assert secret not in [ANN.agree(other, "masks", b"round 1") for other in (renamed, rekeyed)]
    with pytest.raises(Refused, match="not with itself"):
        ANN.agree(ANN.public, "masks", b"")


@pytest.mark.parametrize("point", LOW_ORDER)
def test_points_of_low_order_are_refused(point):
    with pytest.raises(BadMessage, match="'bob' refused: its X25519 key is degenerate"):
        ANN.agree(PublicIdentity("bob", BOB.public.verify_key, point), "masks", b"")


def test_a_roster_has_one_party_per_name_and_key():
    assert [identity.name for identity in ROSTER] == ["ann", "bob"]
    assert "bob" in ROSTER and "eve" not in ROSTER and len(ROSTER) == 2
    assert Roster([ANN.public, BOB.public]) == ROSTER
    assert Roster([ANN.public, BOB.public]).digest() == ROSTER.digest()
    assert Roster([ANN.public]).digest() != ROSTER.digest()
    assert Roster.from_bytes(ROSTER.to_bytes(), "x") == ROSTER
    twin = PublicIdentity("ann", EVE.public.verify_key, EVE.public.exchange_key)
    copy = PublicIdentity("copy", ANN.public.verify_key, EVE.public.exchange_key)
    with pytest.raises(Refused, match="differ in name"):
        Roster([ANN.public, twin])
    with pytest.raises(Refused, match="differ in verify_key"):
        Roster([ANN.public, copy])
    unsorted = byte_lists.join([BOB.public.to_bytes(), ANN.public.to_bytes()])
    for wrong in (unsorted, byte_lists.join([ANN.public.to_bytes()] * 2), b"\1", b"\xff" * 9):
        with pytest.raises(BadMessage, match="'x' refused"):
            Roster.from_bytes(wrong, "x")


@pytest.mark.parametrize("name", ["", "two\nlines", "x" * 256, "\x1b[2J"])
def test_names_are_short_printable_text(name):
    with pytest.raises(Refused, match="printable"):
        Identity.generate(name)


def test_fingerprints_are_stable_and_differ():
    assert (
        ANN.public.fingerprint == PublicIdentity.from_bytes(ANN.public.to_bytes(), "").fingerprint
    )
    assert len({one.public.fingerprint for one in (ANN, BOB, EVE)}) == 3
    assert len(ANN.public.fingerprint) == 39


def test_nothing_secret_is_printed_and_nothing_is_repeated():
    secret = ANN.to_bytes()
    assert repr(ANN) == "Identity(name='ann')"
    assert secret != Identity.generate("ann").to_bytes()


def test_an_identity_survives_its_file(tmp_path):
    path = tmp_path / "ann.identity"
    ANN.save(path)
    loaded = Identity.load(path)
    assert loaded.public == ANN.public and loaded.to_bytes() == ANN.to_bytes()
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"ann\.identity is damaged"):
        Identity.load(path)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_parsing_is_total(data):
    for parse in (PublicIdentity.from_bytes, Identity.from_bytes):
        with pytest.raises(BadMessage, match="'x' refused"):
            parse(data, "x")
    with contextlib.suppress(BadMessage):
        assert byte_lists.join(byte_lists.split(data, "x")) == data


@given(st.lists(st.text(max_size=5), max_size=5))
def test_lists_of_names_come_back(names):
    assert byte_lists.split_names(byte_lists.join_names(names), "x") == tuple(names)
