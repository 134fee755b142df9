"""Tokenizers: parity with other people's ids, stable identity, clear errors."""

import json
from pathlib import Path

import pytest
import tokenizers

from fedjax_llm.errors import UserError
from fedjax_llm.models.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "The year 2024: 1,234.56 + 0007 = ٣٤٥ ½",
    "  leading, trailing  \n\n\t tabs\r\n and   runs ",
    "naïve café — “quotes”… 日本語 и русский 🙂👩‍👩‍👧",
    "it's we'll I'D don't x=y*z; // code\ndef f(a):\n    return a",
    "<|im_start|>user\nhello<|im_end|>\n<file_sep><repo_name>",
    "",
]
MESSAGES = [
    {"role": "user", "content": "What are the symptoms of asthma?"},
    {"role": "assistant", "content": "Wheezing."},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a word tokenizer, a template, and special tokens in both notations."""
    vocab = {"[UNK]": 0, "<s>": 1, "</s>": 2, "hello": 3, "world": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "chat_template": "{{ messages[0].content }}{{ eos_token }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    special = {"eos_token": {"content": "</s>", "lstrip": False}, "pad_token": None}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    return tmp_path


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_smollm2_gives_the_ids_and_the_chat_text_of_transformers(
    smollm2: Path, shared: Path
) -> None:
    reference = json.loads((shared / "reference" / "smollm2-135m-transformers.json").read_text())
    tokenizer = load_tokenizer(smollm2)
    for text, ids in zip(reference["texts"], reference["token_ids"], strict=True):
        assert tokenizer.encode(text) == ids
    rendered = tokenizer.render_chat(MESSAGES)
    assert rendered == reference["chat_template_render"]
    assert tokenizer.encode(rendered) == reference["chat_ids"]
    prompt = tokenizer.render_chat(MESSAGES[:1], add_generation_prompt=True)
    assert rendered.startswith(prompt) and prompt.endswith("<|im_start|>assistant\n")


def test_smollm2_encodes_as_the_reference_tokenizer(smollm2: Path, shared: Path) -> None:
    path = shared / "models" / "tokenizers" / "smollm2_tokenizer.json"
    oracle = tokenizers.Tokenizer.from_file(str(path))
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer.vocab_size == 49152
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == oracle.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text


def test_smollm2_offsets_cover_the_text(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    for text in TEXTS:
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert ids == tokenizer.encode(text)
        end = 0
        for start, stop in offsets:
            # The bytes of one character may be several tokens, which then share its offsets.
            assert start <= end <= stop
            end = stop
        assert end == len(text)


def test_offsets_are_characters_of_the_text_with_an_added_space(stories260k: Path) -> None:
    text = "Once upon é 🙂 time"
    _, offsets = load_tokenizer(stories260k).encode_with_offsets(text)
    assert offsets[0][0] == 0 and offsets[-1][1] == len(text)
    assert {i for start, stop in offsets for i in range(start, stop)} == set(range(len(text)))


def test_special_tokens_as_text_or_object(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert tokenizer.encode("hello world") == [3, 4]
    assert tokenizer.render_chat(MESSAGES).endswith("</s>")


def test_end_token_from_the_models_config_where_no_name_is_given(folder: Path) -> None:
    (folder / "special_tokens_map.json").unlink()
    with pytest.raises(UserError, match="no end token"):
        load_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [2, 4]}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_id == 2 and tokenizer.special_tokens["eos_token"] == "</s>"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ([{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}], "d"),
        ([{"name": "only", "template": "o"}], "o"),
        ("s", "s"),
    ],
)
def test_named_templates(folder: Path, template: object, text: str) -> None:
    change(folder / "tokenizer_config.json", chat_template=template)
    assert load_tokenizer(folder).render_chat(MESSAGES) == text


def test_a_template_file_wins_over_the_config_and_survives_saving(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "chat_template.jinja").write_text("from file")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.render_chat(MESSAGES) == "from file"
    tokenizer.save(folder)
    assert load_tokenizer(folder) == tokenizer


@pytest.mark.parametrize("source", ["folder", "stories260k"])
def test_saving_and_loading_keeps_identity(
    source: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(source))
    tokenizer.save(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert copy == tokenizer and hash(copy) == hash(tokenizer)
    assert copy.encode("hello world") == tokenizer.encode("hello world")
    assert (copy.bos_id, copy.eos_id, copy.pad_id) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
    )
    assert not list((tmp_path / "copy").glob(".*"))


def _other_template(folder: Path) -> None:
    change(folder / "tokenizer_config.json", chat_template="other")


def _other_end(folder: Path) -> None:
    change(folder / "tokenizer_config.json", eos_token="world")


def _other_vocabulary(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("hello", "hallo"))


@pytest.mark.parametrize("edit", [_other_template, _other_end, _other_vocabulary])
def test_whatever_decides_ids_changes_the_hash(folder: Path, edit) -> None:  # type: ignore[no-untyped-def]
    before: Tokenizer = load_tokenizer(folder)
    assert load_tokenizer(folder).sha256 == before.sha256
    edit(folder)
    assert load_tokenizer(folder).sha256 != before.sha256


def test_stored_truncation_and_padding_are_not_applied(folder: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).encode("hello world hello") == [3, 4, 3]


def _cut(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer in"),
        (_cut, "not a valid tokenizer"),
        (lambda f: (f / "tokenizer.json").write_bytes(b"\xff\xfe"), "not UTF-8"),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "tokenizer_config.json").write_text("[]"), "must hold a JSON object"),
        (lambda f: change(f / "tokenizer_config.json", eos_token="<gone>"), "no token '<gone>'"),
        (lambda f: change(f / "tokenizer_config.json", chat_template=[1]), "is a list without"),
        (lambda f: change(f / "tokenizer_config.json", chat_template=1), "is not text"),
        (
            lambda f: change(
                f / "tokenizer_config.json",
                chat_template=[{"name": n, "template": n} for n in "ab"],
            ),
            "no template named 'default'",
        ),
    ],
)
def test_damage_is_one_line(folder: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_no_template_and_half_a_surrogate_pair_are_one_line(stories260k: Path) -> None:
    tokenizer = load_tokenizer(stories260k)
    assert not tokenizer.has_chat_template
    with pytest.raises(UserError, match="no chat template"):
        tokenizer.render_chat(MESSAGES)
    with pytest.raises(UserError, match="character 3 is half of a surrogate pair"):
        tokenizer.encode("abc\ud800")
