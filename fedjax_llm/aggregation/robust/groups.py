"""Robust to malicious clients under a secure sum: combine the means of groups, not messages.

Letters: K clients, P parameters; here G is the number of groups.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.aggregation.robust.combine import Combine, PyTree
from fedjax_llm.errors import UserError


def assign(clients: int, groups: int) -> np.ndarray:
    """[K] int64: the group of each client, dealt in turn, so sizes differ by at most one.

    Who sits together follows from the order of the clients alone. Permute them afresh each round
    with randomness that no client chooses, or one malicious client spoils the same people always.

    Raises:
        UserError: `groups` is below one, or a group would have fewer than two clients.
    """
    if groups < 1:
        raise UserError(f"groups must be at least 1, got {groups}")
    if clients < 2 * groups:
        raise UserError(
            f"{clients} clients cannot fill {groups} groups of two or more, and a group of one is "
            f"no secret; set groups to at most {clients // 2} or call {2 * groups} clients"
        )
    return np.arange(clients, dtype=np.int64) % groups


@dataclass(frozen=True)
class GroupRobust:
    """`inner` over the means of groups, each of which is known only through its secure sum.

    Formal note. The server sees G vectors, the sum over the present clients of each group, and
    their counts; by the guarantee of the secure sum, nothing else of a message. A group's sum
    hides a message among those of the others in the group who do not collude with the server: a
    group that shrinks to one present client hides nothing, and the secure sum has to refuse to
    open it, since here it is open already. A malicious client can make its group's sum anything,
    and no other's; so f malicious clients spoil at most f of the G means, wherever they sit, and
    the guarantee of `inner` against f malicious among G messages holds. What `inner` needs of G
    (2f + 1, say) it therefore needs twice of K, as a group has two clients or more.

    | input                                 | effect                                          |
    |---------------------------------------|-------------------------------------------------|
    | count 0                               | the group is absent, its sum may hold anything  |
    | groups of unequal counts              | one vote each: `inner` sees means, not weights  |
    | every count 0                         | as `inner` with nobody present                  |

    Attributes:
        groups: G.
        inner: combines the means; its `byzantine` counts spoilt groups.
    """

    groups: int
    inner: Combine

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise UserError(f"groups must be at least 1, got {self.groups}")

    def init(self, size: int) -> PyTree:
        """Returns what `inner` carries into the first round."""
        return self.inner.init(size)

    def assign(self, clients: int) -> np.ndarray:
        """`assign` into these groups."""
        return assign(clients, self.groups)

    def combine_groups(
        self, sums_GxP: jax.Array, counts_G: jax.Array, memory: PyTree
    ) -> tuple[jax.Array, PyTree]:
        """Combines the groups' means.

        Args:
            sums_GxP: float32, the sum of the messages of the present clients of each group.
            counts_G: integers, how many clients of each group are present.
            memory: from `init` or the last round.

        Returns:
            [P] float32, which stands for the mean message of a client, and the memory.
        """
        divisor_G = jnp.maximum(counts_G.astype(jnp.float32), jnp.float32(1))
        means_GxP = sums_GxP.astype(jnp.float32) / divisor_G[:, None]
        return self.inner.combine(means_GxP, counts_G > 0, memory)

    def check(self, clients: int) -> None:
        """Raises UserError when `clients` do not fill the groups or `inner` needs more groups."""
        self.assign(clients)
        try:
            self.inner.check(self.groups)
        except UserError as error:
            raise UserError(
                f"groups = {self.groups} is too few, since each counts as one client: {error}"
            ) from None
