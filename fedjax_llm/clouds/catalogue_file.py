"""Reads the catalogue, and lays a user's own file over it.

A user's file has the form of `catalogue.toml`; it is laid over that key by key, so that it may
correct one price or add a machine.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from importlib import resources
from pathlib import Path
from typing import Any

from fedjax_llm.clouds.catalogue import (
    Accelerator,
    Catalogue,
    Instance,
    Provider,
    Region,
    Route,
    Source,
    hint,
)
from fedjax_llm.clouds.prices import Egress
from fedjax_llm.errors import UserError

_KINDS: dict[str, type] = {
    "sources": Source,
    "accelerators": Accelerator,
    "providers": Provider,
    "instances": Instance,
    "regions": Region,
    "routes": Route,
}
_WORDS = {
    ("providers", "unit"): ("GB", "GiB"),
    ("regions", "continent"): (
        "africa",
        "asia",
        "europe",
        "north-america",
        "oceania",
        "south-america",
    ),
}


def load(own: Path | None = None) -> Catalogue:
    """The package's catalogue, with a user's file laid over it.

    Args:
        own: the file; None for the package's figures alone.

    Raises:
        UserError: the file cannot be read, is not TOML, or an entry does not fit.
    """
    text = resources.files("fedjax_llm.clouds").joinpath("catalogue.toml").read_text("utf-8")
    data = tomllib.loads(text)
    if own is not None:
        _lay_over(data, _read(own))
    return _catalogue(data, str(own or "catalogue.toml"))


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"cannot read the catalogue {path}: {reason}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None


def _lay_over(data: dict[str, Any], own: Mapping[str, Any]) -> None:
    for key, value in own.items():
        if isinstance(value, dict) and isinstance(data.get(key), dict):
            _lay_over(data[key], value)
        else:
            data[key] = value


def _catalogue(data: Mapping[str, Any], file: str) -> Catalogue:
    for key in data:
        if key not in _KINDS:
            raise UserError(f"{file}: unknown section [{key}]{hint(key, _KINDS)}")
    made: dict[str, dict[str, Any]] = {}
    for section, kind in _KINDS.items():
        table = data.get(section, {})
        if not isinstance(table, dict):
            raise UserError(f"{file}: [{section}] must be a table, got {table!r}")
        made[section] = {
            name: _entry(kind, entry, f"{file}: {section}.{name}") for name, entry in table.items()
        }
    catalogue = Catalogue(**made)
    _check(catalogue, file)
    return catalogue


def _entry(kind: type, entry: Any, where: str) -> Any:
    if not isinstance(entry, dict):
        raise UserError(f"{where} must be a table of keys and values, got {entry!r}")
    known = {field.name: field for field in fields(kind)}
    for key in entry:
        if key not in known:
            raise UserError(f"{where}: unknown key {key}{hint(key, known)}")
    values = {}
    for name, field in known.items():
        if name in entry:
            values[name] = _value(entry[name], field.type, f"{where}: {name}")
        elif field.default is MISSING:
            raise UserError(f"{where}: the key {name} is missing; add it")
    return kind(**values)


def _value(value: Any, kind: Any, where: str) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is str:
        if isinstance(value, str):
            return value
        if hasattr(value, "isoformat"):
            return value.isoformat()
        raise UserError(f"{where} must be a text in quotes, got {value!r}")
    if kind is int:
        if number and value == int(value) and value >= 1:
            return int(value)
        raise UserError(f"{where} must be a whole number of at least 1, got {value!r}")
    if kind is float:
        if number and 0 <= value < float("inf"):
            return float(value)
        raise UserError(f"{where} must be a number of zero or more, got {value!r}")
    # Tiers of egress; one number is one tier.
    tiers = [[0, value]] if number else value
    try:
        pairs = tuple((float(above), float(price)) for above, price in tiers)
        Egress(tuple(price for _, price in pairs), tuple(above for above, _ in pairs))
    except (TypeError, ValueError):
        raise UserError(
            f"{where} must be dollars, or tiers as [[0, 0.09], [10240, 0.085]], got {value!r}"
        ) from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return pairs


def _check(catalogue: Catalogue, file: str) -> None:
    """Every name that an entry holds exists, and every word is one of those that are known."""
    for section in _KINDS:
        for name, entry in getattr(catalogue, section).items():
            for field in fields(entry):
                value = getattr(entry, field.name)
                if value and "section" in field.metadata:
                    valid = getattr(catalogue, field.metadata["section"])
                elif (section, field.name) in _WORDS:
                    valid = _WORDS[section, field.name]
                else:
                    continue
                if value not in valid:
                    raise UserError(
                        f"{file}: {section}.{name}: {field.name} must be one of "
                        f"{', '.join(valid)}, got {value!r}{hint(value, valid)}"
                    )
    for name in catalogue.routes:
        ends = name.split(" ")
        if len(ends) != 2 or ends[0] == ends[1]:
            raise UserError(f"{file}: routes.{name!r} must name two regions with a space between")
        for end in ends:
            if end not in catalogue.regions:
                near = hint(end, catalogue.regions)
                raise UserError(f"{file}: routes.{name!r}: unknown region {end!r}{near}")
