"""Chains against their codecs one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.compression import (
    Chain,
    Fragment,
    Identity,
    PowerSgd,
    RandomMask,
    Rotated,
    Sketch,
    TopMask,
    TurnMask,
)
from fedjax_llm.errors import UserError

KEY = jax.random.key(0)


def test_a_chain_is_its_codecs_one_after_the_other():
    first, second = RandomMask(3), Rotated()
    chain, x = Chain((first, second)), jnp.asarray(np.random.default_rng(0).normal(size=40), "f4")
    keys = [jax.random.fold_in(jax.random.fold_in(KEY, place), 0) for place in range(2)]
    inner = first.encode((), keys[0], x)
    coded = second.encode((), keys[1], inner)
    assert np.array_equal(chain.encode(chain.init(x), KEY, x), coded)
    decoded = first.decode(x, (), keys[0], second.decode(inner, (), keys[1], coded))
    assert np.array_equal(chain.decode(x, chain.init(x), KEY, coded), decoded)


def test_the_bound_of_a_chain_is_that_of_what_is_sent():
    x = jax.ShapeDtypeStruct((5000,), jnp.float32)
    inner = jax.ShapeDtypeStruct((500,), jnp.float32)
    chain = Chain((RandomMask(10), Rotated()))
    assert chain.coordinate_bound(x, 1.0, 1e-6) == Rotated().coordinate_bound(inner, 1.0, 1e-6)
    assert Chain((Rotated(), RandomMask(10))).coordinate_bound(x, 1.0, 1e-6) == 1.0


def test_rotations_of_two_stages_differ():
    chain, x = Chain((PowerSgd(1), Rotated())), jnp.ones((1, 16, 16))
    state = chain.init(x)
    one = chain.encode(state, KEY, x)
    two = chain.encode(state, KEY, x, 1, chain.between(x, state, KEY, one))
    assert one.shape == two.shape == (16,)
    # Of a symmetric matrix of rank one both stages send one vector, but for its sign and length.
    cosine = one @ two / (jnp.linalg.norm(one) * jnp.linalg.norm(two))
    assert abs(float(cosine)) < 0.99


@pytest.mark.parametrize(
    ("codecs", "message"),
    [
        ((), "a chain needs a codec; use identity to send everything"),
        ((PowerSgd(1), PowerSgd(2)), "power-sgd and power-sgd both take two sums a round; keep"),
        (
            (Rotated(), TopMask()),
            "top-mask keeps rate, .* means nothing after rotation;",
        ),
        ((RandomMask(), TurnMask()), "turn-mask keeps how many .* after random-mask"),
        ((Fragment(2), PowerSgd(1)), "power-sgd keeps Q, .* after fragment"),
        ((PowerSgd(1), Fragment(2)), "fragment keeps how many rounds .* after power-sgd"),
        ((Chain((Identity(), Sketch())), TopMask()), "top-mask keeps .* after chain"),
    ],
)
def test_codecs_that_do_not_fit_each_other_are_refused(codecs, message):
    with pytest.raises(UserError, match=message):
        Chain(codecs)


def test_the_facts_of_a_chain_are_those_of_all_its_codecs():
    assert Chain((Identity(), Rotated())).facts.lossless_on == "everything"
    unbiased = Chain((RandomMask(4, unbiased=True), Rotated())).facts
    assert unbiased.unbiased and not unbiased.projects
    mixed = Chain((RandomMask(4, unbiased=True), Sketch(4))).facts
    assert not mixed.unbiased and not mixed.projects
    assert not Chain((TopMask(), Rotated())).facts.steady
    assert Chain((Identity(), TopMask())).facts.keeps == TopMask().facts.keeps
