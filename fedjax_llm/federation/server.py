"""What the server does in the rounds of one phase, as pure functions of sums.

Notation: K clients, K' with padding, P numbers of a message, G groups whose sums stay apart.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.aggregation import (
    AggregationRule,
    Round,
    ServerState,
    aggregation_error,
    mean_product,
    with_plain_step,
)
from fedjax_llm.aggregation.part import subset
from fedjax_llm.aggregation.robust import GroupRobust
from fedjax_llm.federation.client_values import ClientInputs, Local
from fedjax_llm.federation.keys import Purpose, key_for
from fedjax_llm.federation.message import MessageCodec
from fedjax_llm.federation.recipe import Applied, Global, Recipe
from fedjax_llm.privacy import gaussian_noise_like

PyTree = Any


class Server:
    """The server's functions.

    Args:
        recipe: of the federation.
        phase: of the rule.
        codecs: fixed point of the message of each stage.
    """

    def __init__(self, recipe: Recipe, phase: int, codecs: tuple[MessageCodec, ...]) -> None:
        self._recipe, self._phase, self._codecs = recipe, phase, codecs

    def round_of(self, state: Global, seed: jax.Array, number: jax.Array) -> Round:
        """The round as the rule sees it."""
        key = key_for(seed, Purpose.RULE, number)
        return Round(state.server, self._phase, number, key)

    def between(
        self,
        stage: int,
        total_P: jax.Array,
        inverse: jax.Array,
        state: Global,
        seed: jax.Array,
        number: jax.Array,
    ) -> PyTree:
        """What the sum of a stage tells all clients; arguments as those of `apply`."""
        codec, compressor = self._codecs[stage], self._recipe.compressor
        mean = jax.lax.optimization_barrier(codec.unravel(codec.decode(total_P) * inverse))
        if compressor is not None:
            return compressor.between(state.compression, seed, number, mean)
        return self._recipe.rule.between(self.round_of(state, seed, number), stage, mean.message)

    def apply(
        self,
        total: jax.Array,
        inverse: jax.Array,
        state: Global,
        clients: ClientInputs,
        local: Local,
        shares_K: jax.Array,
        public: PyTree,
        seed: jax.Array,
        number: jax.Array,
    ) -> Applied:
        """The server's step.

        Args:
            total: int32; the sum [P], group sums [G, P], or every message [K, P].
            inverse: what turns the sum into a mean, one over the sum of weights. A product, because
                XLA makes one of a division on two devices and not on one, with other bytes.
            state: that was broadcast.
            clients: public weights and who takes part; of group sums, who is in them.
            local: what clients trained, to measure the error; without it nothing is measured.
            shares_K: float32, each client's share in the mean, adding up to one.
            public: what the rule made of its stage before; () in the first.
            seed: the run's key.
            number: the round.
        """
        recipe, codec = self._recipe, self._codecs[-1]
        compressor = recipe.compressor
        barrier = jax.lax.optimization_barrier
        round_ = self.round_of(state, seed, number)
        present_K, ranks_K = recipe.layout.gathered((clients.participates, clients.rank))

        noise_P, noise = jnp.float32(0), state.noise
        if recipe.server_noise_stddev > 0:
            noise_P, noise = barrier(self._noise(state.noise, codec.size, seed, number))

        def applied_by(
            rule: AggregationRule, round_: Round
        ) -> tuple[ServerState, PyTree, PyTree, PyTree]:
            """The server, memory of a combination, the mean, the codec's state; after the step."""
            memory = state.combine
            if recipe.combine is not None:
                if isinstance(recipe.combine, GroupRobust):
                    counts_G = self._group_counts(present_K)
                    combined_P, memory = recipe.combine.combine_groups(
                        codec.decode(total), counts_G, memory
                    )
                else:
                    combined_P, memory = recipe.combine.combine(
                        codec.decode(total), present_K, memory
                    )
                mean = codec.unravel(combined_P)
                return rule.apply(round_, mean.message, public), memory, mean, state.compression
            if rule.needs_individual_messages:
                uploads_K = jax.vmap(lambda ints: codec.unravel(codec.decode(ints)))(total)
                after = rule.apply_each(round_, uploads_K.message, shares_K, ranks_K)
                mean = jax.tree.map(lambda leaf_K: jnp.tensordot(shares_K, leaf_K, 1), uploads_K)
                return after, memory, mean, state.compression
            sum_P = codec.decode(total)
            # Noise has the unit of the sum: of one message's largest norm.
            if recipe.server_noise_stddev > 0:
                sum_P = sum_P + noise_P
            if state.clip:
                sum_P = sum_P * state.clip.clip_norm
            mean = barrier(codec.unravel(sum_P * inverse))
            if compressor is None:
                return rule.apply(round_, mean.message, public), memory, mean, state.compression
            mean, codec_state = barrier(
                compressor.decode(state.compression, seed, number, mean, public)
            )
            after = rule.apply(round_, mean.message)
            sent = subset(rule.trainable(round_.server, self._phase), rule.sent(self._phase))
            after = compressor.only_its_turn(round_.server, after, sent, number)
            return after, memory, mean, codec_state

        server, memory, mean, codec_state = barrier(applied_by(recipe.rule, round_))
        control = state.control
        if control:
            # The server's variate is the mean over all clients, who took part or not
            # (arXiv 1910.06378, algorithm 1, line 17).
            scale = 1 / (inverse * jnp.float32(recipe.layout.clients))
            own = jax.tree.map(lambda c, d: c + d * scale, control[self._phase], mean.control)
            control = (*control[: self._phase], own, *control[self._phase + 1 :])
        squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(mean.message)]
        error = jnp.float32(jnp.nan)
        if recipe.measures_error:
            plain = with_plain_step(recipe.rule)
            started = plain.restarted(state.server)
            aggregated, _, _, _ = applied_by(plain, round_._replace(server=started))
            after_K = recipe.layout.gathered(local.after)
            truth = mean_product(recipe.rule, state.server, after_K, shares_K)
            error = aggregation_error(truth, state.server, aggregated)
        return Applied(
            Global(
                server,
                control,
                memory,
                noise,
                self._next_clip(total, state, seed, number),
                codec_state,
            ),
            jnp.sqrt(jnp.sum(jnp.stack(squares))),
            error,
        )

    def _noise(
        self, state: PyTree, size: int, seed: jax.Array, number: jax.Array
    ) -> tuple[jax.Array, PyTree]:
        """The noise on the sum, float32 [P], and what it keeps."""
        like_P = jax.ShapeDtypeStruct((size,), jnp.float32)

        def draw(index: jax.Array) -> jax.Array:
            key = key_for(seed, Purpose.SERVER_NOISE, index + jnp.int32(1))
            return gaussian_noise_like(key, like_P, self._recipe.server_noise_stddev)

        index = number - jnp.int32(1)
        if self._recipe.server_noise is None:
            return draw(index), state
        return self._recipe.server_noise.next(index, draw, state)

    def _next_clip(
        self, total_P: jax.Array, state: Global, seed: jax.Array, number: jax.Array
    ) -> PyTree:
        """The adaptive clip norm of the next round, from the noised count of messages within it."""
        recipe = self._recipe
        if recipe.adaptive is None:
            return ()
        key = key_for(seed, Purpose.COUNT_NOISE, number)
        noise = jnp.float32(recipe.adaptive.count_stddev) * jax.random.normal(key, (), jnp.float32)
        count = self._codecs[-1].count(total_P) + noise
        return recipe.adaptive.update(state.clip, count, recipe.expected)

    def _group_counts(self, present_K: jax.Array) -> jax.Array:
        groups = self._recipe.groups
        assert groups is not None
        count = max(groups) + 1
        return jax.ops.segment_sum(present_K.astype(jnp.int32), jnp.asarray(groups), count)

    def total(self, ints_KxP: jax.Array) -> jax.Array:
        """What the server may see of the messages: their sum, group sums, or each of them."""
        recipe = self._recipe
        if recipe.reads_messages:
            return recipe.layout.gathered(ints_KxP)
        if recipe.groups is not None:
            own_KxP = recipe.layout.gathered(ints_KxP)
            count = max(recipe.groups) + 1
            return jax.ops.segment_sum(own_KxP, jnp.asarray(recipe.groups), count)
        # Integers: the order of the clients and the number of devices cannot change a bit.
        return recipe.layout.everywhere(jnp.sum(ints_KxP, axis=0, dtype=jnp.int32))

    def by_cloud(self, ints_KxP: jax.Array) -> jax.Array:
        """What leaves each cloud: the sum over its clients, in the plain inside the cloud."""
        clouds = self._recipe.clouds
        count = max(clouds) + 1
        # Read on the host, which may hold some of the devices only.
        everywhere = self._recipe.layout.everywhere
        if count == len(clouds):
            return everywhere(ints_KxP)
        own_KxP = self._recipe.layout.gathered(ints_KxP)
        return everywhere(jax.ops.segment_sum(own_KxP, jnp.asarray(clouds), count))
