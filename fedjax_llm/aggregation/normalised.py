"""Norm-normalised averaging: every client counts by its direction, none by its length."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from fedjax_llm.aggregation.part import Part


@dataclass(frozen=True)
class NormalisedMean:
    """Fed-NGA's mean of directions (arXiv 2408.09539, equation 9).

    Each client divides its message by the message's length and the server adds the directions up:
    robust against clients that scale or turn their updates, as long as honest ones hold more than
    half of the weight, and still a sum, so that it works under encryption, where the server could
    not see a length. A client that lies about having divided is bounded by the codec alone, which
    therefore shortens to length 1: a larger `update_bound` is refused. The paper normalises one
    gradient a round; here the change after several local steps takes its place. The length of the
    step is the server's learning rate.

    | message | result |
    |---|---|
    | zero | zero |
    | not finite | not finite; the codec sends zeros |
    """

    name = "normalised"
    source = "arXiv 2408.09539"
    summary = "mean of the messages' directions; adds under encryption"

    def of(self, message: Part) -> Part:
        """The message divided by its l2 norm over all arrays together."""
        leaves = jax.tree.leaves(message)
        # Relative to the largest entry, so that squares neither overflow nor vanish.
        peak = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in leaves]))
        unit = jnp.where(peak > 0, peak, jnp.float32(1))
        squares = [jnp.sum(jnp.square(leaf / unit)) for leaf in leaves]
        norm = jnp.sqrt(jnp.sum(jnp.stack(squares)))
        norm = jnp.where(norm > 0, norm, jnp.float32(1))
        return jax.tree.map(lambda leaf: (leaf / unit) / norm, message)
