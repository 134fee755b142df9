"""The benchmarks against peers, as far as they need no environment of a peer."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

HERE = Path(__file__).resolve().parents[2] / "experiments" / "benchmarks"


@pytest.fixture(scope="module")
def peers() -> Any:
    """Imports a module of the benchmark by name; they import each other by name too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        patch.syspath_prepend(str(HERE / "peers"))

        def module(name: str) -> ModuleType:
            return importlib.import_module(name)

        yield module


def test_distance_is_relative_to_the_way_and_needs_one(peers: Any) -> None:
    tasks = peers("tasks")
    start = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(2, np.float32)}
    first = {"w": np.full((2, 3), 4.0, np.float32), "b": np.full(2, 4.0, np.float32)}
    second = {name: 1.25 * value for name, value in first.items()}
    assert tasks.distance(first, first, start) == 0.0
    assert tasks.distance(first, second, start) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="where it started"):
        tasks.distance(start, first, start)
    with pytest.raises(ValueError, match="different names"):
        tasks.distance(first, {"w": first["w"]}, start)


def test_spread_and_ratio_ignore_the_scale_and_one_slow_turn(peers: Any) -> None:
    sides = peers("sides")
    calm = [1.0, 1.0, 1.0, 1.0, 9.0]
    assert sides.spread(calm) == 0.0
    assert sides.spread([1.0, 2.0, 3.0]) == pytest.approx(sides.spread([10.0, 20.0, 30.0]))
    assert sides.ratio([2.0, 2.0, 2.0, 2.0, 2.0], calm) == 2.0
    with pytest.raises(ValueError, match="argument 2"):
        sides.ratio([1.0], calm)


def test_rows_do_not_depend_on_who_asks_and_fit_the_vocabulary(peers: Any) -> None:
    prepare, tasks = peers("prepare"), peers("tasks")
    task = tasks.Task(5, 1, 2, 16, 0.1, "random", seed=3)
    rows_KxBxT = prepare.rows(task, 11)
    np.testing.assert_array_equal(rows_KxBxT, prepare.rows(task, 11))
    assert rows_KxBxT.shape == (5, 2, 16) and rows_KxBxT.dtype == np.int32
    assert rows_KxBxT.min() >= 0 and rows_KxBxT.max() < 11
    # Something can be learned: in a client every token says the next.
    steps_KxBxT = np.diff(rows_KxBxT, axis=2) % 11
    assert (steps_KxBxT == steps_KxBxT[:, :1, :1]).all()


def test_losses_that_differ_or_are_no_numbers_are_missed(peers: Any, tmp_path: Path) -> None:
    contests, tasks = peers("contests"), peers("tasks")
    start = {"w": np.zeros(3, np.float32)}
    tasks.write_factors(tmp_path / "start.npz", start)

    class Told:
        def __init__(self, *losses: float) -> None:
            self.rounds = [{"loss": loss} for loss in losses]

        def trained(self) -> dict[str, np.ndarray]:
            return {"w": np.ones(3, np.float32)}

    contest = contests.Contest("t", contests.OURS, {}, {}, 1.0, "")

    def met(*losses: float) -> bool:
        return contest.same(Told(2.0, 1.0), Told(*losses), "peer", tmp_path)[0]["met"]

    assert met(2.0, 1.0) and met(2.0009, 1.0)
    assert not met(2.0011, 1.0) and not met(2.0, float("nan"))


def test_our_federation_is_the_loop_that_peers_are_given(peers: Any, tmp_path: Path) -> None:
    """Gradient descent of each client by itself, then the mean of what they trained."""
    from fedjax_llm.lora import Adapter, LoraConfig, LowRank, init_adapter
    from fedjax_llm.models import Batch, DecoderConfig, init_base, loss
    from fedjax_llm.models.checkpoint import write_base

    ours, prepare, tasks = peers("ours"), peers("prepare"), peers("tasks")
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = DecoderConfig.from_hf({**prepare.RANDOM, **small, **heads})
    task = tasks.Task(3, 2, 2, 16, 0.5, "random", rank=2)
    base = init_base(config, jax.random.key(1))
    write_base(tasks.model_folder(tmp_path), config, base)
    tokens_KxBxT = prepare.rows(task, config.vocab_size)
    np.save(tmp_path / "tokens.npy", tokens_KxBxT)
    lora = LoraConfig(rank=task.rank, alpha=task.alpha, targets=("all-linear",))
    adapter = init_adapter(config, lora, jax.random.key(2))
    begun = {
        f"{name}.{side}": np.asarray(f)
        for name, pair in adapter.factors.items()
        for side, f in zip("ab", pair, strict=True)
    }
    tasks.write_factors(tmp_path / "start.npz", begun)

    federation = ours.federate(task, tmp_path, 1)
    state, report = federation.run_round(ours.start(federation, tmp_path))
    found = state.server.adapter.factors

    everywhere = np.ones((task.batch, task.length), bool)

    def mean_loss(factors: dict[str, LowRank], tokens_BxT: np.ndarray) -> jax.Array:
        batch = Batch(tokens_BxT, everywhere, everywhere.astype(np.int32))
        nll_B, count_B = loss(config, base, Adapter(factors, lora.scale), batch)
        return jnp.sum(nll_B) / jnp.sum(count_B).astype(jnp.float32)

    step = jax.jit(jax.value_and_grad(mean_loss))
    ended, losses = [], []
    for tokens_BxT in tokens_KxBxT:
        factors = adapter.factors
        for _ in range(task.steps):
            value, gradient = step(factors, tokens_BxT)
            losses.append(float(value))
            rate = jnp.float32(task.learning_rate)
            factors = jax.tree.map(lambda p, g, rate=rate: p - rate * g, factors, gradient)
        ended.append(factors)
    expected = jax.tree.map(lambda *own: np.mean(own, axis=0), *ended)
    assert report.loss_train_nats == pytest.approx(np.mean(losses), abs=1e-5)
    # Integers of a sum stand between: their step is `BOUND` over two to the power of their bits.
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=0, atol=1e-5), found, expected)
    moved = jax.tree.map(lambda e, s: float(np.abs(e - s).max()), expected, adapter.factors)
    assert max(jax.tree.leaves(moved)) > 1e-2


def test_our_dense_round_is_federated_averaging(peers: Any, tmp_path: Path) -> None:
    """Clients of different sizes count by their rows and take steps by them."""
    dense, ours, tasks = peers("dense_tasks"), peers("ours_dense"), peers("tasks")
    from fedjax_llm.federation import CohortLayout

    # One batch each, so that the order of rows does not matter.
    task = dense.DenseTask(population=4, cohort=4, batch=5, epochs=2, mean_rows=0)
    dense.write(task, tmp_path)
    (images_CxN, labels_CxN), sizes_C = ours.tables(tmp_path)
    layout = CohortLayout.over(task.cohort)
    program = ours.round_program(task, layout, images_CxN.shape[1])
    start = tasks.read_factors(tmp_path / "start.npz")
    found = program(
        layout.replicate(start),
        (images_CxN, labels_CxN),
        sizes_C,
        jnp.asarray(dense.cohort(task, 0)),
        jax.random.key(0),
        jnp.int32(0),
    )

    def loss(params: Any, images: np.ndarray, labels: np.ndarray) -> jax.Array:
        x = jnp.asarray(images.reshape(len(images), -1))
        for layer in range(3):
            x = x @ params[f"w{layer}"] + params[f"b{layer}"][None]
            x = jnp.maximum(x, jnp.float32(0)) if layer < 2 else x
        return -jnp.mean(jax.nn.log_softmax(x)[jnp.arange(len(labels)), labels])

    gradient = jax.jit(jax.grad(loss))
    ended = []
    for images, labels in dense.clients(tmp_path):
        params = start
        for _ in range(task.epochs):
            rate = jnp.float32(task.learning_rate)
            steps = gradient(params, images, labels)
            params = jax.tree.map(lambda p, g, rate=rate: p - rate * g, params, steps)
        ended.append(params)
    expected = jax.tree.map(lambda *own: np.mean(own, axis=0), *ended)
    for name in start:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-6, err_msg=name)
    assert np.abs(expected["w2"] - start["w2"]).max() > 1e-3


def test_clients_of_the_dense_task_have_whole_batches(peers: Any, tmp_path: Path) -> None:
    dense = peers("dense_tasks")
    task = dense.DenseTask(population=50, cohort=7, batch=4, epochs=1, mean_rows=20)
    dense.write(task, tmp_path)
    sizes = [len(labels) for _, labels in dense.clients(tmp_path)]
    assert len(sizes) == 50 and len(set(sizes)) > 3
    assert all(size % task.batch == 0 and 0 < size <= task.most_rows for size in sizes)
    rounds = [dense.cohort(task, number) for number in range(50)]
    counts = np.bincount(np.concatenate(rounds), minlength=50)
    assert (counts == 7).all()
