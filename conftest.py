"""Strict test environment: two fake CPU devices, no implicit promotion, warnings are errors."""

import os

# Read when the backend starts, so it has to be set before anything imports jax.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # OpenFHE: threads scale over clients instead
