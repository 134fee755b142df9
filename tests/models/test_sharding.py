"""Partitions of a decoder's weights: shapes of shards, refusals, and that parts make the whole."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from fedjax_llm.errors import UserError
from fedjax_llm.lora import LoraConfig, init_adapter
from fedjax_llm.models import DecoderConfig, base_shapes, loss, quantised_base
from fedjax_llm.models.batch import Batch
from fedjax_llm.models.decoder import init_base
from fedjax_llm.models.quantised_base import Kind
from fedjax_llm.models.sharding import adapter_specs, base_specs, check_sizes
from fedjax_llm.models.spread import Spread, joined, manual_specs, spread

CONFIG = DecoderConfig(
    vocab_size=144,
    hidden_size=48,
    intermediate_size=96,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=6,
    qkv_bias=True,
)


def abstract(data: int, model: int) -> AbstractMesh:
    return AbstractMesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def shard_shapes(config: DecoderConfig, data: int, model: int) -> dict[str, tuple[int, ...]]:
    """By the leaf's name, without the layer axis where it is a stack."""
    specs, mesh = base_specs(config, data, model), abstract(data, model)
    shapes = jax.tree.map(
        lambda leaf, spec: NamedSharding(mesh, spec).shard_shape(leaf.shape),
        base_shapes(config),
        specs,
    )
    flat = jax.tree_util.tree_flatten_with_path(shapes, is_leaf=lambda leaf: type(leaf) is tuple)
    return {".".join(str(key.key) for key in path): shape for path, shape in flat[0]}


def test_shapes_of_shards() -> None:
    found = shard_shapes(CONFIG, 2, 4)
    assert found == {
        "embed": (72, 12),
        "unembed": (72, 12),
        "norm.weight": (48,),
        "layers.input_norm.weight": (2, 48),
        "layers.post_norm.weight": (2, 48),
        "layers.q_proj.kernel": (2, 24, 12),
        "layers.q_proj.bias": (2, 12),
        "layers.k_proj.kernel": (2, 24, 6),
        "layers.k_proj.bias": (2, 6),
        "layers.v_proj.kernel": (2, 24, 6),
        "layers.v_proj.bias": (2, 6),
        "layers.o_proj.kernel": (2, 12, 24),
        "layers.gate_proj.kernel": (2, 24, 24),
        "layers.up_proj.kernel": (2, 24, 24),
        "layers.down_proj.kernel": (2, 24, 24),
    }


@given(st.sampled_from([1, 2, 3, 4, 6, 8, 16]), st.sampled_from([1, 2, 3, 4, 8]))
def test_every_matrix_is_cut_as_often_as_there_are_devices(data: int, model: int) -> None:
    if 48 % data or 4 % model:
        with pytest.raises(UserError, match="does not divide the model's"):
            base_specs(CONFIG, data, model)
        return
    whole, cut = shard_shapes(CONFIG, 1, 1), shard_shapes(CONFIG, data, model)
    for name, shape in whole.items():
        parts = math.prod(shape) // math.prod(cut[name])
        norm, bias = name.endswith("weight"), name.endswith("bias")
        assert parts == (1 if norm else model if bias else data * model)


def test_words_that_do_not_divide_are_cut_by_width() -> None:
    odd = DecoderConfig(**{**vars(CONFIG), "vocab_size": 71})
    assert shard_shapes(odd, 2, 4)["embed"] == (71, 6)
    narrow = DecoderConfig(**{**vars(CONFIG), "vocab_size": 71, "hidden_size": 36})
    with pytest.raises(UserError, match="data = 2 divides neither the model's 71 words nor"):
        base_specs(narrow, 2, 4)


@pytest.mark.parametrize(
    ("data", "model", "words"),
    [
        (5, 1, "data = 5 does not divide the model's 48 width; use 1, 2, 3, 4, 6, 8, 12, 16"),
        (1, 8, "model = 8 does not divide the model's 4 key-value heads; use 1, 2, 4"),
        (1, 3, "model = 3 does not divide the model's 4 key-value heads; use 1, 2, 4"),
    ],
)
def test_what_does_not_divide_is_refused(data: int, model: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_sizes(CONFIG, data, model)


def test_adapters_are_cut_with_their_projections() -> None:
    lora = LoraConfig(rank=2, targets=("all-linear",))
    factors = init_adapter(CONFIG, lora, jax.random.key(0)).factors
    specs, kernels = adapter_specs(list(factors)), base_specs(CONFIG, 1, 4)["layers"]
    mesh = abstract(1, 4)

    def part(spec: PartitionSpec, array: jax.Array) -> tuple[int, ...]:
        return NamedSharding(mesh, spec).shard_shape(array.shape)

    for name, (a_LxDxR, b_LxRxF) in factors.items():
        kernel_LxDxF = jnp.zeros((2, a_LxDxR.shape[1], b_LxRxF.shape[2]))
        of_kernel = part(kernels[name]["kernel"], kernel_LxDxF)
        assert part(specs[name][0], a_LxDxR) == (2, of_kernel[1], 2)
        assert part(specs[name][1], b_LxRxF) == (2, 2, of_kernel[2])


def over(data: int) -> Mesh:
    return jax.make_mesh(
        (data,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:data]
    )


def placed(base: Any, mesh: Mesh) -> Any:
    specs = base_specs(CONFIG, mesh.size, 1, base)
    there = jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), base, specs
    )
    return spread(there, specs)


@pytest.mark.optimised
@pytest.mark.parametrize("kind", [None, "int8", "nf4", "nf4-double"])
def test_gathered_parts_are_the_whole_to_the_bit(kind: Kind | None) -> None:
    base = init_base(CONFIG, jax.random.key(0))
    base = base if kind is None else quantised_base(base, kind)
    mesh = over(2)
    there = placed(base, mesh)
    kernel = there["layers"]["q_proj"]["kernel"]
    assert isinstance(kernel, Spread) and isinstance(there["embed"], Spread)
    largest = max(jax.tree.leaves(kernel), key=lambda leaf: leaf.size)
    rows = largest.shape[1] // 2
    assert [shard.data.shape[1] for shard in largest.addressable_shards] == [rows, rows]

    def gather(base: Any) -> Any:
        return jax.tree.map(
            lambda leaf: leaf.gathered() if isinstance(leaf, Spread) else leaf,
            base,
            is_leaf=lambda leaf: isinstance(leaf, Spread),
        )

    gathered = jax.jit(
        jax.shard_map(
            gather,
            mesh=mesh,
            in_specs=(manual_specs(there),),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    )(there)
    assert jax.tree.structure(gathered) == jax.tree.structure(base)
    for found in (gathered, joined(there)):
        jax.tree.map(np.testing.assert_array_equal, found, base)


@pytest.mark.optimised
def test_each_device_trains_on_its_own_rows() -> None:
    """Loss and gradient of two devices that share the weights are those of each by itself."""
    base = init_base(CONFIG, jax.random.key(0))
    adapter = init_adapter(CONFIG, LoraConfig(rank=2), jax.random.key(1))
    tokens_2xBxT = jax.random.randint(jax.random.key(2), (2, 3, 7), 0, 144, jnp.int32)

    def found(base: Any, tokens_BxT: jax.Array) -> Any:
        ones = jnp.ones(tokens_BxT.shape, jnp.int32)
        batch = Batch(tokens_BxT, ones > 0, ones)
        return jax.value_and_grad(lambda own: jnp.sum(loss(CONFIG, base, own, batch)[0]))(adapter)

    def on_device(base: Any, tokens_1xBxT: jax.Array) -> Any:
        return jax.tree.map(lambda leaf: leaf[None], found(base, tokens_1xBxT[0]))

    mesh = over(2)
    there = placed(base, mesh)
    both = jax.jit(
        jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(manual_specs(there), PartitionSpec("data")),
            out_specs=PartitionSpec("data"),
            check_vma=False,
        )
    )(there, tokens_2xBxT)
    alone = jax.jit(found)
    for device in range(2):
        jax.tree.map(
            lambda leaf, own, device=device: np.testing.assert_array_equal(leaf[device], own),
            both,
            alone(base, tokens_2xBxT[device]),
        )
