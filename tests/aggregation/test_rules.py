"""What every aggregation rule promises, against a dense float64 oracle.

Clients are moved at random, and a round of a rule is played through its own functions: start,
messages of every stage, their weighted sum, the server's step. A new rule is tested by being in
`RULES`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm.aggregation import (
    RULES,
    AggregationRule,
    LocalResult,
    Part,
    Round,
    ServerState,
    aggregation_error,
    mean_product,
    with_plain_step,
)
from fedjax_llm.aggregation.part import size_at_rank, subset, where_rank, zip_with
from fedjax_llm.errors import UserError
from fedjax_llm.lora import Adapter, LowRank, algebra

LAYERS, INPUTS, OUTPUTS, RANK = 2, 24, 20, 3
KEY = jax.random.key(5)
Dense = dict[str, np.ndarray]


def adapter(seed: int = 0, scale: float = 2.0) -> Adapter:
    """Two projections of different shapes, neither factor zero."""
    draw = np.random.default_rng(seed)

    def factor(inputs: int, outputs: int) -> LowRank:
        a = jnp.asarray(draw.normal(size=(LAYERS, inputs, RANK)) / 4, jnp.float32)
        b = jnp.asarray(draw.normal(size=(LAYERS, RANK, outputs)) / 4, jnp.float32)
        return LowRank(a, b)

    return Adapter({"q_proj": factor(INPUTS, OUTPUTS), "down_proj": factor(OUTPUTS, INPUTS)}, scale)


class Play:
    """A rule and its server after some rounds of random clients, so that every phase is reached."""

    def __init__(self, rule: AggregationRule, rounds_before: int = 0) -> None:
        self.rule, self.server = rule, rule.init(adapter())
        self.number = 1
        for _ in range(rounds_before):
            self.server = self.after([self.trained(seed) for seed in range(3)])
            self.number += 1

    @property
    def round(self) -> Round:
        key = jax.random.fold_in(KEY, self.number)
        return Round(self.server, self.rule.phase(self.number), jnp.int32(self.number), key)

    def trained(self, seed: int, rank: int = RANK, size: float = 0.1) -> LocalResult:
        """What a client might come to: what it may train, moved at random."""
        start = self.rule.start(self.round, jnp.int32(rank))
        draw = np.random.default_rng(seed)
        after = jax.tree.map(
            lambda leaf: leaf + jnp.asarray(size * draw.normal(size=leaf.shape), jnp.float32), start
        )
        return LocalResult(start, self.rule.limited(start, after, jnp.int32(rank)), jnp.int32(rank))

    def idle(self, rank: int = RANK) -> LocalResult:
        start = self.rule.start(self.round, jnp.int32(rank))
        return LocalResult(start, start, jnp.int32(rank))

    def messages(self, client: LocalResult, stage: int, shared: Any) -> Any:
        return self.rule.message(self.round, client, stage, shared)

    def after(self, clients: list[LocalResult], weights: list[float] | None = None) -> ServerState:
        """The server's state after a round of these clients, as the federation plays it."""
        given = np.asarray(weights or [1.0] * len(clients))
        if self.rule.weighs_by_result:
            own = [float(self.rule.weight(self.round, client)) for client in clients]
            given = given * np.asarray(own)
        shares = jnp.asarray(given / given.sum(), jnp.float32)
        shared: Any = ()
        for stage in range(self.rule.stages):
            sent = [self.messages(client, stage, shared) for client in clients]
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *sent)
            if self.rule.needs_individual_messages:
                ranks = jnp.stack([client.rank for client in clients])
                return self.rule.apply_each(self.round, stacked, shares, ranks)
            mean = jax.tree.map(lambda leaf_K: jnp.tensordot(shares, leaf_K, 1), stacked)
            if stage + 1 < self.rule.stages:
                shared = self.rule.between(self.round, stage, mean)
        return self.rule.apply(self.round, mean, shared)

    def product(self, client: LocalResult) -> Dense:
        return dense(self.rule.adapter(self.server, client.after))

    def global_product(self, server: ServerState) -> Dense:
        """The product after a round, with what was folded into the base meanwhile."""
        found = dense(server.adapter)
        for name, residual in server.residual.items():
            folded = np.asarray(residual, np.float64) - np.asarray(self.server.residual[name])
            found[name] = found[name] + folded
        return found


def dense(one: Adapter) -> Dense:
    return {
        name: one.scale * np.asarray(a, np.float64) @ np.asarray(b, np.float64)
        for name, (a, b) in one.factors.items()
    }


def weighted(products: list[Dense], weights: list[float] | None = None) -> Dense:
    given = np.asarray(weights or [1.0] * len(products), np.float64)
    shares = given / given.sum()
    return {
        name: sum(share * one[name] for share, one in zip(shares, products, strict=True))
        for name in products[0]
    }


def distance(one: Dense, other: Dense) -> float:
    """Relative, over all projections together."""
    apart = sum(np.sum(np.square(one[name] - other[name])) for name in one)
    return float(np.sqrt(apart / sum(np.sum(np.square(x)) for x in other.values())))


def make(name: str, optimizer: optax.GradientTransformation | None = None) -> AggregationRule:
    return RULES[name](optimizer or optax.sgd(1.0))


def named(names: list[str]) -> Any:
    return pytest.mark.parametrize("name", names)


ALL = sorted(RULES)
GLOBAL = sorted(name for name, rule in RULES.items() if not rule.kept)
EXACT = sorted(name for name, rule in RULES.items() if rule.facts.exact)
# At the start, and where rules of two and three phases are in another one.
ROUNDS = pytest.mark.parametrize("before", [0, 3])


@named(ALL)
def test_a_rule_says_what_it_is(name: str) -> None:
    rule = RULES[name]
    assert rule.name == name and rule.summary and "arXiv" in rule.source
    assert rule.facts.uplink and rule.facts.downlink
    assert rule.__doc__ and "arXiv" in rule.__doc__


@named(GLOBAL)
@ROUNDS
def test_clients_that_did_nothing_change_nothing(name: str, before: int) -> None:
    play = Play(make(name), before)
    after = play.after([play.idle(), play.idle(), play.idle()])
    start = dense(play.rule.adapter(play.server, play.idle().after))
    found = play.global_product(after)
    if play.rule.new_coordinates and not np.any(start["q_proj"]):
        assert not any(np.any(x) for x in found.values())  # a fresh adapter is zero
        return
    assert distance(found, start) < 2e-6


@named(GLOBAL)
@ROUNDS
def test_identical_clients_give_what_each_has(name: str, before: int) -> None:
    """Also of unequal weights; a mean of equal things is the thing."""
    play = Play(make(name), before)
    client = play.trained(1)
    after = play.after([client] * 4, [1.0, 0.2, 0.7, 0.4])
    assert distance(play.global_product(after), play.product(client)) < 1e-5


@named(GLOBAL)
@ROUNDS
def test_one_client_gives_its_own_result(name: str, before: int) -> None:
    play = Play(make(name), before)
    client = play.trained(1)
    assert distance(play.global_product(play.after([client])), play.product(client)) < 1e-5


@named(ALL)
@ROUNDS
def test_the_order_of_clients_does_not_matter(name: str, before: int) -> None:
    play = Play(make(name), before)
    clients = [play.trained(seed) for seed in range(4)]
    weights = [1.0, 0.5, 0.3, 0.9]
    one, other = (
        play.global_product(play.after(clients[::turn], weights[::turn])) for turn in (1, -1)
    )
    assert distance(one, other) < 1e-5


@named(ALL)
def test_a_client_of_zero_weight_changes_nothing(name: str) -> None:
    play = Play(make(name), 2)
    clients = [play.trained(seed) for seed in range(3)]
    wild = play.trained(9, size=10.0)
    without = play.global_product(play.after(clients, [1.0, 0.5, 0.3]))
    beside = play.global_product(play.after([*clients, wild], [1.0, 0.5, 0.3, 0.0]))
    assert distance(beside, without) < 1e-5


@named(GLOBAL)
@ROUNDS
def test_exact_rules_apply_the_mean_of_the_products(name: str, before: int) -> None:
    """And a rule that does not say it is exact is not: the flag is worth reading."""
    play = Play(make(name), before)
    clients = [play.trained(seed) for seed in range(5)]
    weights = [1.0, 0.5, 0.3, 0.9, 0.2]
    found = play.global_product(play.after(clients, weights))
    truth = weighted([play.product(client) for client in clients], weights)
    assert distance(found, truth) < 1e-5 if name in EXACT else distance(found, truth) > 1e-4


@named(EXACT)
@ROUNDS
def test_exact_rules_stay_exact_with_different_ranks(name: str, before: int) -> None:
    play = Play(make(name), before)
    clients = [play.trained(seed, rank) for seed, rank in enumerate([1, 3, 2])]
    found = play.global_product(play.after(clients))
    assert distance(found, weighted([play.product(client) for client in clients])) < 1e-5


@named(sorted(name for name, rule in RULES.items() if rule.facts.ranks))
@ROUNDS
def test_a_smaller_rank_trains_and_sends_its_part_only(name: str, before: int) -> None:
    play = Play(make(name), before)
    client = play.trained(1, rank=1)
    whole = play.rule.limited(client.before, client.before, jnp.int32(RANK))
    changed = jax.tree.map(jnp.subtract, client.after, client.before)
    beyond = zip_with(
        jnp.subtract, changed, where_rank(changed, zip_with(jnp.zeros_like, changed), jnp.int32(1))
    )
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(beyond))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(changed))
    truncated = any(
        np.any(np.asarray(x) != np.asarray(y))
        for x, y in zip(
            jax.tree.leaves(whole),
            jax.tree.leaves(play.rule.trainable(play.server, play.round.phase)),
            strict=True,
        )
    )
    assert truncated <= play.rule.truncates


@named(GLOBAL)
@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_alpha_over_rank_scales_products_and_nothing_else(name: str, scale: float) -> None:
    """The same clients under another alpha: every product is multiplied by the ratio."""
    found = []
    for factor in (1.0, scale):
        rule = make(name)
        play = Play(rule)
        play.server = rule.init(adapter(scale=2.0 * factor))
        clients = [play.trained(seed) for seed in range(3)]
        found.append(play.global_product(play.after(clients)))
    assert distance({k: scale * v for k, v in found[0].items()}, found[1]) < 1e-5


@named(ALL)
def test_messages_are_as_long_as_the_facts_say(name: str) -> None:
    """What a client of each rank has to send, counted on the arrays that it sends."""
    play = Play(make(name), 2)
    rule, phase = play.rule, play.round.phase
    shapes, answers = rule.messages(play.server, phase)
    assert len(shapes) == rule.stages == len(answers) + 1
    counted = sum(leaf.size for shape in shapes for leaf in jax.tree.leaves(shape))
    assert rule.uplink(play.server, phase, RANK) == counted
    if rule.stages == 1 and rule.facts.ranks:
        sent = play.messages(play.trained(1, rank=1), 0, ())
        own = sum(int(np.count_nonzero(leaf)) for leaf in jax.tree.leaves(sent))
        padded = rule.truncates and not rule.needs_individual_messages
        # A truncated client's message also takes the rest of the old values back.
        assert own == rule.uplink(play.server, phase, 1) or padded
    assert rule.downlink(play.server, phase, (RANK, RANK), RANK) >= size_at_rank(
        subset(rule.trainable(play.server, phase), rule.sent(phase))
    )


@named(ALL)
@pytest.mark.parametrize("plan", [optax.sgd(1.0), optax.sgd(lambda step: 1.0)])
def test_rounds_keep_the_structure_of_the_state(
    name: str, plan: optax.GradientTransformation
) -> None:
    """What a checkpoint and a compiled program need: the same tree, shapes and dtypes for ever."""
    play = Play(make(name, plan))
    before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), play.server)
    play = Play(make(name, plan), 4)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), play.server) == before
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(play.server))


@named(sorted(name for name in GLOBAL if not RULES[name].plain_steps_only))
def test_server_optimisers_see_the_negated_mean_as_gradient(name: str) -> None:
    whole, half = Play(make(name)), Play(make(name, optax.sgd(0.5)))
    clients = [whole.trained(seed) for seed in range(3)]
    steps = [
        jax.tree.map(jnp.subtract, play.after(clients).adapter, play.server.adapter)
        for play in (whole, half)
    ]
    jax.tree.map(lambda w, h: np.testing.assert_allclose(w, 2 * h, atol=1e-6), *steps)


@named(sorted(name for name in GLOBAL if RULES[name].plain_steps_only))
@pytest.mark.parametrize("rate", [0.5, 1.5])
def test_a_rate_goes_that_part_of_the_way(name: str, rate: float) -> None:
    """Rate times the mean product and the rest of the old one, as far as rank R can hold it."""
    play = Play(make(name, optax.sgd(rate)), 0)
    if name == "flora":
        play.server = play.after([play.trained(seed) for seed in range(2)])
    client = play.trained(1)
    found = play.global_product(play.after([client]))
    before, after = (dense(play.rule.adapter(play.server, part)) for part in client[:2])
    wanted = {k: before[k] + rate * (after[k] - before[k]) for k in before}
    if RULES[name].facts.exact:
        assert distance(found, wanted) < 1e-5
    else:  # the best of rank R, which the two products together exceed
        best = np.sqrt(
            sum(
                np.sum(np.square(np.linalg.svd(layer, compute_uv=False)[RANK:]))
                for layers in wanted.values()
                for layer in layers
            )
            / sum(np.sum(np.square(x)) for x in wanted.values())
        )
        assert best * (1 - 1e-4) <= distance(found, wanted) < best * 1.125 + 1e-5


@named(sorted(name for name, rule in RULES.items() if rule.plain_steps_only))
@pytest.mark.parametrize("optimizer", [optax.sgd(1.0, momentum=0.9), optax.adam(1.0)])
def test_a_momentum_that_would_lose_its_coordinates_is_refused(
    name: str, optimizer: optax.GradientTransformation
) -> None:
    with pytest.raises(UserError, match=f"rule '{name}' takes plain steps .* sgd"):
        RULES[name](optimizer)


@named(GLOBAL)
def test_the_error_that_is_reported_is_the_one_of_the_oracle(name: str) -> None:
    play = Play(make(name, optax.sgd(0.25)), 1)
    plain = Play(with_plain_step(play.rule))
    plain.server, plain.number = plain.rule.restarted(play.server), play.number
    clients = [play.trained(seed) for seed in range(4)]
    weights = [1.0, 0.5, 0.3, 0.9]
    if play.rule.weighs_by_result:
        own = [float(play.rule.weight(play.round, client)) for client in clients]
        weights = [w * o for w, o in zip(weights, own, strict=True)]
        after = plain.after(clients, [1.0, 0.5, 0.3, 0.9])
    else:
        after = plain.after(clients, weights)
    shares = jnp.asarray(np.asarray(weights) / np.sum(weights), jnp.float32)
    afters = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[c.after for c in clients])
    mean = mean_product(play.rule, play.server, afters, shares)
    found = float(jax.jit(aggregation_error)(mean, play.server, after))
    truth = weighted([play.product(client) for client in clients], weights)
    assert found == pytest.approx(distance(plain.global_product(after), truth), rel=1e-3, abs=2e-6)


def test_fedsvd_turns_the_adapter_to_its_principal_axes() -> None:
    play = Play(make("fedsvd"), 3)
    for a, b in play.server.adapter.factors.values():
        eye = np.broadcast_to(np.eye(RANK), (LAYERS, RANK, RANK))
        np.testing.assert_allclose(algebra.matmul(algebra.transposed(a), a), eye, atol=1e-5)
        gram = np.asarray(algebra.matmul(b, algebra.transposed(b)))
        sizes = np.diagonal(gram, axis1=1, axis2=2)
        np.testing.assert_allclose(gram, np.stack([np.diag(s) for s in sizes]), atol=1e-4)
        assert np.all(np.diff(sizes, axis=1) <= 1e-5)  # longest first


def test_fedask_finds_the_best_product_of_its_rank() -> None:
    """Against numpy's dense SVD: a warm sketch of 2 R is within an eighth of the best."""
    play = Play(make("fedask"), 1)
    clients = [play.trained(seed) for seed in range(4)]
    truth = weighted([play.product(client) for client in clients])
    found = play.global_product(play.after(clients))
    for name, layers in truth.items():
        for layer in range(LAYERS):
            sizes = np.linalg.svd(layers[layer], compute_uv=False)
            error = np.linalg.norm(found[name][layer] - layers[layer])
            best = np.linalg.norm(sizes[RANK:])
            assert best * 0.999 < error < best * 1.125


def test_fedask_sketches_add_up_as_the_changes_do() -> None:
    """All clients multiply by one Omega: a message is linear in the change where only B moves."""
    play = Play(make("fedask-fixed-a"), 1)
    round_, rank = play.round, jnp.int32(RANK)
    start = play.rule.start(round_, rank)
    one, other = play.trained(1).after, play.trained(2).after

    def message(after: Part) -> Part:
        return play.rule.message(round_, LocalResult(start, after, rank), 0, ())

    both = jax.tree.map(lambda x, y, z: x + y - z, one, other, start)
    added = jax.tree.map(lambda x, y: x + y, message(one), message(other))
    for found, expected in zip(jax.tree.leaves(added), jax.tree.leaves(message(both)), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_fedask_lets_a_rank_learn_that_nothing_has_used() -> None:
    """From B = 0, as runs begin: A stays where nobody moves, and keeps what rank 1 leaves."""
    play = Play(make("fedask"))
    begun = {
        name: LowRank(a, jnp.zeros_like(b)) for name, (a, b) in play.server.adapter.factors.items()
    }
    play.server = play.rule.init(Adapter(begun, 2.0))
    idle = play.after([play.idle()])
    for name, (a, b) in idle.adapter.factors.items():
        np.testing.assert_array_equal(a, begun[name].a_LxDxR)
        assert not np.any(b)
    narrow = play.trained(1, rank=1)
    play.server = play.after([narrow])
    assert distance(dense(play.server.adapter), play.product(narrow)) < 1e-5
    for a, b in play.server.adapter.factors.values():
        lengths = np.linalg.norm(a, axis=1)
        assert np.all(lengths[:, 1:] > lengths[:, :1] / 40)
        assert np.all(np.linalg.norm(b[:, 1:], axis=2) < 1e-4 * np.linalg.norm(b[:, :1], axis=2))


@pytest.mark.parametrize("ranks", [(3, 3, 3), (1, 2, 3)])
def test_flexlora_is_the_best_product_of_its_rank(ranks: tuple[int, ...]) -> None:
    play = Play(make("flexlora"), 1)
    clients = [play.trained(seed, rank) for seed, rank in enumerate(ranks)]
    truth = weighted([play.product(client) for client in clients])
    found = play.global_product(play.after(clients))
    for name, layers in truth.items():
        u, s, vt = np.linalg.svd(layers, full_matrices=False)
        best = (u[..., :RANK] * s[:, None, :RANK]) @ vt[:, :RANK]
        assert distance({name: found[name]}, {name: best}) < 1e-5


def test_fedrot_lowers_the_error_of_clients_whose_factors_are_turned() -> None:
    """Clients of one product whose factors are turned apart: their mean loses most of it."""
    rot, plain = Play(make("fedrot"), 1), Play(make("factor-averaging"), 1)
    plain.server = plain.rule.init(rot.server.adapter)

    def turned(seed: int) -> Part:
        draw = np.random.default_rng(seed)
        turn = jnp.asarray(np.linalg.qr(draw.normal(size=(RANK, RANK)))[0], jnp.float32)
        turn = turn * jnp.sign(jnp.linalg.det(turn))
        whole = rot.rule.trainable(rot.server)
        return {
            name: {"a": sides["a"] @ turn, "b": turn.T @ sides["b"]}
            for name, sides in whole.items()
        }

    errors = []
    for play in (rot, plain):
        start = play.rule.start(play.round, jnp.int32(RANK))
        clients = [LocalResult(start, turned(seed), jnp.int32(RANK)) for seed in range(5)]
        truth = weighted([play.product(client) for client in clients])
        errors.append(distance(play.global_product(play.after(clients)), truth))
    assert errors[0] < 0.6 * errors[1]


def test_hetlora_weighs_by_the_norm_of_the_product() -> None:
    play = Play(make("hetlora"), 1)
    clients = [play.trained(seed, rank) for seed, rank in enumerate([1, 3])]
    for client in clients:
        scale = play.server.adapter.scale
        norm = np.sqrt(sum(np.sum(np.square(x)) for x in play.product(client).values())) / scale
        assert float(play.rule.weight(play.round, client)) == pytest.approx(norm, rel=1e-5)


def test_fedsb_sends_the_square_of_the_rank_once_it_has_its_axes() -> None:
    play = Play(make("fed-sb"), 4)
    sent = play.messages(play.trained(1), 0, ())
    assert sum(leaf.size for leaf in jax.tree.leaves(sent)) == 2 * LAYERS * RANK**2
    for name, (a, b) in play.server.adapter.factors.items():
        basis = play.server.memory[name]["basis"]
        eye = np.broadcast_to(np.eye(RANK), (LAYERS, RANK, RANK))
        np.testing.assert_allclose(algebra.matmul(algebra.transposed(a), a), eye, atol=1e-5)
        np.testing.assert_allclose(algebra.matmul(basis, algebra.transposed(basis)), eye, atol=1e-5)
        assert b.shape == basis.shape
