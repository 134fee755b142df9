"""The one shape in which token sequences reach a model."""

from typing import NamedTuple

import jax
import numpy as np


class Batch(NamedTuple):
    """Token sequences, one per row. A pytree; more leading dimensions may come from ``vmap``.

    Attributes:
      tokens_BxT: int32 token ids; any valid id where there is padding.
      loss_mask_BxT: bool. Position t is counted when ``tokens[t]`` is a target, that is, the loss
        of predicting ``tokens[t]`` from the tokens before it in its segment. The first position of
        a segment has nothing before it and is never counted.
      segments_BxT: int32. 0 is padding, 1, 2, ... are the examples packed into the row, each a
        contiguous run. Attention never crosses segments, and positions restart with each.
    """

    tokens_BxT: jax.Array | np.ndarray
    loss_mask_BxT: jax.Array | np.ndarray
    segments_BxT: jax.Array | np.ndarray
