"""Integer noise shares: exact tables, draws that follow them, epsilons that bound the truth."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from dp_accounting.gaussian_mechanism import get_epsilon_gaussian
from dp_accounting.rdp import compute_epsilon
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import logsumexp

from fedjax_llm.errors import Refused, UserError
from fedjax_llm.privacy.integer_noise import (
    DiscreteGaussianShares,
    SkellamShares,
    accounting,
    draw,
    draw_secret,
    sampling,
    tables,
    weights,
)

KINDS = [DiscreteGaussianShares, SkellamShares]
draw_jit = jax.jit(draw, static_argnums=2)


def gaussian_oracle(variance, largest):
    """Probabilities of 0 ... largest, each exponential on its own."""
    weights = [(-Decimal(x * x) / (2 * variance)).exp() for x in range(largest + 1)]
    return [w / (2 * sum(weights) - 1) for w in weights]


def skellam_oracle(variance, largest):
    """Probabilities of 0 ... largest, from the series of the product of two Poissons."""

    def one(x):
        term = (-variance).exp() * (variance / 2) ** x / math.factorial(x)
        total, k = term, 0
        while term > total * Decimal(10) ** -75:
            k += 1
            term *= (variance / 2) ** 2 / (k * (k + x))
            total += term
        return total

    return [one(x) for x in range(largest + 1)]


def seeded(seed):
    """Bytes like the operating system's, but always the same."""
    return lambda count: np.random.default_rng(seed).bytes(count)


def pmf(table):
    return np.array([float(Fraction(mass, 2**192)) for mass in table.masses()])


def moment(table, power):
    """Exact moment of a table's distribution."""
    values = range(-table.bound, table.bound + 1)
    total = sum(x**power * mass for x, mass in zip(values, table.masses(), strict=True))
    return Fraction(total, 2**192)


@pytest.mark.parametrize("stddev", [0.02, 0.5, 1.0, 2.75, 20.0])
@pytest.mark.parametrize("kind", KINDS)
def test_table_is_within_its_total_variation_of_an_independent_oracle(kind, stddev):
    table = kind(clients=1).sampler(stddev)
    masses = table.masses()
    assert sum(masses) == 2**192 and masses == masses[::-1] and len(masses) == 2 * table.bound + 1
    with localcontext() as context:
        context.prec = 80
        oracle = gaussian_oracle if kind is DiscreteGaussianShares else skellam_oracle
        p = oracle(Decimal(stddev) ** 2, 2 * table.bound + 5)
        mine = [Decimal(mass) / 2**192 for mass in masses[table.bound :]]
        mine += [Decimal(0)] * (len(p) - len(mine))
        excess = [max(m - q, Decimal(0)) for m, q in zip(mine, p, strict=True)]
        distance = float(2 * sum(excess) - excess[0])
    assert distance <= table.total_variation <= tables.MAX_TOTAL_VARIATION
    # The bound is no larger than it must be.
    assert distance >= (table.total_variation - weights.ERROR) / 2


@pytest.mark.parametrize("kind", KINDS)
def test_largest_table(kind):
    table = kind(clients=1).sampler(4096.0)
    assert table.total_variation <= tables.MAX_TOTAL_VARIATION and table.bound < 2**16
    variance = moment(table, 2)
    assert abs(variance / 4096**2 - 1) < Fraction(1, 10**15)
    values = np.arange(-table.bound, table.bound + 1)
    if kind is SkellamShares:
        oracle = stats.skellam.pmf(values[::997], 4096**2 / 2, 4096**2 / 2)
        # A Skellam variable has excess kurtosis 1 / variance.
        assert abs(moment(table, 4) / variance**2 - 3 - 1 / variance) < Fraction(1, 10**15)
    else:
        oracle = stats.norm.pdf(values[::997] / 4096) / 4096
    np.testing.assert_allclose(pmf(table)[::997], oracle, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("stddev", [0.7, 30.0])
@pytest.mark.parametrize("source", ["simulated", "secret"])
@pytest.mark.parametrize("kind", KINDS)
def test_draws_follow_the_table(kind, source, stddev):
    table = kind(clients=1).sampler(stddev)
    count = 400_000
    if source == "simulated":
        values = draw_jit(table, jax.random.key(5), (count,))
        assert values.dtype == jnp.int32 and values.shape == (count,)
    else:
        values = draw_secret(table, count, seeded(5))
        assert values.dtype == np.int64 and values.shape == (count,)
    values = np.asarray(values)
    expected = pmf(table) * count
    found = np.bincount(values + table.bound, minlength=expected.size)
    cell = np.cumsum(expected) // 20  # cells of about 20 expected draws or more
    cell = np.unique(np.minimum(cell, cell[-1] - 1), return_inverse=True)[1]
    expected, found = np.bincount(cell, expected), np.bincount(cell, found)
    assert stats.chisquare(found, expected * (count / expected.sum())).pvalue > 1e-3
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 4 / math.sqrt(count)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_words_are_mapped_to_values_as_defined(data):
    stddev = data.draw(st.floats(2**-10, 300))
    table = data.draw(st.sampled_from(KINDS))(clients=1).sampler(stddev)
    bits, count = table.column_bits, 40
    column = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count))
    near = data.draw(st.lists(st.integers(-1, 1), min_size=6 * count, max_size=6 * count))
    # Limbs at, just below and just above the thresholds: every comparison is decided somewhere.
    width = np.array(tables.widths(bits))[:, None]
    keep = table.keep_6xL[:, column].astype(np.int64)
    limb = (keep + np.array(near).reshape(6, count)) % 2**width
    third = (limb[2] << bits | np.array(column)).astype(np.uint32)
    more = [row.astype("<u4").tobytes() for row in limb[3:].T]
    # Further words are asked for in order, only by draws that the first three leave undecided.
    asked = [i for i in range(count) if (limb[:3, i] == keep[:3, i]).all()]
    queue = [more[i] for i in asked]
    secret = sampling._select_host(
        table,
        table.keep_6xL[0].astype(np.uint64) << np.uint64(32) | table.keep_6xL[1],
        limb[0].astype(np.uint64) << np.uint64(32) | limb[1].astype(np.uint64),
        third,
        lambda size: queue.pop(0)[:size],
    )
    assert not queue
    first = [jnp.asarray(row.astype(np.uint32)) for row in limb[:2]]
    simulated = sampling._select(table, *first, jnp.asarray(third))
    for i, c in enumerate(column):
        number, threshold = (tables.join(x[:, i].tolist(), bits) for x in (limb, keep))
        value = (c if number < threshold else int(table.alias_L[c])) - table.bound
        assert secret[i] == value
        if i not in asked:
            assert simulated[i] == value
        assert abs(int(simulated[i])) <= table.bound


@given(
    st.sampled_from(KINDS),
    st.floats(2**-6, 500),
    st.integers(1, 40),
    st.integers(1, 30),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=40)
def test_no_share_and_no_sum_exceeds_its_bound(kind, stddev, clients, bits, seed):
    shares = kind(clients, dropouts=clients // 3)
    table = shares.sampler(stddev * math.sqrt(shares.counted))
    # Columns beyond the bound are empty, or `masses` would raise: it holds for every word.
    assert len(table.masses()) == 2 * table.bound + 1
    share_KxP = np.stack([draw_secret(table, 50, seeded(seed + k)) for k in range(clients)])
    assert np.abs(share_KxP).max() <= table.bound <= 2**16
    max_int = 2**bits - 1
    noised = np.int32(max_int) + share_KxP.astype(np.int32)  # exact: nothing wraps
    np.testing.assert_array_equal(noised.astype(np.int64), max_int + share_KxP)
    bound = shares.sum_bound(max_int, table)
    assert bound == clients * (max_int + table.bound)
    assert np.abs(noised.astype(np.int64).sum(axis=0)).max() <= bound


@pytest.mark.parametrize("lost", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_variance_of_the_sum_with_dropouts(kind, lost):
    shares, total, count = kind(clients=7, dropouts=3), 9.0, 100_000
    assert shares.share_variance(total**2) == total**2 / 4
    table = shares.sampler(total)
    keys = jax.random.split(jax.random.key(lost), 7 - lost)
    share_KxP = np.asarray(jax.vmap(lambda key: draw_jit(table, key, (count,)))(keys), np.int64)
    variance = share_KxP.sum(axis=0).var()
    expected = float((7 - lost) * moment(table, 2))
    assert abs(expected / (total**2 * (7 - lost) / 4) - 1) < 1e-12
    assert expected >= total**2 * (1 - 1e-12)
    spread = 4 * math.sqrt(2.1 / count)  # four standard errors; kurtosis is below 3.1
    assert abs(variance / expected - 1) < spread
    assert variance > total**2 * (1 - spread)


def test_keys_and_shapes():
    table = SkellamShares(3).sampler(4.0)
    one, two = (draw_jit(table, jax.random.key(seed), (20, 30)) for seed in (1, 2))
    assert one.shape == (20, 30) and (one != two).mean() > 0.5
    np.testing.assert_array_equal(one, draw(table, jax.random.key(1), (20, 30)))
    assert draw(table, jax.random.key(0), ()).shape == ()
    assert draw(table, jax.random.key(0), (0, 3)).shape == (0, 3)
    assert draw_secret(table, 0).shape == (0,)
    many = draw_secret(table, 70_001, seeded(1))
    np.testing.assert_array_equal(many[:100], draw_secret(table, 70_001, seeded(1))[:100])
    assert (many[:32768] != many[32768:65536]).any()  # the stream goes on from chunk to chunk
    assert (draw_secret(table, 100) != draw_secret(table, 100)).any()
    assert SkellamShares(3).sampler(4.0) is table
    there = jax.device_put(table)
    np.testing.assert_array_equal(one, draw_jit(there, jax.random.key(1), (20, 30)))
    np.testing.assert_array_equal(many, draw_secret(there, 70_001, seeded(1)))


def test_secret_stream_is_aes_256_in_counter_mode():
    table = DiscreteGaussianShares(1).sampler(3.0)
    key = seeded(9)(32)
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(12 * 50))
    pairs = np.frombuffer(stream[: 8 * 50], "<u8")
    last = np.frombuffer(stream[8 * 50 :], "<u4")
    values = sampling._select(
        table,
        jnp.asarray((pairs >> np.uint64(32)).astype(np.uint32)),
        jnp.asarray((pairs & np.uint64(2**32 - 1)).astype(np.uint32)),
        jnp.asarray(last),
    )
    np.testing.assert_array_equal(values, draw_secret(table, 50, lambda count: key[:count]))


# Accounting.


def formula(kind, stddev, n, l2, d, alpha):
    """The papers' bounds, written out; integer orders."""
    l1 = min(math.sqrt(d) * l2, l2**2)
    if kind is SkellamShares:
        mu = stddev**2
        second = ((2 * alpha - 1) * l2**2 + 6 * l1) / (4 * mu**2)
        return alpha * l2**2 / (2 * mu) + min(second, 3 * l1 / (2 * mu))
    s = stddev / math.sqrt(n)
    tau = 10 * sum(math.exp(-2 * math.pi**2 * s**2 * k / (k + 1)) for k in range(1, n))
    return min(
        alpha * l2**2 / (2 * n * s**2) + tau * d,
        alpha / 2 * (l2**2 / (n * s**2) + 2 * l1 / (math.sqrt(n) * s) * tau + tau**2 * d),
        alpha / 2 * (l2 / (math.sqrt(n) * s) + tau * math.sqrt(d)) ** 2,
    )


@pytest.mark.parametrize(
    ("stddev", "l2", "d", "rounds", "delta"),
    [
        (2.0, 1.0, 1, 1, 1e-5),
        (3.1, 5.5, 10, 3, 1e-6),
        (4.0, 2.0, 10**6, 1, 1e-5),
        (40.0, 50.0, 10**7, 20, 1e-8),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_epsilon_is_the_papers_formula_composed_and_converted(kind, stddev, l2, d, rounds, delta):
    shares = kind(clients=9, dropouts=2, colluding=1)
    integers = [2, 3, 5, 9, 17, 65]
    found = {
        SkellamShares: lambda: accounting.skellam_divergence(
            np.array(integers, float), stddev, l2, d
        ),
        DiscreteGaussianShares: lambda: accounting.discrete_gaussian_divergence(
            np.array(integers, float), stddev, 6, l2, d
        ),
    }[kind]()
    np.testing.assert_allclose(
        found, [formula(kind, stddev, 6, l2, d, a) for a in integers], rtol=1e-12
    )
    # An upper bound by integer orders alone, converted by hand; real orders gain a little.
    coarse = min(
        rounds * formula(kind, stddev, 6, l2, d, a)
        + math.log1p(-1 / a)
        - math.log(delta * a) / (a - 1)
        for a in range(2, 400)
    )
    epsilon = shares.epsilon(stddev, l2, d, rounds, delta)
    assert coarse * 0.93 < epsilon < coarse * 1.001


@pytest.mark.parametrize("kind", KINDS)
def test_epsilon_approaches_the_continuous_gaussian_from_above(kind):
    shares, delta, rounds, d = kind(clients=20, dropouts=5), 1e-6, 10, 10**6
    for multiplier in (0.5, 2.0, 30.0):
        orders = np.linspace(1.05, 400, 60_000)
        limit = compute_epsilon(orders, rounds * orders / (2 * multiplier**2), delta)[0]
        exact = get_epsilon_gaussian(multiplier / math.sqrt(rounds), delta)
        gaps = []
        for stddev in (3.0, 30.0, 300.0, 3e4):
            epsilon = shares.epsilon(stddev, stddev / multiplier, d, rounds, delta)
            assert epsilon >= limit * (1 - 1e-5) and epsilon > exact
            gaps.append(epsilon / limit - 1)
        # Skellam's bound is for integer orders, and the best one is below 2 for the least noise.
        small = 1e-3 if kind is DiscreteGaussianShares else 2e-2 if multiplier < 2 else 3e-3
        assert gaps[-1] < small and gaps == sorted(gaps, reverse=True)


def sum_masses(table, n):
    """Exact distribution of the sum of n shares, in units of 2^-(192 n)."""
    total = np.ones(1, object)
    for _ in range(n):
        total = np.convolve(total, np.array(table.masses(), object))
    return total


def shifted(p, by):
    """A distribution and the same one moved, on one support."""
    return np.pad(p, (0, by)), np.pad(p, (by, 0))


@pytest.mark.parametrize(("stddev", "n"), [(0.6, 1), (1.0, 2), (1.3, 4), (2.0, 12), (6.0, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_divergence_bounds_that_of_the_summed_shares(kind, stddev, n):
    shares = kind(clients=n)
    mass = sum_masses(shares.sampler(stddev), n)
    log_p = np.array([math.log(m) - 192 * n * math.log(2) for m in mass])
    orders = np.array([1.1, 1.7, 2, 2.5, 3, 4.2, 6, 9])
    for shift in (1, 2, 3):
        bound = shares._divergence(orders, stddev, float(shift), 1)
        # Where only one of them has mass, the tables are cut: total variation covers that.
        log_a, log_b = log_p[shift:], log_p[:-shift]
        for order, limit in zip(orders, bound, strict=True):
            exact = logsumexp(order * log_a - (order - 1) * log_b) / (order - 1)
            assert exact <= limit * (1 + 1e-9)
            assert stddev < 6 or order < 2 or exact > 0.85 * limit


@pytest.mark.parametrize(("stddev", "n"), [(1.2, 2), (2.5, 4), (8.0, 6)])
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_epsilon_bounds_the_hockey_stick_of_the_summed_shares(kind, stddev, n, rounds):
    shares, delta = kind(clients=n + 2, dropouts=1, colluding=1), 1e-4
    p = np.array(
        [float(Fraction(m, 2 ** (192 * n))) for m in sum_masses(shares.sampler(stddev), n)]
    )
    for shift in (1, 3):
        a, b = shifted(p, shift)
        epsilon = shares.epsilon(stddev, float(shift), 1, rounds, delta)
        assert math.isfinite(epsilon)
        if rounds == 2:
            a, b = np.outer(a, a), np.outer(b, b)
        for one, other in ((a, b), (b, a)):
            assert np.maximum(one - math.exp(epsilon) * other, 0).sum() <= delta
        # Nor is it far off: at six tenths of epsilon more than delta is left.
        if stddev > 2:
            assert np.maximum(a - math.exp(0.6 * epsilon) * b, 0).sum() > delta


@pytest.mark.parametrize("kind", KINDS)
def test_epsilon_is_monotone(kind):
    def epsilon(stddev=20.0, rounds=4, dropouts=2, l2=12.0, d=10**5, delta=1e-5, colluding=0):
        return kind(12, dropouts, colluding).epsilon(stddev, l2, d, rounds, delta)

    stddevs = [epsilon(stddev=s) for s in (4.0, 5.0, 7.0, 15.0, 40.0, 1e3, 1e6)]
    assert stddevs == sorted(stddevs, reverse=True) and len(set(stddevs)) == 7
    for name, values in (
        ("rounds", (0, 1, 2, 5, 100)),
        ("l2", (0.0, 1.0, 4.0, 15.0, 60.0)),
        ("d", (1, 100, 10**9)),
        ("delta", (0.1, 1e-3, 1e-9, 1e-12)),
    ):
        found = [epsilon(**{name: value}) for value in values]
        assert found == sorted(found), name
    # With the size of a share fixed, every share that may be missing costs privacy.
    for name in ("dropouts", "colluding"):
        found = [
            epsilon(stddev=6 * math.sqrt(12 - lost), **{"dropouts": 0, name: lost})
            for lost in range(12)
        ]
        assert found == sorted(found) and len(set(found)) == 12
    assert epsilon(dropouts=3, colluding=2) == epsilon(dropouts=5)


@pytest.mark.parametrize("kind", KINDS)
def test_total_variation_is_paid_from_delta(kind):
    shares = kind(10)
    plain = shares.epsilon(50.0, 50.0, 10**6, 10, 1e-9)
    orders = accounting.ORDERS_O
    divergence = 10 * shares._divergence(orders, 50.0, 50.0, 10**6)
    assert plain == pytest.approx(compute_epsilon(orders, divergence, 1e-9)[0], rel=1e-6)
    # Ten times the rounds: epsilon would be 113, and e^113 * 10^9 * 2^-159 is above delta.
    assert math.isinf(shares.epsilon(50.0, 50.0, 10**6, 100, 1e-9))
    found = accounting.certified_epsilon(orders, divergence, 1e-3, 1e-20)
    spent = 1e-3 - (1 + math.exp(found)) * 1e-20
    assert found >= compute_epsilon(orders, divergence, spent)[0] * (1 - 1e-12)
    assert math.isinf(accounting.certified_epsilon(orders, divergence, 1e-3, 1e-4))


def test_nothing_is_certified_where_the_theorem_does_not_hold():
    args = (1.0, 5, 1, 1e-5)
    shares = DiscreteGaussianShares(clients=20, dropouts=4)
    assert math.isinf(shares.epsilon(1.99, *args))  # shares of less than half a step
    assert math.isfinite(shares.epsilon(2.0, *args))
    assert math.isfinite(SkellamShares(20, 4).epsilon(1.99, *args))
    for kind in KINDS:
        assert kind(5).epsilon(3.0, 0.0, 5, 1, 1e-5) == 0
        assert kind(5).epsilon(3.0, 2.0, 5, 0, 1e-5) == 0
        for stddev in (1e-300, 1e-160, 1e-9, 2.0**-10, 1e-2, 1e9, 1e160, 1e300):
            for l2 in (1e-300, 1e-2, 1.0, 1e9, 1e160, 1e300):
                epsilon = kind(5).epsilon(stddev, l2, 10**9, 1000, 1e-5)
                assert epsilon >= 0 and (stddev >= l2 / 64 or math.isinf(epsilon))


@pytest.mark.parametrize("kind", KINDS)
def test_refusals(kind):
    with pytest.raises(UserError, match="at least one client, got 0"):
        kind(0)
    with pytest.raises(UserError, match="dropouts must not be negative, got -1"):
        kind(3, -1)
    with pytest.raises(UserError, match="colluding must not be negative, got -2"):
        kind(3, 0, -2)
    with pytest.raises(Refused, match="2 dropouts and 1 colluding of 3"):
        kind(3, 2, 1)
    shares = kind(4, 1)
    for stddev in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match="positive, finite"):
            shares.sampler(stddev)
        with pytest.raises(UserError, match="positive, finite"):
            shares.epsilon(stddev, 1.0, 1, 1, 0.1)
    assert shares.sampler(4096.0 * math.sqrt(3) * (1 - 1e-9)).bound < 2**16
    with pytest.raises(UserError, match=r"7094\.[0-9]* steps .*fewer bits"):
        kind(3).sampler(7094.5 * math.sqrt(3))
    with pytest.raises(UserError, match="more bits"):
        shares.sampler(1e-3)
    for l2 in (-1.0, math.inf, math.nan):
        with pytest.raises(UserError, match="l2 sensitivity"):
            shares.epsilon(1.0, l2, 1, 1, 0.1)
    for dimension, rounds in ((0, 1), (1, -1)):
        with pytest.raises(UserError, match="dimension must be"):
            shares.epsilon(1.0, 1.0, dimension, rounds, 0.1)
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(UserError, match="delta must be in"):
            shares.epsilon(1.0, 1.0, 1, 1, delta)
    with pytest.raises(UserError, match="draws must not be negative, got -1"):
        draw_secret(shares.sampler(3.0), -1)
