"""Partition: how a set of records is divided among clients, for simulated federations.

| module | idea |
|---|---|
| `dealing` | whole units (groups, rows, keys) to clients, near their targets |
| `even` | every client a random sample |
| `quantity` | samples of sizes that follow a law |
| `dirichlet` | label skew, of free or of given sizes |
| `keys` | whole users, sources, domains |
| `shards` | pieces of the rows sorted by label |
| `ways` | the choice among them, as objects |

Every division is one int64 array per client: the indices of its records in ascending order; every
index occurs exactly once.
"""

import numpy as np

from fedjax_llm.models.batch import Batch

from .dealing import EmptyClient as EmptyClient
from .dealing import deal as deal
from .dealing import targets as targets
from .dirichlet import dirichlet as dirichlet
from .dirichlet import dirichlet_to_size as dirichlet_to_size
from .even import iid as iid
from .keys import by_key as by_key
from .keys import by_label as by_label
from .quantity import by_quantity as by_quantity
from .quantity import power_law_shares as power_law_shares
from .shards import by_shards as by_shards
from .ways import KEYS as KEYS
from .ways import ByKey as ByKey
from .ways import Dirichlet as Dirichlet
from .ways import Granularity as Granularity
from .ways import Iid as Iid
from .ways import Quantity as Quantity
from .ways import Shards as Shards
from .ways import Way as Way
from .ways import partition as partition


def select(batch: Batch, indices_N: np.ndarray) -> Batch:
    """The rows `indices_N` of a batch [B, T], in that order, as NumPy arrays.

    Row i of a corpus's batch is its record i only without packing, and only if rendering lost none
    (`RenderReport.lost`); otherwise divide the records first and render each client's own.
    """
    # JAX would clamp an index that is out of range; NumPy raises IndexError.
    return Batch(*(np.asarray(array)[indices_N] for array in batch))
