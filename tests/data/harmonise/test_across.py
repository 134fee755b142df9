"""Duplicates between clouds: found like at home, divided fairly, and nothing told but what is said.

The transcript is attacked from both sides: by what it must not hold (anything computable from the
rows without the secrets), and by what it may depend on (a transcript made from the claims alone has
the same form, and so has one for other rows with the same matches).
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.data import Record
from fedjax_llm.data.harmonise import Commutative, Keyed, Likeness, Party, drop_across, meet
from fedjax_llm.data.harmonise.across import row_values, shared_bands
from fedjax_llm.data.harmonise.blinding import _ORDER, SECRET_BYTES, Blinding, hash_to_group
from fedjax_llm.data.harmonise.keeping import components, lost_here
from fedjax_llm.data.harmonise.messages import Elements, Groups
from fedjax_llm.data.harmonise.party import padded
from fedjax_llm.data.harmonise.shingles import compared_text
from fedjax_llm.errors import UserError

# The curve of P-256 (SEC 2, section 2.4.2), for checking by plain integers.
P = 2**256 - 2**224 + 2**192 + 2**96 - 1
B = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B


def secrets(seed: int) -> Callable[[], bytes]:
    rng = random.Random(seed)
    return lambda: rng.randbytes(SECRET_BYTES)


def disguises(how: str, seed: int, session: bytes = b"s") -> tuple[Blinding, Blinding]:
    make = secrets(seed)
    if how == "keyed":
        common = make()
        return Keyed(common, session), Keyed(common, session)
    return Commutative(make(), session), Commutative(make(), session)


def hold_meeting(
    one: Sequence[Sequence[bytes]],
    two: Sequence[Sequence[bytes]],
    shared: int = 1,
    how: str = "keyed",
    seed: int = 0,
) -> tuple[list[int], list[int], list[bytes]]:
    disguise_one, disguise_two = disguises(how, seed)
    rng = random.Random(seed)
    return meet(
        Party(one, shared, disguise_one, True, 0, rng),
        Party(two, shared, disguise_two, False, 0, rng),
    )


def test_elements_are_points_of_the_curve_and_uniform_in_their_first_bits() -> None:
    elements = [hash_to_group(str(i).encode(), b"s") for i in range(400)]
    for element in elements[:50]:
        x = int.from_bytes(element, "big")
        assert x < P and pow(x**3 - 3 * x + B, (P - 1) // 2, P) == 1
    ones = sum(element[0] >> 7 for element in elements)
    assert abs(ones - 200) < 5 * 10  # five standard deviations
    assert hash_to_group(b"a", b"s") != hash_to_group(b"a", b"t")
    assert hash_to_group(b"b", b"sa") != hash_to_group(b"ab", b"s")


@pytest.mark.parametrize("how", ["keyed", "private"])
def test_disguises_commute_and_keep_values_apart(how: str) -> None:
    one, two = disguises(how, 1)
    values = [str(i).encode() for i in range(30)]
    both = two.second(one.first(values))
    assert both == one.second(two.first(values))
    assert len(set(both)) == len(values)
    decoys = [one.decoy(bytes([i]) * 32) for i in range(30)]
    assert not set(two.second(decoys)) & set(both)


def test_the_scalar_of_any_secret_is_a_scalar() -> None:
    x = hash_to_group(b"v", b"s")
    for secret in (bytes(SECRET_BYTES), b"\xff" * SECRET_BYTES):
        assert len(Commutative(secret, b"s").second([x])[0]) == 32
    # Secrets that differ by a multiple of the order less one are one scalar: that is the reduction.
    one = (5).to_bytes(SECRET_BYTES, "big")
    other = (5 + 3 * (_ORDER - 1)).to_bytes(SECRET_BYTES, "big")
    assert Commutative(one, b"s").second([x]) == Commutative(other, b"s").second([x])
    assert Commutative(bytes(SECRET_BYTES), b"s").second([x]) == [x]  # the scalar one
    with pytest.raises(ValueError, match="48 bytes"):
        Commutative(bytes(32), b"s")


def test_elements_off_the_curve_are_refused() -> None:
    off = next(
        x.to_bytes(32, "big") for x in range(2, 100) if pow(x**3 - 3 * x + B, (P - 1) // 2, P) != 1
    )
    blinding = Commutative(bytes(SECRET_BYTES), b"s")
    for element in (off, P.to_bytes(32, "big"), b"\xff" * 32, b"", bytes(31)):
        with pytest.raises(UserError, match="not on the curve"):
            blinding.second([element])
    with pytest.raises(UserError, match="not 32 bytes"):
        Keyed(bytes(SECRET_BYTES), b"s").second([bytes(31)])


@given(st.integers(0, 10**6))
def test_padding_hides_the_low_bits_at_little_cost(count: int) -> None:
    size = padded(count)
    assert count <= size <= count * 1.12 + 1
    # No more significant bits than the length of the exponent (arXiv 1806.03160, section 4).
    assert size == 0 or (size >> ((size & -size).bit_length() - 1)).bit_length() <= 1 + max(
        1, (count.bit_length() - 1).bit_length()
    )


VALUES = st.lists(st.sets(st.integers(0, 8), min_size=1, max_size=4), max_size=7)


def as_rows(rows: Sequence[set[int]]) -> list[list[bytes]]:
    return [[bytes([value]) for value in sorted(row)] for row in rows]


@settings(max_examples=60, deadline=None)
@given(VALUES, VALUES, st.integers(1, 3))
def test_a_meeting_leaves_no_pair_and_loses_nothing(
    one: list[set[int]], two: list[set[int]], shared: int
) -> None:
    lost_one, lost_two, _ = hold_meeting(as_rows(one), as_rows(two), shared)
    pairs = [
        (i, j)
        for i, j in itertools.product(range(len(one)), range(len(two)))
        if len(one[i] & two[j]) >= shared
    ]
    for i, j in pairs:
        assert (i in lost_one) != (j in lost_two)  # exactly one side keeps a duplicate
    assert set(lost_one) <= {i for i, _ in pairs} and set(lost_two) <= {j for _, j in pairs}


@settings(max_examples=30, deadline=None)
@given(VALUES, VALUES, st.integers(1, 3), st.integers(0, 5))
def test_the_outcome_does_not_depend_on_secrets_or_on_the_disguise(
    one: list[set[int]], two: list[set[int]], shared: int, seed: int
) -> None:
    rows = (as_rows(one), as_rows(two))
    plain = hold_meeting(*rows, shared)[:2]
    assert plain == hold_meeting(*rows, shared, seed=seed + 1)[:2]
    assert plain == hold_meeting(*rows, shared, how="private", seed=seed)[:2]


@given(st.integers(1, 200), st.integers(0, 3))
def test_losses_of_one_to_one_duplicates_differ_by_one_at_most(count: int, seed: int) -> None:
    rng = random.Random(seed)
    names = [rng.randbytes(16) for _ in range(count)]
    found = components([(i, i) for i in range(count)], names)
    here, there = lost_here(found, True), lost_here(found, False)
    assert sorted(here + there) == list(range(count))
    assert abs(len(here) - len(there)) <= 1


def test_larger_components_are_balanced_up_to_one_of_them() -> None:
    rng = random.Random(4)
    edges = [(row, 5 * row + k) for row in range(100) for k in range(rng.randrange(1, 5))]
    names = [rng.randbytes(16) for _ in edges]
    found = components(edges, names)
    here = lost_here(found, True)
    mirrored = components([(j, i) for i, j in edges], names)
    there = lost_here(mirrored, False)
    assert {i for i, _ in edges} - set(here) == {i for i, j in edges if j in there}
    assert abs(len(here) - len(there)) <= 4


def test_messages_survive_the_wire_and_damage_is_an_error() -> None:
    elements = Elements((bytes(32), b"\x01" * 32))
    groups = Groups(((0, 1), (1,)))
    assert Elements.from_bytes(elements.to_bytes(), expected=2) == elements
    assert Groups.from_bytes(groups.to_bytes(), elements=2) == groups
    assert Groups.from_bytes(Groups(()).to_bytes(), elements=0) == Groups(())
    for data in (elements.to_bytes()[:-1], elements.to_bytes() + b"x", b"", b"\x00\x00\x00\x09"):
        with pytest.raises(UserError, match="damaged"):
            Elements.from_bytes(data)
    with pytest.raises(UserError, match="2 elements in place of 3"):
        Elements.from_bytes(elements.to_bytes(), expected=3)
    for data in (b"", b"abc", groups.to_bytes()[:-4], groups.to_bytes() + bytes(4)):
        with pytest.raises(UserError, match="damaged"):
            Groups.from_bytes(data, elements=2)
    for places in ((2,), (1, 0), (0, 0), ()):
        with pytest.raises(UserError, match="names places that cannot be"):
            Groups.from_bytes(Groups((places,)).to_bytes(), elements=2)


ROWS_ONE = [Record(f"a secret question number {i} of the first cloud", f"a{i}") for i in range(9)]
ROWS_TWO = [Record(f"what the second cloud asks, case {i}, in private", f"b{i}") for i in range(7)]
COMMON = [Record(f"the textbook question {i} that everyone knows", f"c{i}") for i in range(4)]


def transcript(one: Sequence[Record], two: Sequence[Record], **options: Any) -> list[bytes]:
    likeness = Likeness("near", hashes=32, threshold=0.8)
    clouds = {"one": one, "two": two}
    _, _, (meeting,) = drop_across(clouds, likeness, "private", **options)
    return list(meeting.messages)


def derived(records: Sequence[Record]) -> set[bytes]:
    """What anyone could compute from guessed rows without a secret, 32-byte hashes and points."""
    likeness = Likeness("near", hashes=32, threshold=0.8)
    values = [value for row in row_values(records, likeness)[0] for value in row]
    raw = [compared_text(r, "record").encode() for r in records]
    raw += [part.encode() for r in records for part in (r.prompt, r.answer)]
    found: set[bytes] = {value[2:] for value in values}
    session = b"\0".join([b"fedjax-llm duplicates", b"one", b"two"])
    for text in (*values, *raw):
        found |= {hash_to_group(text, session), hash_to_group(text, b"")}
        for hashed in (hashlib.sha256, hashlib.sha3_256, hashlib.blake2s):
            found.add(hashed(text).digest())
        found.add(hashlib.blake2b(text, digest_size=32).digest())
    return found


def test_the_transcript_holds_nothing_that_can_be_computed_without_a_secret() -> None:
    clouds = ([*ROWS_ONE, *COMMON], [*ROWS_TWO, *COMMON])
    known = derived([*ROWS_ONE, *ROWS_TWO, *COMMON])
    whole = b"".join(transcript(*clouds))
    assert not any(value in whole for value in known)
    assert not any(record.prompt.encode() in whole for rows in clouds for record in rows)
    # The attack works: with the scalar one for a secret, which disguises nothing, it finds every
    # value of every row.
    bare = b"".join(transcript(*clouds, secret=lambda: bytes(SECRET_BYTES)))
    likeness = Likeness("near", hashes=32, threshold=0.8)
    values = {v for rows in clouds for row in row_values(rows, likeness)[0] for v in row}
    assert sum(value in bare for value in known) == len(values)


def test_keyed_hashes_can_be_tested_by_who_holds_the_secret_and_by_nobody_else() -> None:
    rows = [[b"guess"], [b"another"]]
    (one, two), session = disguises("keyed", 1), b"s"
    offer = Elements.from_bytes(Party(rows, 1, one, True, 0, random.Random(0)).offer()).elements
    assert two.first([b"guess"])[0] in offer  # what the other party can do, at any time
    for key in (b"", bytes(SECRET_BYTES)):
        stranger = hashlib.blake2b(
            len(session).to_bytes(4, "big") + session + b"guess",
            digest_size=32,
            key=key,
            person=b"value",
        )
        assert stranger.digest() not in offer


def test_two_meetings_about_the_same_rows_share_no_element() -> None:
    def elements(messages: Sequence[bytes]) -> set[bytes]:
        return {e for data in messages[:4] for e in Elements.from_bytes(data).elements}

    rows = ([*ROWS_ONE, *COMMON], [*ROWS_TWO, *COMMON])
    first, second = elements(transcript(*rows)), elements(transcript(*rows))
    assert len(first) == len(second) and not first & second


def test_elements_of_one_message_are_distinct_so_that_repeats_do_not_show() -> None:
    repeated = [*ROWS_ONE, ROWS_ONE[0], ROWS_ONE[0]]
    for data in transcript(repeated, ROWS_TWO)[:4]:
        elements = Elements.from_bytes(data).elements
        assert len(set(elements)) == len(elements) == padded(len(elements))


def form(messages: Sequence[bytes]) -> list[Any]:
    """Sizes, and the multiset of group sizes: all of a transcript but random-looking elements."""
    sizes = [len(Elements.from_bytes(data).elements) for data in messages[:4]]
    rows = [Groups.from_bytes(data, 10**6).places for data in messages[4:]]
    return [*sizes, *(sorted(map(len, groups)) for groups in rows)]


def test_the_form_depends_on_the_claims_alone() -> None:
    """Other rows with the same matches and sizes make a transcript of the same form."""
    other_one = [
        Record(f"entirely different row {i:02d} about other things", "z") for i in range(9)
    ]
    other_two = [Record(f"nothing like the above, {i:02d}, at all, ever", "y") for i in range(7)]
    mine = form(transcript([*ROWS_ONE, *COMMON], [*ROWS_TWO, *COMMON]))
    theirs = form(transcript([*other_one, *COMMON], [*other_two, *COMMON]))
    # Like rows share bands with each other, so the counts of distinct bands differ a little; what
    # the padding leaves of that is claim 1.
    for left, right in zip(mine[:4], theirs[:4], strict=True):
        assert left == padded(left) and right == padded(right)
    assert mine[4:] == theirs[4:]
    assert all(len(groups) == len(COMMON) for groups in mine[4:])


def test_rows_that_share_too_little_are_not_grouped_for_the_other() -> None:
    """A row with fewer common values than a duplicate has stays out of the last messages."""
    one = [[b"a", b"b", b"c"], [b"d", b"e", b"f"]]
    two = [[b"a", b"x", b"y"], [b"d", b"e", b"z"]]
    *losses, messages = hold_meeting(one, two, shared=2, how="private")
    groups = [Groups.from_bytes(data, 10**6).places for data in messages[4:]]
    assert [sorted(map(len, rows)) for rows in groups] == [[2], [2]]
    assert sorted(map(tuple, losses)) in ([(), (1,)], [(1,), ()])


def test_the_order_of_rows_does_not_show_even_with_a_known_generator() -> None:
    """Rows are sorted before they are shuffled: one generator, any order, the same offer."""
    rows = [[bytes([value])] for value in range(12)]

    def offer(order: Sequence[list[bytes]]) -> bytes:
        disguise, _ = disguises("keyed", 1)
        return Party(order, 1, disguise, True, 0, random.Random(3)).offer()

    assert offer(rows) == offer(rows[::-1])


def test_near_duplicates_are_found_without_comparing_texts() -> None:
    rng = random.Random(0)
    words = [f"w{i}" for i in range(400)]
    originals = [" ".join(rng.choices(words, k=60)) for _ in range(40)]

    def near(text: str, edits: int) -> str:
        parts = text.split()
        for place in rng.sample(range(len(parts)), edits):
            parts[place] = rng.choice(words)
        return " ".join(parts)

    one = [Record(text, "") for text in originals]
    alike = [Record(near(text, 1), "") for text in originals[:20]]  # similarity near 0.94
    unlike = [Record(near(text, 20), "") for text in originals[20:]]  # near 0.4
    likeness = Likeness("near")
    kept, steps, _ = drop_across({"one": one, "two": [*alike, *unlike]}, likeness, "keyed")
    assert len(kept["one"]) + len(kept["two"]) == 80 - 20
    assert [steps[name].rows_out for name in ("one", "two")] == [
        len(kept[name]) for name in ("one", "two")
    ]
    bands, shared = shared_bands(likeness)
    assert bands.probability(0.8, shared) >= 0.95 and bands.probability(0.4, shared) < 0.01


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sets(st.integers(0, 12), max_size=10), min_size=2, max_size=4))
def test_one_copy_of_an_exact_duplicate_is_left_among_all_clouds(held: list[set[int]]) -> None:
    own = [Record("own row of a cloud", str(k)) for k in range(2 * len(held))]
    clouds = {
        f"cloud {k}": [*own[2 * k : 2 * k + 2], *(Record(f"q {i}", "a") for i in sorted(rows))]
        for k, rows in enumerate(held)
    }
    kept, steps, _ = drop_across(clouds, Likeness("exact"), "keyed")
    left = [record for records in kept.values() for record in records]
    assert sorted(r.prompt + r.answer for r in left) == sorted(
        [r.prompt + r.answer for r in own] + [f"q {i}a" for i in set.union(*held)]
    )
    for name, records in clouds.items():
        assert kept[name] == [r for r in records if r in kept[name]]  # in their order
        assert steps[name].rows_in == len(records) and steps[name].rows_out == len(kept[name])


def test_a_cloud_that_is_all_duplicates_is_told_in_one_line() -> None:
    rows = [Record(f"q {i}", "a") for i in range(3)]
    with pytest.raises(UserError) as error:
        drop_across({"small": rows[:2], "large": [*rows, *ROWS_ONE]}, Likeness("exact"), "keyed")
    assert "cloud 'small': 1 of its 2 rows are duplicates that other clouds keep" in str(
        error.value
    )
    assert "\n" not in str(error.value)


def test_off_is_off_and_contradictions_are_named() -> None:
    clouds = {"one": ROWS_ONE, "two": ROWS_ONE}
    kept, steps, meetings = drop_across(clouds, Likeness("exact"), "off")
    assert kept == clouds and steps == {} and meetings == []
    with pytest.raises(UserError, match='set duplicates = "exact"'):
        drop_across(clouds, Likeness("off"), "private")
