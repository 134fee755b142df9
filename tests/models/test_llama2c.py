"""llama2.c's tokenizer against a plain-Python version of its own greedy algorithm."""

import itertools
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.errors import UserError
from fedjax_llm.models import llama2c
from fedjax_llm.models.tokenizer import Tokenizer, build_tokenizer, load_tokenizer

TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    "  two  spaces, a tab\tand\nlines\n\n",
    "héllo wörld, naïve café – “quotes” … 1234567890",
    "日本語テキスト и немного русского",
    "emoji 🙂👩‍👩‍👧 and a zero byte \x00 and ▁ itself",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa bbbbbbbbb abababababab",
    "x",
    " ",
    "",
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def greedy(pieces: list[str], scores: list[float], text: str) -> list[int]:
    """llama2.c's `encode`: single characters, then always the merge of the highest score."""
    lookup = {piece: index for index, piece in enumerate(pieces)}
    tokens: list[int] = []
    for character in " " + text if text else "":
        if character in lookup:
            tokens.append(lookup[character])
        else:
            tokens += [byte + llama2c.FIRST_BYTE_ID for byte in character.encode()]
    while True:
        best, at, score = -1, -1, -1e10
        for i, (left, right) in enumerate(itertools.pairwise(tokens)):
            merged = lookup.get(pieces[left] + pieces[right])
            if merged is not None and scores[merged] > score:
                best, at, score = merged, i, scores[merged]
        if at < 0:
            return tokens
        tokens[at : at + 2] = [best]


def write(path: Path, pieces: list[bytes], scores: list[float], longest: int = 16) -> Path:
    body = b"".join(struct.pack("<fi", s, len(p)) + p for p, s in zip(pieces, scores, strict=True))
    path.write_bytes(struct.pack("<i", longest) + body)
    return path


def small_vocabulary() -> tuple[list[bytes], list[float]]:
    """Controls, bytes, the letters a, b and the space, and some of their joins."""
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % i for i in range(256))]
    joins = [b"ab", b"ba", b" a", b"aa", b"aba", b" ab", b"abab", b"bb"]
    pieces += [*joins, b"a", b"b", b" "]
    scores = [0.0] * 259 + [-float(i) for i in range(len(joins) + 3)]
    return pieces, scores


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tokenizer]:
    path = write(tmp_path_factory.mktemp("small") / "tokenizer.bin", *small_vocabulary())
    return path, build_tokenizer(llama2c.tokenizer_json(path), SPECIAL)


@given(text=st.text(alphabet="ab é", max_size=40))
@settings(max_examples=300, deadline=None)
def test_a_made_up_vocabulary_encodes_as_the_greedy_oracle(
    small: tuple[Path, Tokenizer], text: str
) -> None:
    path, tokenizer = small
    ids = tokenizer.encode(text)
    assert ids == greedy(*llama2c.read_pieces(path), text)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("folder", "name"), [("stories260K", "tok512.bin"), ("stories15M", "tokenizer.bin")]
)
def test_real_vocabularies_encode_as_the_greedy_oracle(
    shared: Path, folder: str, name: str
) -> None:
    path = shared / "models" / folder
    tokenizer = load_tokenizer(path)
    pieces, scores = llama2c.read_pieces(path / name)
    assert tokenizer.vocab_size == len(pieces)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == greedy(pieces, scores, text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text, add_special_tokens=True) == [tokenizer.bos_id, *ids]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def _fields(data: bytes) -> list[tuple[int, bytes]]:
    """(number, payload) of the fields of one protocol buffer message."""
    found, at = [], 0
    while at < len(data):
        key, at = _varint(data, at)
        begin = at
        if key & 7 == 2:
            length, begin = _varint(data, at)
            at = begin + length
        elif key & 7 == 5:
            at += 4
        else:
            _, at = _varint(data, at)
        found.append((key >> 3, data[begin:at]))
    return found


def test_the_binary_of_stories15m_holds_the_pieces_of_the_sentencepiece_model(shared: Path) -> None:
    model = (shared / "models" / "tokenizers" / "llama32k_tokenizer.model").read_bytes()
    expected = []
    for number, payload in _fields(model):
        if number == 1:  # ModelProto.pieces: 1 is the text, 2 the score
            parts = dict(_fields(payload))
            score = struct.unpack("<f", parts[2])[0] if 2 in parts else 0.0
            expected.append((parts[1].decode().replace("▁", " "), score))
    found = llama2c.read_pieces(shared / "models" / "stories15M" / "tokenizer.bin")
    assert list(zip(*found, strict=True))[3:] == expected[3:]
    assert len(expected) == 32000


def test_the_reference_model_writes_a_story(shared: Path) -> None:
    np = pytest.importorskip("numpy")
    reference = np.load(shared / "reference" / "stories15M-transformers.npz")
    text = load_tokenizer(shared / "models" / "stories15M").decode(
        reference["greedy_from_bos"].ravel(), skip_special_tokens=True
    )
    assert text.startswith("Once upon a time, there was a little girl named Lily.")


@pytest.mark.parametrize("keep", [0, 3, 4, 9, 200, -1, -9])
def test_a_truncated_file_is_one_line(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "tokenizer.bin", *small_vocabulary())
    path.write_bytes(path.read_bytes()[:keep])
    size = len(small_vocabulary()[0])
    with pytest.raises(UserError, match=r"truncated|holds \d+ pieces") as caught:
        llama2c.read_pieces(path, size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda p, s: ([*p[:-1], b"\xff"], s, 16),
        lambda p, s: (p, [*s[:-1], float("nan")], 16),
        lambda p, s: (p, s, -5),
        lambda p, s: ([*p[:-1], b"ab"], s, 16),
    ],
    ids=["not utf-8", "nan score", "negative length", "piece twice"],
)
def test_an_invalid_file_is_one_line(tmp_path: Path, change) -> None:  # type: ignore[no-untyped-def]
    pieces, scores, longest = change(*small_vocabulary())
    path = write(tmp_path / "tokenizer.bin", pieces, scores, longest)
    with pytest.raises(UserError) as caught:
        llama2c.tokenizer_json(path)
    assert "\n" not in str(caught.value)


def test_a_file_of_another_vocabulary_size_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "tokenizer.bin", *small_vocabulary())
    with pytest.raises(UserError, match="the model's vocabulary 512"):
        llama2c.tokenizer_json(path, 512)
