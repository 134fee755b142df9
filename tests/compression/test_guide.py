"""The README's round: its code runs, and what it loses comes back."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import compression

README = Path(compression.__file__).parent / "README.md"


def test_the_round_of_the_guide_arrives_in_the_end() -> None:
    """Eight clients of one message each, in 40 rounds of a tenth of the numbers and four bits."""
    [code] = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    guide: dict = {}
    exec(compile(code, "README.md", "exec"), guide)
    draw = np.random.default_rng(0)
    messages_KxP = jnp.asarray(draw.normal(size=(8, 900)) / 100, jnp.float32)
    memory_KxP, state = jnp.zeros_like(messages_KxP), guide["codec"].init(messages_KxP[0])

    @jax.jit
    def round_(state, number, memory_KxP):
        key = jax.random.fold_in(jax.random.key(1), number)
        own_K = jax.random.split(jax.random.fold_in(jax.random.key(2), number), 8)
        ints_KxM, memory_KxP = jax.vmap(guide["client"], in_axes=(None, None, 0, 0, 0))(
            state, key, own_K, memory_KxP, messages_KxP
        )
        total_M = jnp.sum(ints_KxM, axis=0)
        return ints_KxM, memory_KxP, guide["server"](messages_KxP[0], state, key, total_M, 8)

    arrived_P, errors = np.zeros(900), []
    for number in range(40):
        ints_KxM, memory_KxP, (decoded_P, state) = round_(state, number, memory_KxP)
        assert ints_KxM.shape == (8, 90) and np.abs(ints_KxM).max() <= 7
        arrived_P += np.asarray(decoded_P, np.float64)
        wanted_P = np.asarray(messages_KxP, np.float64).mean(0) * (number + 1)
        errors.append(np.linalg.norm(arrived_P - wanted_P) / np.linalg.norm(wanted_P))
    assert errors[0] > 0.8 and errors[-1] < 0.25
