"""What a run file names exists, and its sections go together: all that needs more than the file."""

from typing import Any, get_args

from fedjax_llm.errors import FedJaxError, Refused, UserError
from fedjax_llm.runs.runfile.errors import Where
from fedjax_llm.runs.sections import toml_errors
from fedjax_llm.runs.sections.aggregation import CombineName
from fedjax_llm.runs.sections.schema import RunFile


def check_rule(run_file: RunFile, data: dict[str, Any], where: Where) -> None:
    """The rule exists, and goes together with everything else that is asked for."""
    # Imported here: it brings JAX, which those who only want the classes need not wait for.
    from fedjax_llm.aggregation import RULES
    from fedjax_llm.runs.runfile import together

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
        together.check_together(run_file)
    except FedJaxError as error:
        raise type(error)(f"{where(('aggregation',))}: {error}") from None


def check_profiles(run_file: RunFile, where: Where) -> None:
    """The profiles of all clouds can be made: traces, names of the catalogue, its file."""
    from fedjax_llm.runs.build import cloud_profiles  # as above, and it reads the catalogue

    try:
        figures = cloud_profiles.catalogue(run_file)
    except UserError as error:
        raise UserError(f"{where(('catalogue',))}: {error}") from None
    for index, cloud in enumerate(run_file.clouds):
        try:
            cloud_profiles.profile(cloud, run_file, figures)
        except UserError as error:
            name = toml_errors.shown(cloud.name)
            raise UserError(f"{where(('clouds', index))}: cloud {name}: {error}") from None


def check_harmonise(run_file: RunFile, where: Where) -> None:
    """Labels, lengths and mixtures of all clouds can be made."""
    from fedjax_llm.runs.build import harmonising  # as above

    try:
        harmonising.settings(run_file)
    except UserError as error:
        raise UserError(f"{where(('harmonise',))}: {error}") from None
