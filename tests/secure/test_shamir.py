"""Shamir over the primes that OpenFHE uses."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.errors import UserError
from fedjax_llm.secure.shamir import lagrange_at_zero, scale, split, uniform_residues

PRIMES = [97, 1099511480321, 2**60 - 2**14 + 1, 1152921504606830593]
PRIME = 1152921504606830593


def combined(shares, points, modulus):
    total = np.zeros(shares[points[0]].size, object)
    for point, weight in lagrange_at_zero(points, modulus).items():
        total = (total + scale(shares[point], weight, modulus).astype(object)) % modulus
    return total.astype(np.uint64)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.data())
def test_any_threshold_shares_give_the_secret_and_fewer_do_not(parties, data):
    threshold = data.draw(st.integers(2, parties))
    secret = uniform_residues(16, PRIME)
    points = list(range(1, parties + 1))
    shares = split(secret, PRIME, threshold, points)
    for size in range(2, parties + 1):
        for chosen in combinations(points, size):
            same = np.array_equal(combined(shares, chosen, PRIME), secret)
            assert same == (size >= threshold)


def test_shares_of_a_sum_are_sums_of_shares():
    first, second = uniform_residues(8, PRIME), uniform_residues(8, PRIME)
    one, two = split(first, PRIME, 2, [1, 2, 3]), split(second, PRIME, 2, [1, 2, 3])
    added = {p: ((one[p].astype(object) + two[p]) % PRIME).astype(np.uint64) for p in one}
    expected = ((first.astype(object) + second) % PRIME).astype(np.uint64)
    assert np.array_equal(combined(added, [1, 3], PRIME), expected)


def test_shares_below_the_threshold_are_uniform_whatever_the_secret():
    zero = split(np.zeros(97 * 400, np.uint64), 97, 2, [1, 2, 3])
    for share in zero.values():
        counts = np.bincount(share.astype(int), minlength=97)
        # Chi-square with 96 degrees of freedom: 200 is beyond the 1 - 1e-8 quantile.
        assert ((counts - 400) ** 2 / 400).sum() < 200


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 2**63 - 1), st.integers(-(2**64), 2**64), st.data())
def test_scaling_is_exact_for_every_modulus(modulus, weight, data):
    """Also for composite ones, and next to their ends, where an estimate would be off by one."""
    near = [value % modulus for value in (0, 1, modulus - 1, modulus // 2, 2**32, 2**32 - 1)]
    values = near + data.draw(st.lists(st.integers(0, modulus - 1), max_size=8))
    scaled = scale(np.array(values, np.uint64), weight, modulus)
    assert scaled.dtype == np.uint64
    assert scaled.tolist() == [value * weight % modulus for value in values]


def test_what_is_no_residue_is_refused():
    for values in (np.array([97], np.uint64), np.array([1], np.int64)):
        with pytest.raises(UserError, match="residues below a modulus"):
            scale(values, 1, 97)
        with pytest.raises(UserError, match="residues below a modulus"):
            split(values, 97, 2, [1, 2])
    with pytest.raises(UserError, match="at most 63 bits"):
        scale(np.zeros(1, np.uint64), 1, 2**63)


def test_nonsense_is_refused():
    secret = np.zeros(1, np.uint64)
    for points in ([0, 1], [1, 1], [97, 1], [1, 98]):
        with pytest.raises(UserError, match="distinct"):
            split(secret, 97, 2, points)
        with pytest.raises(UserError, match="distinct"):
            lagrange_at_zero(points, 97)
    with pytest.raises(UserError, match="threshold"):
        split(secret, 97, 3, [1, 2])
