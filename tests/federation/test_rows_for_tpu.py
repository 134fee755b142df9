"""What the compiler of a TPU makes of a round whose rows lie in the host's memory.

No device is needed, but libtpu, a package that nothing else needs: left out of default tests.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from fedjax_llm.clouds import Cloud, Link
from fedjax_llm.federation import Federation, Participant
from fedjax_llm.federation.client_values import ClientState
from fedjax_llm.federation.engine import Engine
from fedjax_llm.federation.fitting import program_bytes
from fedjax_llm.federation.host_rows import packed
from fedjax_llm.federation.layout import CLIENTS, CohortLayout, Memory
from fedjax_llm.federation.tables import table_shapes
from fedjax_llm.models import Batch

pytestmark = pytest.mark.drill

LINK = Link(up_mbps=10.0, down_mbps=100.0)
COUNT, GROUP, ROWS, LENGTH = 64, 4, 512, 128


@pytest.fixture(scope="module")
def tpus() -> Any:
    """Two chips of a v5e."""
    pytest.importorskip("libtpu", reason="needs libtpu, the TPU compiler")
    with pytest.MonkeyPatch.context() as patch:
        # There is no metadata server to ask about the machine.
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
        yield topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[:2]


def many_rows() -> list[Participant]:
    rows = Batch(
        np.ones((ROWS, LENGTH), np.int32),
        np.ones((ROWS, LENGTH), bool),
        np.ones((ROWS, LENGTH), np.int32),
    )
    held_out = jax.tree.map(lambda leaf: leaf[:2], rows)
    return [Participant(Cloud(f"cloud-{k}", LINK), rows, held_out) for k in range(COUNT)]


def compiled_round(
    federation: Federation, chips: Sequence[Any], rows: Memory
) -> jax.stages.Compiled:
    """The program of a federation's plain rounds for devices that are described only."""
    own = federation._engine
    layout = CohortLayout.over(COUNT, GROUP, chips)
    parts = Engine.of(own.roster, replace(own.recipe, layout=layout), own.road, own.codecs)

    def described(tree: Any, spec: PartitionSpec) -> Any:
        where = NamedSharding(layout.mesh, spec)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree
        )

    state = federation.init()
    clients = own.roster.inputs(state.clients, 1, np.ones(COUNT, bool))
    rest = described(clients._replace(state=ClientState((), {}, ())), CLIENTS)
    # As `Roster.in_shapes` has them; there is no roster of devices that are not here.
    table = table_shapes(federation.participants, federation._training).rows
    table = layout.shard(packed(table) if rows == "host" else table, rows)
    rest = rest._replace(table=rest.table._replace(rows=table))
    whole = PartitionSpec()
    scalars = (jnp.float32(1), own.road.seed, jnp.int32(1))
    lowered = (
        parts.programs[0]
        .round.trace(
            described(own.road.base, whole),
            described(state.globals, whole),
            described(clients.state, CLIENTS),
            rest,
            *described(scalars, whole),
        )
        .lower(lowering_platforms=("tpu",))
    )
    return lowered.compile()


@pytest.fixture(scope="module", params=[False, True], ids=["all", "sampled"])
def programs(request: Any, federate: Callable[..., Federation], tpus: Any) -> Any:
    """Of a round by where rows lie, with all clients and with a few of them."""
    given = {"clients_at_once": GROUP, "devices": jax.devices()[:1]}
    unit = "client" if request.param else "none"
    rate = {"rate": 0.25} if request.param else {}
    federation = federate(unit, participants=many_rows(), **given, **rate)
    return {rows: compiled_round(federation, tpus, rows) for rows in ("device", "host")}


def test_a_device_holds_some_groups_instead_of_all_rows(programs: Any) -> None:
    """Two groups' rows, and less than a third that XLA copies where a branch ends."""
    each = ROWS * LENGTH * (4 + 4 + 4)  # tokens, mask and segments, as on the host
    all_rows, a_group = COUNT // 2 * ROWS * LENGTH * (4 + 1 + 4), GROUP * each
    device, host = program_bytes(programs["device"]), program_bytes(programs["host"])
    assert device > all_rows
    assert device - host >= all_rows - 3 * a_group
    memory = programs["host"].memory_analysis()
    # Of arrays of bytes, which the compiler lays out anew, there would be a whole copy.
    assert memory.host_argument_size_in_bytes == COUNT // 2 * each
    assert memory.host_temp_size_in_bytes == 0


def test_the_next_group_s_rows_come_while_one_trains(programs: Any) -> None:
    """In the schedule of the branch that trains: begun before its loop of steps, awaited after."""
    found = 0
    for computation in programs["host"].as_text().split("\n\n"):
        lines = computation.splitlines()
        begun = [i for i, line in enumerate(lines) if " dynamic-slice-start(" in line]
        awaited = [i for i, line in enumerate(lines) if " dynamic-slice-done(" in line]
        loops = [i for i, line in enumerate(lines) if " while(" in line]
        if not begun or not loops or "ENTRY" in computation:
            continue
        found += 1
        assert len(begun) == len(awaited)
        assert max(begun) < max(loops) < min(awaited)
    assert found == 1
