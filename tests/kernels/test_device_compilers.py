"""The Pallas kernels through the compilers of devices that are not here.

Lowering ends at Mosaic's or Triton's dialect; here layouts, fast memory and instructions are
checked by what makes the program. The compilers need no device, but packages that nothing else
needs: libtpu for the one; for the other, without their dependencies, jax-cuda12-plugin,
jax-cuda12-pjrt and nvidia-cuda-nvcc-cu12, with its bin in PATH and
--xla_gpu_cuda_data_dir=<its folder> in XLA_FLAGS. Left out of default tests.
"""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh

from fedjax_llm_kernels import (
    attention_gpu,
    attention_tpu,
    clip_sum_pallas,
    cross_entropy_pallas,
    many_adapters_pallas,
)
from fedjax_llm_kernels.quantise_pack_pallas import gpu_pack, tpu_pack

pytestmark = pytest.mark.drill

TPU = {
    "pass": cross_entropy_pallas.tpu_pass,
    "forward": many_adapters_pallas.tpu_forward,
    "backward": many_adapters_pallas.tpu_backward,
    "attend": attention_tpu.tpu_forward,
    "attend back": attention_tpu.tpu_backward,
    "clip": clip_sum_pallas.tpu_clip_sum,
    "pack": tpu_pack,
}
GPU = {
    "pass": cross_entropy_pallas.gpu_pass,
    "forward": many_adapters_pallas.gpu_forward,
    "backward": many_adapters_pallas.gpu_backward,
    "attend": attention_gpu.gpu_forward,
    "attend back": attention_gpu.gpu_backward,
    "clip": clip_sum_pallas.gpu_clip_sum,
    "pack": gpu_pack,
}
# What the compiler asks about a GPU: NVIDIA's figures of an H100.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  memory_bandwidth: 3352320000000 device_memory_size: 84942979072
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@pytest.fixture(scope="module")
def tpus():
    """One device of a generation, by its topology's name."""
    pytest.importorskip("libtpu", reason="needs libtpu, the TPU compiler")
    with pytest.MonkeyPatch.context() as patch:
        # There is no metadata server to ask about the machine.
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
        yield lambda name: topologies.get_topology_desc(platform="tpu", topology_name=name).devices[
            0
        ]


def f32(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def programs(forms):
    """Name, function and shapes of each kernel, odd sizes and large ones."""
    for dtype in (jnp.float32, jnp.bfloat16):
        of = partial(f32, dtype=dtype)
        for rows, width, words in ((300, 100, 1001), (1000, 576, 49_152), (512, 4096, 128_256)):
            yield (
                f"cross entropy {width} {dtype.__name__}",
                partial(forms["pass"], with_gradient=True),
                (of(rows, width), of(words, width)),
            )
        for k, t, d, r, f in ((2, 30, 100, 3, 50), (4, 2000, 4096, 16, 1024)):
            # Two products of the same activations, as gate and up have.
            b, dy = ((of(k, *sizes, f), of(k, *sizes, f // 2)) for sizes in ((r,), (t,)))
            shapes = (of(k, t, d), of(k, d, r), b, dy)
            yield f"adapters forward {d}", forms["forward"], shapes[:3]
            yield f"adapters backward {d}", forms["backward"], shapes
        # The second is a step of a decoder of a billion parameters, 16 clients at once.
        for (b, t, h, g, width), window in (
            ((2, 100, 4, 2, 24), 30),
            ((16, 1024, 32, 8, 64), None),
            ((4, 2048, 32, 8, 128), 600),
            ((2, 1000, 8, 1, 256), None),
        ):
            q, k, lse = of(b, t, h, width), of(b, t, g, width), f32(b, h, t)
            shapes = (q, k, k, f32(b, t, dtype=jnp.int32))
            name = f"{width} wide, window {window}, {dtype.__name__}"
            yield f"attention {name}", partial(forms["attend"], window=window), shapes
            shapes = (*shapes, q, lse, q)
            yield f"attention back {name}", partial(forms["attend back"], window=window), shapes
    for sizes in ((5, 100), (20_000, 1 << 20), (8192, 3072), (655_360, 65_536)):
        shapes = ([f32(13, size) for size in sizes], f32(13, dtype=jnp.bool_), f32())
        yield f"clip and sum {sizes}", forms["clip"], shapes
    for bits in (3, 8, 16):
        shapes = (f32(100_003), f32(100_003, dtype=jnp.uint32), f32())
        yield f"quantise and pack {bits}", partial(forms["pack"], bits=bits), shapes


def refused_by_the_compiler(device, forms, platform, **options):
    """What each kernel that does not compile says."""
    place = jax.sharding.SingleDeviceSharding(device)
    refused = {}
    for name, function, shapes in programs(forms):
        placed = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes
        )
        traced = jax.jit(partial(function, interpret=False)).trace(*placed)
        try:
            traced.lower(lowering_platforms=(platform,)).compile(compiler_options=options)
        except Exception as error:
            refused[name] = str(error)[:300]
    return refused


@pytest.mark.parametrize("generation", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_every_kernel_compiles_for_a_tpu(tpus, generation):
    assert refused_by_the_compiler(tpus(generation), TPU, "tpu") == {}


@pytest.mark.filterwarnings("ignore:.*Triton backend is deprecated:DeprecationWarning")
def test_every_kernel_compiles_for_a_gpu_and_keeps_to_its_registers():
    pytest.importorskip("jax_plugins.xla_cuda12", reason="needs jax-cuda12-plugin, the compiler")
    topology = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1")
    kind = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=kind)):
        no_spills = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}
        assert refused_by_the_compiler(topology.devices[0], GPU, "cuda", **no_spills) == {}
