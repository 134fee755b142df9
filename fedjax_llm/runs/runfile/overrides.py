"""`--set section.key=value`: one value of a run file, changed from the command line."""

import tomllib
from typing import Any

from fedjax_llm.errors import UserError
from fedjax_llm.runs.sections import toml_errors


def apply_override(data: dict[str, Any], override: str) -> toml_errors.Path:
    """Sets one value in `data` in place and returns its path."""
    key, equals, text = override.partition("=")
    try:
        parts = _key_parts(tomllib.loads(f"{key} = 0")) if equals and "\n" not in key else []
    except tomllib.TOMLDecodeError:
        parts = []
    if not parts:
        raise UserError(f"--set {override}: write it as section.key=value")
    node: Any = data
    path: toml_errors.Path = ()
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            step: str | int = _element(node, part, override)
        elif isinstance(node, dict):
            step = part
            if not last:
                node.setdefault(part, {})
        else:
            raise UserError(
                f"--set {override}: {'.'.join(parts[:depth])} is a value, not a section"
            )
        path = (*path, step)
        if last:
            node[step] = _override_value(text, override)
        else:
            node = node[step]
    return path


def _key_parts(nested: Any) -> list[str]:
    parts = []
    while isinstance(nested, dict):
        ((part, nested),) = nested.items()
        parts.append(part)
    return parts


def _element(elements: list[Any], part: str, override: str) -> int:
    names = [element.get("name") if isinstance(element, dict) else None for element in elements]
    if part in names:
        return names.index(part)
    if part.isdecimal() and int(part) < len(elements):
        return int(part)
    valid = [name for name in names if isinstance(name, str)]
    guess = toml_errors.nearest(part, valid)
    hint = f"did you mean {guess}?" if guess else f"there are {', '.join(valid) or len(elements)}"
    raise UserError(f"--set {override}: no cloud {part}; {hint}")


def _override_value(text: str, override: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError as error:
        if text.strip()[:1] in ("", '"', "'", "[", "{"):
            reason = str(error).split(" (at ")[0]
            raise UserError(f"--set {override}: the value is not TOML: {reason}") from None
        return text.strip()  # a bare word is the string a shell user meant
    return parsed["value"] if len(parsed) == 1 else text
