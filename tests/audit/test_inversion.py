"""What an observer of one message reads of a client's text, with and without protection."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm.audit.inversion import Inversion, column_space, invert
from fedjax_llm.errors import UserError
from fedjax_llm.federation.message import MessageCodec, fitting_bits
from fedjax_llm.privacy import gaussian_noise_like
from fedjax_llm.training import ExamplePrivacy, LocalTraining

PLAIN = LocalTraining(optax.sgd(1.0), 1, 1, 1)
PRIVATE = LocalTraining(optax.sgd(1.0), 1, 1, 1, ExamplePrivacy(1.0, 1.0))
CLIENTS = ("ann", "bob", "cat")


def attack(subject: Any, update: Any, **options: Any) -> Inversion:
    return invert(
        subject.model.config, subject.model.base, subject.adapter, update, longest=48, **options
    )


def codec_of(update: Any) -> MessageCodec:
    bits = fitting_bits(None, len(CLIENTS))
    return MessageCodec.for_tree(update, max_norm=1.0, bits=bits, clients=len(CLIENTS))


@pytest.mark.parametrize("sides", [("a", "b"), ("b",)])
def test_an_unprotected_message_is_the_text(
    subject: Callable, sentences: list[str], sides: tuple
) -> None:
    """Rank 32, 21 inputs: read word for word from the integers that a plain sum uploads.

    With A fixed, as in FFA-LoRA, as well: freezing half of the adapter hides nothing.
    """
    client = subject("stories15M", 32, sides)
    update = client.update(sentences[0], PLAIN)
    codec = codec_of(update)
    seen = codec.unravel(codec.decode(codec.encode(update).ints_P))
    ids = client.row(sentences[0])
    found = attack(client, seen)
    assert found.overlap(ids[:-1]) == (1.0, 1.0)
    assert list(found.tokens) == ids[:-1] and found.placed == len(ids) - 1
    text = client.model.tokenizer.decode(found.tokens, skip_special_tokens=True)
    assert text.strip() == sentences[0].removesuffix(".")


def test_a_rank_below_the_texts_length_hides_it(subject: Callable, sentences: list[str]) -> None:
    client = subject("stories15M", 8, ("b",))
    found = attack(client, client.update(sentences[0], PLAIN))
    assert found.overlap(client.row(sentences[0])) == (0.0, 0.0)


def test_clip_and_noise_leave_nothing_to_read(subject: Callable, sentences: list[str]) -> None:
    """Clip 1, noise multiplier 1; the attacker is even told how many different tokens there are.

    Guessing is the same attack on the noise alone.
    """
    client = subject("stories15M", 32)
    truth = client.row(sentences[0])[:-1]
    known = len(set(truth))
    read, guessed = [], []
    for seed in range(4):
        update = client.update(sentences[0], PRIVATE, seed)
        assert attack(client, update).overlap(truth)[1] < 0.1
        read.append(attack(client, update, known=known).overlap(truth)[1])
        noise = gaussian_noise_like(jax.random.key(seed), update, 1.0)
        guessed.append(attack(client, noise, known=known).overlap(truth)[1])
    assert np.mean(read) <= np.mean(guessed) + 0.05
    assert np.mean(read) < 0.05


def masked_words(ints_P: np.ndarray, max_abs: int) -> np.ndarray:
    """What the server of a masked sum can read of one client's upload, as signed integers."""
    from fedjax_llm.secure.masked import MaskedSum
    from fedjax_llm.secure.masked_layout import Layout, add_packed
    from fedjax_llm.secure.wire import MAC_BYTES

    hidden = MaskedSum(CLIENTS, ints_P.size, max_abs, len(CLIENTS), minimum_clients=3)
    hidden.begin(1)
    layout = Layout(ints_P.size, max_abs, len(CLIENTS))
    chunks = list(hidden.upload("ann", 1, ints_P))
    read = []
    for chunk, (data, size) in enumerate(zip(chunks, layout.payload_bytes, strict=True)):
        payload = memoryview(data)[len(data) - MAC_BYTES - size : len(data) - MAC_BYTES]
        words = np.zeros(layout.elements(chunk), layout.word)
        add_packed(words, payload, layout.bits)
        unused = 8 * words.itemsize - layout.bits
        read.append((words[1:] << words.dtype.type(unused)).view("<i4") >> unused)
    return np.concatenate(read)


def test_a_masked_message_is_noise(subject: Callable, sentences: list[str]) -> None:
    """The attack on the words of one client's upload, as they cross the wire."""
    client = subject("stories15M", 32)
    update = client.update(sentences[0], PLAIN)
    codec = codec_of(update)
    ints_P = np.asarray(codec.encode(update).ints_P)
    words_P = masked_words(ints_P, codec.fixed_point.max_int)
    assert abs(np.corrcoef(words_P, ints_P)[0, 1]) < 0.02
    seen = codec.unravel(codec.decode(jnp.asarray(words_P, jnp.int32)))
    truth = client.row(sentences[0])[:-1]
    assert attack(client, seen).overlap(truth)[1] < 0.1
    assert attack(client, seen, known=len(set(truth))).overlap(truth)[1] < 0.1


def test_a_sum_hides_whose_text_it_is_and_not_always_the_text(
    subject: Callable, sentences: list[str]
) -> None:
    """What encryption opens is the sum: spans add up, and short texts are read from it together."""
    client = subject("stories15M", 32)
    short = [text for text in sentences if len(client.row(text)) == 11][:2]
    updates = [client.update(text, PLAIN) for text in short]
    total = jax.tree.map(jnp.add, *updates)
    together = {token for text in short for token in client.row(text)[:-1]}
    assert len(together) < 28
    assert attack(client, total).overlap(sorted(together))[1] > 0.9

    long = [" ".join(sentences[:7]), " ".join(sentences[7:14])]
    total = jax.tree.map(jnp.add, *[client.update(text, PLAIN, longest=64) for text in long])
    together = {token for text in long for token in client.row(text, 64)[:-1]}
    assert len(together) > 64
    assert attack(client, total).overlap(sorted(together))[1] < 0.1


def test_an_update_of_other_projections_is_refused(subject: Callable) -> None:
    client = subject("stories260K", 2, targets=("o_proj",))
    with pytest.raises(UserError, match="q_proj, k_proj, v_proj, got o_proj"):
        attack(client, client.part)


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_the_column_space_is_cut_where_rounding_begins(rank: int) -> None:
    draw = np.random.default_rng(0)
    low = draw.normal(size=(40, rank)) * 10.0 ** -np.arange(rank)
    matrix = low @ draw.normal(size=(rank, 12))
    basis = column_space(matrix + 1e-9 * draw.normal(size=matrix.shape) * (rank > 0))
    assert basis.shape == (40, rank)
    np.testing.assert_allclose(basis @ (basis.T @ low), low, atol=1e-6)


def test_a_full_matrix_has_no_cut() -> None:
    assert column_space(np.random.default_rng(0).normal(size=(40, 12))).shape == (40, 12)
