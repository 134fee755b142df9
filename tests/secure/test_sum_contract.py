"""What every secure sum keeps: exact, in any order, of any subset, or refused by name."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedjax_llm.errors import Refused
from fedjax_llm.secure import BadMessage

CLOUDS = ("medical", "finance", "general")
SHARED = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def vector(secure_sum, seed):
    """Random integers with the extremes in front."""
    bound = bound_of(secure_sum)
    ints = np.random.default_rng(seed).integers(-bound, bound + 1, secure_sum.count)
    ints[:4] = bound, -bound, 0, bound
    return ints


def bound_of(secure_sum):
    return getattr(secure_sum, "max_abs", None) or secure_sum.parameters.max_abs


def summands_of(secure_sum):
    return getattr(secure_sum, "summands", None) or secure_sum.parameters.summands


def encoded(secure_sum, round_number, vectors):
    return {c: secure_sum.encode_message(c, round_number, v) for c, v in vectors.items()}


@SHARED
@given(st.data())
def test_exact_for_any_subset_of_clients_and_any_integers(secure_sum, new_round, data):
    bound, round_number = bound_of(secure_sum), new_round()
    entry = st.one_of(st.sampled_from([-bound, bound, 0]), st.integers(-bound, bound))
    clients = data.draw(st.integers(1, summands_of(secure_sum)))
    vectors = {}
    for number in range(clients):
        ints = np.full(secure_sum.count, data.draw(entry), np.int64)
        some = data.draw(st.lists(entry, max_size=12))
        ints[: len(some)] = some
        vectors[f"client {number}"] = ints
    messages = encoded(secure_sum, round_number, vectors)
    sent = data.draw(st.lists(st.sampled_from(sorted(messages)), min_size=1, unique=True))
    result = secure_sum.sum({c: messages[c] for c in sent}, round_number, CLOUDS)
    assert result.total_P.dtype == np.int64
    assert np.array_equal(result.total_P, sum(vectors[c] for c in sent))
    assert result.participants == tuple(sorted(sent))


def test_all_clients_at_both_extremes(secure_sum, new_round):
    for sign in (1, -1):
        round_number, bound = new_round(), bound_of(secure_sum)
        ints = np.full(secure_sum.count, sign * bound)
        clients = [f"c{i}" for i in range(summands_of(secure_sum))]
        messages = encoded(secure_sum, round_number, dict.fromkeys(clients, ints))
        assert np.array_equal(
            secure_sum.sum(messages, round_number, CLOUDS).total_P, len(clients) * ints
        )


def test_order_of_clients_does_not_matter(secure_sum, new_round):
    vectors = {name: vector(secure_sum, seed) for seed, name in enumerate("xyz")}
    totals = []
    for order in ("xyz", "zyx", "yxz"):
        round_number = new_round()
        messages = encoded(secure_sum, round_number, vectors)
        result = secure_sum.sum({c: messages[c] for c in order}, round_number, CLOUDS)
        totals.append((result.total_P.tobytes(), result.participants))
    assert len(set(totals)) == 1


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.uint16, np.int64])
def test_integer_types_do_not_matter(secure_sum, new_round, dtype):
    round_number = new_round()
    ints = np.arange(secure_sum.count).astype(dtype)
    messages = encoded(secure_sum, round_number, {"a": ints, "b": ints})
    total = secure_sum.sum(messages, round_number, CLOUDS).total_P
    assert np.array_equal(total, 2 * ints.astype(np.int64))


def test_overflow_and_wrong_vectors_are_refused_before_anything_is_sent(secure_sum):
    bound, count = bound_of(secure_sum), secure_sum.count
    for value in (bound + 1, -bound - 1, -(2**31), 2**62, -(2**63)):
        ints = np.zeros(count, np.int64)
        ints[7] = value
        with pytest.raises(Refused, match=rf"client 'alice': entry 7 is {value}, beyond"):
            secure_sum.encode_message("alice", 0, ints)
    for number in (-1, 2**63):
        with pytest.raises(Refused, match="round number"):
            secure_sum.encode_message("alice", number, np.zeros(count, int))
    for wrong in (np.zeros(count), np.zeros(count + 1, int), np.zeros((1, count), int)):
        with pytest.raises(Refused, match="'alice' must send"):
            secure_sum.encode_message("alice", 0, wrong)


def test_wrong_round_and_wrong_client_are_refused_by_name(secure_sum, new_round):
    now, before = new_round(), new_round()
    good = secure_sum.encode_message("bob", now, vector(secure_sum, 0))
    late = secure_sum.encode_message("alice", before, vector(secure_sum, 1))
    with pytest.raises(BadMessage, match=f"'alice' refused: it belongs to round {before}") as bad:
        secure_sum.sum({"bob": good, "alice": late}, now, CLOUDS)
    assert bad.value.sender == "alice"
    with pytest.raises(BadMessage, match="'eve' refused: it was written by 'bob'"):
        secure_sum.sum({"bob": good, "eve": good}, now, CLOUDS)


@SHARED
@given(st.data())
def test_damaged_truncated_or_invented_bytes_are_refused_by_name(secure_sum, data):
    good = secure_sum.encode_message("bob", 10**6, vector(secure_sum, 0))
    other = secure_sum.encode_message("alice", 10**6, vector(secure_sum, 1))
    damaged = bytearray(other)
    damaged[data.draw(st.integers(0, len(other) - 1))] ^= data.draw(st.integers(1, 255))
    cut = other[: data.draw(st.integers(0, len(other) - 1))]
    for wrong in (bytes(damaged), cut, other + b"\0", data.draw(st.binary(max_size=100))):
        with pytest.raises(BadMessage, match="'alice' refused"):
            secure_sum.sum({"bob": good, "alice": wrong}, 10**6, CLOUDS)


def test_more_clients_than_planned_or_none_are_refused(secure_sum, new_round):
    round_number = new_round()
    clients = [f"c{i}" for i in range(summands_of(secure_sum) + 1)]
    messages = encoded(secure_sum, round_number, dict.fromkeys(clients, vector(secure_sum, 0)))
    with pytest.raises(Refused, match="exact up to"):
        secure_sum.sum(messages, round_number, CLOUDS)
    with pytest.raises(Refused, match="at least 1"):
        secure_sum.sum({}, round_number, CLOUDS)


def test_statement_is_one_line(secure_sum):
    assert secure_sum.statement() and "\n" not in secure_sum.statement()
