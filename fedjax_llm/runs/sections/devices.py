"""[devices] of the run file: how the devices of a run are divided."""

from typing import Literal

from pydantic import Field

from fedjax_llm.runs.sections.types import Count, Section


class MeshSection(Section):
    """Devices along each axis of the mesh; `clouds` takes what is left if it is not given."""

    clouds: Count | None = None
    data: Count = 1
    model: Count = 1


class DevicesSection(Section):
    """[devices]: how the devices are divided, those of all processes together.

    Clients are spread over `clouds` times `data`. Along `data` devices share one copy of the base
    weights, which each gathers layer by layer as it needs them; `model` devices compute one client
    together, whose sums are rounded in another order then. All devices work along `clouds` if it is
    left out. What devices there are is no matter of the run file: it may be resumed on others.

    `rows` says where the clients' training rows lie: in the memory of the devices, or in that of
    their host, from which each group of clients that run at once has its rows copied while the
    group before it trains; a device then holds some groups' rows in the place of all. With "auto"
    they stay on the host where an accelerator does not hold them beside the compiled program. No
    byte of a result depends on it.
    """

    rows: Literal["auto", "device", "host"] = "auto"
    mesh: MeshSection = Field(default=MeshSection())
