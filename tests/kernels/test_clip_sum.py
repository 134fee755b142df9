"""Clipped sums: each form against the clip of one example after the other, and its guarantee."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm_kernels import clip_sum_once, clip_sum_pallas
from fedjax_llm_kernels.clip_norm import clip_arrays
from fedjax_llm_kernels.clip_sum import clip_sum


def two_passes_of_a_tpu(arrays, counts, bound):
    return clip_sum_pallas._two_passes(
        clip_sum_pallas._tpu_lanes,
        clip_sum_pallas._tpu_sum,
        arrays,
        counts,
        jnp.asarray(bound, jnp.float32),
        True,
    )


def one_pass_of_a_tpu(arrays, counts, bound):
    """Filled with zeros up to whole tiles, which change neither norm nor sum."""
    whole = [jnp.pad(array, ((0, 0), (0, -array.shape[1] % 1024))) for array in arrays]
    assert clip_sum_once.fits(whole)
    sums, norms = clip_sum_once.tpu_once(
        whole, counts, jnp.asarray(bound, jnp.float32), interpret=True
    )
    return [s[: array.shape[1]] for s, array in zip(sums, arrays, strict=True)], norms


def gpu(arrays, counts, bound):
    return clip_sum_pallas.gpu_clip_sum(
        arrays, counts, jnp.asarray(bound, jnp.float32), interpret=True
    )


FORMS = {
    "xla": jax.jit(partial(clip_sum, implementation="xla")),
    "tpu, two passes": jax.jit(two_passes_of_a_tpu),
    "tpu, one pass": jax.jit(one_pass_of_a_tpu),
    "gpu": jax.jit(gpu),
}
clip_one = jax.jit(clip_arrays)
each_form = pytest.mark.parametrize("form", FORMS)


def gradients(examples, sizes, seed=0):
    """Of norms from far below to far above one."""
    rng = np.random.default_rng(seed)
    sizes_of = 10.0 ** rng.uniform(-4, 4, (examples, 1))
    return [jnp.asarray(rng.normal(size=(examples, s)) * sizes_of, jnp.float32) for s in sizes]


def one_by_one(arrays, counts, bound):
    """The sum in float64 of what `clip_arrays` makes of each example that counts, and norms."""
    sums = [np.zeros(array.shape[1]) for array in arrays]
    norms = []
    for example, counted in enumerate(counts):
        clipped, norm = clip_one([array[example] for array in arrays], bound)
        norms.append(norm)
        for total, array in zip(sums, clipped, strict=True):
            total += np.asarray(array, np.float64) * bool(counted)
    return sums, np.asarray(norms)


@each_form
@pytest.mark.parametrize(("examples", "sizes"), [(1, (1,)), (9, (5, 1024)), (10, (3000, 17_000))])
@pytest.mark.parametrize("bound", [1.0, 1e9])
def test_equals_clipping_one_by_one(form, examples, sizes, bound):
    arrays, counts = gradients(examples, sizes), jnp.arange(examples) != 3
    sums, norms = FORMS[form](arrays, counts, bound)
    expected, expected_norms = one_by_one(arrays, counts, bound)
    np.testing.assert_allclose(norms, expected_norms, rtol=2e-6)
    for got, wanted in zip(sums, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2e-6 * np.abs(wanted).max())


# What float32 makes hard: overflow and loss of squares, denormals, what is not finite.
HARD = {
    "squares overflow": [3e38, 3e38, 1.0, 0.0],
    "squares vanish": [3e-38, -3e-38, 2e-38, 0.0],
    "denormal beside normal": [1e-40, 1e-40, 1.0, 0.0],
    "all denormal": [1e-40, -1e-41, 0.0, 0.0],
    "zeros": [0.0, -0.0, 0.0, 0.0],
    "NaN": [np.nan, 1.0, 0.0, 0.0],
    "infinite": [1.0, -np.inf, 0.0, 0.0],
    "largest": [np.finfo(np.float32).max] * 4,
}


@each_form
@pytest.mark.parametrize("bound", [1.0, 1e-30, np.inf, 0.0, -1.0, np.nan])
def test_every_hard_example_is_as_clip_arrays_has_it(form, bound):
    array = jnp.asarray(list(HARD.values()), jnp.float32)
    _, expected_norms = one_by_one([array], [True] * len(HARD), bound)
    for example, name in enumerate(HARD):
        alone = jnp.arange(len(HARD)) == example
        (total,), norms = FORMS[form]([array], alone, bound)
        np.testing.assert_allclose(norms, expected_norms, rtol=1e-6, err_msg=name)
        (wanted,), _ = one_by_one([array], alone, bound)
        # An addition may make zero of what is denormal.
        np.testing.assert_allclose(total, wanted, rtol=1e-5, atol=1.2e-38, err_msg=name)
        assert not np.isnan(total).any()


@settings(max_examples=10, deadline=None)
@given(
    exponents=st.lists(st.integers(-126, 127), min_size=1, max_size=6),
    bound=st.sampled_from([1.0, 1e-20, 1e20]),
    form=st.sampled_from(sorted(FORMS)),
)
def test_no_example_adds_more_than_the_bound(exponents, bound, form):
    """Magnitudes of any sizes, in falling and rising order, over several lanes and turns."""
    values = np.float32(1.99) * np.float32(2.0) ** np.asarray(exponents, np.float32)
    row = np.resize(np.repeat(values, 131), 2000)
    array = jnp.asarray(np.stack([row, row[::-1]]))
    for example in range(2):
        (total,), norms = FORMS[form]([array], jnp.arange(2) == example, bound)
        assert np.linalg.norm(np.asarray(total, np.float64)) <= bound
        real = np.linalg.norm(np.asarray(row, np.float64))
        if real < 3e38:
            assert float(norms[example]) * (1 + 2.0**-15) >= real


@each_form
def test_a_long_sum_of_equal_terms_does_not_stop_growing(form):
    """One sequential float32 sum would stop at 2^24 terms; here 2^16 of them, and the bound is hit.

    The margin is 2^-14: an understated norm shows as a sum that is too long.
    """
    array = jnp.full((1, 1 << 16), jnp.float32(1.1))
    (total,), _ = FORMS[form]([array], jnp.bool_([True]), 1.0)
    length = np.linalg.norm(np.asarray(total, np.float64))
    assert 1 - 2.0**-13 < length <= 1


@each_form
def test_an_example_that_does_not_count_adds_nothing_at_all(form):
    array = jnp.asarray([[1.0, 2.0], [np.nan, np.inf], [0.5, 0.0]], jnp.float32)
    (total,), _ = FORMS[form]([array], jnp.bool_([False, False, True]), 9.0)
    np.testing.assert_array_equal(total, [0.5, 0.0])


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_shapes_are_kept_and_empty_arrays_have_no_say(implementation):
    leaves = [jnp.ones((4, 2, 3)), jnp.zeros((4, 0)), jnp.ones((4,))]
    sums, norms = clip_sum(leaves, jnp.ones(4, bool), 1e9, implementation)
    assert [s.shape for s in sums] == [(2, 3), (0,), ()]
    np.testing.assert_allclose(sums[0], np.full((2, 3), 4.0))
    np.testing.assert_allclose(norms, np.full(4, np.sqrt(7)), rtol=1e-6)
    for nothing in ([], [jnp.zeros((4, 0))]):
        _, norms = clip_sum(nothing, jnp.ones(4, bool), 1.0, implementation)
        np.testing.assert_array_equal(norms, np.zeros(4))
    sums, norms = clip_sum([jnp.zeros((0, 3))], jnp.zeros(0, bool), 1.0, implementation)
    assert norms.shape == (0,)
    np.testing.assert_array_equal(sums[0], np.zeros(3))


@pytest.mark.parametrize(
    "array", [jnp.ones((3, 2)), jnp.ones((4, 2), jnp.bfloat16), jnp.float32(1)]
)
def test_arrays_that_do_not_fit_are_refused(array):
    with pytest.raises(ValueError, match="array 0 must be float32 with 4 entries"):
        clip_sum([array], jnp.ones(4, bool), 1.0)


def total_of(counts, bound, *arrays):
    return clip_sum(arrays, counts, bound, "pallas")


SIZES = [(5, 100), (20_000, 1 << 20), (8192, 3072)]


def shapes_of(sizes):
    f32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    counts = jax.ShapeDtypeStruct((13,), jnp.bool_)
    return counts, f32(()), *(f32((13, size)) for size in sizes)


@pytest.mark.parametrize("sizes", SIZES)
def test_lowers_for_a_tpu(lowered, sizes):
    assert lowered(total_of, "tpu", *shapes_of(sizes)) == {"tpu_custom_call"}


@pytest.mark.filterwarnings("ignore:.*Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("sizes", SIZES)
def test_lowers_for_a_gpu(lowered, sizes):
    assert "__gpu$xla.gpu.triton" in lowered(total_of, "cuda", *shapes_of(sizes))
