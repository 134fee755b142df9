"""Parts of privacy.py that check promises: accounting, sensitivity, audits, shares of noise.

- accounting: epsilon of ten plans, of every unit, sampler, mechanism and kind of neighbours that
  dp-accounting has an event for, against its own accountant of privacy loss distributions on that
  event; the largest difference.
- sensitivity: hypothesis looks for trees (any float32: NaN, infinity, subnormals, huge ones) that
  each kind of clipping lets through longer than its stated sensitivity, and for turns of a unit
  that correlated noise lets move C g further than stated; the largest ratio in float64.
- audit: one run of real training code on stories260K with 500 canaries, and of the noised sum of
  clients; the lower bound over the accountant's epsilon. The same without a clip must be caught.
- shares: a round of five clouds under an encrypted sum whose messages are zero; the variance of
  what the sum opens to against that of the shares of those who came, in standard errors.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from table import Row, row


def accounting() -> list[Row]:
    """Ten plans against dp-accounting."""
    import dp_accounting as dp
    from dp_accounting import pld

    from fedjax_llm.privacy import Banded, Buffered, LambdaCgd, PrivacyPlan

    settings: dict[str, Any] = {
        "expected_batch": 8.0,
        "steps_per_round": 4,
        "rounds": 20,
        "clip_norm": 1.0,
        "noise_multiplier": 1.0,
        "delta": 1e-5,
    }
    rounds: dict[str, Any] = {
        "rounds": 20,
        "clip_norm": 0.5,
        "noise_multiplier": 2.0,
        "delta": 1e-3,
    }

    def examples(sizes: tuple[int, ...] = (400, 800), **changes: Any) -> PrivacyPlan:
        return PrivacyPlan.for_examples(sizes, **(settings | changes))

    def clients(**changes: Any) -> PrivacyPlan:
        return PrivacyPlan.for_clients(10, **(rounds | changes))

    plans = [
        examples(),
        examples(noise_multiplier=0.6, rounds=5),
        examples((8, 8)),
        examples(unit="user"),
        examples(period=5),
        examples(period=5, correlation=Banded(80, 5)),
        examples((400,), period=50, correlation=LambdaCgd(80, 0.5)),
        clients(rate=0.25),
        clients(period=4, correlation=Buffered(20, 2, 4)),
        examples(adjacency="replace"),
    ]
    apart = []
    for plan in plans:
        relation = (
            dp.NeighboringRelation.REPLACE_ONE
            if plan.adjacency == "replace"
            else dp.NeighboringRelation.ADD_OR_REMOVE_ONE
        )
        expected = pld.PLDAccountant(relation).compose(plan.event()).get_epsilon(plan.delta)
        apart.append(abs((plan.epsilon() or 0.0) - expected))
    return [row("accounting: largest difference to PLD, ten plans", max(apart), "", 1e-6)]


def sensitivity(tries: int) -> list[Row]:
    """The longest contribution that hypothesis finds, over the stated bound."""
    import jax
    import jax.numpy as jnp
    from hypothesis import HealthCheck, given, settings, target
    from hypothesis import strategies as st
    from hypothesis.extra import numpy as numpy_st

    from fedjax_llm.privacy import Banded, Buffered, LambdaCgd, PerFactor, PerLayer
    from fedjax_llm.privacy.clipping import Joint

    rows = []
    values = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)
    shapes = {"a": (2, 3, 2), "b": (2, 2, 4)}
    trees = st.fixed_dictionaries(
        {
            side: numpy_st.arrays(np.float32, shape, elements=values)
            for side, shape in shapes.items()
        }
    )
    hard = settings(
        max_examples=tries,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )

    def longest(kind: Any) -> float:
        worst = [0.0]
        clip = jax.jit(kind.clip)

        @hard
        @given(trees)
        def search(tree: Any) -> None:
            clipped, _ = clip({"q": jax.tree.map(jnp.asarray, tree)})
            leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(clipped)]
            norm = math.sqrt(sum(float(np.sum(np.square(leaf))) for leaf in leaves))
            ratio = norm / float(kind.sensitivity) if math.isfinite(norm) else math.inf
            worst[0] = max(worst[0], ratio)
            target(min(ratio, 1e6))

        search()
        return worst[0]

    def farthest(made: Any) -> float:
        worst = [0.0]
        coefficients = made.coefficients()
        dense = np.array(
            [[coefficients[i - j] if i >= j else 0.0 for j in range(12)] for i in range(12)]
        )
        dense /= np.linalg.norm(dense, axis=0)

        @hard
        @given(st.integers(1, 6), st.data())
        def search(period: int, data: Any) -> None:
            own = list(range(data.draw(st.integers(0, period - 1)), 12, period))
            moves = data.draw(numpy_st.arrays(np.float64, (len(own), 3), elements=st.floats(-1, 1)))
            norms = np.linalg.norm(moves, axis=1, keepdims=True)
            moves = np.where(norms > 1, moves / np.maximum(norms, 1), moves)
            ratio = float(np.linalg.norm(dense[:, own] @ moves)) / made.sensitivity(period)
            worst[0] = max(worst[0], ratio)
            target(ratio)

        search()
        return worst[0]

    for kind in (Joint(0.7), PerFactor(0.3, 1.1), PerLayer((0.4, 2.0))):
        name = f"sensitivity: {type(kind).__name__}, longest found over stated"
        rows.append(row(name, longest(kind), "x", 1.0))
    for made in (LambdaCgd(12, 0.6), Banded(12, 4), Buffered(12, 2, 3)):
        name = f"sensitivity: {made.name} noise, farthest found over stated"
        rows.append(row(name, farthest(made), "x", 1.0 + 1e-9))
    return rows


def audits(shared: Path) -> list[Row]:
    """Lower bounds over the accountant's epsilon, with the clip and without."""
    import jax
    import jax.numpy as jnp
    import optax

    import fedjax_llm as fl
    from fedjax_llm.audit import audit_clients, audit_examples
    from fedjax_llm.data import Record, render_all, to_batch
    from fedjax_llm.federation.objective import row_loss
    from fedjax_llm.lora import init_adapter

    model = fl.load_model(shared / "models" / "stories260K")
    text = (shared / "data" / "lm_text" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    parts = [Record(prompt="", answer=text[k : k + 120]) for k in range(0, 32 * 200, 200)]
    rendered, _ = render_all(parts, model.tokenizer, "plain", 48)
    batch = jax.tree.map(jnp.asarray, to_batch(rendered, 48, False, model.tokenizer.pad_id))
    lora = fl.LoraConfig(rank=4, alpha=8.0)
    rule = fl.FfaLora(optax.sgd(1.0))
    server = rule.init(init_adapter(model.config, lora, jax.random.key(0)))
    part = rule.trainable(server, 0)

    def loss(base: Any, part: Any, one: Any) -> Any:
        return row_loss(model, base, rule.adapter(server, part), one, jnp.float32, False)

    def of_examples(done: fl.ExamplePrivacy, claimed: fl.ExamplePrivacy, rounds: int) -> Any:
        training = fl.LocalTraining(optax.adam(1e-3), 1, 532, 32, done)
        return audit_examples(
            loss,
            model.base,
            part,
            batch,
            training,
            canaries=500,
            rounds=rounds,
            delta=1e-5,
            claimed=claimed,
        )

    honest = fl.ExamplePrivacy(0.5, 1.5)
    rows = []
    kept = of_examples(honest, honest, 2)
    wild = of_examples(fl.ExamplePrivacy(500.0, 0.0015), honest, 1)
    messages = {"b": jnp.zeros((4, 16_384))}
    settings: dict[str, Any] = {"canaries": 500, "rounds": 2, "clip_norm": 1.0, "delta": 1e-5}
    sums = audit_clients(messages, noise_multiplier=1.5, **settings)
    loose = audit_clients(messages, noise_multiplier=1.5, codec_norm=64.0, **settings)
    for what, honest_report, caught in (("example", kept, wild), ("client", sums, loose)):
        rows += [
            row(f"audit, unit {what}: accountant's epsilon", honest_report.upper_bound, ""),
            row(f"audit, unit {what}: lower bound", honest_report.lower_bound, ""),
            row(
                f"audit, unit {what}: lower bound over epsilon",
                honest_report.lower_bound / honest_report.upper_bound,
                "x",
                1.0,
            ),
            row(
                f"audit, unit {what}, no clip: lower bound over epsilon (caught above 1)",
                caught.lower_bound / caught.upper_bound,
                "x",
                1.0,
                least=True,
            ),
        ]
    return rows


def shares(shared: Path) -> list[Row]:
    """Variance of what encrypted sums open to, with 0, 1 and the most dropouts."""
    import jax
    import jax.numpy as jnp
    import optax

    import fedjax_llm as fl
    from fedjax_llm.federation.shares import mechanism_and_bits
    from fedjax_llm.models import Batch

    model = fl.load_model(shared / "models" / "stories260K")
    lora = fl.LoraConfig(rank=8, alpha=8.0, targets=("all-linear",))
    rule = fl.FfaLora(optax.sgd(1.0))
    noise, clip, count, dropouts = 1.5, 0.5, 5, 2
    tokens = np.ones((4, 16), np.int32)
    batch = Batch(tokens, np.ones((4, 16), bool), np.ones((4, 16), np.int32))
    rows = []
    for kind in (fl.SkellamShares, fl.DiscreteGaussianShares):
        for lost in (0, 1, dropouts):
            integer, _ = mechanism_and_bits(
                model.config,
                lora,
                rule,
                kind(count, dropouts),
                clip_norm=clip,
                noise_multiplier=noise,
                control=False,
                bits=None,
            )
            plan = fl.PrivacyPlan.for_clients(
                count,
                rounds=1,
                clip_norm=clip,
                noise_multiplier=noise,
                delta=1e-2,
                trust="distributed",
                integer=integer,
            )
            clouds = [
                fl.Participant(
                    fl.Cloud(f"cloud{k}", fl.Link(up_mbps=100.0, down_mbps=100.0)),
                    batch,
                    batch,
                    frozenset({1}) if k < lost else frozenset(),
                )
                for k in range(count)
            ]
            federation = fl.Federation(
                model,
                clouds,
                lora=lora,
                training=fl.LocalTraining(optax.sgd(0.0), 1, 4, 4),
                rule=rule,
                plan=plan,
                sum_mode=fl.Threshold(2, count - dropouts),
                measure_error=False,
            )
            state = federation.init()
            after, _ = federation.run_round(state)
            moved = jax.tree.map(
                jnp.subtract, after.server.adapter.factors, state.server.adapter.factors
            )
            flat = np.concatenate([np.ravel(factor.b_LxRxF) for factor in moved.values()])
            here = count - lost
            sums = flat.astype(np.float64) * here
            promised = (noise * clip) ** 2
            expected = promised * here / (count - dropouts)
            errors = (np.mean(np.square(sums)) / expected - 1) * math.sqrt(sums.size / 2)
            name = f"shares, {kind.__name__}, {lost} of {count} lost"
            rows += [
                row(
                    f"{name}: variance over what is promised",
                    float(np.mean(np.square(sums)) / promised),
                    "x",
                ),
                row(f"{name}: standard errors from what is expected", abs(float(errors)), "", 4.0),
            ]
    return rows


def everything(shared: Path) -> dict[str, Callable[[], list[Row]]]:
    """The parts by name; those that need the shared folder are there only with it."""
    parts: dict[str, Callable[[], list[Row]]] = {
        "accounting": accounting,
        "sensitivity": lambda: sensitivity(400),
    }
    if (shared / "models" / "stories260K").is_dir():
        parts |= {"audit": lambda: audits(shared), "shares": lambda: shares(shared)}
    return parts
