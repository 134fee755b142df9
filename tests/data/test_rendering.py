"""The loss falls on the answer and the end of the turn, whatever the texts are."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fedjax_llm.data import Record, Rendered, prompt_text, render, render_all
from fedjax_llm.errors import UserError
from fedjax_llm.models.tokenizer import Tokenizer

FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
# No "<": a text that spells out a special token is encoded as that token.
TEXT = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="<"), min_size=1, max_size=30
).map(str.strip).filter(bool)  # fmt: skip
WORDS = st.lists(st.sampled_from(["yes", "no", "cough", "a"]), min_size=1, max_size=6).map(" ".join)
RECORDS = st.builds(
    Record, prompt=TEXT | WORDS, answer=TEXT | WORDS, context=st.just("") | TEXT | WORDS
)
QWEN3_LIKE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{{ '(think)\n\n(/think)\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2_LIKE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' <|im_end|>' }}{% endif %}{% endfor %}"
)
ENDLESS = "{% for m in messages %}{{ ' ' if not loop.first }}{{ m.content }}{% endfor %}"


def targets(example: Rendered, tokenizer: Tokenizer) -> str:
    ids = [i for i, target in zip(example.tokens, example.loss_mask, strict=True) if target]
    return tokenizer.decode(ids)


@FIXTURE
@given(record=RECORDS, system=st.none() | WORDS)
def test_chat_targets_decode_to_the_answer_and_the_end_token(
    chat_tokenizer: Tokenizer, record: Record, system: str | None
) -> None:
    example = render(record, chat_tokenizer, "chat", 10_000, system)
    assert targets(example, chat_tokenizer) == record.answer + "<|im_end|>"
    assert example.tokens[-1] == chat_tokenizer.eos_id and example.loss_mask[-1]
    assert example.cut == "nothing"
    prompt = prompt_text(record, chat_tokenizer, "chat", system)
    assert chat_tokenizer.decode(example.tokens) == prompt + record.answer + "<|im_end|>"


@FIXTURE
@given(record=RECORDS)
def test_plain_targets_decode_to_the_answer_and_the_end_token(
    plain_tokenizer: Tokenizer, record: Record
) -> None:
    example = render(record, plain_tokenizer, "plain", 10_000)
    assert targets(example, plain_tokenizer) == record.answer + "<|im_end|>"
    parts = [part for part in (record.context, record.prompt, record.answer) if part]
    assert plain_tokenizer.decode(example.tokens) == "\n".join(parts) + "<|im_end|>"


@pytest.mark.parametrize("template", [QWEN3_LIKE, LLAMA2_LIKE, ENDLESS])
@FIXTURE
@given(record=RECORDS.filter(lambda r: r.answer.isascii()))
def test_other_templates_keep_their_own_text_out_of_the_loss(
    chat_tokenizer: Tokenizer, record: Record, template: str
) -> None:
    tokenizer = dataclasses.replace(chat_tokenizer, chat_template=template)
    text = targets(render(record, tokenizer, "chat", 10_000), tokenizer)
    assert text.removesuffix("<|im_end|>").strip() == record.answer
    assert text.endswith("<|im_end|>")


def test_a_token_that_straddles_the_start_is_a_target(chat_tokenizer: Tokenizer) -> None:
    # The space and the answer's first letters form one token in a byte-level vocabulary.
    tokenizer = dataclasses.replace(chat_tokenizer, chat_template=LLAMA2_LIKE)
    example = render(Record("[/INST] cough", "cough"), tokenizer, "chat", 100)
    assert targets(example, tokenizer) == " cough <|im_end|>"


def test_a_template_that_changes_the_answer_is_refused(chat_tokenizer: Tokenizer) -> None:
    upper = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    tokenizer = dataclasses.replace(chat_tokenizer, chat_template=upper)
    with pytest.raises(UserError, match="does not print the answer 'cough' as it is"):
        render(Record("what", "cough"), tokenizer)


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_plain_text_counts_all_but_the_first_token(
    chat_tokenizer: Tokenizer, template: str
) -> None:
    example = render(Record("", "cough and wheezing"), chat_tokenizer, template)
    assert chat_tokenizer.decode(example.tokens) == "cough and wheezing<|im_end|>"
    assert example.loss_mask == [False, *[True] * (len(example.tokens) - 1)]


@FIXTURE
@given(record=RECORDS, max_length=st.integers(2, 90), template=st.sampled_from(["chat", "plain"]))
def test_what_does_not_fit_is_cut_in_the_stated_order(
    chat_tokenizer: Tokenizer, record: Record, max_length: int, template: str
) -> None:
    whole = render(record, chat_tokenizer, template, 10_000)
    example = render(record, chat_tokenizer, template, max_length)
    assert len(example.tokens) == len(example.loss_mask) <= max_length
    assert (example.cut == "nothing") == (len(whole.tokens) <= max_length)
    text = targets(example, chat_tokenizer)
    if example.cut == "context":
        assert text == record.answer + "<|im_end|>"
        assert record.prompt in chat_tokenizer.decode(example.tokens)
    elif example.cut == "answer":
        # A cut may fall inside a character, whose bytes then decode to the replacement character.
        assert text and (record.answer + "<|im_end|>").startswith(text.rstrip("\ufffd"))
        bare = render(dataclasses.replace(record, context=""), chat_tokenizer, template, 10_000)
        assert len(bare.tokens) > max_length
    elif example.cut == "all":
        assert not any(example.loss_mask)


def test_dropped_and_cut_examples_are_counted(chat_tokenizer: Tokenizer) -> None:
    records = [
        Record("what", "cough"),
        Record("what", "cough", context="wheezing " * 50),
        Record("what", "cough " * 50),
        Record("what " * 50, "cough"),
    ]
    system = "Answer briefly."
    kept, report = render_all(records, chat_tokenizer, "chat", 60, system)
    assert [example.cut for example in kept] == ["nothing", "context", "answer"]
    assert (report.records, report.kept, report.lost) == (4, 3, 1)
    assert (report.context_cut, report.answer_cut) == (1, 1)


def test_bad_arguments_name_the_cure(plain_tokenizer: Tokenizer) -> None:
    record = Record("what", "cough")
    with pytest.raises(UserError, match="template must be one of chat, plain, got 'alpaca'"):
        render(record, plain_tokenizer, "alpaca")
    with pytest.raises(UserError, match="set template = 'plain'"):
        render(record, plain_tokenizer, "chat")
    with pytest.raises(UserError, match="max_length must be at least 2"):
        render(record, plain_tokenizer, "plain", 1)


@FIXTURE
@given(words=WORDS)
def test_llama_texts_begin_with_the_begin_token(llama_tokenizer: Tokenizer, words: str) -> None:
    example = render(Record("the cat", words), llama_tokenizer, "plain", 1000)
    assert example.tokens[0] == llama_tokenizer.bos_id
    assert example.tokens[-1] == llama_tokenizer.eos_id
    assert not example.loss_mask[0]
    ids = [i for i, t in zip(example.tokens[:-1], example.loss_mask[:-1], strict=True) if t]
    assert llama_tokenizer.decode(ids) == words


def test_smollm2_chat_has_the_reference_ids(shared: Path, smollm2_tokenizer: Tokenizer) -> None:
    reference = json.loads((shared / "reference" / "smollm2-135m-transformers.json").read_text())
    example = render(Record("What are the symptoms of asthma?", "Wheezing."), smollm2_tokenizer)
    # The reference ends with the line end after the marker, which is not part of the example.
    assert example.tokens == reference["chat_ids"][:-1]
    assert targets(example, smollm2_tokenizer) == "Wheezing.<|im_end|>"


def test_smollm2_targets_are_the_answer(smollm2_tokenizer: Tokenizer) -> None:
    # The tokenizer is not an argument: hypothesis would print its two megabytes.
    @settings(deadline=None)
    @given(record=RECORDS)
    def check(record: Record) -> None:
        # Its vocabulary lacks some bytes of rare scripts, which no mask can bring back.
        ids = smollm2_tokenizer.encode(record.answer)
        assume(smollm2_tokenizer.decode(ids) == record.answer)
        example = render(record, smollm2_tokenizer, "chat", 10_000)
        assert targets(example, smollm2_tokenizer) == record.answer + "<|im_end|>"

    check()
