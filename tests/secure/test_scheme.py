"""OpenFHE's two schemes behind one interface: exact, fresh, flooded as wide as is claimed."""

import dataclasses
import functools
import math
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.errors import Refused, UserError
from fedjax_llm.secure import ckks as ckks_module
from fedjax_llm.secure.bfv import Bfv, open_bfv
from fedjax_llm.secure.ciphertext_round import payload_bytes
from fedjax_llm.secure.ckks import Ckks, open_ckks
from fedjax_llm.secure.ckks_parameters import (
    BASE_FLOODING_BITS,
    FLOODING_STEP_BITS,
    LOG_Q,
    MAX_FLOODING_BITS,
    choose_ckks,
)
from fedjax_llm.secure.parameters import choose
from fedjax_llm.secure.residues import add
from fedjax_llm.secure.scheme import Scheme
from fedjax_llm.secure.sums import WrongSum

MAX_ABS, CLIENTS, CLOUDS = 2**15 - 1, 8, 3


@functools.cache
def scheme_of(kind):
    """One context per kind and session."""
    if kind == "bfv":
        return open_bfv(choose(MAX_ABS, CLIENTS, CLOUDS))
    if kind == "key layer":
        return open_bfv(choose(48, CLIENTS, CLOUDS, count=4096))
    return open_ckks(choose_ckks(MAX_ABS, CLIENTS, CLOUDS))


@pytest.fixture(scope="session", params=["bfv", "key layer", "ckks"])
def scheme(request) -> Scheme:
    """Every scheme, with other parameters for the key layer of mode threshold."""
    return scheme_of(request.param)


@pytest.fixture(scope="session")
def ckks() -> Ckks:
    """CKKS for sums of eight integers of 16 bits."""
    return scheme_of("ckks")


@pytest.fixture(scope="session")
def bfv() -> Bfv:
    """BFV for the same, two integers per slot."""
    return scheme_of("bfv")


@functools.cache
def keys_of(scheme):
    """Secrets of three clouds, additively shared, and their joint public key."""
    rng = np.random.default_rng(1)
    shape = (1, len(scheme.moduli), scheme.ring_dimension)
    primes = np.asarray(scheme.moduli, np.uint64)[None, :, None]
    reference = rng.integers(0, 2**63, shape, dtype=np.uint64) % primes
    secrets, shares = zip(*(scheme.key_share(reference) for _ in range(CLOUDS)), strict=True)
    joint = functools.reduce(lambda x, y: add(x, y, scheme.moduli), shares)
    return secrets, scheme.public_key(np.concatenate([joint, reference]))


def fused(scheme, ciphertext):
    """c_0 and what each cloud answers, added up."""
    parts = [scheme.decrypt_partially(secret, ciphertext[1:]) for secret in keys_of(scheme)[0]]
    return functools.reduce(lambda x, y: add(x, y, scheme.moduli), parts, ciphertext[:1])


def largest_of(scheme):
    """The bound of a sum's slots."""
    parameters = scheme.parameters
    if scheme.kind == "bfv":
        return (parameters.plaintext_modulus - 1) // 2
    return parameters.max_abs * parameters.summands


def coefficient_0(scheme, residues_LN):
    """Of ring elements in evaluation form: the mean of their evaluations, modulo Q, centred."""
    size, product = scheme.ring_dimension, math.prod(scheme.moduli)
    value = 0
    for row, modulus in zip(residues_LN, scheme.moduli, strict=True):
        rest = product // modulus
        value += int(row.astype(object).sum()) * pow(size * rest, -1, modulus) * rest
    return (value + product // 2) % product - product // 2


def test_sums_come_back_exactly_for_any_slots_and_both_extremes(scheme):
    largest, size = largest_of(scheme) // CLIENTS, scheme.ring_dimension
    rng = np.random.default_rng(2)
    fillings = [
        rng.integers(-largest, largest + 1, (CLIENTS, size)),
        np.full((CLIENTS, size), largest),
        np.full((CLIENTS, size), -largest),
        np.tile(np.where(np.arange(size) % 2, largest, -largest), (CLIENTS, 1)),
        np.zeros((CLIENTS, 1), np.int64),
    ]
    fillings[-1][:, 0] = 1
    for vectors in fillings:
        encrypted = [scheme.encrypt(keys_of(scheme)[1], vector) for vector in vectors]
        total = functools.reduce(lambda x, y: add(x, y, scheme.moduli), encrypted)
        slots = scheme.decode(fused(scheme, total))
        assert slots.dtype == np.int64 and slots.shape == (size,)
        expected = vectors.sum(axis=0)
        assert np.array_equal(slots[: expected.size], expected)
        assert not slots[expected.size :].any()


def test_adding_residues_is_openfhe_s_eval_add(scheme):
    public_key = keys_of(scheme)[1]
    one, two = (scheme.encrypt(public_key, np.arange(9) * factor) for factor in (1, -5))
    openfhe = scheme.openfhe
    made = openfhe.context.EvalAdd(openfhe.ciphertext(one), openfhe.ciphertext(two))
    assert np.array_equal(add(one, two, scheme.moduli), openfhe.read(made, 2))


def test_what_is_encrypted_does_not_show(scheme):
    """Fresh randomness for the same integers, and residues uniform whatever they are."""
    public_key, size = keys_of(scheme)[1], scheme.ring_dimension
    largest = largest_of(scheme) // CLIENTS
    ints = np.random.default_rng(0).integers(-largest, largest + 1, size)
    first, second = (scheme.encrypt(public_key, ints) for _ in range(2))
    assert (first == second).mean() < 0.001
    for vector in (np.zeros(size, np.int64) + 1, np.full(size, largest), ints):
        residues = scheme.encrypt(public_key, vector)
        for element in residues:
            for row, modulus in zip(element, scheme.moduli, strict=True):
                bins = np.bincount((row / np.float64(modulus) * 64).astype(int), minlength=64)
                expected = row.size / 64
                # Chi-square with 63 degrees of freedom: 160 is beyond the 1 - 1e-9 quantile.
                assert ((bins - expected) ** 2 / expected).sum() < 160
        if vector.std():
            # 8192 points: six standard deviations.
            assert abs(np.corrcoef(residues[0, 0].astype(float), vector)[0, 1]) < 6 / size**0.5


def test_a_missing_or_wrong_share_gives_garbage(scheme):
    secrets, public_key = keys_of(scheme)
    ciphertext = scheme.encrypt(public_key, np.ones(1, np.int64))
    stranger = scheme.key_share(np.ones_like(ciphertext[:1]))[0]
    for given_secrets in (secrets[:2], (*secrets[:2], stranger), (*secrets, secrets[0])):
        parts = [scheme.decrypt_partially(secret, ciphertext[1:]) for secret in given_secrets]
        total = functools.reduce(lambda x, y: add(x, y, scheme.moduli), parts, ciphertext[:1])
        if scheme.kind == "ckks":
            with pytest.raises(WrongSum, match="away from an integer"):
                scheme.decode(total)
        else:
            slots = scheme.decode(total)
            assert np.unique(slots[1:]).size > 1000 and slots[0] != 1


# Bits, clients, clouds and integers per client; the last nine are key layers of mode threshold.
SIZES = [
    (bits, clients, clouds, count)
    for bits, clients, clouds in (
        (9, 10, 2),
        (8, 4, 3),
        (7, 8, 3),
        (4, 5, 2),
        (7, 5, 2),
        (2, 50, 2),
    )
    for count in (1000, 10**6)
] + [(None, clients, 3, count) for clients in (2, 8, 1000) for count in (2048, 4096, 8192)]


@pytest.mark.parametrize(("bits", "clients", "clouds", "count"), SIZES)
def test_bfv_is_exact_under_the_flooding_of_all_clouds(bits, clients, clouds, count):
    """Wherever the plaintext modulus ends up below its limit; the self test runs on the way."""
    max_abs = 48 if bits is None else 2 ** (bits - 1) - 1
    made = open_bfv(choose(max_abs, clients, clouds, count))
    largest, size = largest_of(made), made.ring_dimension
    secret, share = made.key_share(np.ones((1, len(made.moduli), size), np.uint64))
    public_key = made.public_key(np.concatenate([share, np.ones_like(share)]))
    rng = np.random.default_rng(clients)
    for slots in (rng.integers(-largest, largest + 1, size), rng.choice([-largest, largest], size)):
        ciphertext = made.encrypt(public_key, slots)
        for _ in range(4):
            total = add(ciphertext[:1], made.decrypt_partially(secret, ciphertext[1:]), made.moduli)
            for _ in range(clouds - 1):
                more = made.decrypt_partially(secret, np.zeros_like(total))
                total = add(total, more, made.moduli)
            assert np.array_equal(made.decode(total), slots)


def test_bfv_floods_as_widely_as_the_argument_assumes(bfv):
    """Of c_1 = 0 only the error is left, which is uniform over +-Q / (2 q_0)."""
    zero = np.zeros((1, len(bfv.moduli), bfv.ring_dimension), np.uint64)
    secret = keys_of(bfv)[0][0]
    errors = [coefficient_0(bfv, bfv.decrypt_partially(secret, zero)[0]) for _ in range(24)]
    half = math.prod(bfv.moduli) // bfv.moduli[0] // 2
    assert half > 2**119
    assert max(map(abs, errors)) <= half + 1
    # 24 uniform draws: each of these fails with a probability below 1e-6.
    assert max(errors) > 0 > min(errors) and max(map(abs, errors)) > half // 2


def test_ckks_floods_with_a_gaussian_of_the_stated_width(ckks):
    zero = np.zeros((1, 2, ckks.ring_dimension), np.uint64)
    parameters, secret = ckks.parameters, keys_of(ckks)[0][0]
    width = 2.0**parameters.flooding_bits
    noise = ckks.decrypt_partially(secret, zero)
    # All coefficients at once: parts of slots are sums of N of them with cosines as weights.
    parts = np.ldexp(ckks.decode_parts(noise), parameters.scale_bits)
    parts /= math.sqrt(ckks.ring_dimension / 2) * width
    assert abs(parts.std() - 1) < 0.05  # six standard deviations of the estimate
    assert np.abs(parts).max() < 6.5 and abs((parts**4).mean() - 3) < 0.35
    # One coefficient exactly. Its low bits are noise as well: no draw is missing, none aligned.
    drawn = [coefficient_0(ckks, ckks.decrypt_partially(secret, zero)[0]) for _ in range(16)]
    assert max(drawn) > 0 > min(drawn)
    assert width / 3 < np.std(np.array(drawn, float)) < width * 2.2
    for shift in (1, 2**18, 2**36):
        assert len({value // shift % 2**18 for value in drawn}) == 16
    assert parameters.flooding_bits == MAX_FLOODING_BITS
    assert parameters.noise_distance < 2**-56
    # Fresh noise at every call, also for the same ciphertext.
    assert len(set(drawn)) == 16


def without_flooding(ckks, ciphertext):
    """c_0 + c_1 s for the sum of all secrets: what nobody could compute."""
    secrets = keys_of(ckks)[0]
    secret = functools.reduce(lambda x, y: add(x, y, ckks.moduli), secrets)
    product = ciphertext[1:].astype(object) * secret.astype(object)
    primes = np.array(ckks.moduli, object)[None, :, None]
    return add(ciphertext[:1], (product % primes).astype(np.uint64), ckks.moduli)


def test_ckks_errors_are_as_small_as_is_stated(ckks):
    parameters, size = ckks.parameters, ckks.ring_dimension
    rng = np.random.default_rng(3)
    vectors = rng.integers(-MAX_ABS, MAX_ABS + 1, (CLIENTS, size))
    encrypted = [ckks.encrypt(keys_of(ckks)[1], vector) for vector in vectors]
    total = functools.reduce(lambda x, y: add(x, y, ckks.moduli), encrypted)
    errors = ckks.decode_parts(fused(ckks, total)) - vectors.sum(axis=0)
    assert errors.std() == pytest.approx(parameters.error_deviation, rel=0.05)
    assert parameters.error_deviation <= 2**-6 and np.abs(errors).max() < 6 * 2**-6
    # The ciphertexts' noise and float64 alone, 8192 parts: far below the flooding.
    alone = ckks.decode_parts(without_flooding(ckks, total)) - vectors.sum(axis=0)
    assert 0 < alone.std() < MAX_ABS * CLIENTS * 2.0**-50
    # The expected norm of the noise, in coefficients: as noise_distance takes it, less a factor 2.
    zeros = functools.reduce(
        lambda x, y: add(x, y, ckks.moduli),
        [ckks.encrypt(keys_of(ckks)[1], np.zeros(2, np.int64) + 0) for _ in range(CLIENTS)],
    )
    noise = ckks.decode_parts(without_flooding(ckks, zeros))
    norm = np.linalg.norm(np.ldexp(noise, parameters.scale_bits)) / math.sqrt(size / 2)
    assumed = parameters.noise_distance * 2.0 ** (parameters.flooding_bits + 1)
    assert assumed / 3 < norm < assumed / 1.5


@pytest.mark.parametrize("filling", ["signs", "waves"])
def test_float64_costs_ckks_no_more_than_is_stated(ckks, filling):
    """All integers at their bound, the same from every client: the errors add up."""
    size, largest = ckks.ring_dimension, MAX_ABS * CLIENTS
    rng = np.random.default_rng(4)
    for frequency in (1, 5, 2731, 4095):
        waves = np.sin(2 * np.pi * frequency * np.arange(size) / size + 0.1)
        signs = rng.choice([-1, 1], size) if filling == "signs" else np.where(waves > 0, 1, -1)
        total = ckks.encrypt(keys_of(ckks)[1], signs * MAX_ABS)
        for _ in range(3):  # eight times
            total = add(total, total, ckks.moduli)
        alone = ckks.decode_parts(without_flooding(ckks, total)) - signs * largest
        assert largest * 2.0**-50 < alone.std() < largest * 2.0**-48
        assert np.abs(alone).max() < largest * 2.0**-47
        # The part of it that rounding_distance is about, in coefficients, is no more than all.
        parameters = ckks.parameters
        norm = np.linalg.norm(np.ldexp(alone, parameters.scale_bits)) / math.sqrt(size / 2)
        assert norm <= parameters.rounding_distance * 2.0 ** (parameters.flooding_bits + 1)


@pytest.mark.parametrize(
    ("bits", "clients", "clouds"), [(20, 16, 5), (24, 1000, 2), (2, 2, 64), (36, 32, 64)]
)
def test_other_sizes_of_ckks_are_exact_at_the_extremes(bits, clients, clouds):
    """The self test runs on the way: it decrypts sums from one extreme to the other."""
    parameters = choose_ckks(2 ** (bits - 1) - 1, clients, clouds)
    made = open_ckks(parameters)
    largest, size = parameters.max_abs * clients, made.ring_dimension
    secret, share = made.key_share(np.ones((1, 2, size), np.uint64))
    public_key = made.public_key(np.concatenate([share, np.ones_like(share)]))
    rng = np.random.default_rng(bits)
    for slots in (np.full(size, largest), rng.integers(-largest, largest + 1, size)):
        ciphertext = made.encrypt(public_key, slots)
        partial = made.decrypt_partially(secret, ciphertext[1:])
        # All the clouds' flooding, though one share is all there is.
        for _ in range(clouds - 1):
            more = made.decrypt_partially(secret, np.zeros_like(partial))
            partial = add(partial, more, made.moduli)
        parts = made.decode_parts(add(ciphertext[:1], partial, made.moduli))
        assert np.array_equal(np.rint(parts), slots)
        assert np.abs(parts - slots).max() < 6 * parameters.error_deviation + largest * 2.0**-46


def test_ckks_refuses_what_is_far_from_an_integer(ckks):
    halved = dataclasses.replace(ckks.parameters, scale_bits=ckks.parameters.scale_bits - 1)
    off_scale = dataclasses.replace(ckks, parameters=halved)
    for value in (1, -7, 2 * MAX_ABS + 1):  # odd: a half at the right scale
        slots = np.zeros(ckks.ring_dimension, np.int64)
        slots[5] = value
        ciphertext = off_scale.encrypt(keys_of(ckks)[1], slots)
        with pytest.raises(WrongSum, match=r"0\.(4|5)\d? away from an integer"):
            ckks.decode(fused(ckks, ciphertext))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2**40), st.integers(1, 2**20), st.integers(2, 64))
def test_ckks_parameters_leave_room_for_range_and_error(max_abs, summands, parties):
    if max_abs * summands > 2**40:
        with pytest.raises(UserError, match="mode bfv"):
            choose_ckks(max_abs, summands, parties)
        return
    p = choose_ckks(max_abs, summands, parties)
    assert 4 * max_abs * summands * 2**p.scale_bits <= 2 ** (LOG_Q - 1)
    assert p.error_deviation <= 2**-6
    assert 12 * p.error_deviation + max_abs * summands * 2.0**-44 <= 0.25
    assert BASE_FLOODING_BITS + sum(p.flooding_shifts) == p.flooding_bits >= 50
    assert all(0 < shift <= FLOODING_STEP_BITS for shift in p.flooding_shifts)
    assert p.noise_distance < 2**-20 and 0 < p.rounding_distance <= 1


def test_ckks_parameters_out_of_range_are_refused():
    for numbers in ((0, 1, 2), (1, 0, 2), (1, 1, 1), (1, 2**20 + 1, 2), (1, 1, 65)):
        with pytest.raises(UserError, match="an encrypted sum takes"):
            choose_ckks(*numbers)


def test_digests_name_scheme_and_parameters():
    same = open_ckks(choose_ckks(MAX_ABS, CLIENTS, CLOUDS))
    other = open_ckks(choose_ckks(MAX_ABS, CLIENTS + 1, CLOUDS))
    digests = [scheme_of(kind).digest() for kind in ("bfv", "key layer", "ckks")]
    assert same.digest() == digests[2]
    assert len({*digests, other.digest()}) == 4
    assert all(len(digest) == 16 for digest in digests)


def test_sizes(bfv, ckks):
    assert payload_bytes(scheme_of("key layer")) == 321_536 < 400_000
    assert payload_bytes(bfv) == bfv.parameters.ciphertext_bytes
    # The second prime is a hair above 2^50, and takes 51 bits.
    assert payload_bytes(ckks) == 2 * (60 + 51) * 1024


def test_a_forked_process_does_not_encrypt_or_decrypt(scheme, monkeypatch):
    """OpenFHE's generator would repeat the parent's noise."""
    secrets, public_key = keys_of(scheme)
    monkeypatch.setattr("os.getpid", lambda: -1)
    zero = np.zeros_like(secrets[0])
    for call in (
        lambda: scheme.encrypt(public_key, np.ones(1, np.int64)),
        lambda: scheme.decrypt_partially(secrets[0], zero),
        lambda: scheme.key_share(zero),
    ):
        with pytest.raises(Refused, match="before this process was forked"):
            call()


@pytest.mark.parametrize("kind", ["bfv", "ckks"])
def test_setting_up_on_another_thread_is_refused(kind):
    made, caught = scheme_of(kind), []

    def attempt():
        try:
            (open_bfv if kind == "bfv" else open_ckks)(made.parameters)
        except UserError as err:
            caught.append(err)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"message_limbs": 1}, "not the product of 3 primes"),
        ({"message_limbs": 3}, r"not the product|unknown format"),
        ({"limb_bits": 60}, "security requirement"),
        ({"parties": 2**20}, "chose other parameters"),
        # 49 bits, which OpenFHE decodes rightly unless flooding is wide.
        (
            {"plaintext_modulus": 562949952798721, "limb_bits": 51, "ring_dimension": 16384},
            "decrypts wrongly",
        ),
        # 53 bits, which OpenFHE decodes wrongly without a word.
        (
            {"plaintext_modulus": 4503599627763713, "limb_bits": 60, "ring_dimension": 16384},
            "decrypts wrongly",
        ),
    ],
)
def test_an_openfhe_that_takes_other_parameters_or_is_wrong_is_found(bfv, changed, reason):
    with pytest.raises(UserError, match=rf"({reason}).*install the version that constraints\.txt"):
        open_bfv(dataclasses.replace(bfv.parameters, **changed))


def test_an_openfhe_that_has_no_room_or_no_noise_for_ckks_is_found(ckks, monkeypatch):
    with pytest.raises(UserError, match=r"chose other parameters .*constraints\.txt"):
        open_ckks(dataclasses.replace(ckks.parameters, scale_bits=100))
    monkeypatch.setattr(ckks_module, "BASE_FLOODING_BITS", 21)
    with pytest.raises(UserError, match=r"0\.(49|5|51) times the noise .*constraints\.txt"):
        open_ckks(ckks.parameters)
