"""[devices] of the run file: how the devices of a run are divided."""

from pydantic import Field

from fedjax_llm.runs.runfile_types import Count, Section


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
    """

    mesh: MeshSection = Field(default=MeshSection())
