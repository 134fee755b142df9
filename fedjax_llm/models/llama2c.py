"""Score-ranked BPE (llama2.c's binary tokenizer, SentencePiece's vocabularies) as Hugging Face BPE.

Both give every piece a score and no list of merges. Encoding starts from single characters
(characters outside the vocabulary become their UTF-8 bytes) and keeps merging the adjacent pair
whose concatenation is the piece of the highest score. The same result comes from a merge list that
holds every way to split every piece in two, ordered by the score of the piece.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedjax_llm.errors import UserError

UNKNOWN, BOS, EOS = "<unk>", "<s>", "</s>"
UNKNOWN_ID, BOS_ID, EOS_ID = 0, 1, 2
FIRST_BYTE_ID = 3
# Real files hold at most 64 or so; a larger number is not a tokenizer.
_LONGEST_PIECE = 4096


def merges_from_scores(
    scores: Mapping[str, float], alphabet: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Every pair of pieces that joins into a piece, best first.

    Args:
        scores: the pieces that merging may produce, with their scores.
        alphabet: every piece that may be a half, with its id; among splits of one piece the halves
            with the lower ids come first.
    """
    ranked: list[tuple[float, int, int, str, str]] = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in alphabet and right in alphabet:
                ranked.append((-score, alphabet[left], alphabet[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def score_bpe_json(
    pieces: Sequence[str],
    scores: Sequence[float],
    *,
    mergeable: Sequence[bool],
    special: Mapping[str, int],
    plain_added: Mapping[str, int] | None = None,
    space: str,
    add_space_prefix: bool,
    add_bos: bool,
    unknown: str = UNKNOWN,
    bos: str = BOS,
) -> str:
    """The `tokenizer.json` of a score-ranked vocabulary with byte fallback.

    Args:
        pieces: text of every piece, by id.
        scores: score of every piece, by id; the higher, the earlier it is merged.
        mergeable: whether merging may use and produce the piece (not for bytes and controls).
        special: control pieces, recognised in the text and skipped on request when decoding.
        plain_added: pieces recognised in the text before any merging, but not controls.
        space: how the vocabulary writes a space: " " or SentencePiece's "▁".
        add_space_prefix: begin every text with a space, as SentencePiece does.
        add_bos: `add_special_tokens=True` puts `bos` in front.
        unknown: the unknown piece.
        bos: the piece that begins a sequence.
    """
    vocab = {piece: index for index, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        twice = next(p for i, p in enumerate(pieces) if vocab[p] != i)
        raise UserError(f"tokenizer holds the piece {twice!r} twice; export the tokenizer again")
    alphabet = {p: i for p, i in vocab.items() if mergeable[i]}
    merges = merges_from_scores({p: scores[i] for p, i in alphabet.items()}, alphabet)
    normalizers: list[dict[str, object]] = []
    if add_space_prefix:
        normalizers.append({"type": "Prepend", "prepend": space})
    decoders: list[dict[str, object]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if space != " ":
        normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": space})
        decoders.insert(0, {"type": "Replace", "pattern": {"String": space}, "content": " "})
    if add_space_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    added = [(text, index, True) for text, index in special.items()]
    added += [(text, index, False) for text, index in (plain_added or {}).items()]
    bos_piece = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": index,
                    "content": text,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": is_special,
                }
                for text, index, is_special in sorted(added, key=lambda item: item[1])
            ],
            "normalizer": (
                {"type": "Sequence", "normalizers": normalizers} if normalizers else None
            ),
            "pre_tokenizer": None,
            "post_processor": (
                {
                    "type": "TemplateProcessing",
                    "single": [bos_piece, first],
                    "pair": [bos_piece, first, bos_piece, second],
                    "special_tokens": {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}},
                }
                if add_bos
                else None
            ),
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": unknown,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "ignore_merges": False,
                "vocab": vocab,
                "merges": merges,
            },
        },
        ensure_ascii=False,
    )


def read_pieces(path: Path, vocab_size: int | None = None) -> tuple[list[str], list[float]]:
    """Reads llama2.c's binary: int32 longest piece; per piece float32 score, int32 length, bytes.

    Args:
        path: `tokenizer.bin` or `tok512.bin`; all integers little-endian.
        vocab_size: the number of pieces that the model expects, when known.

    Raises:
        UserError: truncated, not such a file, or not of the expected size.
    """
    cure = "fetch the file again, or export it with llama2.c's tokenizer.py"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read tokenizer {path}: {error.strerror}; {cure}") from error
    if len(data) < 4:
        raise UserError(f"tokenizer {path} is truncated: {len(data)} bytes; {cure}")
    longest = struct.unpack_from("<i", data)[0]
    if not 1 <= longest <= _LONGEST_PIECE:
        raise UserError(f"{path} is not a llama2.c tokenizer (longest piece {longest}); {cure}")
    pieces: list[str] = []
    scores: list[float] = []
    at = 4
    while at < len(data):
        if at + 8 > len(data):
            raise UserError(f"tokenizer {path} is truncated in piece {len(pieces)}; {cure}")
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        # NaN fails both comparisons, and a NaN score would make the order of merges arbitrary.
        if not (0 <= length <= _LONGEST_PIECE and -1e30 < score < 1e30):
            raise UserError(f"{path} is not a llama2.c tokenizer (piece {len(pieces)}); {cure}")
        if at + length > len(data):
            raise UserError(f"tokenizer {path} is truncated in piece {len(pieces)}; {cure}")
        try:
            pieces.append(data[at : at + length].decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: piece {len(pieces)} is not UTF-8; {cure}") from error
        scores.append(score)
        at += length
    if len(pieces) < FIRST_BYTE_ID + 256:
        raise UserError(
            f"tokenizer {path} is truncated: {len(pieces)} pieces, at least "
            f"{FIRST_BYTE_ID + 256} are needed; {cure}"
        )
    if vocab_size is not None and len(pieces) != vocab_size:
        raise UserError(
            f"tokenizer {path} holds {len(pieces)} pieces, the model's vocabulary {vocab_size}; "
            f"{cure}"
        )
    return pieces, scores


def tokenizer_json(path: Path, vocab_size: int | None = None) -> str:
    """The `tokenizer.json` that encodes as llama2.c does with this binary.

    The exporter wrote spaces for SentencePiece's "▁" and "\\n<s>\\n" for `<s>`. Spaces stay (so
    that every text survives encoding and decoding); the two controls get their names back.

    Args and errors: see `read_pieces`.
    """
    pieces, scores = read_pieces(path, vocab_size)
    pieces[:FIRST_BYTE_ID] = [UNKNOWN, BOS, EOS]
    pieces[FIRST_BYTE_ID : FIRST_BYTE_ID + 256] = [f"<0x{byte:02X}>" for byte in range(256)]
    mergeable = [index >= FIRST_BYTE_ID + 256 for index in range(len(pieces))]
    return score_bpe_json(
        pieces,
        scores,
        mergeable=mergeable,
        special={UNKNOWN: UNKNOWN_ID, BOS: BOS_ID, EOS: EOS_ID},
        space=" ",
        add_space_prefix=True,
        add_bos=True,
    )
