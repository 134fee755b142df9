"""Chat templates: what the model reads, and what a hostile template cannot do."""

import datetime

import pytest

from fedjax_llm.errors import UserError
from fedjax_llm.models import chat

TURNS = [{"role": "user", "content": "Hi <there>"}, {"role": "assistant", "content": "Yes"}]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        # trim_blocks and lstrip_blocks: a line that holds only a tag leaves nothing behind.
        (
            "{% for m in messages %}\n  {% if true %}\n{{ m.content }}|\n{% endif %}\n{% endfor %}",
            "Hi <there>|\nYes|\n",
        ),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "Hi <there>"}'),
        ("{{ ['é'] | tojson(indent=1) }}", '[\n "é"\n]'),
        ("{% for m in messages %}{{ m.role }}{% break %}{% endfor %}", "user"),
        ("{% generation %}a{% endgeneration %}b", "ab"),
        ("{{ strftime_now('%d %b %Y') }}", "03 Feb 2031"),
        ("{{ bos_token }}{{ tools is none }}{{ missing }}", "<s>True"),
        ("{% if add_generation_prompt %}go{% endif %}", "go"),
    ],
)
def test_renders_as_the_hub_environment_does(template: str, text: str) -> None:
    rendered = chat.render(
        template,
        TURNS,
        add_generation_prompt=True,
        special_tokens={"bos_token": "<s>"},
        now=datetime.datetime(2031, 2, 3),
    )
    assert rendered == text


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__closure__[0] }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{% for i in range(999999999) %}{% endfor %}",
        "{{ unclosed",
        "{{ 1 / 0 }}",
        "{{ messages[7].role }}",
        "{{ raise_exception('roles must\nalternate') }}",
        "x" * (chat.MAX_TEMPLATE_CHARS + 1),
    ],
)
def test_what_the_sandbox_forbids_or_the_template_refuses_is_one_line(template: str) -> None:
    with pytest.raises(UserError) as caught:
        chat.render(template, TURNS)
    assert "\n" not in str(caught.value)


def test_the_messages_survive_a_template_that_tries_to_change_them() -> None:
    chat.render("{% set m = messages[0] %}{% set m = {'role': 'x'} %}", TURNS)
    assert TURNS[0] == {"role": "user", "content": "Hi <there>"}


def test_a_refusal_shows_the_template_authors_reason() -> None:
    with pytest.raises(UserError, match="only user and assistant"):
        chat.render("{{ raise_exception('only user and assistant') }}", TURNS)
