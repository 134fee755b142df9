"""Strict test environment: two fake CPU devices, no implicit promotion, warnings are errors.

Most tests compile many small programs and run each once: XLA's optimising is most of their time, so
that they compile without it. A test whose claim is about programs as users compile them (the same
bytes on one device and several, memory that a program takes, speed, reference outputs to the last
digits) is marked `optimised`, by itself or with its whole file; drills always are. Programs of the
two kinds are never mixed. JAX_DISABLE_MOST_OPTIMIZATIONS=0 optimises all tests.
"""

import atexit
import gc
import os
import shutil
import signal
import tempfile

import pytest

# Read when the backend starts, so it has to be set before anything imports jax.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# Processes that tests start inherit it.
QUICK = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # OpenFHE: threads scale over clients instead

# Many tests build the same program anew; the second time it comes from a cache of this session.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="fedjax-llm-tests-")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

# A shell ignores SIGINT in what it starts in the background; processes to interrupt inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Tracing makes objects by the thousand, and each search for cycles looks at all that live."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 10)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before a test's fixtures: how its programs and those of its processes are compiled."""
    optimised = any(item.get_closest_marker(name) for name in ("optimised", "drill"))
    setting = "0" if optimised else QUICK
    if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != setting:
        import jax

        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = setting
        jax.config.update("jax_disable_most_optimizations", setting != "0")
        # The setting is no part of what jit knows a compiled program by.
        jax.clear_caches()
