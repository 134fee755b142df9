"""A real model with a small adapter, real sentences, and what a client sends of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.aggregation.part import Part, pick, put
from fedjax_llm.federation.objective import row_loss
from fedjax_llm.lora import Adapter, LoraConfig, LowRank, init_adapter
from fedjax_llm.models import Batch, Model, load_model
from fedjax_llm.training import ClientTable, LocalTraining, client_update, each_row, optimizer_init


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, the adapter that a client starts from, and the loss of its trainable part."""

    model: Model
    adapter: Adapter
    sides: tuple

    @property
    def part(self) -> Part:
        return pick(self.adapter, self.sides)

    def row_loss(self, base: Any, part: Part, row: Batch) -> jax.Array:
        return row_loss(self.model, base, put(self.adapter, part), row, jnp.float32, False)

    def row(self, text: str, longest: int | None = None) -> list[int]:
        return [1, *self.model.tokenizer.encode(text)][:longest]

    def update(
        self, text: str, training: LocalTraining, seed: int = 0, longest: int | None = None
    ) -> Part:
        """The change of the adapter after local training on one text."""
        ids = self.row(text, longest)
        rows = Batch(
            jnp.array([ids], jnp.int32),
            jnp.ones((1, len(ids)), bool),
            jnp.ones((1, len(ids)), jnp.int32),
        )
        before = self.part
        done = jax.jit(
            lambda base, part, rows, key: (
                client_update(
                    each_row(partial(self.row_loss, base)),
                    training,
                    part,
                    optimizer_init(training.optimizer, part),
                    ClientTable(rows, jnp.int32(1), jnp.float32(1)),
                    *jax.random.split(key),
                ).trainable
            )
        )(self.model.base, before, rows, jax.random.key(seed))
        return jax.tree.map(jnp.subtract, done, before)


@pytest.fixture(scope="session")
def subject(shared: Path) -> Callable[..., Subject]:
    """Builds a subject; B is not zero, as after a first round."""
    models: dict[str, Model] = {}

    def build(name: str, rank: int, sides: tuple = ("a", "b"), targets: tuple = ()) -> Subject:
        folder = shared / "models" / name
        if not folder.is_dir():
            pytest.skip(f"needs the model {name} in ../shared/models")
        model = models.setdefault(name, load_model(folder))
        lora = LoraConfig(rank, 2.0 * rank, targets or ("q_proj", "v_proj"))
        adapter = init_adapter(model.config, lora, jax.random.key(0))
        factors = {}
        for place, (side, factor) in enumerate(adapter.factors.items()):
            key = jax.random.fold_in(jax.random.key(5), place)
            noise = 0.02 * jax.random.normal(key, factor.b_LxRxF.shape)
            factors[side] = LowRank(factor.a_LxDxR, noise)
        return Subject(model, Adapter(factors, adapter.scale), sides)

    return build


@pytest.fixture(scope="session")
def sentences(shared: Path) -> list[str]:
    """Real sentences; the first has 22 tokens of stories15M's, the start of a text included."""
    path = shared / "data" / "lm_text" / "tinystories_valid_4stories.txt"
    if not path.is_file():
        pytest.skip("needs the texts in ../shared/data")
    parts = path.read_text(encoding="utf-8").replace("\n", " ").split(". ")
    return [part.strip() + "." for part in parts if part.strip()]


@pytest.fixture(scope="session")
def real_rows(sentences: list[str], subject: Callable[..., Subject]) -> Batch:
    """32 rows of 16 tokens of real text, for stories260K."""
    ids = subject("stories260K", 2).model.tokenizer.encode(" ".join(sentences))[: 32 * 16]
    tokens = np.array(ids, np.int32).reshape(32, 16)
    return Batch(tokens, np.ones((32, 16), bool), np.ones((32, 16), np.int32))
