"""What a program becomes on a platform that this machine does not have."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

# What Pallas' GPU backend asks the device for; nothing of it enters the tests' results.
_GPU = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
_UNSTABLE = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")

Lowered = Callable[..., str]


@pytest.fixture
def lowered() -> Lowered:
    """Names of the custom calls that a function of arrays has after lowering for a platform."""

    def names(function: Callable[..., Any], platform: str, *arrays: Any) -> set[str]:
        shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
        with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=_GPU)):
            module = jax.export.export(
                jax.jit(function), platforms=[platform], disabled_checks=[_UNSTABLE]
            )(*shapes).mlir_module()
        return set(re.findall(r"custom_call @\"?([\w$.]+)", module))

    return names
