"""Ring-LWE encryption against Python's big integers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm_kernels import ring as kernel
from fedjax_llm_kernels.ring import Ring, choose_primes
from fedjax_llm_kernels.ring_arithmetic import CPU, mulhi_by_halves, mulhi_native
from fedjax_llm_kernels.ring_tables import _root, tables
from fedjax_llm_kernels.ring_transform import forward_transform, inverse_transform

LIMBS_1 = Ring(1024, choose_primes(1024, [27]), 17, 1, 9, 1 << 13)
LIMBS_2 = Ring(2048, choose_primes(2048, [26, 27]), 20, 2, 10, 1 << 15)
LIMBS_3 = Ring(1024, choose_primes(1024, [27, 20, 25]), 12, 5, 9, 0)
LIMBS_4 = Ring(4096, choose_primes(4096, [27, 26, 26, 26]), 19, 5, 9, 1 << 15)
LIMBS_8 = Ring(8192, choose_primes(8192, [27] * 8), 31, 6, 12, 1 << 23)
LIMBS_9 = Ring(1024, choose_primes(1024, [24] + [27] * 8), 29, 8, 7, -5)
RINGS = [LIMBS_1, LIMBS_2, LIMBS_3, LIMBS_4, LIMBS_8, LIMBS_9]
ids = [f"{ring.size}x{ring.limbs}" for ring in RINGS]
each_ring = pytest.mark.parametrize("ring", RINGS, ids=ids)


def random_words(rng, *shape):
    return rng.integers(0, 2**32, shape, dtype=np.uint32)


def random_a(ring, rng, elements):
    rows = [rng.integers(0, p, (elements, ring.size), dtype=np.uint32) for p in ring.primes]
    return jnp.asarray(np.stack(rows, axis=1))


def random_values(ring, rng, elements, clients=1):
    """Values whose sum over the clients fits the digit, the extremes among them."""
    top = min((1 << ring.digit_bits) // clients, 1 << 31) - ring.offset - 1
    low = -ring.offset
    values = rng.integers(low, top, elements * ring.per_element, endpoint=True)
    values[:4], values[-4:] = low, top
    return jnp.asarray(values.astype(np.int32))


def zeros(ring, elements):
    return jnp.zeros((elements, ring.limbs, ring.size), jnp.uint32)


def counted(words):
    """Ones in the words of each column, less 48."""
    return np.bitwise_count(np.asarray(words)).astype(np.int64).sum(axis=0) - 48


def unpacked(ring, payload):
    """The residues in a payload, by the text of `bit_planes`: int[K, L, N]."""
    words = np.asarray(payload).view("<u4").astype(object)
    elements, start = [], 0
    while start < len(words):
        limbs = []
        for prime in ring.primes:
            residues, low = np.zeros(ring.size, object), 0
            for width in (16, 8, 4, 2, 1):
                if prime.bit_length() & width:
                    count = ring.size * width // 32
                    for i in range(ring.size):
                        field = words[start + i % count] >> width * (i // count) & (1 << width) - 1
                        residues[i] += int(field) << low
                    low += width
                    start += count
            limbs.append(residues)
        elements.append(np.stack(limbs))
    return np.stack(elements)


@functools.partial(jax.jit, static_argnums=0)
def forward(ring, x):
    return forward_transform(ring, x, tables(ring).forward, tables(ring).q_L, CPU)


@functools.partial(jax.jit, static_argnums=0)
def inverse(ring, x):
    return inverse_transform(ring, x, tables(ring).inverse, tables(ring).q_L, CPU)


def coefficients(ring, a_hat):
    """The coefficients of u32[L, N], modulo the primes."""
    x = np.asarray(inverse(ring, jnp.asarray(a_hat)))
    return np.stack(
        [
            row.astype(object) * pow(ring.size, -1, prime) % prime
            for row, prime in zip(x, ring.primes, strict=True)
        ]
    )


def negacyclic(a, s, prime):
    """a * s modulo X^N + 1 and a prime, from the definition; s small."""
    n = len(a)
    both = np.concatenate([-np.asarray(a, np.int64), np.asarray(a, np.int64)])
    total = np.zeros(n, np.int64)
    for i, factor in enumerate(np.asarray(s, np.int64)):
        total += int(factor) * both[n - i : 2 * n - i]
    return total % prime


def message(ring, values, element):
    """T of every coefficient as Python integers."""
    digits = np.asarray(values).reshape(-1, ring.digits, ring.size)[element].astype(object)
    return sum(
        (digits[j] + ring.offset) << (ring.scale_bits + ring.digit_bits * j)
        for j in range(ring.digits)
    )


def test_the_high_word_of_a_product():
    rng = np.random.default_rng(1)
    x, y = (rng.integers(0, 2**32, 500, dtype=np.uint32) for _ in range(2))
    x[:3], y[:3] = [2**32 - 1, 2**32 - 1, 0], [2**32 - 1, 1, 2**32 - 1]
    exact = [int(a) * int(b) >> 32 for a, b in zip(x, y, strict=True)]
    for mulhi in (mulhi_native, mulhi_by_halves):
        np.testing.assert_array_equal(mulhi(jnp.asarray(x), jnp.asarray(y)), exact)


@each_ring
def test_the_transform_evaluates_at_the_roots_of_the_ring(ring):
    """Each entry is the polynomial at an odd power of psi, each power once, in the stated order."""
    rng = np.random.default_rng(2)
    secret = rng.integers(-(2**26) + 1, 2**26, ring.size).astype(np.int32)
    secret[:2] = [2**26 - 1, -(2**26) + 1]
    got = np.asarray(kernel.transform_secret(ring, jnp.asarray(secret)))
    a, b = ring.lanes
    bits = ring.size.bit_length() - 1
    places = rng.integers(0, ring.size, 12)
    for limb, prime in enumerate(ring.primes):
        psi = _root(prime, 2 * ring.size)
        for place in places:
            column, row = divmod(int(place), a)  # at [b, a]: number a * B + b, bits reversed
            index = int(f"{row * b + column:0{bits}b}"[::-1], 2)
            power = pow(psi, 2 * index + 1, prime)
            value = 0
            for coefficient in secret[::-1].tolist():
                value = (value * power + coefficient) % prime
            assert got[limb, place] == value


@pytest.mark.parametrize("ring", [LIMBS_2, LIMBS_3, LIMBS_4], ids=["2", "3", "4"])
def test_the_inverse_undoes_the_transform_for_any_words_below_2q(ring):
    rng = np.random.default_rng(3)
    x = np.stack([rng.integers(0, 2 * p, ring.size, dtype=np.uint32) for p in ring.primes])
    x[:, 0], x[:, -1] = [2 * p - 1 for p in ring.primes], 0
    there = forward(ring, jnp.asarray(x))
    back = np.asarray(inverse(ring, there))
    for i, prime in enumerate(ring.primes):
        assert there[i].max() < 2 * prime and back[i].max() < 2 * prime
        exact = x[i].astype(object) * ring.size % prime
        np.testing.assert_array_equal(back[i].astype(object) % prime, exact)


@pytest.mark.parametrize("ring", [LIMBS_1, LIMBS_3], ids=["1", "3"])
def test_a_payload_is_a_times_s_plus_noise_plus_message(ring):
    rng = np.random.default_rng(4)
    a_hat, noise = random_a(ring, rng, 2), random_words(rng, 3, 2, ring.size)
    noise[:, 0, 0], noise[:, 0, 1] = 0, 2**32 - 1  # errors of -48 and 48
    secret, secret_hat = kernel.prepare_secret(ring, random_words(rng, 3, ring.size))
    values = random_values(ring, rng, 2)
    payload = kernel.encrypt(ring, values, a_hat, secret_hat, noise)
    residues = unpacked(ring, payload)
    for element in range(2):
        a = coefficients(ring, a_hat[element])
        clear = message(ring, values, element) + counted(noise)[element]
        for limb, prime in enumerate(ring.primes):
            exact = (negacyclic(a[limb], secret, prime) + clear) % prime
            np.testing.assert_array_equal(residues[element, limb], exact)


@pytest.mark.parametrize(
    ("ring", "elements", "clients"),
    [
        (LIMBS_1, 13, 8),
        (LIMBS_2, 3, 16),
        (LIMBS_3, 1, 3),
        (LIMBS_4, 3, 8),
        (LIMBS_8, 1, 33),
        (LIMBS_9, 2, 1),
    ],
    ids=ids,
)
def test_a_sum_is_exact_with_extreme_values_and_the_worst_noise(ring, elements, clients):
    rng = np.random.default_rng(5)
    a_hat = random_a(ring, rng, elements)
    total, secrets = zeros(ring, elements), np.zeros(ring.size, np.int64)
    exact, errors = np.zeros(elements * ring.per_element, np.int64), 0
    lazy = 0
    for _ in range(clients):
        secret, secret_hat = kernel.prepare_secret(ring, random_words(rng, 3, ring.size))
        noise = random_words(rng, 3, elements, ring.size)
        if clients * 48 < 1 << (ring.scale_bits - 1):
            noise[:, :, :8], noise[:, :, 8:16] = 0, 2**32 - 1
        values = random_values(ring, rng, elements, clients)
        payload = kernel.encrypt(ring, values, a_hat, secret_hat, noise)
        assert payload.dtype == np.uint8
        assert payload.size == elements * ring.payload_bytes_per_element
        if lazy == ring.lazy_additions:
            total, lazy = kernel.reduce(ring, total), 0
        total = kernel.add(ring, total, payload.tobytes())
        lazy += 1
        secrets += np.asarray(secret)
        exact += np.asarray(values)
        errors = errors + counted(noise)
    secret_hat = kernel.transform_secret(ring, jnp.asarray(secrets.astype(np.int32)))
    values, worst, above = kernel.unmask(ring, total, a_hat, secret_hat, jnp.int32(clients))
    np.testing.assert_array_equal(values, exact)
    assert int(above) == 0
    assert int(worst) == np.abs(errors).max()


@functools.cache
def sample(ring):
    rng = np.random.default_rng(6)
    secret, secret_hat = kernel.prepare_secret(ring, random_words(rng, 3, ring.size))
    return random_a(ring, rng, 1), secret, secret_hat, random_words(rng, 3, 1, ring.size)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_values_come_back(data):
    ring = data.draw(st.sampled_from([LIMBS_1, LIMBS_2, LIMBS_3]))
    a_hat, _, secret_hat, noise = sample(ring)
    low, high = -ring.offset, (1 << ring.digit_bits) - 1 - ring.offset
    seed = data.draw(st.lists(st.integers(low, high), min_size=1, max_size=50))
    values = jnp.asarray(np.resize(seed, ring.per_element).astype(np.int32))
    total = kernel.add(ring, zeros(ring, 1), kernel.encrypt(ring, values, a_hat, secret_hat, noise))
    back, _, above = kernel.unmask(ring, total, a_hat, secret_hat, jnp.int32(1))
    np.testing.assert_array_equal(back, values)
    assert int(above) == 0


def test_payloads_add_in_any_order_to_the_same_total():
    ring, rng = LIMBS_2, np.random.default_rng(7)
    size = 3 * ring.payload_bytes_per_element
    payloads = [rng.bytes(size) for _ in range(4)]  # any bytes are valid residues

    def total(order):
        state = zeros(ring, 3)
        for i in order:
            state = kernel.add(ring, state, payloads[i])
        return np.asarray(kernel.reduce(ring, state))

    np.testing.assert_array_equal(total([0, 1, 2, 3]), total([3, 1, 0, 2]))
    assert (total([0, 1, 2, 3]) < np.array(ring.primes, np.uint32)[:, None]).all()
    exact = sum(unpacked(ring, np.frombuffer(payload, np.uint8)) for payload in payloads)
    np.testing.assert_array_equal(
        total([0, 1, 2, 3]), exact % np.array(ring.primes, object)[:, None]
    )


@each_ring
def test_lazy_additions_never_pass_a_word(ring):
    for prime in ring.primes:
        largest = (1 << prime.bit_length()) - 1
        assert prime - 1 + ring.lazy_additions * largest < 1 << 32
    assert ring.lazy_additions >= 31
    total = kernel.reduce(ring, jnp.full((1, ring.limbs, ring.size), 2**32 - 1, jnp.uint32))
    for i, prime in enumerate(ring.primes):
        np.testing.assert_array_equal(total[0, i], np.full(ring.size, (2**32 - 1) % prime))


@pytest.mark.parametrize("ring", [LIMBS_1, LIMBS_4], ids=["1", "4"])
def test_a_wrong_secret_or_a_flipped_bit_shows(ring):
    a_hat, secret, secret_hat, noise = sample(ring)
    values = random_values(ring, np.random.default_rng(8), 1)
    payload = kernel.encrypt(ring, values, a_hat, secret_hat, noise)

    def signs(payload, secret):
        total = kernel.add(ring, zeros(ring, 1), payload)
        hat = kernel.transform_secret(ring, secret)
        _, worst, above = kernel.unmask(ring, total, a_hat, hat, jnp.int32(1))
        return int(worst), int(above)

    honest, above = signs(payload, secret)
    assert honest <= 48 and above == 0
    half = 1 << (ring.scale_bits - 1)
    worst, above = signs(payload, secret + np.eye(1, ring.size, 3, dtype=np.int32)[0])
    assert worst > 0.9 * half and above > 0
    flipped = payload.copy()
    flipped[5] ^= 1 << 6
    if ring.limbs > 1:  # one residue of several: the integer is off by a multiple of q / q_i
        worst, above = signs(flipped, secret)
        assert worst > 48 or above > 0


def test_secrets_are_centred_binomials():
    ring = LIMBS_4
    rng = np.random.default_rng(9)
    words = random_words(rng, 3, ring.size)
    words[:, 0], words[:, 1] = 0, 2**32 - 1
    # Every pattern of the three bits in a column, in every column.
    patterns = np.array([[-(p >> w & 1) & 0xFFFFFFFF for p in range(8)] for w in range(3)])
    single = (patterns[:, :, None] & (1 << np.arange(32))).reshape(3, -1).astype(np.uint32)
    words[:, 2 : 2 + 256] = single
    secret, hat = kernel.prepare_secret(ring, words)
    assert secret.dtype == jnp.int32 and hat.dtype == jnp.uint32
    np.testing.assert_array_equal(secret, counted(words))
    assert int(secret[0]) == -48 and int(secret[1]) == 48
    np.testing.assert_array_equal(hat, kernel.transform_secret(ring, secret))

    draws = np.concatenate(
        [
            np.asarray(kernel.prepare_secret(LIMBS_8, random_words(rng, 3, 8192))[0])
            for _ in range(20)
        ]
    ).astype(np.float64)
    n = draws.size
    # Variance 24; fourth moment 3 * 24^2 - 2 * 96 / 16: six standard errors.
    assert abs(draws.mean()) < 6 * (24 / n) ** 0.5
    assert abs(draws.var() - 24) < 6 * ((1716 - 576) / n) ** 0.5
    assert abs((draws**4).mean() - 1716) < 0.1 * 1716


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"size": 1000}, "size must be"),
        ({"size": 512}, "size must be"),
        ({"primes": ()}, "distinct primes"),
        ({"primes": (12289, 12289)}, "distinct primes"),
        ({"primes": (12287,)}, "is not a prime"),
        ({"primes": (2**27 - 39,)}, "is not a prime"),
        ({"digits": 0}, "digits at least 1"),
        ({"digit_bits": 33}, "digit_bits"),
        ({"scale_bits": 0}, "scale_bits"),
        ({"offset": 2**31}, "offset"),
        ({"digits": 2}, "the modulus holds"),
    ],
)
def test_a_ring_that_the_arithmetic_is_not_proved_for_is_refused(change, text):
    good = {f: getattr(LIMBS_1, f) for f in LIMBS_1.__dataclass_fields__}
    with pytest.raises(ValueError, match=text):
        Ring(**{**good, **change})


def test_the_largest_primes_of_a_width():
    for size in (1024, 2048, 4096, 8192):
        widths = [27] * 9
        primes = choose_primes(size, widths)
        assert sorted(primes, reverse=True) == list(primes) and len(set(primes)) == 9
        step = 2 * size
        candidates = range((2**27 - 2) // step * step + 1, primes[-1] - 1, -step)
        by_division = [n for n in candidates if all(n % d for d in range(3, int(n**0.5) + 1, 2))]
        assert tuple(by_division) == primes
    with pytest.raises(ValueError, match="primes of 12 bits"):
        choose_primes(8192, [12])
    with pytest.raises(ValueError, match="1 to 27 bits"):
        choose_primes(1024, [28])


def test_wrong_shapes_and_lengths_are_refused():
    ring = LIMBS_1
    a_hat, _, secret_hat, noise = sample(ring)
    values = jnp.zeros(ring.per_element, jnp.int32)
    with pytest.raises(ValueError, match="values must have shape"):
        kernel.encrypt(ring, values[1:], a_hat, secret_hat, noise)
    with pytest.raises(ValueError, match="random_words must have shape"):
        kernel.encrypt(ring, values, a_hat, secret_hat, noise[:2])
    with pytest.raises(ValueError, match="payload must have shape"):
        kernel.add(ring, zeros(ring, 2), bytes(ring.payload_bytes_per_element))
    with pytest.raises(ValueError, match="total must have shape"):
        kernel.add(ring, zeros(LIMBS_2, 1), bytes(ring.payload_bytes_per_element))


def test_a_payload_may_lie_anywhere_in_a_buffer():
    ring = LIMBS_1
    payload = np.random.default_rng(10).bytes(ring.payload_bytes_per_element)
    shifted = memoryview(b"xyz" + payload)[3:]
    np.testing.assert_array_equal(
        kernel.add(ring, zeros(ring, 1), shifted), kernel.add(ring, zeros(ring, 1), payload)
    )
