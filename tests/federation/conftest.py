"""A small real federation: a random three-layer decoder and three clouds of different sizes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from fedjax_llm.aggregation import FfaLora
from fedjax_llm.clouds import Cloud, Link
from fedjax_llm.federation import Federation, Participant, Plain
from fedjax_llm.lora import LoraConfig
from fedjax_llm.models import Batch, DecoderConfig, Model, init_base
from fedjax_llm.privacy import PrivacyPlan
from fedjax_llm.training import ExamplePrivacy, LocalTraining

LENGTH = 24
# Rules, one of each kind: one side, two sums, kept sides, stacks. The others
# have the same code between them and the federation; what is long is only drilled with them.
KINDS = {"ffa", "fedask", "fedsa", "flora"}
SIZES = {"north": 20, "south": 32, "west": 26}
CONFIG = DecoderConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `each_rule` are drilled for all rules but `KINDS`."""
    for item in items:
        if not (isinstance(item, pytest.Function) and item.get_closest_marker("each_rule")):
            continue
        if item.callspec.params["name"] not in KINDS:
            item.add_marker(pytest.mark.drill)


def rows(seed: int, count: int) -> Batch:
    """Rows that count upwards from a random start, with padding: something can be learned."""
    draw = np.random.default_rng(seed)
    start_B = draw.integers(0, 96, count)
    tokens = (start_B[:, None] + (1 + seed % 3) * np.arange(LENGTH)) % 96
    real = np.arange(LENGTH)[None] < draw.integers(LENGTH // 2, LENGTH + 1, count)[:, None]
    mask = real & (np.arange(LENGTH)[None] >= 4)
    return Batch(np.where(real, tokens, 0).astype(np.int32), mask, real.astype(np.int32))


def participants(**offline: frozenset[int]) -> list[Participant]:
    return [
        Participant(
            Cloud(name, Link(up_mbps=10.0 * (k + 1), down_mbps=100.0, latency_ms=5.0)),
            rows(k, size),
            rows(300 + k, 6),
            offline.get(name, frozenset()),
        )
        for k, (name, size) in enumerate(SIZES.items())
    ]


@pytest.fixture(scope="session")
def make_participants() -> Callable[..., list[Participant]]:
    """Three clouds; keyword arguments name the rounds in which a cloud is offline."""
    return participants


def random_model() -> Model:
    return Model(CONFIG, init_base(CONFIG, jax.random.key(7)), None, Path())  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def model() -> Model:
    return random_model()


def build(model: Model, /, unit: str = "none", rounds: int = 4, **changes: Any) -> Federation:
    clouds = changes.pop("participants", None) or participants()
    private = ExamplePrivacy(0.5, 0.8) if unit == "example" else None
    plans = {
        "none": lambda: PrivacyPlan.without_privacy(rounds, 2),
        "example": lambda: PrivacyPlan.for_examples(
            [cloud.rows for cloud in clouds],
            expected_batch=6,
            steps_per_round=2,
            rounds=rounds,
            clip_norm=0.5,
            noise_multiplier=0.8,
            delta=1e-3,
        ),
        "client": lambda: PrivacyPlan.for_clients(
            len(clouds),
            rounds=rounds,
            clip_norm=0.1,
            noise_multiplier=0.7,
            delta=1e-2,
            rate=changes.pop("rate", 1.0),
        ),
    }
    arguments: dict[str, Any] = {
        "lora": LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "v_proj")),
        "training": LocalTraining(optax.adam(0.02), 2, 6, 4, private),
        "rule": FfaLora(optax.sgd(1.0)),
        "plan": plans[unit](),
        "sum_mode": Plain(),
        "seed": 3,
        "measure_error": False,  # it takes as long to compile as the rest
        "clients_at_once": 1,  # so that every device has something to do
    }
    return Federation(changes.pop("model", model), clouds, **(arguments | changes))


@pytest.fixture(scope="session")
def federate(model: Model) -> Callable[..., Federation]:
    """Builds a federation; keyword arguments replace parts of the default one."""
    return partial(build, model)
