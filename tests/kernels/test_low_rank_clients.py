"""Low-rank products under `jax.vmap` over clients: the kernel against float64 and XLA's form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from fedjax_llm_kernels import choice, low_rank_xla, many_adapters_pallas
from fedjax_llm_kernels.low_rank import low_rank_matmul, low_rank_matmuls
from fedjax_llm_kernels.metered import Metered

CLIENTS, ROWS, POSITIONS, WIDTH = 2, 2, 5, 8
# Rank and outputs of projections that share their input.
PAIRS = ((3, 4), (1, 7), (2, 4))
MANY = "many_adapters"


@pytest.fixture
def kernel_wins(monkeypatch):
    """The table says of this machine's device that the kernel is the faster form."""
    monkeypatch.setattr(choice, "BEST", {(MANY, jax.devices()[0].device_kind): "pallas"})


def problem(shared=(), dtype=jnp.float32):
    """x, pairs, scale and cotangents; with a leading axis of clients, unless they share it."""
    draw = np.random.default_rng(3)

    def normal(name, *shape):
        array = draw.normal(size=(CLIENTS, *shape))
        return jnp.asarray(array[0] if name in shared else array, dtype)

    x = normal("x", ROWS, POSITIONS, WIDTH)
    pairs = [(normal("a", WIDTH, rank), normal("b", rank, outputs)) for rank, outputs in PAIRS]
    dy = [normal("dy", ROWS, POSITIONS, outputs) for _, outputs in PAIRS]
    scale = jnp.array([0.5, 2.0])
    return x, pairs, scale[0] if "scale" in shared else scale, dy


def axes(shared=()):
    x, a, b, scale = (None if name in shared else 0 for name in ("x", "a", "b", "scale"))
    return x, [(a, b)] * len(PAIRS), scale, 0


def each_its_own(shared, arrays):
    return jax.vmap(lambda *one: one, in_axes=axes(shared))(*arrays)


def of(client, tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[client], tree)


def one_client(x, pairs, scale, dy):
    y, pull = jax.vjp(low_rank_matmuls, x, pairs, scale)
    return y, pull(dy)


def all_clients(shared=()):
    # A function of its own: the table is asked while tracing, and traces are remembered.
    return jax.jit(jax.vmap(lambda *arrays: one_client(*arrays), in_axes=axes(shared)))


def oracle(x, pairs, scale, dy):
    """What `one_client` computes, in float64."""
    x, pairs, scale, dy = jax.tree.map(lambda a: np.asarray(a, np.float64), (x, pairs, scale, dy))
    flat, y, dx, dpairs, dscale = x.reshape(-1, WIDTH), [], 0.0, [], 0.0
    for (a, b), wide in zip(pairs, dy, strict=True):
        rows = wide.reshape(-1, wide.shape[-1])
        y.append(scale * x @ a @ b)
        dx = dx + scale * wide @ b.T @ a.T
        dpairs.append((scale * flat.T @ rows @ b.T, scale * (flat @ a).T @ rows))
        dscale += (x @ a @ b * wide).sum()
    return y, (dx, dpairs, dscale)


def close(found, expected, relative):
    """To within a part of each array's largest value: sums of terms of either sign cancel."""

    def compare(got, wanted):
        got, wanted = (np.asarray(array, np.float64) for array in (got, wanted))
        np.testing.assert_allclose(got, wanted, atol=relative * np.abs(wanted).max(), rtol=0)

    jax.tree.map(compare, found, expected)


def kernels_in(function, *arrays):
    return str(jax.make_jaxpr(function)(*arrays)).count("pallas_call")


def as_with_xla(monkeypatch, make, *arrays, relative=2e-5):
    """What a function gives, which must have kernels and be close to itself without them."""
    assert kernels_in(make(), *arrays) > 0
    found = make()(*arrays)
    monkeypatch.setattr(choice, "BEST", {})
    plain = make()
    assert kernels_in(plain, *arrays) == 0
    close(found, plain(*arrays), relative)


@pytest.mark.usefixtures("kernel_wins")
@pytest.mark.parametrize(
    "shared", [(), ("scale",), ("a",), ("b", "scale")], ids=lambda names: "+".join(names) or "none"
)
def test_products_and_derivatives_of_each_client_are_those_of_the_oracle(shared):
    arrays = problem(shared)
    assert kernels_in(all_clients(shared), *arrays) > 0
    found, own = all_clients(shared)(*arrays), each_its_own(shared, arrays)
    for client in range(CLIENTS):
        close(of(client, found), oracle(*of(client, own)), 1e-5)


@pytest.mark.usefixtures("kernel_wins")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_both_forms_agree_and_keep_the_dtype(dtype, monkeypatch):
    arrays = problem(("scale",), dtype)
    y, (dx, dpairs, dscale) = all_clients(("scale",))(*arrays)
    assert {leaf.dtype for leaf in jax.tree.leaves((y, dx, dpairs))} == {jnp.dtype(dtype)}
    assert dscale.dtype == jnp.float32
    error = 2e-5 if dtype == jnp.float32 else 2e-2
    as_with_xla(monkeypatch, lambda: all_clients(("scale",)), *arrays, relative=error)


@pytest.mark.usefixtures("kernel_wins")
def test_derivatives_outside_of_the_clients_add_up_what_these_share(monkeypatch):
    *arrays, dy = problem(("a", "scale"))

    def make():
        batched = jax.vmap(lambda *one: low_rank_matmuls(*one), in_axes=axes(("a", "scale"))[:3])
        return jax.jit(lambda x, pairs, scale: jax.vjp(batched, x, pairs, scale)[1](dy))

    (da, _), *_ = make()(*arrays)[1]
    assert da.shape == (WIDTH, PAIRS[0][0])
    as_with_xla(monkeypatch, make, *arrays)


NO_KERNEL = {
    "examples, not clients": ("a", "b", "scale"),
    "activations are shared": ("x",),
    "only the scales differ": ("x", "a", "b"),
}


@pytest.mark.usefixtures("kernel_wins")
@pytest.mark.parametrize("which", NO_KERNEL)
def test_batches_of_something_else_are_left_to_xla(which):
    shared = NO_KERNEL[which]
    arrays = problem(shared)
    assert kernels_in(all_clients(shared), *arrays) == 0
    found, own = all_clients(shared)(*arrays), each_its_own(shared, arrays)
    for client in range(CLIENTS):
        close(of(client, found), oracle(*of(client, own)), 2e-5)


@pytest.mark.usefixtures("kernel_wins")
def test_no_client_or_position_and_other_dtypes_are_left_to_xla():
    x, pairs, scale, dy = problem()
    for cut in (lambda leaf: leaf[:0], lambda leaf: leaf[:, :0] if leaf.ndim == 4 else leaf):
        arrays = jax.tree.map(cut, (x, pairs, scale, dy))
        assert kernels_in(all_clients(), *arrays) == 0
        _, (_, dpairs, _) = all_clients()(*arrays)
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(dpairs))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), (x, pairs, scale, dy))
    assert kernels_in(all_clients(), *half) == 0


@pytest.mark.usefixtures("kernel_wins")
@pytest.mark.parametrize("metered", [False, True])
def test_examples_of_clients_have_derivatives_of_their_own(metered, monkeypatch):
    """As privacy by example needs them, whichever way it takes; the kernel has sums alone."""
    x, pairs, scale, dy = problem(("scale",))

    def apart(x, pairs, dy):
        def of_example(x, dy):
            return one_client(x, pairs, scale, dy)[1][1]

        return jax.vmap(of_example)(x, dy)

    def shortened(x, pairs, dy):
        def loss(pairs, caps):
            def of_example(x, cap, dy):
                sides = [(Metered(a, cap), Metered(b, cap)) for a, b in pairs]
                found = low_rank_matmuls(x, sides, scale)
                return sum(jnp.sum(y * wide) for y, wide in zip(found, dy, strict=True))

            return jnp.sum(jax.vmap(of_example)(x, caps, dy))

        return jax.grad(loss, (0, 1))(pairs, jnp.full(ROWS, jnp.inf))

    def make():
        function = shortened if metered else apart
        return jax.jit(jax.vmap(lambda *one: function(*one)))

    assert kernels_in(make(), x, pairs, dy) == 0
    found = make()(x, pairs, dy)
    monkeypatch.setattr(choice, "BEST", {})
    close(found, make()(x, pairs, dy), 1e-6)


@pytest.mark.usefixtures("kernel_wins")
def test_layers_that_are_scanned_and_computed_again_have_the_kernel(monkeypatch):
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (CLIENTS, POSITIONS, WIDTH))
    a = jax.random.normal(keys[1], (CLIENTS, 2, WIDTH, 3))
    b = jax.random.normal(keys[2], (CLIENTS, 2, 3, WIDTH))

    def make():
        def layer(x, sides):
            return jnp.sin(x + low_rank_matmul(x, *sides, 0.5)), None

        def loss(a, b, x):
            return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, (a, b))[0])

        return jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1))))

    as_with_xla(monkeypatch, make, a, b, x)


@pytest.mark.usefixtures("kernel_wins")
def test_ranks_that_a_client_does_not_use_change_nothing():
    """Clients of different ranks are as wide as the widest, with zeros."""
    x, _, _, dy = problem()
    (a, b), dy = problem()[1][0], dy[0]
    mask_R = jnp.array([1.0, 0.0, 1.0])
    a, b = a * mask_R[None, None], b * mask_R[None, :, None]

    def of_ranks(x, a, b, dy):
        y, pull = jax.vjp(low_rank_matmul, x, a, b, 0.5)
        return y, pull(dy)[:3]

    y, (dx, da, db) = jax.jit(jax.vmap(of_ranks))(x, a, b, dy)
    used = np.array([0, 2])
    expected = jax.jit(jax.vmap(of_ranks))(x, a[:, :, used], b[:, used], dy)
    close((y, (dx, da[:, :, used], db[:, used])), expected, 1e-6)
    assert not np.any(da[:, :, 1]) and not np.any(db[:, 1])


@pytest.mark.usefixtures("kernel_wins")
def test_clients_on_several_devices(monkeypatch):
    arrays = problem(("scale",))
    mesh = jax.make_mesh((2,), ("clouds",), axis_types=(jax.sharding.AxisType.Auto,))
    by_cloud = PartitionSpec("clouds")

    def make():
        return jax.jit(
            jax.shard_map(
                all_clients(("scale",)),
                mesh=mesh,
                in_specs=(by_cloud, by_cloud, PartitionSpec(), by_cloud),
                out_specs=by_cloud,
                check_vma=False,
            )
        )

    as_with_xla(monkeypatch, make, *arrays)


@pytest.mark.usefixtures("kernel_wins")
def test_a_mesh_that_the_compiler_divides_has_no_kernel():
    arrays = problem()
    for parts in (1, 2):
        with jax.sharding.use_abstract_mesh(AbstractMesh((parts,), ("model",))):
            assert (kernels_in(all_clients(), *arrays) > 0) == (parts == 1)


@pytest.mark.usefixtures("kernel_wins")
def test_the_table_decides_and_where_it_names_xla_nothing_else_is_traced(monkeypatch):
    arrays = problem()
    assert kernels_in(all_clients(), *arrays) > 0
    monkeypatch.undo()
    assert choice.BEST == {}
    assert kernels_in(all_clients(), *arrays) == 0

    def direct(x, pairs, scale, dy):
        def products(x, pairs, scale):
            return list(low_rank_xla.products(x, *zip(*pairs, strict=True), scale))

        y, pull = jax.vjp(products, x, pairs, scale)
        return y, pull(dy)

    # But for the first line, which names the function.
    own, expected = (
        form.lower(*arrays).as_text().split("\n", 1)[1]
        for form in (all_clients(), jax.jit(jax.vmap(direct)))
    )
    assert own == expected


def large():
    """A function of the clients' arrays alone, and shapes as queries, keys and values have."""
    outputs = (576, 192, 192)
    shapes = [(4, 2, 500, 576)]
    shapes += [side for f in outputs for side in ((4, 576, 8), (4, 8, f))]
    shapes += [(4, 2, 500, f) for f in outputs]

    def of_clients(x, *rest):
        sides, dy = rest[: 2 * len(outputs)], list(rest[2 * len(outputs) :])
        pairs = list(zip(sides[::2], sides[1::2], strict=True))
        return jax.vmap(one_client, in_axes=(0, 0, None, 0))(x, pairs, jnp.float32(2), dy)

    return of_clients, [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]


@pytest.mark.usefixtures("kernel_wins")
@pytest.mark.filterwarnings("ignore:.*Triton backend is deprecated:DeprecationWarning")
def test_lowers_for_accelerators_and_a_tpu_without_room_has_xla(lowered, monkeypatch):
    of_clients, shapes = large()
    assert lowered(of_clients, "tpu", *shapes) == {"tpu_custom_call"}
    assert "__gpu$xla.gpu.triton" in lowered(of_clients, "cuda", *shapes)
    monkeypatch.setattr(many_adapters_pallas, "TPU_BYTES", 1000)
    of_clients, shapes = large()
    assert lowered(of_clients, "tpu", *shapes) == set()
    assert "__gpu$xla.gpu.triton" in lowered(of_clients, "cuda", *shapes)
