"""The run file: one typed TOML file says everything a run does.

It is parsed once, here, into frozen objects; nothing below this floor reads TOML. Every mistake
becomes one line that names the file, the line, the key and the cure.
"""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from fedjax_llm.errors import Refused, UserError
from fedjax_llm.runs import toml_errors

BUILTIN_PREFIX = "builtin:"
BUILTIN_CORPORA = ("medical", "finance", "general")

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
# TOML has lists, frozen objects hold tuples: the container is converted, its elements stay strict.
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[tuple[Text, ...], Field(strict=False, min_length=1)]
Optimizer = Literal["sgd", "momentum", "nesterov", "adam", "adamw"]


class Section(BaseModel):
    """A table of the run file: unknown keys are errors, types are exact, objects are frozen."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True
    )


class ModelSection(Section):
    """[model]: a model of the catalogue by `name`, or a Hugging Face folder by `path`."""

    name: str | None = Field(None, min_length=1)
    path: str | None = Field(None, min_length=1)
    dtype: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.name is None) == (self.path is None):
            given = "neither" if self.name is None else "both"
            raise _problem((), f"[model] takes either name or path, {given} given")
        return self


class AdapterSection(Section):
    """[adapter]: low-rank adapters. `targets` are shell-style patterns over projection names."""

    rank: Count = 8
    alpha: Positive = 16.0
    targets: Texts = ("q_proj", "v_proj")


class TrainingSection(Section):
    """[training]: one client's local update. `batch_size` is the expected batch size."""

    local_steps: Count = 4
    batch_size: Count = 8
    microbatch: Count = 4
    sequence_length: Annotated[int, Field(ge=8)] = 256
    optimizer: Optimizer = "adamw"
    learning_rate: Positive = 1e-3
    template: Literal["chat", "plain"] = "chat"
    system_prompt: str = ""
    packing: bool = False
    remat: bool = False
    clients_at_once: Annotated[int | Literal["auto"], Field(union_mode="left_to_right")] = "auto"

    @model_validator(mode="after")
    def _clients_at_once(self) -> Self:
        if self.clients_at_once != "auto" and self.clients_at_once < 1:
            raise _problem(("clients_at_once",), 'must be at least 1 or "auto"')
        return self


class AggregationSection(Section):
    """[aggregation]: how the updates of the clouds become one, and the server's optimiser."""

    rule: Text = "ffa"
    weights: Literal["uniform", "examples"] = "uniform"
    server_optimizer: Optimizer = "sgd"
    server_learning_rate: Positive = 1.0


class PrivacySection(Section):
    """[privacy]: the unit that is protected, the Gaussian mechanism, and how units are sampled."""

    unit: Literal["none", "example", "client"] = "none"
    clip_norm: Positive = 1.0
    noise_multiplier: NotNegative = 1.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    sampling: Literal["poisson", "full", "fixed"] = "poisson"
    client_rate: Annotated[float, Field(gt=0, le=1)] = 1.0


class SecureSection(Section):
    """[secure]: how the updates are summed.

    `update_bound` is the largest l2 norm of one client's update; larger ones are clipped to it,
    which proves that the fixed-point sum cannot overflow. `bits` left out lets the run choose.
    """

    sum: Literal["plain", "threshold"] = "plain"
    threshold: Count = 2
    bits: Annotated[int, Field(ge=8, le=24)] | None = None
    update_bound: Positive = 1.0


class EvaluationSection(Section):
    """[evaluation]: held-out loss every `every_rounds`, and one sample answer before and after."""

    every_rounds: Count = 1
    examples_per_cloud: Count = 32
    microbatch: Count = 8
    prompt: Text | None = None
    max_new_tokens: Count = 64


class CheckpointSection(Section):
    """[checkpoint]: every round is checkpointed; the last `keep` are kept."""

    keep: Count = 2


class Link(Section):
    """A cloud's wide-area link, for virtual time: rates in megabits per second, latency one way."""

    up_mbps: Positive = 100.0
    down_mbps: Positive = 100.0
    latency_ms: NotNegative = 20.0


class MappingSection(Section):
    """Column names (or `"{column} text"` templates) from a cloud's schema to the record."""

    prompt: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    context: str | None = None
    label: str | None = None
    group: str | None = None
    labels: dict[str, str] | None = None


class DataSection(Section):
    """A cloud's data: files or folders (or `builtin:NAME`), how many rows, how much is held out."""

    sources: Texts
    limit: Count | None = None
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    mapping: MappingSection | None = None

    @model_validator(mode="after")
    def _sources(self) -> Self:
        for index, source in enumerate(self.sources):
            if not source.startswith(BUILTIN_PREFIX):
                if self.mapping is None:
                    raise _problem(
                        (),
                        "needs a mapping from columns to prompt and answer, "
                        'as mapping = {prompt = "question", answer = "answer"}',
                    )
                continue
            name = source.removeprefix(BUILTIN_PREFIX)
            if name not in BUILTIN_CORPORA:
                valid = ", ".join(BUILTIN_PREFIX + corpus for corpus in BUILTIN_CORPORA)
                raise _problem(("sources", index), f"must be a file, a folder or one of {valid}")
        return self


class Cloud(Section):
    """[[clouds]]: one site with its own data and its own link.

    In `offline_rounds` it cannot be reached: neither its update nor its part of a decryption come.
    """

    name: str = Field(min_length=1, max_length=64)
    link: Link = Link()
    data: DataSection
    offline_rounds: Annotated[tuple[Count, ...], Field(strict=False)] = ()


class RunFile(Section):
    """A whole run. Build it with `load`, or from Python with keyword arguments."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    rounds: Count
    model: ModelSection
    adapter: AdapterSection = AdapterSection()
    training: TrainingSection = TrainingSection()
    aggregation: AggregationSection = AggregationSection()
    privacy: PrivacySection = PrivacySection()
    secure: SecureSection = SecureSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    clouds: Annotated[tuple[Cloud, ...], Field(strict=False, min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [cloud.name for cloud in self.clouds]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise _problem(("clouds", index, "name"), "must be unique among the clouds")
        if self.secure.sum == "threshold":
            self._check_threshold(len(names))
        if self.privacy.unit != "none" and self.privacy.sampling == "fixed":
            raise _problem(
                ("privacy", "sampling"),
                "fixed-size batches certify no epsilon; use poisson or full, or unit none",
                refused=True,
            )
        full = self.privacy.unit == "client" and self.privacy.sampling == "full"
        if full and self.privacy.client_rate != 1:
            raise _problem(
                ("privacy", "client_rate"),
                f'must be 1 with sampling = "full", got {self.privacy.client_rate:g}; '
                'use sampling = "poisson"',
            )
        return self

    def _check_threshold(self, clouds: int) -> None:
        threshold = self.secure.threshold
        if clouds < 2:
            raise _problem(
                ("secure", "sum"), f"needs at least 2 clouds to share the key, the run has {clouds}"
            )
        if threshold == 1:
            raise _problem(
                ("secure", "threshold"),
                f"must be between 2 and {clouds}: with 1, every cloud could decrypt alone",
                refused=True,
            )
        if threshold > clouds:
            raise _problem(
                ("secure", "threshold"),
                f"must be between 2 and {clouds}, the number of clouds",
            )


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunFile:
    """Reads a run file, applies `--set` overrides and checks everything that can be checked early.

    Args:
      path: the TOML file. Relative data and model paths in it (and in overrides) are taken from
        its folder and come out absolute, so that the result can be written anywhere.
      overrides: `key.path=VALUE` each; the value is TOML, a bare word is a string;
        `clouds.0.link.up_mbps` and `clouds.medical.link.up_mbps` both address one of the clouds.

    Raises:
      UserError: no such file, not TOML, unknown key, wrong type or value, missing data.
      Refused: the settings would let one party decrypt another's update.
    """
    path = Path(path)
    try:
        source = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"cannot read the run file {path}: {reason}") from None
    try:
        data = tomllib.loads(source)
    except tomllib.TOMLDecodeError as error:
        raise UserError(_syntax_error(path, source, str(error))) from None
    lines = toml_errors.key_lines(source)
    origin: dict[toml_errors.Path, str] = {}
    for override in overrides:
        origin[_apply_override(data, override)] = f"--set {override}"
    where = _Where(path, lines, origin)
    try:
        run_file = RunFile.model_validate(data)
    except ValidationError as error:
        raise _explained(error, data, where) from None
    _check_rule(run_file, data, where)
    return _with_absolute_paths(run_file, path.resolve().parent, data, where)


def to_toml(run_file: RunFile) -> str:
    """The resolved run file, every default written out; `load` gives an equal object back."""
    return tomli_w.dumps(run_file.model_dump(exclude_none=True))


class _Where:
    """Says where a key was set: the `--set` that set it, else file and line, else the file."""

    def __init__(
        self, path: Path, lines: Mapping[toml_errors.Path, int], origin: Mapping[Any, str]
    ) -> None:
        self.path, self.lines, self.origin = path, lines, origin

    def __call__(self, key: toml_errors.Path) -> str:
        for length in range(len(key), 0, -1):
            if key[:length] in self.origin:
                return self.origin[key[:length]]
            if key[:length] in self.lines:
                return f"{self.path}:{self.lines[key[:length]]}"
            # A table that is not in the file was made by the override of a key inside it.
            for overridden, words in self.origin.items():
                if overridden[:length] == key[:length]:
                    return words
        return str(self.path)


def _problem(path: toml_errors.Path, text: str, refused: bool = False) -> PydanticCustomError:
    # The context travels with the error to `_explained`; braces in the text must not be formatted.
    context = {"path": path, "text": text, "refused": refused}
    return PydanticCustomError("run_file", "{text}", context)


def _syntax_error(path: Path, source: str, message: str) -> str:
    text, _, position = message.partition(" (at ")
    if position.startswith("line "):
        line = position.removeprefix("line ").split(",")[0]
    else:
        line = str(source.rstrip("\n").count("\n") + 1)
    return f"{path}:{line}: not valid TOML: {text[:1].lower()}{text[1:]}"


def _apply_override(data: dict[str, Any], override: str) -> toml_errors.Path:
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


def _explained(error: ValidationError, data: dict[str, Any], where: _Where) -> UserError | Refused:
    """The first of pydantic's errors, in the order of the file, as one line."""
    details = error.errors(include_url=False)
    # What the reader meets first in the file comes first; keys that are missing come after typos,
    # because a typo is usually why a key is missing.
    details.sort(
        key=lambda detail: (
            detail["type"] == "missing",
            where.lines.get(_present(detail["loc"], data), 0),
        )
    )
    first = details[0]
    message = f"{where(_full_path(first, data))}: {_sentence(first, data)}"
    if len(details) > 1:
        message += f" (and {len(details) - 1} more)"
    refused = first["type"] == "run_file" and first["ctx"]["refused"]
    return Refused(message) if refused else UserError(message)


def _full_path(detail: ErrorDetails, data: dict[str, Any]) -> toml_errors.Path:
    if detail["type"] == "run_file":
        return (*detail["loc"], *detail["ctx"]["path"])
    return _present(detail["loc"], data)


def _present(path: toml_errors.Path, data: Any) -> toml_errors.Path:
    """The part of `path` that exists in the data; pydantic appends the names of union members."""
    node = data
    for length, part in enumerate(path):
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            return path[:length]
    return path


def _sentence(detail: ErrorDetails, data: dict[str, Any]) -> str:
    kind, path = detail["type"], detail["loc"]
    if kind == "extra_forbidden":
        return _unknown_key(path, data)
    if kind == "missing":
        what = "section" if path[-1] in ("model", "clouds", "data") else "key"
        return f"the {what} {toml_errors.key_name(path, data)} is missing"
    if kind == "run_file":
        text = str(detail["ctx"]["text"])
        if not detail["ctx"]["path"]:
            inner = toml_errors.key_name(path, data)
            return text if text.startswith("[") else f"{inner} {text}"
        path = (*path, *detail["ctx"]["path"])
        return f"{toml_errors.key_name(path, data)} {text}, got {_value_at(path, data)}"
    path = _present(path, data)
    name = toml_errors.key_name(path, data)
    expected = toml_errors.expectation(kind, detail.get("ctx", {}))
    if name == "[training] clients_at_once":
        expected = 'an integer of at least 1 or "auto"'
    guess = None
    if kind == "literal_error" and isinstance(detail["input"], str):
        guess = toml_errors.nearest(
            detail["input"], str(detail["ctx"]["expected"]).split("'")[1::2]
        )
    hint = f"; did you mean {toml_errors.shown(guess)}?" if guess else ""
    got = f"got {toml_errors.shown(detail['input'])}"
    if expected is None:
        return f"{name}: {detail['msg']}, {got}"
    return f"{name} must be {expected}, {got}{hint}"


def _value_at(path: toml_errors.Path, data: Any) -> str:
    node = data
    for part in path:
        if isinstance(node, dict) and part not in node:
            return "the default"
        node = node[part]
    return toml_errors.shown(node)


def _unknown_key(path: toml_errors.Path, data: dict[str, Any]) -> str:
    word = str(path[-1])
    section = _section_at(path[:-1])
    valid = list(section.model_fields) if section else []
    what = "section" if len(path) == 1 and isinstance(data.get(word), dict) else "key"
    name = f"[{word}]" if what == "section" else toml_errors.key_name(path, data)
    guess = toml_errors.nearest(word, valid)
    if guess is None:
        homes = [home for home, field in _sections().items() if word in field.model_fields]
        if homes:
            return f"unknown {what} {name}; did you mean [{homes[0]}] {word}?"
        return f"unknown {what} {name}; valid here: {', '.join(valid)}"
    return f"unknown {what} {name}; did you mean {f'[{guess}]' if what == 'section' else guess}?"


def _sections() -> dict[str, type[Section]]:
    return {
        name: field.annotation
        for name, field in RunFile.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }


def _section_at(path: toml_errors.Path) -> type[Section] | None:
    nested: dict[toml_errors.Path, type[Section]] = {
        (): RunFile,
        ("clouds",): Cloud,
        ("clouds", "link"): Link,
        ("clouds", "data"): DataSection,
        ("clouds", "data", "mapping"): MappingSection,
        **{(name,): section for name, section in _sections().items()},
    }
    return nested.get(tuple(part for part in path if isinstance(part, str)))


def _check_rule(run_file: RunFile, data: dict[str, Any], where: _Where) -> None:
    """The rule exists, and does not have to read single messages that the sum hides."""
    # Imported here: it brings JAX, which those who only want the classes need not wait for.
    from fedjax_llm.aggregation import RULES
    from fedjax_llm.training import OPTIMIZERS

    key: toml_errors.Path = ("aggregation", "rule")
    name, sum_name = run_file.aggregation.rule, run_file.secure.sum
    if name not in RULES:
        guess = toml_errors.nearest(name, RULES)
        hint = f"; did you mean {toml_errors.shown(guess)}?" if guess else ""
        valid = ", ".join(toml_errors.shown(rule) for rule in RULES)
        got = toml_errors.shown(name)
        raise UserError(f"{where(key)}: [aggregation] rule must be one of {valid}, got {got}{hint}")
    if sum_name != "plain" and RULES[name](OPTIMIZERS["sgd"](1.0)).needs_individual_messages:
        raise Refused(
            f'{where(key)}: [aggregation] rule "{name}" has to read the message of each cloud, '
            f'which [secure] sum = "{sum_name}" hides; choose another rule or sum = "plain"'
        )


def _with_absolute_paths(
    run_file: RunFile, folder: Path, data: dict[str, Any], where: _Where
) -> RunFile:
    def existing(text: str, key: toml_errors.Path) -> str:
        absolute = (folder / Path(text).expanduser()).resolve()
        if not absolute.exists():
            name = toml_errors.key_name(key, data)
            raise UserError(f"{where(key)}: {name}: there is no {absolute}")
        return str(absolute)

    model = run_file.model
    if model.path is not None:
        model = model.model_copy(update={"path": existing(model.path, ("model", "path"))})
    clouds = []
    for index, cloud in enumerate(run_file.clouds):
        sources = tuple(
            source
            if source.startswith(BUILTIN_PREFIX)
            else existing(source, ("clouds", index, "data", "sources", position))
            for position, source in enumerate(cloud.data.sources)
        )
        data_section = cloud.data.model_copy(update={"sources": sources})
        clouds.append(cloud.model_copy(update={"data": data_section}))
    return run_file.model_copy(update={"model": model, "clouds": tuple(clouds)})
