"""Real updates: eight clients fine-tune stories260K on lines of Shakespeare's roles, in rounds.

Rank 8 on all seven projections, both factors, 8 steps of 8 lines with Adam a round, averaged after
each; lines are dealt in turn. Needs the shared folder (FEDJAX_LLM_SHARED).
"""

import gzip
import json
import os
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("FEDJAX_LLM_SHARED", HERE.parents[2] / "shared"))
MODEL = SHARED / "models" / "stories260K"
TEXT = SHARED / "data" / "lm_text" / "shakespeare_by_role.jsonl.gz"
CLIENTS, LINES, LENGTH = 8, 96, 64
RANK, STEPS, BATCH, RATE = 8, 8, 8, 1e-2


def available() -> bool:
    """Whether model and text are there."""
    return MODEL.is_dir() and TEXT.exists()


def updates(rounds: int) -> list[Any]:
    """The change of each client in each round: trees of float32 [K, ..]."""
    import jax
    import jax.numpy as jnp
    import optax

    import fedjax_llm as fl
    from fedjax_llm.aggregation.part import pick, put
    from fedjax_llm.data import Record, render_all, to_batch
    from fedjax_llm.federation.objective import rows_loss
    from fedjax_llm.lora import init_adapter
    from fedjax_llm.training import ClientTable, client_update, optimizer_init

    model = fl.load_model(MODEL)
    adapter = init_adapter(
        model.config, fl.LoraConfig(RANK, 2.0 * RANK, ("all-linear",)), jax.random.key(0)
    )
    with gzip.open(TEXT, "rt", encoding="utf-8") as lines:
        spoken = [json.loads(line)["text"] for line in lines]
    spoken = [text for text in spoken if 60 <= len(text) <= 160][: CLIENTS * LINES]
    records = [Record(prompt="", answer=text) for text in spoken]
    rendered, _ = render_all(records, model.tokenizer, "plain", LENGTH)
    batch = to_batch(rendered, LENGTH, False, model.tokenizer.pad_id)
    own = jax.tree.leaves(batch)[0].shape[0] // CLIENTS
    rows_K = jax.tree.map(
        lambda rows: jnp.asarray(
            rows[: own * CLIENTS].reshape(own, CLIENTS, *rows.shape[1:]).swapaxes(0, 1)
        ),
        batch,
    )
    training = fl.LocalTraining(optax.adam(RATE), STEPS, BATCH, BATCH)
    part = pick(adapter, ("a", "b"))
    state_K = jax.vmap(lambda _: optimizer_init(training.optimizer, part))(jnp.arange(CLIENTS))

    @jax.jit
    def train(base: Any, part: Any, state_K: Any, key: jax.Array) -> tuple[Any, Any]:
        def losses(candidate: Any, rows: Any) -> jax.Array:
            return rows_loss(model, base, put(adapter, candidate), rows, jnp.float32, False)

        def one(client: Any) -> tuple[Any, Any]:
            rows, state, own_key = client
            table = ClientTable(rows, jnp.int32(own), jnp.float32(1))
            done = client_update(losses, training, part, state, table, own_key, own_key)
            return jax.tree.map(jnp.subtract, done.trainable, part), done.optimizer

        return jax.lax.map(one, (rows_K, state_K, jax.random.split(key, CLIENTS)))

    found = []
    for number in range(rounds):
        change_K, state_K = train(model.base, part, state_K, jax.random.key(number))
        part = jax.tree.map(lambda leaf, change: leaf + change.mean(0), part, change_K)
        found.append(change_K)
    return found
