"""[model] weights: how the frozen weights are kept, from the run file to an export."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.errors import UserError
from fedjax_llm.models import apply, base_bytes, dequantised_base, load_model
from fedjax_llm.models.quantised import Int8, Quantised
from fedjax_llm.models.quantised_nf4 import NF4, Scales8
from fedjax_llm.runs import build, runfile
from fedjax_llm.runs.folder import fingerprint


def model(file: Path, *overrides: str):
    run_file = runfile.load(file, overrides)
    return run_file, build.model(run_file, lambda event: None)


@pytest.fixture
def file(job_files: Any) -> Path:
    return job_files.run_file


def test_left_out_weights_are_kept_as_what_is_computed_in(file: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        _, found = model(file, f"model.dtype={dtype}")
        assert {leaf.dtype.name for leaf in jax.tree.leaves(found.base)} == {dtype}
    _, found = model(file, "model.dtype=bfloat16", "model.weights=float32")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found.base)} == {"float32"}


@pytest.mark.parametrize("kind", ["int8", "nf4", "nf4-double"])
def test_kernels_of_layers_are_quantised_and_the_rest_is_not(file: Path, kind: str) -> None:
    _, found = model(file, f"model.weights={kind}", "model.dtype=bfloat16")
    for module in found.base["layers"].values():
        for name, leaf in module.items():
            assert isinstance(leaf, Quantised) == (name == "kernel")
            if name != "kernel":
                assert leaf.dtype == jnp.bfloat16
    kernel = found.base["layers"]["q_proj"]["kernel"]
    assert isinstance(kernel, Int8 if kind == "int8" else NF4)
    if isinstance(kernel, NF4):
        assert isinstance(kernel.scales_BxF, Scales8) == (kind == "nf4-double")
    assert found.base["embed"].dtype == jnp.bfloat16
    _, plain = model(file, "model.dtype=bfloat16")
    assert base_bytes(found.base) < base_bytes(plain.base)


def test_an_unknown_kind_is_told_with_the_nearest(file: Path) -> None:
    with pytest.raises(UserError, match=r'weights must be .* got "nf5"; did you mean "nf4"'):
        model(file, "model.weights=nf5")


def test_a_run_is_not_continued_on_weights_kept_otherwise(file: Path) -> None:
    """Nor with other activations, which the weights alone do not tell."""
    found = []
    for overrides in (
        (),
        ("model.weights=nf4",),
        ("model.weights=int8",),
        ("model.weights=float32", "model.dtype=bfloat16"),
        ("model.weights=float32",),
    ):
        run_file, base = model(file, *overrides)
        found.append(fingerprint.of(run_file, base, ())["model"])
    assert len(set(found)) == len(found)


@pytest.mark.drill
def test_a_run_on_four_bits_is_exported_in_floats(
    jobs: Any, tmp_path: Path, stories260k: Path
) -> None:
    from fedjax_llm.lora import read_peft

    out, peft, merged = (tmp_path / name for name in ("run", "peft", "merged"))
    settings = ("--set", "model.weights=nf4-double", "--set", "rounds=2")
    assert jobs.here("run", jobs.run_file, *settings, "--out", out) == 0
    assert jobs.here("export", out, "--peft", peft, "--merged", merged) == 0
    base = load_model(stories260k, quantised="nf4-double")
    adapter = read_peft(peft, base.config)
    tokens_BxT = jnp.asarray(np.random.default_rng(0).integers(3, 512, (2, 24)), jnp.int32)
    whole = load_model(merged)
    with_adapter = apply(base.config, base.base, adapter, tokens_BxT)
    np.testing.assert_allclose(
        apply(whole.config, whole.base, None, tokens_BxT), with_adapter, atol=1e-4
    )
    floats = dequantised_base(base.base)
    np.testing.assert_array_equal(whole.base["embed"], floats["embed"])
