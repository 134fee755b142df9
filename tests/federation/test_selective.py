"""Selective encryption in a federation: where it is refused, what it encrypts, and the map."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from safetensors.numpy import load_file, save_file

from fedjax_llm.aggregation import RULES, AggregationRule
from fedjax_llm.aggregation.part import subset
from fedjax_llm.errors import Refused, UserError
from fedjax_llm.federation import (
    Federation,
    Masked,
    Participant,
    Plain,
    Purpose,
    Selective,
    Threshold,
    key_for,
)
from fedjax_llm.federation.keys import seed_key
from fedjax_llm.federation.objective import row_loss
from fedjax_llm.federation.sensitivity import measure, read_map, trained_blocks
from fedjax_llm.lora import Adapter, LoraConfig, LowRank, init_adapter, write_peft
from fedjax_llm.models import Batch, Model
from fedjax_llm.privacy import PrivacyPlan
from fedjax_llm.secure.selection import Selection, by_layers, by_sensitivity
from fedjax_llm.training import ExamplePrivacy, LocalTraining

Build = Callable[..., Federation]
LORA = LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "v_proj"))


def rule(name: str = "ffa") -> AggregationRule:
    return RULES[name](optax.sgd(1.0))


@pytest.fixture(scope="module")
def queries(model: Model) -> Selection:
    return by_layers(trained_blocks(model.config, LORA, rule()), ["*q_proj*"])


@pytest.fixture(scope="module")
def public_rows(make_participants: Callable[..., list[Participant]]) -> Batch:
    return jax.tree.map(lambda leaf: leaf[:7], make_participants()[0].evaluation)


@pytest.mark.optimised
@pytest.mark.parametrize("hidden", [Threshold(2), Masked()])
def test_a_selective_sum_gives_the_bytes_of_a_plain_one(
    federate: Build, queries: Selection, hidden: Any
) -> None:
    states = []
    for mode in (Plain(), Selective(hidden, queries)):
        federation = federate("example", sum_mode=mode)
        state, report = federation.run_round(federation.init())
        states.append(jax.tree.leaves(state))
    for plain, selective in zip(*states, strict=True):
        assert np.asarray(plain).tobytes() == np.asarray(selective).tobytes()
    assert all(report.seconds[stage] > 0 for stage in ("encrypt", "add", "decrypt"))


def test_the_statement_says_what_is_open_and_what_covers_it(
    federate: Build, queries: Selection
) -> None:
    federation = federate("example", sum_mode=Selective(Threshold(2), queries))
    words = federation.statement()
    share = federation.encrypted_fraction
    assert share == queries.fraction
    assert f"only {100 * share:.0f} % of the parameters" in words
    assert "for every client: all of self_attn.v_proj.lora_B" in words
    assert "the epsilon per example holds for what it sends in the clear as well" in words
    assert federate("example", sum_mode=Plain()).encrypted_fraction == 0
    assert federate("example", sum_mode=Threshold(2)).encrypted_fraction == 1


@pytest.mark.parametrize("unit", ["none", "client"])
def test_without_noise_in_every_cloud_it_is_refused(
    federate: Build, queries: Selection, unit: str
) -> None:
    with pytest.raises(Refused, match=f"needs privacy unit 'example', got '{unit}'"):
        federate(unit, sum_mode=Selective(Threshold(2), queries))


def test_noise_that_certifies_nothing_is_refused(
    federate: Build,
    queries: Selection,
    make_participants: Callable[..., list[Participant]],
) -> None:
    plan = PrivacyPlan.for_examples(
        [cloud.rows for cloud in make_participants()],
        expected_batch=6,
        steps_per_round=2,
        rounds=2,
        clip_norm=0.5,
        noise_multiplier=0.01,
        delta=1e-3,
    )
    training = LocalTraining(optax.adam(0.02), 2, 6, 4, ExamplePrivacy(0.5, 0.01))
    with pytest.raises(Refused, match="noise that certifies an epsilon"):
        federate(plan=plan, training=training, sum_mode=Selective(Threshold(2), queries))


def test_a_selection_for_another_adapter_is_a_user_error(
    federate: Build, queries: Selection
) -> None:
    wider = LoraConfig(rank=3, alpha=4.0, targets=("q_proj", "v_proj"))
    with pytest.raises(UserError, match="the selection is for"):
        federate("example", lora=wider, sum_mode=Selective(Threshold(2), queries))


def test_noise_of_a_clear_coordinate_is_that_of_one_cloud_alone(
    federate: Build, queries: Selection
) -> None:
    """The claim that the epsilon rests on: each cloud's own message carries the full noise.

    Gradients are clipped to next to nothing, so that a message of one step of SGD at rate 1 is
    the noise: clip norm x multiplier / expected batch.
    """
    still = LocalTraining(optax.sgd(1.0), 1, 6, 4, ExamplePrivacy(1e-6, 5e5))
    plan = PrivacyPlan.for_examples(
        [20, 32, 26],
        expected_batch=6,
        steps_per_round=1,
        rounds=1,
        clip_norm=1e-6,
        noise_multiplier=5e5,
        delta=1e-3,
    )
    federation = federate(
        plan=plan, training=still, update_bound=8.0, sum_mode=Selective(Threshold(2), queries)
    )
    secure = federation._hidden and federation._hidden.first
    assert secure is not None
    seen: list[np.ndarray] = []
    step = federation._programs[0].codecs[0].fixed_point.step
    honest = secure.upload

    def spy(client: str, round_number: int, ints_P: jax.Array) -> Any:
        seen.append(np.asarray(ints_P)[~queries.mask_P] * step)
        return honest(client, round_number, ints_P)

    secure.upload = spy  # type: ignore[method-assign]
    federation.run_round(federation.init())
    expected = 1e-6 * 5e5 / 6
    for clear in seen:
        # Five standard errors of a standard deviation.
        assert abs(clear.std() / expected - 1) < 5 / np.sqrt(2 * clear.size)


@pytest.mark.parametrize("name", sorted(n for n, r in RULES.items() if r.stages == 1))
def test_blocks_name_what_is_sent_in_its_order(model: Model, name: str) -> None:
    """Each coordinate is marked in the adapter under its name and found in its block."""
    blocks = trained_blocks(model.config, LORA, rule(name))
    server = rule(name).init(init_adapter(model.config, LORA, jax.random.key(0)))
    adapter = server.adapter
    sent = subset(rule(name).trainable(server), rule(name).sent(0))
    flat, _ = ravel_pytree(sent)
    assert sum(block.size for block in blocks) == flat.size
    end = 0
    for block in blocks:
        _, layer, _, projection, side = block.name.split(".")
        factor: LowRank = adapter.factors[projection]
        matrix = {"lora_A": factor.a_LxDxR, "lora_B": factor.b_LxRxF}[side][int(layer)]
        end += block.size
        assert matrix.shape == block.shape
        np.testing.assert_array_equal(flat[end - block.size : end], np.ravel(matrix))
    factors = len(rule(name).sent(0))
    assert len({block.name for block in blocks}) == len(blocks) == 3 * 2 * factors


@pytest.mark.parametrize("microbatch", [1, 4])
def test_the_map_is_the_mean_square_of_each_rows_derivative(
    model: Model, public_rows: Batch, microbatch: int
) -> None:
    found_P = measure(model, LORA, rule(), public_rows, seed=3, microbatch=microbatch)
    adapter = init_adapter(model.config, LORA, key_for(seed_key(3), Purpose.ADAPTER_INIT))
    server = rule().init(adapter)
    trainable = rule().trainable(server)
    squares = []
    for k in range(len(public_rows.tokens_BxT)):
        row = jax.tree.map(lambda leaf, k=k: leaf[k], public_rows)

        def loss(candidate: Any, row: Batch = row) -> jax.Array:
            whole = rule().adapter(server, candidate)
            return row_loss(model, model.base, whole, row, jnp.float32, False)

        squares.append(np.square(np.asarray(ravel_pytree(jax.grad(loss)(trainable))[0])))
    expected = np.mean(np.stack(squares).astype(np.float64), axis=0)
    np.testing.assert_allclose(found_P, expected, rtol=2e-4, atol=1e-9)
    assert found_P.min() >= 0 and found_P.max() > 0


def test_the_factor_that_starts_without_effect_has_no_sensitivity(
    model: Model, public_rows: Batch
) -> None:
    """B starts at zero, and the derivative by A is a multiple of B."""
    blocks = trained_blocks(model.config, LORA, rule("factor-averaging"))
    found_P = measure(model, LORA, rule("factor-averaging"), public_rows, seed=3)
    end = 0
    for block in blocks:
        end += block.size
        part = found_P[end - block.size : end]
        assert (part == 0).all() if block.name.endswith("A") else part.max() > 0


def test_a_map_in_either_format_is_read_in_the_order_of_what_is_sent(
    model: Model, tmp_path: Path
) -> None:
    """PEFT's names and transposed shapes; extra tensors, such as the other factor, may be there."""
    blocks = trained_blocks(model.config, LORA, rule())
    draw = np.random.default_rng(0)
    template = init_adapter(model.config, LORA, jax.random.key(0))
    factors = jax.tree.map(lambda leaf: draw.random(leaf.shape, np.float32), template.factors)
    adapter = Adapter(factors, template.scale)
    expected = np.asarray(ravel_pytree(rule().trainable(rule().init(adapter)))[0])
    write_peft(tmp_path / "map", adapter, LORA, "m")
    tensors = tmp_path / "map" / "adapter_model.safetensors"
    np.testing.assert_array_equal(read_map(tensors, blocks), expected)
    np.save(tmp_path / "map.npy", expected.astype(np.float64))
    np.testing.assert_array_equal(read_map(tmp_path / "map.npy", blocks), expected)
    chosen = by_sensitivity(blocks, read_map(tensors, blocks), 0.25, "map")
    assert expected[chosen.mask_P].min() >= expected[~chosen.mask_P].max()

    kept = load_file(tensors)
    lost = next(name for name in kept if name.endswith("v_proj.lora_B.weight"))
    kept.pop(lost)
    save_file(kept, tensors)
    with pytest.raises(UserError, match=f"lacks tensor {lost}"):
        read_map(tensors, blocks)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "not a whole .npy file"),
        (b"\x93NUMPY\x01\x00rubbish", "not a whole .npy file"),
        (np.arange(288), "does not hold floats"),
        (np.ones(287), "has shape"),
        (np.ones((288, 1)), "has shape"),
        (np.array([{}, {}], dtype=object), "not a whole .npy file"),
    ],
)
def test_a_bad_map_is_a_user_error(model: Model, tmp_path: Path, content: Any, match: str) -> None:
    path = tmp_path / "map.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(UserError, match=match) as caught:
        read_map(path, trained_blocks(model.config, LORA, rule()))
    assert "map.npy" in str(caught.value) and "\n" not in str(caught.value)
