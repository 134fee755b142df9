"""The public stream is ChaCha20 at any position; the secret one never repeats."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedjax_llm.secure.streams import PublicStream, SecretWords

SEED, EPOCH = bytes(range(32)), bytes(16)


def test_the_public_stream_is_chacha20_and_seekable():
    stream = PublicStream(SEED, EPOCH, 7)
    key = stream.key_words.astype("<u4").tobytes()
    start = b"".join(word.to_bytes(4, "little") for word in (0, 1, 2, 3))
    cipher = Cipher(algorithms.ChaCha20(key, start), mode=None)
    whole = cipher.encryptor().update(bytes(64 * 40_000))
    assert bytes(stream((1, 2, 3), 0, 40_000)) == whole
    assert bytes(stream((1, 2, 3), 1234, 5)) == whole[64 * 1234 : 64 * 1239]
    assert bytes(stream((1, 2, 4), 0, 5)) != whole[:320]


def test_seed_epoch_and_round_each_change_the_public_stream():
    streams = [
        PublicStream(SEED, EPOCH, 7),
        PublicStream(SEED[::-1], EPOCH, 7),
        PublicStream(SEED, EPOCH[:-1] + b"\1", 7),
        PublicStream(SEED, EPOCH, 8),
    ]
    assert len({bytes(stream((0, 0, 0), 0, 1)) for stream in streams}) == len(streams)
    assert bytes(PublicStream(SEED, EPOCH, 7)((0, 0, 0), 0, 1)) == bytes(
        streams[0]((0, 0, 0), 0, 1)
    )


@pytest.mark.parametrize(("first", "blocks"), [(-1, 1), (2**32, 1), (2**32 - 1, 2)])
def test_the_counter_of_the_public_stream_does_not_wrap(first, blocks):
    with pytest.raises(ValueError, match="2\\^32 blocks"):
        PublicStream(SEED, EPOCH, 0)((0, 0, 0), first, blocks)


def test_secret_words_are_one_aes_stream_under_a_fresh_key():
    asked = []

    def random(size):
        asked.append(size)
        return bytes(range(size))

    words = SecretWords(random)
    drawn = np.concatenate([words.draw(3, 5).reshape(-1), words.draw(600_000)])
    cipher = Cipher(algorithms.AES(bytes(range(32))), modes.CTR(bytes(16))).encryptor()
    assert drawn.astype("<u4").tobytes() == cipher.update(bytes(4 * drawn.size))
    assert asked == [32]
    assert not np.array_equal(SecretWords().draw(8), SecretWords().draw(8))
