"""Adapters: where they start, which projections they cover, their dense form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.errors import UserError
from fedjax_llm.lora import Adapter, LoraConfig, delta, init_adapter, merge, target_names
from fedjax_llm.models import DecoderConfig, init_base, projection_shapes

CONFIG = DecoderConfig(61, 24, 40, 3, 4, 2, 6)
ALL = tuple(projection_shapes(CONFIG))


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (("all-linear",), ALL),
        (("v_proj", "q_proj"), ("q_proj", "v_proj")),
        (("[qkv]_proj",), ("q_proj", "k_proj", "v_proj")),
        (("*",), ALL),
        (("down*", "up*"), ("up_proj", "down_proj")),
    ],
)
def test_targets(targets, names):
    assert target_names(CONFIG, targets) == names
    adapter = init_adapter(CONFIG, LoraConfig(2, 4.0, targets), jax.random.key(0))
    assert set(adapter.factors) == set(names)


@pytest.mark.parametrize("targets", [("q_proj", "query"), ("Q_PROJ",), ()])
def test_a_target_that_matches_nothing_is_an_error_that_lists_the_names(targets):
    with pytest.raises(UserError) as error:
        target_names(CONFIG, targets)
    assert all(name in str(error.value) for name in ALL)


@pytest.mark.parametrize(
    "bad",
    [
        {"rank": 0},
        {"alpha": 0.0},
        {"alpha": float("inf")},
        {"alpha": float("nan")},
        {"targets": "q_proj"},
    ],
)
def test_values_out_of_range(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        LoraConfig(**bad)


def test_a_rank_above_a_matrix_is_an_error_that_names_it():
    with pytest.raises(UserError, match="rank 13 exceeds the size of k_proj, 24 x 12"):
        init_adapter(CONFIG, LoraConfig(13, 1.0, ("all-linear",)), jax.random.key(0))
    init_adapter(CONFIG, LoraConfig(13, 1.0, ("q_proj",)), jax.random.key(0))


def test_starts_as_nothing_with_a_as_peft_draws_it():
    config = DecoderConfig(11, 256, 64, 4, 4, 4, 64)
    adapter = init_adapter(config, LoraConfig(64, 128.0, ("all-linear",)), jax.random.key(0))
    assert adapter.scale == 2.0
    for name, (inputs, _) in projection_shapes(config).items():
        a, b = (np.asarray(factor) for factor in adapter.factors[name])
        assert (b == 0).all() and a.dtype == b.dtype == np.float32
        # kaiming_uniform(a=sqrt(5)) is uniform within 1/sqrt(inputs)
        assert np.abs(a).max() <= inputs**-0.5
        np.testing.assert_allclose(a.std(), (3 * inputs) ** -0.5, rtol=0.02)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(delta(adapter)))


def test_a_projection_draws_the_same_whichever_others_are_adapted():
    few = init_adapter(CONFIG, LoraConfig(2, 4.0, ("v_proj",)), jax.random.key(3))
    many = init_adapter(CONFIG, LoraConfig(2, 4.0, ("all-linear",)), jax.random.key(3))
    np.testing.assert_array_equal(few.factors["v_proj"][0], many.factors["v_proj"][0])
    others = [np.asarray(many.factors[name][0]).ravel()[:8] for name in ALL]
    assert len({row.tobytes() for row in others}) == len(ALL)


def test_is_a_pytree_whose_scale_is_static():
    adapter = init_adapter(CONFIG, LoraConfig(2, 4.0, ("q_proj",)), jax.random.key(0))
    doubled = jax.jit(lambda tree: jax.tree.map(lambda leaf: 2 * leaf, tree))(adapter)
    assert isinstance(doubled, Adapter) and doubled.scale == 2.0
    assert len(jax.tree.leaves(adapter)) == 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merge_adds_the_delta_and_leaves_the_rest_alone(dtype):
    base = jax.tree.map(lambda x: x.astype(dtype), init_base(CONFIG, jax.random.key(0)))
    adapter = init_adapter(CONFIG, LoraConfig(2, 3.0, ("q_proj", "down_proj")), jax.random.key(1))
    adapter = jax.tree.map(lambda leaf: leaf + 0.3, adapter)
    merged = merge(base, adapter)
    for name in ALL:
        before, after = base["layers"][name]["kernel"], merged["layers"][name]["kernel"]
        assert after.dtype == dtype
        if name not in adapter.factors:
            assert after is before
            continue
        a, b = (np.asarray(factor, np.float64) for factor in adapter.factors[name])
        dense = np.asarray(before, np.float64) + 1.5 * a @ b
        rtol = 1e-5 if dtype == jnp.float32 else 1e-2
        np.testing.assert_allclose(np.asarray(after, np.float64), dense, rtol=rtol, atol=1e-5)
    assert merged["embed"] is base["embed"]
