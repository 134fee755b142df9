"""Error feedback: what does not arrive in one round is added to the next one's message.

    corrected = message + memory            before encoding, and before any clip
    memory    = corrected - what arrived of it

The sums telescope: after any number of rounds, everything that has arrived from a client and its
memory add up to everything that it had to say (arXiv 1809.07599, algorithm 1; 1901.09847, algorithm
2; for PowerSGD 1905.13727, algorithm 2). With a codec that sends a part delta of the square of any
message the memory stays bounded (1901.09847, lemma 3), and the error of what has arrived falls like
one over the rounds.

The memory follows from private data and stays with its client, in the unit of its messages. For
unit `client` it has to come before the clip: added after it, nothing would bound it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.compression.codec import Codec, PyTree
from fedjax_llm.errors import Refused


def check(codec: Codec) -> None:
    """Raises Refused for a codec on which the memory may grow without bound."""
    if not codec.facts.projects:
        raise Refused(
            f"error feedback on {codec.name} with unbiased = true adds up to more than was lost; "
            "set unbiased = false, or switch error feedback off"
        )


def empty(like: PyTree) -> PyTree:
    """The memory before the first round."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), like)


def corrected(memory: PyTree, tree: PyTree) -> PyTree:
    """The message with what earlier ones left out."""
    return jax.tree.map(jnp.add, tree, memory)


def remember(
    codec: Codec,
    state: Any,
    key: jax.Array,
    memory: PyTree,
    message: PyTree,
    shared: PyTree = (),
    sent: PyTree | None = None,
    took_part: bool | jax.Array = True,
) -> PyTree:
    """The memory after a round.

    | this round | memory |
    |---|---|
    | the encoding entered the sum | what was lost of the corrected message |
    | the client took no part | as before |
    | the corrected message was not finite | as before: the round's update is dropped |

    Args:
        codec: one that `check` passes.
        state: of the codec, this round's.
        key: of the round.
        memory: before.
        message: corrected.
        shared: what `Codec.between` gave.
        sent: the last stage's encoding as it left the client. With it, what clipping and rounding
            took goes into the memory, too. A clip that acts in every round then lets the memory
            grow; None leaves the clip's share out.
        took_part: whether the encoding entered the sum.
    """
    lost = codec.residual(state, key, message, shared, sent)
    finite = jnp.bool_(True)
    for leaf in jax.tree.leaves(lost):
        finite = finite & jnp.all(jnp.isfinite(leaf))
    kept = finite & took_part
    return jax.tree.map(lambda new, old: jnp.where(kept, new, old), lost, memory)
