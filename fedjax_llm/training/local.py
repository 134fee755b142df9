"""One client's local update as a pure function of the global adapter, its own state and its keys.

The frozen base model enters through `rows_loss`: the caller receives the base as an argument of
the compiled program and binds it while tracing, so it is never baked in as a constant.

Notation: S local steps, N rows of the client's table, B rows a step, M rows a micro-batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_llm.errors import UserError
from fedjax_llm.privacy import poisson_clipped_grad_sum, poisson_sample, uniform_batches
from fedjax_llm.training.example_privacy import ExamplePrivacy, NoiseStream, StepNoise
from fedjax_llm.training.optimizers import optimizer_step
from fedjax_llm_kernels.lockstep import turns_together

PyTree = Any
RowsLoss = Callable[[PyTree, PyTree], jax.Array]


def each_row(row_loss: Callable[[PyTree, PyTree], jax.Array]) -> RowsLoss:
    """The losses of rows from the loss of one, `(trainable, row) -> loss`."""
    return jax.vmap(row_loss, in_axes=(None, 0))


@dataclass(frozen=True)
class Drift:
    """Two ways to keep clients of different data from drifting apart during their local steps.

    Both act on the gradient after clipping and noise, by what the client has been sent or has
    computed from noised gradients, so that under example privacy they are post-processing.

    Attributes:
        proximal: mu of FedProx (arXiv 1812.06127, algorithm 2), which adds mu / 2 times the squared
            distance to the global values to the loss; 0 is none.
        control: SCAFFOLD (arXiv 1910.06378, algorithm 1): the gradient is corrected by the global
            control variate minus the client's own. A client's next one is the mean of its gradients
            over the local steps: the paper's option II, whose (x - y) / (S eta) is that mean for
            sgd, and which in this form holds for any local optimiser. It doubles the uplink. A
            message that is shortened to its bound shortens the change of the global variate too,
            and not the client's own.
    """

    proximal: float = 0.0
    control: bool = False

    def __post_init__(self) -> None:
        """Raises UserError for a mu that is negative or not finite."""
        if not 0 <= self.proximal < math.inf:
            raise UserError(f"proximal must be zero or more and finite, got {self.proximal}")


@dataclass(frozen=True)
class LocalTraining:
    """What every client does between two broadcasts.

    Attributes:
        optimizer: the client's optax transformation.
        steps: local optimiser steps a round, S; the most where clients take different numbers.
        batch_size: rows a step, B; the expected number where rows are Poisson-sampled; the most
            where clients take different numbers.
        microbatch: rows whose activations are in memory at once, M.
        privacy: example-level clipping and noise, or None.
        drift: what keeps the clients from drifting apart.
        keeps_optimizer: whether the optimiser's state stays with the client from round to round.
            If not it begins anew, and memory does not grow with the clients by it: what many
            clients that are seldom there need.
    """

    optimizer: optax.GradientTransformation
    steps: int
    batch_size: int
    microbatch: int
    privacy: ExamplePrivacy | None = None
    drift: Drift = Drift()
    keeps_optimizer: bool = True


class ClientTable(NamedTuple):
    """One client's training rows, padded to the cohort's common length N.

    Attributes:
        rows: a pytree of arrays with N leading rows; with example privacy a row is one example.
        population: int32 scalar, how many of the N rows are real.
        rate: float32 scalar, the probability with which a Poisson-sampled step takes a row whose
            turn it is.
        turns: int32 [N], in which step of every period a row's turn is; None for every step.
    """

    rows: PyTree
    population: jax.Array
    rate: jax.Array
    turns: jax.Array | None = None


class ClientMetrics(NamedTuple):
    """What a client measured in a round. Scalars; not covered by any privacy guarantee.

    Attributes:
        loss_sum: float32, loss in nats summed over the rows of all steps.
        rows: float32, rows of all steps.
        clipped: float32, rows whose gradient was clipped (0 without example privacy).
    """

    loss_sum: jax.Array
    rows: jax.Array
    clipped: jax.Array


class Trained(NamedTuple):
    """What a client holds after its local steps.

    Attributes:
        trainable: the trained tree.
        optimizer: its optimiser's state.
        gradient: mean gradient of the steps, clipped and noised but not corrected; () unless
            control variates are asked for.
        metrics: measurements.
        noise: state of the correlated noise; () without.
        clip: state of the adaptive clip norm; () without.
    """

    trainable: PyTree
    optimizer: PyTree
    gradient: PyTree
    metrics: ClientMetrics
    noise: PyTree = ()
    clip: PyTree = ()


def client_update(
    rows_loss: RowsLoss,
    training: LocalTraining,
    trainable: PyTree,
    optimizer_state: PyTree,
    table: ClientTable,
    sampling_key: jax.Array,
    noise_key: jax.Array,
    steps: jax.Array | None = None,
    correction: PyTree = (),
    stream: NoiseStream | None = None,
    batch: jax.Array | None = None,
) -> Trained:
    """Trains the adapter on one client's rows for `training.steps` steps.

    With example privacy, each step takes every row with probability `table.rate`, clips each
    row's gradient, adds Gaussian noise to the sum and divides by the *expected* batch size: that
    one is a public constant, the realised one is not. Without it, rows are shuffled and taken
    `training.batch_size` at a time.

    Formal guarantee: with example privacy, a step releases the sum of gradients of l2 norm at most
    the step's C of a Poisson sample at `table.rate`, with noise calibrated to C (independent or
    correlated): neither depends on `batch`, which only divides what is released. The caller answers
    for `table.rate` being what its accountant takes for this client
    (`federation.tables.sampler_of`), and for `batch` being public.

    Args:
        rows_loss: `(trainable, rows) -> losses in nats`, of each of some rows the mean over its
            answer tokens. Rows of a step are given together, which makes one matrix product of
            theirs; where each row's gradient is clipped, one at a time.
        training: steps, batch sizes, optimiser, privacy.
        trainable: the part of the adapter that is trained, float32 leaves.
        optimizer_state: the client's optimiser state after its last round.
        table: the client's rows.
        sampling_key: key of this client's choice of rows in this round.
        noise_key: key of this client's noise in this round.
        steps: int32 scalar, how many of the steps this client takes; all if None. In a batch of
            clients all go on until the last is through, and the others' steps leave no trace.
        correction: like `trainable`, is added to every gradient (`Drift.control`); () for none.
        stream: for correlated noise, and for turns; a run begins in this round if None.
        batch: int32 scalar, rows a step of this client, at least one and at most
            `training.batch_size`; all of them if None. Without example privacy the rows of the
            largest batch are computed for all and masked for this one: to the same gradients as
            with its own number alone, micro-batches that nobody needs included.
    """
    size: int | jax.Array = training.batch_size
    if batch is not None:
        # Those that fill up a cohort have none, and nothing of theirs may be NaN.
        batch = jnp.maximum(batch, jnp.int32(1))
        size = batch.astype(jnp.float32)
    share = _one_over(size)
    drift = training.drift
    noise = StepNoise.of(training.privacy, training.steps, trainable, noise_key, stream)

    def step(carry: _Carry, step_index: jax.Array) -> tuple[_Carry, ClientMetrics]:
        params, state, seen, held, norm = carry
        if training.privacy is None:
            grads, metrics = _plain_gradient(
                rows_loss, training, params, table, step_index, sampling_key, batch
            )
        else:
            total, metrics = _clipped_sum(
                rows_loss, training, params, table, step_index, noise.first, sampling_key, norm
            )
            drawn, held = noise.next(step_index, total, held, norm)
            norm = noise.next_norm(step_index, norm, metrics.rows, metrics.clipped, size)
            grads = jax.tree.map(lambda t, n: (t + n) * share, total, drawn)
        if drift.control:
            seen = jax.tree.map(jnp.add, seen, grads)
            grads = jax.tree.map(jnp.add, grads, correction)
        if drift.proximal:
            mu = jnp.float32(drift.proximal)
            grads = jax.tree.map(lambda g, p, p0: g + mu * (p - p0), grads, params, trainable)
        params, state = optimizer_step(training.optimizer, grads, state, params)
        return _Carry(params, state, seen, held, norm), metrics

    def step_if_due(carry: _Carry, step_index: jax.Array) -> tuple[_Carry, ClientMetrics]:
        after, metrics = step(carry, step_index)
        assert steps is not None
        due = step_index < steps
        metrics = jax.tree.map(lambda m: jnp.where(due, m, jnp.zeros_like(m)), metrics)
        kept = jax.tree.map(lambda new, old: jnp.where(due, new, old), after, carry)
        # The noise goes on, so that its steps are those by which turns are counted.
        return kept._replace(noise=after.noise), metrics

    seen = jax.tree.map(jnp.zeros_like, trainable) if drift.control else ()
    start = _Carry(trainable, optimizer_state, seen, noise.state, noise.clip)
    goes_on = training.privacy is not None and training.privacy.correlation is not None
    if steps is None or goes_on:
        (trained, optimizer_state, seen, held, norm), metrics_S = jax.lax.scan(
            step if steps is None else step_if_due, start, jnp.arange(training.steps)
        )
        metrics = jax.tree.map(lambda m: jnp.sum(m, axis=0), metrics_S)
    else:
        (trained, optimizer_state, seen, held, norm), metrics = _until(step, start, steps)
    taken = jnp.float32(training.steps) if steps is None else steps.astype(jnp.float32)
    return Trained(
        trained,
        optimizer_state,
        jax.tree.map(lambda leaf: leaf * _one_over(jnp.maximum(taken, jnp.float32(1))), seen),
        metrics,
        held,
        norm,
    )


def _until(
    step: Callable[["_Carry", jax.Array], tuple["_Carry", ClientMetrics]],
    start: "_Carry",
    steps: jax.Array,
) -> tuple["_Carry", ClientMetrics]:
    """So many steps and no more, and the sum of what they measured.

    Batched over clients it ends with the last of them, and keeps the others as they are.
    """

    def one(index: jax.Array, so_far: tuple[_Carry, ClientMetrics]) -> tuple[_Carry, ClientMetrics]:
        carry, metrics = so_far
        after, found = step(carry, index)
        return after, jax.tree.map(jnp.add, metrics, found)

    zeros = ClientMetrics(*(jnp.float32(0) for _ in ClientMetrics._fields))
    found: tuple[_Carry, ClientMetrics] = turns_together(steps, one, (start, zeros))
    return found


class _Carry(NamedTuple):
    """What goes from one local step to the next."""

    trainable: PyTree
    optimizer: PyTree
    seen: PyTree
    noise: PyTree
    clip: PyTree


def _clipped_sum(
    rows_loss: RowsLoss,
    training: LocalTraining,
    params: PyTree,
    table: ClientTable,
    step_index: jax.Array,
    first: jax.Array,
    sampling_key: jax.Array,
    clip: PyTree,
) -> tuple[PyTree, ClientMetrics]:
    """The sum of the clipped gradients of the rows that a step samples."""
    privacy = training.privacy
    assert privacy is not None
    size = jax.tree.leaves(table.rows)[0].shape[0]
    due_N = None
    if table.turns is not None:
        due_N = table.turns == (first + step_index) % privacy.period
    indices_N, count = poisson_sample(
        jax.random.fold_in(sampling_key, step_index), table.population, table.rate, size, due_N
    )
    bound = privacy.clip_norm if privacy.adaptive is None else clip.clip_norm

    def row_loss(candidate: PyTree, row: PyTree) -> jax.Array:
        return rows_loss(candidate, jax.tree.map(lambda leaf: leaf[None], row))[0]

    total, stats = poisson_clipped_grad_sum(
        row_loss,
        params,
        table.rows,
        indices_N,
        count,
        bound,
        training.microbatch,
        privacy.method,
    )
    return total, ClientMetrics(stats.loss * stats.weight, stats.weight, stats.clipped)


def _plain_gradient(
    rows_loss: RowsLoss,
    training: LocalTraining,
    params: PyTree,
    table: ClientTable,
    step_index: jax.Array,
    sampling_key: jax.Array,
    batch: jax.Array | None,
) -> tuple[PyTree, ClientMetrics]:
    """The mean gradient of a step's rows, `batch` of them; `training.batch_size` if None."""
    size = jax.tree.leaves(table.rows)[0].shape[0]
    own: int | jax.Array = training.batch_size if batch is None else batch
    # One shuffle serves the round; every step cuts its batch out of the same one.
    indices_SxB = uniform_batches(
        sampling_key, table.population, size, training.steps, training.batch_size, batch
    )
    microbatches = -(-training.batch_size // training.microbatch)
    padding = microbatches * training.microbatch - training.batch_size
    indices_QxM = jnp.pad(indices_SxB[step_index], (0, padding)).reshape(microbatches, -1)
    present_QxM = (jnp.arange(indices_QxM.size) < own).reshape(indices_QxM.shape)

    # Put to the losses, and not to the gradient's many numbers.
    share = _one_over(own)

    def part_of_mean(
        candidate: PyTree, indices_M: jax.Array, present_M: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        rows = jax.tree.map(lambda leaf: leaf[indices_M], table.rows)
        loss_M = rows_loss(candidate, rows)
        loss = jnp.sum(jnp.where(present_M, loss_M, jnp.float32(0)))
        return loss * share, loss

    def add_microbatch(
        carry: tuple[jax.Array, PyTree], inputs: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, PyTree], None]:
        gradient, loss = jax.grad(part_of_mean, has_aux=True)(params, *inputs)
        return jax.tree.map(jnp.add, carry, (loss, gradient)), None

    start = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
    (loss, mean), _ = jax.lax.scan(add_microbatch, start, (indices_QxM, present_QxM))
    return mean, ClientMetrics(loss, jnp.asarray(own, jnp.float32), jnp.float32(0))


def _one_over(count: int | jax.Array) -> jax.Array:
    """By what sums of so many are multiplied to be means.

    XLA divides by a client's own number in one way where a device has several groups of clients
    and in another where it has one, and a run would not end in the same bytes on two devices.
    """
    return jax.lax.optimization_barrier(1 / jnp.asarray(count, jnp.float32))
