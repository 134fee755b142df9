"""The mesh of a run: how its devices are divided among clients and the weights of the base.

Clients are spread over `clouds` and `data` together; a device computes whole clients. Along
`clouds` every device has all the weights; along `data` each has a part and gathers the rest layer
by layer (FSDP); along `model` several devices compute one client's matrix products together (tensor
parallel). The default is `clouds` alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.sharding import AxisType, Mesh

from fedjax_llm.errors import UserError
from fedjax_llm.models.sharding import MODEL
from fedjax_llm_kernels.lockstep import DATA

CLOUDS = "clouds"
SPREAD = (CLOUDS, DATA)
"""The axes over which clients are spread."""


@dataclass(frozen=True)
class MeshShape:
    """Devices along each axis.

    Attributes:
        clouds: with all the weights each; as many as there are if None.
        data: that share one copy of the weights.
        model: that compute a client together.
    """

    clouds: int | None = None
    data: int = 1
    model: int = 1

    def over(self, devices: Sequence[jax.Device]) -> Mesh:
        """The mesh of so many devices, in their order: those of one process stay neighbours.

        Raises:
            UserError: the axes do not multiply to the number of devices.
        """
        count, copy = len(devices), self.data * self.model
        if count % copy:
            raise UserError(
                f"[devices] mesh: data x model = {self.data} x {self.model} does not divide the "
                f"{count} devices of this run; start it on a multiple of {copy}, or lower them"
            )
        clouds = self.clouds or count // copy
        if clouds * copy != count:
            raise UserError(
                f"[devices] mesh = {clouds} x {self.data} x {self.model} takes {clouds * copy} "
                f"devices and this run has {count}; leave clouds out to use all"
            )
        return jax.make_mesh(
            (clouds, self.data, self.model),
            (CLOUDS, DATA, MODEL),
            axis_types=(AxisType.Auto,) * 3,
            devices=devices,
        )
