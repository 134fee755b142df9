"""Chat templates: a conversation as the one string that a model was trained to read.

A template is Jinja source that arrives with a model, so it is untrusted. It is rendered in an
immutable sandbox: no attribute that starts with an underscore, no method that changes an object,
no import, no file. (It can still waste time and memory; the sandbox bounds neither.) The
environment offers what Hugging Face's renderer offers (the same white-space rules, filters, globals
and tags), so a template gives the same text here and there.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fedjax_llm.errors import UserError

Message = Mapping[str, Any]

# The longest published templates (tool use, several languages) have some 20,000.
MAX_TEMPLATE_CHARS = 200_000


class _GenerationTag(Extension):
    """`{% generation %}`, with which templates mark the assistant's text, renders as its body."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for web pages, which would change the model's input.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(template)


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    special_tokens: Mapping[str, str] | None = None,
    now: datetime.datetime | None = None,
) -> str:
    """Renders a conversation with a chat template.

    Args:
        template: Jinja source, as in `tokenizer_config.json` or `chat_template.jinja`.
        messages: `{"role": ..., "content": ...}` in order.
        add_generation_prompt: end with the opening of an assistant turn.
        special_tokens: names that the template may use, such as `bos_token`.
        now: what `strftime_now` shows; the present local time when None. Give it where the text
            must be the same tomorrow.

    Raises:
        UserError: the template is not valid, tried what the sandbox forbids, or refused the
            conversation (`raise_exception`).

    >>> render("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
    ...        [{"role": "user", "content": "Hi"}])
    '[user]Hi'
    """
    if len(template) > MAX_TEMPLATE_CHARS:
        raise UserError(
            f"chat template has {len(template)} characters, at most {MAX_TEMPLATE_CHARS} are "
            "accepted; check chat_template in the model's folder"
        )

    def strftime_now(form: str) -> str:
        return (now or datetime.datetime.now()).strftime(form)

    try:
        return str(
            _compile(template).render(
                **(special_tokens or {}),
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=strftime_now,
            )
        )
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"chat template cannot render this conversation: {reason}; "
            "check the roles and their order, or use the template 'plain'"
        ) from error
