"""Logits, likelihoods and greedy text against Hugging Face transformers and PEFT."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.lora import merge, read_peft
from fedjax_llm.models import Batch, Model, apply, generate, load_model, target_nll

pytestmark = pytest.mark.optimised

logits_of = partial(jax.jit, static_argnums=0)(apply)


@pytest.fixture(scope="module", params=["stories260K", "stories15M"])
def story(
    request: pytest.FixtureRequest, shared: Path
) -> tuple[Model, dict[str, np.ndarray], Path]:
    name = request.param
    with np.load(shared / "reference" / f"{name}-transformers.npz", allow_pickle=False) as file:
        reference = dict(file)
    adapter = shared / "reference" / f"{name}-peft-adapter"
    return load_model(shared / "models" / name), reference, adapter


def test_logits(story):
    model, reference, _ = story
    logits = logits_of(model.config, model.base, None, reference["tokens"])
    np.testing.assert_allclose(logits[..., :256], reference["logits_first256"], rtol=0, atol=2e-4)


def test_log_likelihood_through_the_chunked_loss(story):
    model, reference, _ = story
    tokens = jnp.asarray(reference["tokens"])
    batch = Batch(tokens, jnp.ones_like(tokens, bool), jnp.ones_like(tokens))
    nll, counted = target_nll(model.config, model.base, None, batch)
    assert counted.all()
    np.testing.assert_allclose(-nll, reference["next_token_logprob"], rtol=0, atol=2e-4)


def test_greedy_tokens(story):
    model, reference, _ = story
    (expected,) = reference["greedy_from_bos"].tolist()
    assert generate(model, None, expected[:1], len(expected) - 1) == expected[1:]


def test_logits_with_a_peft_adapter(story):
    model, reference, folder = story
    adapter = read_peft(folder, model.config)
    for base, added in ((model.base, adapter), (merge(model.base, adapter), None)):
        logits = logits_of(model.config, base, added, reference["tokens"])
        np.testing.assert_allclose(
            logits[..., :256], reference["peft_logits_first256"], rtol=0, atol=2e-4
        )


@pytest.fixture(scope="module")
def chat_model(smollm2: Path, shared: Path) -> tuple[Model, dict, dict[str, np.ndarray]]:
    name = shared / "reference" / "smollm2-135m-transformers"
    with np.load(name.with_suffix(".npz"), allow_pickle=False) as file:
        arrays = dict(file)
    return load_model(smollm2), json.loads(name.with_suffix(".json").read_text("utf-8")), arrays


@pytest.mark.slow
@pytest.mark.parametrize("case", range(3))
def test_smollm2(chat_model, case):
    model, reference, arrays = chat_model
    ids = reference["token_ids"][case]
    logits = logits_of(model.config, model.base, None, jnp.asarray([ids], jnp.int32))[0]
    np.testing.assert_allclose(
        logits[:, :256], arrays[f"logits_first256_{case}"], rtol=0, atol=2e-3
    )
    logprob = np.asarray(jax.nn.log_softmax(logits[:-1]))
    nll = -logprob[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(nll, arrays[f"nll_{case}"], rtol=0, atol=2e-3)
    expected = reference["greedy"][case]
    text = reference["texts"][case]
    count = len(model.tokenizer.encode(expected)) - len(ids)
    got = generate(model, None, ids, count)
    assert text + model.tokenizer.decode(got) == expected
