"""Attacks by their definitions in float64; only malicious clients who are present change."""

from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.aggregation.attacks import ATTACKS, z_max
from fedjax_llm.aggregation.robust import CoordinateMedian, Krum

CLIENTS, SIZE = 8, 6
MALICIOUS = np.array([1, 0, 0, 1, 0, 1, 0, 0], bool)
PRESENT = np.array([1, 1, 0, 1, 1, 0, 1, 1], bool)  # clients 2 (honest) and 5 (malicious) are not
KEY = jax.random.key(3)
every = pytest.mark.parametrize("name", ATTACKS)
_jitted = {name: jax.jit(attack) for name, attack in ATTACKS.items()}


def draw(seed=0, clients=CLIENTS, size=SIZE):
    return np.random.default_rng(seed).normal(1, 2, size=(clients, size)).astype(np.float32)


def attack(name, rows, malicious=MALICIOUS, present=PRESENT, key=KEY, scale=1.5):
    out = _jitted[name](
        jnp.asarray(rows), jnp.asarray(malicious), jnp.asarray(present), key, jnp.float32(scale)
    )
    assert out.dtype == jnp.float32 and out.shape == rows.shape
    return np.asarray(out)


@every
def test_only_malicious_clients_who_are_present_change(name):
    rows = draw()
    rows[~PRESENT] = np.nan
    out = attack(name, rows)
    changed = MALICIOUS & PRESENT
    np.testing.assert_array_equal(out[~changed], rows[~changed])
    assert np.isfinite(out[changed]).all()
    assert (np.abs(out[changed] - rows[changed]).max(axis=1) > 0.1).all()
    np.testing.assert_array_equal(attack(name, rows, np.zeros(CLIENTS, bool)), rows)


@every
def test_absent_clients_and_what_the_malicious_held_have_no_influence(name):
    rows = draw()
    out = attack(name, rows)
    other = rows.copy()
    other[~PRESENT] = 1e6
    if name in ("gaussian", "little-is-enough"):
        other[MALICIOUS] = -1e6
    changed = MALICIOUS & PRESENT
    np.testing.assert_array_equal(attack(name, other)[changed], out[changed])


@every
def test_nobody_honest_stays_finite(name):
    everyone = np.ones(CLIENTS, bool)
    out = attack(name, draw(), malicious=everyone, present=everyone)
    assert np.isfinite(out).all()
    if name in ("gaussian", "little-is-enough"):
        assert not out.any()


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_scaled_and_sign_flip_multiply_the_own_message(scale):
    rows, changed = draw(), MALICIOUS & PRESENT
    np.testing.assert_array_equal(
        attack("scaled", rows, scale=scale)[changed], scale * rows[changed]
    )
    flipped = attack("sign-flip", rows, scale=scale)[changed]
    np.testing.assert_array_equal(flipped, -scale * rows[changed])


def test_scale_may_be_a_plain_number():
    rows = jnp.asarray(draw())
    for name, function in ATTACKS.items():
        out = function(rows, jnp.asarray(MALICIOUS), jnp.asarray(PRESENT), KEY, 1.5)
        np.testing.assert_allclose(out, attack(name, draw()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_gaussian_noise_has_the_length_of_honest_messages(scale):
    rows = draw(size=4096)
    out = attack("gaussian", rows, scale=scale)
    honest = rows[PRESENT & ~MALICIOUS].astype(np.float64)
    length = scale * np.linalg.norm(honest, axis=1).mean()
    noise = out[MALICIOUS & PRESENT].astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(noise, axis=1), length, rtol=1e-5)
    unit = noise * np.sqrt(4096) / length
    # Standard normal moments, 5 standard errors wide: each client's own draw, in no direction.
    assert np.abs(unit.mean(axis=1)).max() < 5 / 64
    assert np.abs((unit**4).mean(axis=1) - 3).max() < 5 * np.sqrt(96) / 64
    assert abs(np.mean(unit[0] * unit[1])) < 5 / 64
    other = attack("gaussian", rows, scale=scale, key=jax.random.key(4))
    assert not np.isclose(other[0], out[0]).all()


@pytest.mark.parametrize(
    ("number", "malicious"), [(50, 24), (50, 12), (25, 5), (7, 3), (8, 2), (9, 1), (100, 20)]
)
def test_z_max_is_the_quantile_of_the_paper(number, malicious):
    supporters = number // 2 + 1 - malicious
    share = (number - malicious - supporters) / (number - malicious)
    found = float(jax.jit(z_max)(jnp.int32(number), jnp.int32(malicious)))
    assert found == pytest.approx(NormalDist().inv_cdf(share), rel=1e-5, abs=1e-6)


def test_z_max_at_its_edges():
    # By hand: 24 of 50 need 2 supporters among 26, and 24/26 of a normal lies below 1.4261.
    assert float(z_max(jnp.int32(50), jnp.int32(24))) == pytest.approx(1.4261, abs=1e-4)
    for number, malicious in [(1, 0), (1, 1), (2, 1), (10, 1), (3, 3), (0, 0)]:
        assert float(z_max(jnp.int32(number), jnp.int32(malicious))) == 0.0
    majority = float(z_max(jnp.int32(10), jnp.int32(6)))
    assert majority == pytest.approx(NormalDist().inv_cdf(3 / 4), rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_little_is_enough_moves_the_honest_mean_by_deviations(scale):
    rows = draw()
    out = attack("little-is-enough", rows, scale=scale)
    honest = rows[PRESENT & ~MALICIOUS].astype(np.float64)
    # 6 present, 2 malicious: 2 supporters of 4 honest, z = 0; so make client 4 malicious too.
    np.testing.assert_allclose(out[MALICIOUS & PRESENT], np.tile(honest.mean(0), (2, 1)), rtol=1e-5)
    malicious = MALICIOUS.copy()
    malicious[4] = True
    out = attack("little-is-enough", rows, malicious, scale=scale)
    honest = rows[PRESENT & ~malicious].astype(np.float64)
    z = NormalDist().inv_cdf(2 / 3)
    expected = honest.mean(0) - scale * z * honest.std(0)
    np.testing.assert_allclose(out[malicious & PRESENT], np.tile(expected, (3, 1)), rtol=1e-4)


def test_little_is_enough_deceives_krum_where_scaling_does_not():
    rows = np.random.default_rng(0).normal(size=(25, 2000)).astype(np.float32)
    malicious, everyone = np.arange(25) < 11, np.ones(25, bool)

    def krum(messages):
        return np.asarray(Krum(11).combine(jnp.asarray(messages), jnp.asarray(everyone), ())[0])

    sly = attack("little-is-enough", rows, malicious, everyone, scale=1.0)
    np.testing.assert_array_equal(krum(sly), sly[0])
    loud = attack("scaled", rows, malicious, everyone, scale=10.0)
    assert any((krum(loud) == row).all() for row in loud[11:])


def test_sign_flip_turns_the_mean_and_not_the_median():
    rows = (1 + 0.1 * np.random.default_rng(1).normal(size=(9, SIZE))).astype(np.float32)
    malicious, everyone = np.arange(9) < 3, np.ones(9, bool)
    out = attack("sign-flip", rows, malicious, everyone, scale=10.0)
    assert (out.mean(axis=0) < 0).all()
    median, _ = CoordinateMedian().combine(jnp.asarray(out), jnp.asarray(everyone), ())
    assert (np.abs(np.asarray(median) - 1) < 0.3).all()
