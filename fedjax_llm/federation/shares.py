"""The clients' integer noise: the steps it is measured in, and the table that shares come from."""

import math
from typing import Any

import jax

from fedjax_llm.aggregation import AggregationRule
from fedjax_llm.errors import Refused, UserError
from fedjax_llm.federation.message import Upload, fitting_bits
from fedjax_llm.lora import LoraConfig, init_adapter
from fedjax_llm.models import DecoderConfig
from fedjax_llm.privacy import IntegerMechanism
from fedjax_llm.privacy.integer_mechanism import Shares
from fedjax_llm.privacy.integer_noise import NoiseTable
from fedjax_llm.secure.fixed_point import FixedPoint

# Integers of a sum stay within int32.
_MOST = 2**31
_FEWEST_BITS = 6


def mechanism_and_bits(
    config: DecoderConfig,
    lora: LoraConfig,
    rule: AggregationRule,
    shares: Shares,
    *,
    clip_norm: float,
    noise_multiplier: float,
    control: bool,
    bits: int | None,
) -> tuple[IntegerMechanism, int]:
    """The mechanism of a run, and the bits of a coordinate that suit its noise.

    Args:
        config: of the model.
        lora: of the adapter.
        rule: what is sent.
        shares: distribution and number of shares.
        clip_norm: of a client's message.
        noise_multiplier: on their sum.
        control: whether control variates are sent as well.
        bits: as wished; the most for which shares fit their table and sums 32 bits if None.

    Raises:
        UserError: shares do not fit at the bits that are wished for, or at any.
    """
    shapes = jax.eval_shape(
        lambda key: rule.init(init_adapter(config, lora, key)), jax.random.key(0)
    )
    dimension = max(_size(rule, shapes, phase, control) for phase in range(len(rule.phases)))

    def at(bits: int) -> IntegerMechanism:
        step = FixedPoint(bits, clip_norm, shares.clients).step
        return IntegerMechanism(shares, clip_norm / step, dimension)

    most = fitting_bits(bits, shares.clients)
    for tried in (most,) if bits is not None else range(most, _FEWEST_BITS - 1, -1):
        found = at(tried)
        try:
            table = table_of(found, noise_multiplier)
        except UserError:
            if tried == (most if bits is not None else _FEWEST_BITS):
                raise
            continue
        fixed_point = FixedPoint(tried, clip_norm, shares.clients)
        if shares.clients * (fixed_point.max_int + table.bound) < _MOST:
            _check_room(fixed_point, clip_norm, dimension)
            return found, tried
    raise UserError(
        f"messages of {most} bits and their noise do not fit 32 bits for {shares.clients} clients; "
        "use fewer bits"
    )


def _check_room(fixed_point: FixedPoint, clip_norm: float, dimension: int) -> None:
    """Refuses a fixed point so coarse that rounding takes most of the clip norm.

    Raises:
        UserError: it takes more than half.
    """
    taken = fixed_point.step * math.sqrt(dimension) / 2
    if taken > clip_norm / 2:
        raise UserError(
            f"with so much noise the integers are so coarse that rounding {dimension} parameters "
            f"can take {min(100, 100 * taken / clip_norm):.0f} % of the clip norm; lower the noise "
            "multiplier, or train fewer parameters"
        )


def table_of(mechanism: IntegerMechanism, noise_multiplier: float) -> NoiseTable:
    """What every client draws its share from."""
    return mechanism.shares.sampler(mechanism.stddev(noise_multiplier))


def _size(rule: AggregationRule, shapes: Any, phase: int, control: bool) -> int:
    message = rule.messages(shapes, phase)[0][0]
    extra = rule.trainable(shapes, phase) if control else ()
    return sum(leaf.size for leaf in jax.tree.leaves(Upload(message, extra)))


def check_online(mechanism: IntegerMechanism, online: int, number: int) -> None:
    """Refuses a round whose noise would be less than planned.

    Raises:
        Refused: too few clients are online.
    """
    least = mechanism.shares.clients - mechanism.shares.dropouts
    if online < least:
        raise Refused(
            f"round {number}: {online} clients are online, and the noise is planned for at least "
            f"{least} shares; wait for more, or plan for more dropouts"
        )
