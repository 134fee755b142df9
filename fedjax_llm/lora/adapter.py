"""Low-rank adapters (LoRA, arXiv 2106.09685): what they are and how they start."""

import dataclasses
import fnmatch
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.errors import UserError
from fedjax_llm.models.config import DecoderConfig, projection_shapes


class LowRank(NamedTuple):
    """Factors of one projection in all layers, float32; the update of a layer is a @ b * scale."""

    a_LxDxR: jax.Array
    b_LxRxF: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """A pytree of factors; the scale is static and not part of the leaves.

    Attributes:
      factors: By projection name ("q_proj", ...); only the adapted projections are present.
      scale: alpha / rank.
    """

    factors: dict[str, LowRank]
    scale: float = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which projections get an adapter, and of what rank.

    Attributes:
      rank: Columns of A, at least 1.
      alpha: The update is multiplied by alpha / rank.
      targets: Shell-style patterns over the seven projection names, or "all-linear".
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            raise UserError(
                f"targets must be a list of names, got {self.targets!r}; write [{self.targets!r}]"
            )
        if self.rank < 1:
            raise UserError(f"rank must be at least 1, got {self.rank}; raise it")
        if not 0.0 < self.alpha < float("inf"):
            raise UserError(
                f"alpha must be positive and finite, got {self.alpha}; 2 * rank is usual"
            )

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


def target_names(config: DecoderConfig, targets: tuple[str, ...]) -> tuple[str, ...]:
    """The projections that the patterns name, in the order of the model.

    Raises:
      UserError: No patterns, or a pattern that matches nothing.
    """
    names = tuple(projection_shapes(config))
    if not targets:
        raise UserError(f"targets is empty; name some of {', '.join(names)}, or all-linear")
    chosen: set[str] = set()
    for pattern in targets:
        matched = names if pattern == "all-linear" else fnmatch.filter(names, pattern)
        if not matched:
            raise UserError(
                f"target {pattern!r} matches no projection; there are {', '.join(names)}, "
                "or all-linear"
            )
        chosen.update(matched)
    return tuple(name for name in names if name in chosen)


def init_adapter(config: DecoderConfig, lora: LoraConfig, key: jax.Array) -> Adapter:
    """A fresh adapter that changes nothing: A uniform, B zero.

    A is uniform in +-1/sqrt(inputs), which is PEFT's kaiming_uniform(a=sqrt(5)). Each projection
    draws from the key folded with its place among the seven, so its A does not depend on which
    others are adapted.

    Raises:
      UserError: The rank exceeds a matrix's size, or a pattern matches nothing.
    """
    shapes = projection_shapes(config)
    factors = {}
    for name in target_names(config, lora.targets):
        inputs, outputs = shapes[name]
        if lora.rank > min(inputs, outputs):
            raise UserError(
                f"rank {lora.rank} exceeds the size of {name}, {inputs} x {outputs}; "
                f"use a rank of at most {min(inputs, outputs)}, or leave {name} out of targets"
            )
        bound = inputs**-0.5
        a_LxDxR = jax.random.uniform(
            jax.random.fold_in(key, tuple(shapes).index(name)),
            (config.num_layers, inputs, lora.rank),
            jnp.float32,
            minval=-bound,
            maxval=bound,
        )
        b_LxRxF = jnp.zeros((config.num_layers, lora.rank, outputs), jnp.float32)
        factors[name] = LowRank(a_LxDxR, b_LxRxF)
    return Adapter(factors, lora.scale)
