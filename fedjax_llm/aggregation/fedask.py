"""FedASK: two sums of sketches give the best low-rank form of the mean product."""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp

from fedjax_llm.aggregation.part import Side, pick, size_at_rank
from fedjax_llm.aggregation.rule import (
    AggregationRule,
    Facts,
    LocalResult,
    PyTree,
    Round,
    ServerState,
)
from fedjax_llm.lora import Adapter, LowRank, algebra

Sketches = dict[str, jax.Array]

# Random columns of a sketch. With the known ones, from the second round on, four find a product
# within one percent of the best of its rank, and so do sixteen.
_NEW = 8
# The least length of a column of A, of the longest.
_LEAST_A = 1 / 32
# Bits of a random word.
_WORD = 32


class FedAsk(AggregationRule):
    """FedASK's rule (arXiv 2507.09990): both factors move, and still all that is sent adds up.

    Let M be the global product and C_k the change of client k's product. First the clients send
    C_k Omega for a random Omega of F x S that all know; M Omega plus their mean spans the range of
    the new product, and the server answers with an orthonormal basis Q. Then the clients send
    Q' C_k, and Q times the singular value decomposition of Q' M plus the mean, cut at rank R, is
    the new product, its singular values shared between A and B (all to B where they are so small
    that the rank could not learn from it). Nobody forms a D x F matrix.

    Omega has S = R + min(R, 8) columns, at most D and F: the R rows of the global B, and random
    ones that each round draws anew. The first make the sketch one more step of a subspace iteration
    that goes on from round to round, as PowerSGD does (arXiv 1905.13727), far more accurate than
    the paper's purely random Omega; the others find what is new. What is cut is what the mean has
    beyond rank R; there lies the difference to the mean product.
    """

    name = "fedask"
    source = "arXiv 2507.09990"
    summary = "two sums of sketches give the best rank-R form of the mean product"
    facts = Facts(
        exact=False,
        dp_safe=False,
        ranks=True,
        uplink="S (D + F), S = R + min(R, 8)",
        downlink="S D + R (D + F)",
    )
    phases: ClassVar[tuple[tuple[Side, ...], ...]] = (("a", "b"),)
    stages = 2
    plain_steps_only = True
    new_coordinates = True

    def message(self, round_: Round, result: LocalResult, stage: int, shared: PyTree) -> Sketches:
        """The change of the client's product times Omega; then Q' times the change."""
        before = self.adapter(round_.server, result.before)
        after = self.adapter(round_.server, result.after)
        sketches = {}
        for index, (name, new) in enumerate(after.factors.items()):
            old = before.factors[name]
            if stage == 0:
                known = round_.server.adapter.factors[name]
                signs_LxFxS = jax.vmap(partial(_signs, known))(_keys(round_, index, known))
                of_new, of_old = (_times(x, known.b_LxRxF, signs_LxFxS) for x in (new, old))
                sketches[name] = of_new - of_old
            else:
                q_LxDxS = shared[name]
                sketches[name] = _project(q_LxDxS, new) - _project(q_LxDxS, old)
        return sketches

    def between(self, round_: Round, stage: int, mean: Sketches) -> Sketches:
        """The basis Q by projection; of the product to which the server's rate will lead."""
        del stage
        rate, _ = self._rate(round_)

        return {
            name: _by_layer(
                _basis, mean[name], factor, _keys(round_, index, factor), _each(rate, factor)
            )
            for index, (name, factor) in enumerate(round_.server.adapter.factors.items())
        }

    def apply(self, round_: Round, mean: Sketches, shared: PyTree = ()) -> ServerState:
        """The best product of rank R inside the basis."""
        rate, server = self._rate(round_)

        factors = {
            name: _by_layer(_cut, factor, shared[name], mean[name], _each(rate, factor))
            for name, factor in server.adapter.factors.items()
        }
        return server._replace(adapter=Adapter(factors=factors, scale=server.adapter.scale))

    def uplink(self, server: ServerState, phase: int, rank: int) -> int:
        """Two sketches, whatever the client's rank."""
        del phase, rank
        total = 0
        for factor in server.adapter.factors.values():
            layers, inputs, _ = factor.a_LxDxR.shape
            total += layers * _width(factor) * (inputs + factor.b_LxRxF.shape[-1])
        return total

    def downlink(self, server: ServerState, phase: int, ranks: tuple[int, ...], rank: int) -> int:
        """Both factors; the basis between the stages is counted apart, by its own size."""
        del phase, ranks, rank
        return size_at_rank(pick(server.adapter, ("a", "b")))


class FedAskFixedA(FedAsk):
    """FedASK's private form (arXiv 2507.09990): clients train, clip and noise B alone.

    A stays as it was broadcast. So the mean product has rank R, nothing is cut, and noise enters
    once: the rule is exact, and differs from `fedsvd` in where the singular values go (and in
    sending more than it needs to).
    """

    name = "fedask-fixed-a"
    summary = "FedASK as the paper runs it under privacy: clients train B alone"
    facts = Facts(
        exact=True,
        dp_safe=True,
        ranks=True,
        uplink="S (D + F), S = R + min(R, 8)",
        downlink="S D + R (D + F)",
    )
    phases = (("b",),)


@partial(jax.jit, static_argnums=0)
def _by_layer(function: Callable[..., PyTree], first: PyTree, *others: PyTree) -> PyTree:
    """A function of one layer of each argument, which takes the place of that of the first.

    One layer after the other, so that what lies between fits a processor's cache, and in place.
    """
    layers = jax.tree.leaves(first)[0].shape[0]

    def step(index: jax.Array, first: PyTree) -> PyTree:
        layer = jax.tree.map(lambda leaf: leaf[index], (first, *others))
        return jax.tree.map(lambda leaf, new: leaf.at[index].set(new), first, function(*layer))

    return jax.lax.fori_loop(0, layers, step, first)


def _basis(mean_DxS: jax.Array, factor: LowRank, key: jax.Array, rate: jax.Array) -> jax.Array:
    """One layer's Q from the mean of the clients' first sketches."""
    sketch_DxS = _times(factor, factor.b_LxRxF, _signs(factor, key))
    return algebra.orthonormal(sketch_DxS + rate * mean_DxS)


def _cut(factor: LowRank, q_DxS: jax.Array, mean_SxF: jax.Array, rate: jax.Array) -> LowRank:
    """One layer's best product of rank R inside Q, from the mean of the second sketches.

    A product of zero leaves A as it was.
    """
    inside_SxF = _project(q_DxS, factor) + rate * mean_SxF
    rank = factor.a_LxDxR.shape[-1]
    u_SxS, s_S = algebra.left_axes(inside_SxF)
    u_SxR = u_SxS[:, :rank]
    # Half of each singular value to either side, so that both learn at one rate; but A keeps some
    # length where the product has none, for a rank of two zeros would never learn again.
    root_1xR = jnp.sqrt(s_S[None, :rank])
    root_1xR = jnp.maximum(root_1xR, jnp.float32(_LEAST_A) * root_1xR[:, :1])
    found = s_S[0] > 0
    root_1xR = jnp.where(found, root_1xR, jnp.float32(1))
    return LowRank(
        jnp.where(found, algebra.matmul(q_DxS, u_SxR * root_1xR), factor.a_LxDxR),
        algebra.matmul_tn(u_SxR * (1 / root_1xR), inside_SxF),
    )


def _each(rate: jax.Array, factor: LowRank) -> jax.Array:
    return jnp.broadcast_to(rate, factor.a_LxDxR.shape[:1])


def _width(factor: LowRank) -> int:
    """S; with or without layers."""
    inputs, rank = factor.a_LxDxR.shape[-2:]
    return min(rank + min(rank, _NEW), inputs, factor.b_LxRxF.shape[-1])


def _keys(round_: Round, index: int, factor: LowRank) -> jax.Array:
    """Of each layer's Omega."""
    return jax.random.split(jax.random.fold_in(round_.key, index), factor.b_LxRxF.shape[0])


def _signs(factor: LowRank, key: jax.Array) -> jax.Array:
    """One layer's random signs, float32 [F, S]; each is one bit of what the key draws.

    Clients and server compute Omega in programs of their own and need the same bytes: so there is
    no rounding in it, which a compiler may do in one way or another (normal draws end in a
    polynomial). Signs span as well, and the lengths of the columns do not matter.
    """
    outputs, width = factor.b_LxRxF.shape[-1], _width(factor)
    words_FxWx1 = jax.random.bits(key, (outputs, -(-width // _WORD), 1), jnp.uint32)
    shifts_1x1xN = jnp.arange(_WORD, dtype=jnp.uint32)[None, None]
    bits = (words_FxWx1 >> shifts_1x1xN) & jnp.uint32(1)
    bits_FxS = bits.reshape(outputs, -1)[:, :width]
    return jnp.where(bits_FxS == 1, jnp.float32(1), jnp.float32(-1))


def _times(factor: LowRank, known_RxF: jax.Array, signs_FxS: jax.Array) -> jax.Array:
    """A product times Omega: the rows of the global B, then random signs.

    The first signs stand in for rows of zeros. Omega itself is not written out. Leading axes, if
    any, are layers.
    """
    rank = known_RxF.shape[-2]
    by_known_RxR = algebra.matmul_nt(factor.b_LxRxF, known_RxF)
    by_signs_RxS = algebra.matmul(factor.b_LxRxF, signs_FxS)
    found_1xR = jnp.any(known_RxF != 0, axis=-1)[..., None, :]
    by_first_RxR = jnp.where(found_1xR, by_known_RxR, by_signs_RxS[..., :rank])
    by_omega_RxS = jnp.concatenate([by_first_RxR, by_signs_RxS[..., rank:]], axis=-1)
    return algebra.matmul(factor.a_LxDxR, by_omega_RxS)


def _project(q_DxS: jax.Array, factor: LowRank) -> jax.Array:
    """Q' times a product."""
    return algebra.matmul(algebra.matmul_tn(q_DxS, factor.a_LxDxR), factor.b_LxRxF)
