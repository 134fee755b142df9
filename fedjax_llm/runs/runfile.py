"""The run file: one typed TOML file says everything a run does.

It is parsed once, here, into frozen objects; nothing below this floor reads TOML. Every mistake
becomes one line that names the file, the line, the key and the cure.
"""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import tomli_w
from pydantic import Field, ValidationError, model_validator

from fedjax_llm.errors import FedJaxError, Refused, UserError
from fedjax_llm.runs import toml_errors
from fedjax_llm.runs.runfile_aggregation import AggregationSection as AggregationSection
from fedjax_llm.runs.runfile_aggregation import (
    AttackSection,
    CombineName,
    check_aggregation,
    check_attack,
)
from fedjax_llm.runs.runfile_errors import Where, explained, problem, syntax_error
from fedjax_llm.runs.runfile_overrides import apply_override
from fedjax_llm.runs.runfile_secure import SecureSection as SecureSection
from fedjax_llm.runs.runfile_secure import SelectiveSection as SelectiveSection
from fedjax_llm.runs.runfile_secure import check_secure, private_source
from fedjax_llm.runs.runfile_types import (
    BUILTIN_PREFIX,
    Count,
    NotNegative,
    Optimizer,
    Positive,
    Section,
    Text,
    Texts,
    check_sources,
)
from fedjax_llm.runs.runfile_types import MappingSection as MappingSection


class ModelSection(Section):
    """[model]: a model of the catalogue by `name`, or a Hugging Face folder by `path`."""

    name: str | None = Field(None, min_length=1)
    path: str | None = Field(None, min_length=1)
    dtype: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.name is None) == (self.path is None):
            given = "neither" if self.name is None else "both"
            raise problem((), f"[model] takes either name or path, {given} given")
        return self


class AdapterSection(Section):
    """[adapter]: low-rank adapters. `targets` are shell-style patterns over projection names."""

    rank: Count = 8
    alpha: Positive = 16.0
    targets: Texts = ("q_proj", "v_proj")


class TrainingSection(Section):
    """[training]: one client's local update. `batch_size` is the expected batch size.

    `proximal` is the mu of FedProx; `scaffold` adds control variates, and as much again to send.
    """

    local_steps: Count = 4
    batch_size: Count = 8
    microbatch: Count = 4
    sequence_length: Annotated[int, Field(ge=8)] = 256
    optimizer: Optimizer = "adamw"
    learning_rate: Positive = 1e-3
    proximal: NotNegative = 0.0
    scaffold: bool = False
    template: Literal["chat", "plain"] = "chat"
    system_prompt: str = ""
    packing: bool = False
    remat: bool = False
    clients_at_once: Annotated[int | Literal["auto"], Field(union_mode="left_to_right")] = "auto"

    @model_validator(mode="after")
    def _clients_at_once(self) -> Self:
        if self.clients_at_once != "auto" and self.clients_at_once < 1:
            raise problem(("clients_at_once",), 'must be at least 1 or "auto"')
        return self


class PrivacySection(Section):
    """[privacy]: the unit that is protected, the Gaussian mechanism, and how units are sampled."""

    unit: Literal["none", "example", "client"] = "none"
    clip_norm: Positive = 1.0
    noise_multiplier: NotNegative = 1.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    sampling: Literal["poisson", "full", "fixed"] = "poisson"
    client_rate: Annotated[float, Field(gt=0, le=1)] = 1.0


class EvaluationSection(Section):
    """[evaluation]: held-out loss every `every_rounds`, and one sample answer before and after.

    `aggregation_error` compares each round's result with the mean of the clients' products, which
    takes memory for every client's adapter.
    """

    every_rounds: Count = 1
    examples_per_cloud: Count = 32
    microbatch: Count = 8
    prompt: Text | None = None
    max_new_tokens: Count = 64
    aggregation_error: bool = True


class CheckpointSection(Section):
    """[checkpoint]: every round is checkpointed; the last `keep` are kept."""

    keep: Count = 2


class Link(Section):
    """A cloud's wide-area link, for virtual time: rates in megabits per second, latency one way."""

    up_mbps: Positive = 100.0
    down_mbps: Positive = 100.0
    latency_ms: NotNegative = 20.0


class DataSection(Section):
    """A cloud's data: files or folders (or `builtin:NAME`), how many rows, how much is held out."""

    sources: Texts
    limit: Count | None = None
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    mapping: MappingSection | None = None

    @model_validator(mode="after")
    def _sources(self) -> Self:
        check_sources(("sources",), self.sources, self.mapping)
        return self


class Cloud(Section):
    """[[clouds]]: one site with its own data and its own link.

    In `offline_rounds` it cannot be reached: neither its update nor its part of a decryption come.
    `rank` and `local_steps` are this cloud's own, at most those of [adapter] and [training];
    `weight` counts with [aggregation] weights = "public". With `clients` above 1 its training rows
    are divided by `partition` (dirichlet takes `concentration`) among so many clients, whose
    updates are summed inside the cloud before anything leaves it, unless the rule or combination
    reads each.
    """

    name: str = Field(min_length=1, max_length=64)
    link: Link = Link()
    data: DataSection
    offline_rounds: Annotated[tuple[Count, ...], Field(strict=False)] = ()
    rank: Count | None = None
    local_steps: Count | None = None
    weight: Positive = 1.0
    clients: Count = 1
    partition: Literal["iid", "dirichlet", "label"] = "iid"
    concentration: Positive = 0.5


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
    attack: AttackSection | None = None
    clouds: Annotated[tuple[Cloud, ...], Field(strict=False, min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [cloud.name for cloud in self.clouds]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise problem(("clouds", index, "name"), "must be unique among the clouds")
        check_aggregation(self.aggregation, self.training.local_steps, self.secure.sum)
        check_attack(self.attack, names, self.privacy.unit)
        self._check_unread()
        for index, cloud in enumerate(self.clouds):
            for key, own, whole, section in (
                ("rank", cloud.rank, self.adapter.rank, "adapter"),
                ("local_steps", cloud.local_steps, self.training.local_steps, "training"),
            ):
                if own is not None and own > whole:
                    raise problem(
                        ("clouds", index, key), f"must be at most {whole}, [{section}] {key}"
                    )
        privacy = self.privacy
        check_secure(self.secure, len(names), privacy.unit, privacy.noise_multiplier)
        if self.privacy.unit != "none" and self.privacy.sampling == "fixed":
            raise problem(
                ("privacy", "sampling"),
                "fixed-size batches certify no epsilon; use poisson or full, or unit none",
                refused=True,
            )
        full = self.privacy.unit == "client" and self.privacy.sampling == "full"
        if full and self.privacy.client_rate != 1:
            raise problem(
                ("privacy", "client_rate"),
                f'must be 1 with sampling = "full", got {self.privacy.client_rate:g}; '
                'use sampling = "poisson"',
            )
        return self

    def _check_unread(self) -> None:
        """Refuses settings of clouds and training that nothing would read."""
        public = self.aggregation.weights == "public"
        if public and all(cloud.weight == 1 for cloud in self.clouds):
            raise problem(
                ("aggregation", "weights"), 'needs a weight in some [[clouds]]; or use "uniform"'
            )
        for index, cloud in enumerate(self.clouds):
            idle = {
                "weight": (not public, 'goes with [aggregation] weights = "public"'),
                "partition": (cloud.clients == 1, "goes with clients above 1"),
                "concentration": (
                    cloud.clients == 1 or cloud.partition != "dirichlet",
                    'goes with clients above 1 and partition = "dirichlet"',
                ),
            }
            for key, (unread, what) in idle.items():
                if unread and getattr(cloud, key) != Cloud.model_fields[key].default:
                    raise problem(("clouds", index, key), f"{what}; remove it", got=False)
        if self.aggregation.exchange == "gradients":
            for key in ("optimizer", "learning_rate", "proximal"):
                default = TrainingSection.model_fields[key].default
                if getattr(self.training, key) != default:
                    raise problem(
                        ("training", key),
                        'has no effect with [aggregation] exchange = "gradients", where the server '
                        "takes the step; remove it and set server_optimizer and its rate",
                        got=False,
                    )
        if self.training.scaffold and self.secure.selective is not None:
            raise problem(
                ("training", "scaffold"),
                "sends control variates, which [secure.selective] has no names for; remove one",
                got=False,
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
        raise UserError(syntax_error(path, source, str(error))) from None
    lines = toml_errors.key_lines(source)
    origin: dict[toml_errors.Path, str] = {}
    for override in overrides:
        origin[apply_override(data, override)] = f"--set {override}"
    where = Where(path, lines, origin)
    try:
        run_file = RunFile.model_validate(data)
    except ValidationError as error:
        raise explained(error, data, where, RunFile) from None
    _check_rule(run_file, data, where)
    return _with_absolute_paths(run_file, path.resolve().parent, data, where)


def to_toml(run_file: RunFile) -> str:
    """The resolved run file, every default written out; `load` gives an equal object back."""
    return tomli_w.dumps(run_file.model_dump(exclude_none=True))


def _check_rule(run_file: RunFile, data: dict[str, Any], where: Where) -> None:
    """The rule exists, and goes together with everything else that is asked for."""
    # Imported here: it brings JAX, which those who only want the classes need not wait for.
    from fedjax_llm.aggregation import RULES
    from fedjax_llm.runs import build

    key: toml_errors.Path = ("aggregation", "rule")
    name, sum_name = run_file.aggregation.rule, run_file.secure.sum
    if name in get_args(CombineName):
        raise UserError(
            f"{where(key)}: [aggregation] rule says what is trained, and {toml_errors.shown(name)} "
            f'combines messages; write combine = {toml_errors.shown(name)} beside rule = "ffa"'
        )
    if name not in RULES:
        guess = toml_errors.nearest(name, RULES)
        hint = f"; did you mean {toml_errors.shown(guess)}?" if guess else ""
        valid = ", ".join(toml_errors.shown(rule) for rule in RULES)
        got = toml_errors.shown(name)
        raise UserError(f"{where(key)}: [aggregation] rule must be one of {valid}, got {got}{hint}")
    if sum_name != "plain" and RULES[name].needs_individual_messages:
        raise Refused(
            f'{where(key)}: [aggregation] rule "{name}" has to read the message of each cloud, '
            f'which [secure] sum = "{sum_name}" hides; choose another rule or sum = "plain"'
        )
    for index, cloud in enumerate(run_file.clouds):
        if cloud.rank not in (None, run_file.adapter.rank) and not RULES[name].facts.ranks:
            place = ("clouds", index, "rank")
            raise UserError(
                f'{where(place)}: rule "{name}" takes one rank for all clouds; leave '
                f"{toml_errors.key_name(place, data)} out, or choose a rule with ranks in "
                "`fedjax-llm rules`"
            )
    try:
        build.check_together(run_file)
    except FedJaxError as error:
        raise type(error)(f"{where(('aggregation',))}: {error}") from None


def _with_absolute_paths(
    run_file: RunFile, folder: Path, data: dict[str, Any], where: Where
) -> RunFile:
    def existing(text: str, key: toml_errors.Path) -> str:
        absolute = (folder / Path(text).expanduser()).resolve()
        if not absolute.exists():
            name = toml_errors.key_name(key, data)
            raise UserError(f"{where(key)}: {name}: there is no {absolute}")
        return str(absolute)

    def absolute(sources: tuple[str, ...], key: toml_errors.Path) -> tuple[str, ...]:
        return tuple(
            source if source.startswith(BUILTIN_PREFIX) else existing(source, (*key, position))
            for position, source in enumerate(sources)
        )

    model = run_file.model
    if model.path is not None:
        model = model.model_copy(update={"path": existing(model.path, ("model", "path"))})
    clouds = []
    for index, cloud in enumerate(run_file.clouds):
        sources = absolute(cloud.data.sources, ("clouds", index, "data", "sources"))
        data_section = cloud.data.model_copy(update={"sources": sources})
        clouds.append(cloud.model_copy(update={"data": data_section}))
    secure = run_file.secure
    selective = secure.selective
    if selective is not None:
        key = ("secure", "selective")
        if selective.map is not None:
            changed: dict[str, Any] = {"map": existing(selective.map, (*key, "map"))}
        else:
            public = selective.measure_on
            changed = {"measure_on": public and absolute(public, (*key, "measure_on"))}
        selective = selective.model_copy(update=changed)
        secure = secure.model_copy(update={"selective": selective})
        private = {cloud.name: cloud.data.sources for cloud in clouds}
        if (found := private_source(selective, private)) is not None:
            index, name = found
            place = (*key, "measure_on", index)
            raise Refused(
                f"{where(place)}: {toml_errors.key_name(place, data)} must be public text, and "
                f"cloud {toml_errors.shown(name)} trains on it: a map from private data betrays it"
            )
    update = {"model": model, "secure": secure, "clouds": tuple(clouds)}
    return run_file.model_copy(update=update)
