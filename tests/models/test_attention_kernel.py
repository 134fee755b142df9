"""The decoder with the attention kernel, interpreted, against itself with scores in memory."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.lora import LoraConfig, init_adapter
from fedjax_llm.models import Batch, DecoderConfig, decoder, init_base, loss
from fedjax_llm.models.attention import Causal, attend, attention_mask, causal_sight
from fedjax_llm_kernels import choice

LENGTH = 24
CONFIG = DecoderConfig(61, 24, 40, 2, 4, 2, 6, tie_embeddings=True, sliding_window=7)
# Two sequences and padding; one sequence.
SEGMENTS = jnp.asarray([[1] * 9 + [2] * 11 + [0] * 4, [1] * LENGTH], jnp.int32)


@pytest.fixture
def kernel_wins(monkeypatch):
    """The table says of this machine's device that the kernel is the faster form."""
    monkeypatch.setattr(choice, "BEST", {("attention", jax.devices()[0].device_kind): "pallas"})


def problem():
    base = init_base(CONFIG, jax.random.key(0))
    adapter = init_adapter(CONFIG, LoraConfig(2, 6.0, ("all-linear",)), jax.random.key(1))
    adapter = jax.tree.map(lambda leaf: leaf + 0.05, adapter)
    tokens = jax.random.randint(jax.random.key(2), SEGMENTS.shape, 0, 61, jnp.int32)
    return base, adapter, Batch(tokens, SEGMENTS > 0, SEGMENTS)


def training(remat=False):
    """Loss and gradient; a function of its own, as the table is asked while tracing."""

    def total(adapter, base, batch):
        return jnp.sum(loss(CONFIG, base, adapter, batch, remat=remat)[0])

    return jax.jit(lambda base, adapter, batch: jax.value_and_grad(total)(adapter, base, batch))


@pytest.mark.usefixtures("kernel_wins")
@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.drill)])
def test_loss_and_gradient_are_those_of_scores_in_memory(remat, monkeypatch):
    arrays = problem()
    assert "pallas_call" in str(jax.make_jaxpr(training(remat))(*arrays))
    found = training(remat)(*arrays)
    monkeypatch.setattr(choice, "BEST", {})
    expected = training(remat)(*arrays)
    for own, plain in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(own, plain, rtol=0, atol=2e-5 * np.abs(plain).max())


@pytest.mark.usefixtures("kernel_wins")
def test_rows_without_segments_are_one_sequence_each():
    words = causal_sight((2, 5), None, 5, width=8, dtype=jnp.float32)
    assert isinstance(words, Causal)
    # A window as long as the row hides nothing.
    assert words.sliding_window is None
    q, k, v = (jax.random.normal(jax.random.key(n), (2, 5, n, 8)) for n in (4, 2, 2))
    mask = attention_mask(5, None, None)
    np.testing.assert_allclose(attend(q, k, v, words), attend(q, k, v, mask), atol=1e-6)


def test_the_table_decides_and_where_it_names_xla_the_program_is_as_if_there_were_no_kernel(
    monkeypatch,
):
    def direct(shape, segments, window, **rest):
        del rest
        return attention_mask(shape[1], segments, window)

    arrays = problem()
    assert choice.BEST == {}
    asked = training().lower(*arrays).as_text()
    monkeypatch.setattr(decoder, "causal_sight", direct)
    assert training().lower(*arrays).as_text() == asked


@pytest.mark.usefixtures("kernel_wins")
def test_where_there_is_no_kernel_a_mask_is_made_unless_it_was_asked_for_by_name():
    sight = partial(causal_sight, (2, LENGTH), SEGMENTS, 7, width=8)
    mask = attention_mask(LENGTH, SEGMENTS, 7)
    assert isinstance(sight(dtype=jnp.float32), Causal)
    np.testing.assert_array_equal(sight(dtype=jnp.float16), mask)
    np.testing.assert_array_equal(sight(dtype=jnp.float32, implementation="xla"), mask)
    with pytest.raises(ValueError, match=r"float16.*cast"):
        sight(dtype=jnp.float16, implementation="pallas")


@pytest.mark.usefixtures("kernel_wins")
def test_what_comes_later_changes_nothing_before():
    _, adapter, batch = problem()
    base, config = problem()[0], dataclasses.replace(CONFIG, sliding_window=None)
    apply = partial(jax.jit, static_argnums=0)(lambda *given: decoder.apply(*given))
    before = apply(config, base, adapter, batch.tokens_BxT, SEGMENTS)
    other = batch.tokens_BxT.at[:, 12:].add(1) % 61
    after = apply(config, base, adapter, other, SEGMENTS)
    np.testing.assert_array_equal(before[:, :12], after[:, :12])
    assert np.any(before[:, 12:] != after[:, 12:])
