"""The README's guide to adding a rule: its code runs, and the rule keeps its promises."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax

from fedjax_llm import aggregation
from fedjax_llm.aggregation import AggregationRule, LocalResult, Round
from fedjax_llm.aggregation.part import zip_with
from fedjax_llm.lora import Adapter, LowRank

README = Path(aggregation.__file__).parent / "README.md"


def guided() -> AggregationRule:
    [code] = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    [name] = re.findall(r"^class (\w+)", code, re.MULTILINE)
    namespace: dict[str, type[AggregationRule]] = {}
    exec(compile(code, "README.md", "exec"), namespace)
    return namespace[name](optax.sgd(1.0))


def test_the_rule_of_the_guide_is_exact_in_all_its_phases() -> None:
    rule, draw = guided(), np.random.default_rng(0)

    def drawn(*shape: int) -> jnp.ndarray:
        return jnp.asarray(draw.normal(size=shape), jnp.float32)

    server = rule.init(Adapter({"q_proj": LowRank(drawn(2, 9, 3), drawn(2, 3, 8))}, 2.0))
    trained = set()
    for number in range(1, 4):
        round_ = Round(server, rule.phase(number), jnp.int32(number), jnp.zeros(()))
        start = rule.start(round_, jnp.int32(3))
        ends = [zip_with(lambda leaf: leaf + drawn(*leaf.shape), start) for _ in range(3)]
        results = [LocalResult(start, end, jnp.int32(3)) for end in ends]
        sent = [rule.message(round_, result, 0, ()) for result in results]
        mean = zip_with(lambda *leaves: sum(leaves[1:], leaves[0]) / 3, *sent)
        products = [
            np.asarray(a) @ np.asarray(b)
            for a, b in (rule.adapter(server, end).factors["q_proj"] for end in ends)
        ]
        server = rule.apply(round_, mean)
        a, b = server.adapter.factors["q_proj"]
        np.testing.assert_allclose(np.asarray(a) @ np.asarray(b), np.mean(products, 0), atol=1e-5)
        trained |= {side for sides in mean.values() for side in sides}
    assert trained == {"a", "b"}
