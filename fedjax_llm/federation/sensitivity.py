"""Sensitivity maps: how much the loss depends on each trained parameter, for selective encryption.

FedML-HE (arXiv 2303.10837, section 3.3) lets every client measure a map on its own data and adds
the maps up under encryption. Here a map is measured on *public* rows that the user names, or is
read from a file. The difference matters: which coordinates are encrypted is seen by the server,
hence a mask that follows from private rows tells about them, and no epsilon covers that.

Notation: N rows, M rows of a micro-batch, P trained parameters, L layers.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from numpy.typing import NDArray

from fedjax_llm.aggregation import AggregationRule
from fedjax_llm.aggregation.part import subset
from fedjax_llm.errors import UserError
from fedjax_llm.federation.keys import Purpose, key_for, seed_key
from fedjax_llm.federation.objective import row_loss
from fedjax_llm.lora import LoraConfig, init_adapter
from fedjax_llm.models import Batch, DecoderConfig, Model
from fedjax_llm.models.checkpoint import TensorFiles, layer_module
from fedjax_llm.secure.selection import Block

PyTree = Any

# PEFT's name of a block's tensor; it stores the transpose.
_PEFT_PREFIX, _PEFT_SUFFIX = "base_model.model.model.", ".weight"


def trained_blocks(
    config: DecoderConfig, lora: LoraConfig, rule: AggregationRule
) -> tuple[Block, ...]:
    """The names of what each cloud sends, in the order in which it is sent.

    One block for each layer and factor, such as `layers.3.self_attn.o_proj.lora_B`.
    """
    server = jax.eval_shape(
        lambda key: rule.init(init_adapter(config, lora, key)), jax.random.key(0)
    )
    if rule.stages > 1:
        raise UserError(
            f"rule {rule.name!r} sends sketches, which have no layers or sensitivity to select by; "
            "encrypt everything, or choose another rule"
        )
    message = rule.messages(server, phase=0)[0][0]
    blocks = []
    for path, array in jax.tree_util.tree_leaves_with_path(message):
        projection, side = (str(key.key) for key in path)
        name = f"{layer_module(projection)}.lora_{side.upper()}"
        layers, *shape = array.shape  # layers come first in every array of a part
        blocks += [Block(f"layers.{k}.{name}", tuple(shape)) for k in range(layers)]
    return tuple(blocks)


def measure(
    model: Model,
    lora: LoraConfig,
    rule: AggregationRule,
    rows: Batch,
    *,
    seed: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
    microbatch: int = 4,
) -> NDArray[np.float32]:
    """Measures the diagonal of the empirical Fisher matrix at the adapter that the run starts from.

    That is, for each trained parameter, the mean over rows of the squared derivative of the row's
    loss: to second order, how much the loss changes with the parameter. (FedML-HE's map is the
    derivative of the gradient by the label, which tokens do not have.)

    Formal guarantee: none for `rows`. They must be public: the result decides which coordinates
    are encrypted, and everybody sees that.

    | case | result |
    |---|---|
    | factor A of an adapter that starts with B = 0 | 0: its derivative is B's multiple |
    | a row without answer tokens | adds 0 and counts |
    | a derivative that is not finite | UserError |

    Args:
        model: the frozen base.
        lora: rank, alpha and targets.
        rule: says what is trained.
        rows: public rows, numpy [N, T].
        seed: of the run, from which the first adapter follows.
        dtype: of activations.
        microbatch: M.

    Returns:
        float32 [P], in the order of `trained_blocks`.
    """
    adapter = init_adapter(model.config, lora, key_for(seed_key(seed), Purpose.ADAPTER_INIT))
    count = len(rows.tokens_BxT)
    # Empty rows fill the last micro-batch; their derivative is zero.
    padded = jax.tree.map(
        lambda leaf: np.pad(leaf, [(0, -count % microbatch), (0, 0)]).reshape(
            -1, microbatch, leaf.shape[1]
        ),
        rows,
    )

    @jax.jit
    def squares(base: PyTree, batches: Batch) -> jax.Array:
        server = rule.init(adapter)
        trainable = subset(rule.trainable(server), rule.sent(0))

        def one_row(candidate: PyTree, row: Batch) -> jax.Array:
            return row_loss(model, base, rule.adapter(server, candidate), row, dtype, remat=False)

        def add(total: PyTree, batch: Batch) -> tuple[PyTree, None]:
            grads_M = jax.vmap(jax.grad(one_row), in_axes=(None, 0))(trainable, batch)
            found = jax.tree.map(lambda leaf: jnp.sum(jnp.square(leaf), axis=0), grads_M)
            return jax.tree.map(jnp.add, total, found), None

        start = jax.tree.map(jnp.zeros_like, trainable)
        return ravel_pytree(jax.lax.scan(add, start, batches)[0])[0]

    mean_P: NDArray[np.float32] = np.asarray(squares(model.base, padded) / jnp.float32(count))
    if not np.isfinite(mean_P).all():
        raise UserError(
            "the sensitivity map is not finite: the model's derivatives overflow on the rows of "
            "measure_on; measure on other text, or encrypt by layers"
        )
    return mean_P


def read_map(path: Path, blocks: tuple[Block, ...]) -> NDArray[np.float32]:
    """Reads a map from a file.

    Args:
        path: `.npy` with one float for each trained parameter in the order of `blocks`, or
            `.safetensors` with the names and shapes of an adapter saved by PEFT.
        blocks: from `trained_blocks`.

    Raises:
        UserError: missing, damaged, of other sizes, or without a tensor that is trained.
    """
    size = sum(block.size for block in blocks)
    if path.suffix != ".safetensors":
        try:
            values = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            reason = getattr(error, "strerror", None) or "not a whole .npy file of numbers"
            raise UserError(f"cannot read the sensitivity map {path}: {reason}") from None
        if not isinstance(values, np.ndarray) or values.dtype.kind != "f":
            raise UserError(f"the sensitivity map {path} does not hold floats; save one array")
        if values.shape != (size,):
            raise UserError(
                f"the sensitivity map {path} has shape {values.shape}, the run trains {size} "
                "parameters; make the map for this model, adapter and rule"
            )
        return values.astype(np.float32)
    files = TensorFiles({"": path})
    parts = []
    for block in blocks:
        key = f"{_PEFT_PREFIX}{block.name}{_PEFT_SUFFIX}"
        if key not in files.names:
            raise UserError(f"the sensitivity map {path} lacks tensor {key}, which is trained")
        matrix = files.read(key, block.shape[::-1])
        parts.append(matrix.T.astype(np.float32).reshape(-1))
    return np.concatenate(parts)
