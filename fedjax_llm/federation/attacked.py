"""Messages of clients some of which attack: the attack sees them all before they are rounded.

Notation: K' clients with padding, P numbers of a message.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fedjax_llm.federation.client_values import ClientInputs, Local, Shared
from fedjax_llm.federation.cohort import Client
from fedjax_llm.federation.keys import Purpose, key_for
from fedjax_llm.federation.layout import CohortLayout
from fedjax_llm.federation.message import EncodedMessage
from fedjax_llm.federation.recipe import Attackers, Sums

PyTree = Any


def attacked(
    attackers: Attackers,
    layout: CohortLayout,
    client: Client,
    stage: int,
    shared: Shared,
    clients: ClientInputs,
    local: Local,
    sums: Sums,
) -> EncodedMessage:
    """The messages of a stage, int32 [K', P], some of them not what their clients trained.

    Args:
        attackers: who, and what they send.
        layout: where clients are computed.
        client: what each does.
        stage: static.
        shared: the round.
        clients: inputs, without rows.
        local: what they trained.
        sums: known from the stages before.
    """

    def honest(
        everything: tuple[Shared, Sums], pair: tuple[ClientInputs, Local]
    ) -> tuple[jax.Array, PyTree]:
        shared, sums = everything
        upload = client.upload(stage, shared, *pair, sums.public, sums.inverse_weight)
        return ravel_pytree(upload.message)[0], upload.control

    messages_KxP, control_K = layout.map_clients(honest)((shared, sums), (clients, local))
    padding = (False,) * (layout.padded - len(attackers.malicious))
    messages_KxP = attackers.attack(
        messages_KxP,
        jnp.asarray(attackers.malicious + padding),
        clients.participates,
        key_for(shared.seed, Purpose.ATTACK, shared.number, stage),
        attackers.scale,
    )

    def encoded(shared: Shared, inputs: tuple[jax.Array, PyTree, ClientInputs]) -> EncodedMessage:
        message_P, control, one = inputs
        whole_P = jnp.concatenate([message_P, ravel_pytree(control)[0]])
        tree = client.codecs[stage].unravel(whole_P)
        return client.encoded(stage, shared, one, tree, ())

    encoded_K: EncodedMessage = layout.map_clients(encoded)(
        shared, (messages_KxP, control_K, clients)
    )
    return encoded_K._replace(norm=layout.everywhere(encoded_K.norm))
