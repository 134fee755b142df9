"""What a federation would refuse, found before model and data are loaded."""

from fedjax_llm.aggregation import AggregationRule, NormalisedMean
from fedjax_llm.aggregation.attacks import ATTACKS
from fedjax_llm.aggregation.robust import GroupRobust
from fedjax_llm.errors import UserError
from fedjax_llm.federation import Combination
from fedjax_llm.federation.link_promises import (
    Promise,
    check_compression,
    check_schedule,
    in_fragments,
)
from fedjax_llm.federation.promises import check_combination, weight_kinds
from fedjax_llm.privacy.weights import Weights as PlanWeights
from fedjax_llm.privacy.weights import check_weights
from fedjax_llm.runs import build
from fedjax_llm.runs.build import plans
from fedjax_llm.runs.sections.privacy import CORRELATED, INTEGER
from fedjax_llm.runs.sections.schema import RunFile


def check_together(run_file: RunFile) -> None:
    """Refuses settings that a federation would refuse, before model and data are loaded.

    Raises:
        UserError, Refused: as `Federation`; a server optimiser that the rule cannot have.
    """
    section, unit = run_file.aggregation, run_file.privacy.unit
    made = build.rule(run_file)
    kind: PlanWeights = "uniform" if section.weights == "public" else section.weights
    if unit != "none":
        for each in weight_kinds(made, kind):
            check_weights(unit, each)
    found = build.combination(run_file)
    steps = {cloud.local_steps or run_file.training.local_steps for cloud in run_file.clouds}
    check_combination(
        rule=made,
        unit=unit,
        drift=build.drift(run_file),
        hidden=run_file.secure.sum != "plain",
        combine=found,
        bound=run_file.privacy.clip_norm if unit == "client" else run_file.secure.update_bound,
        weighs=section.weights != "uniform" or (section.normalise_steps and len(steps) > 1),
        normalises=section.normalise_steps,
        by_loss=section.weights.startswith("loss"),
        attack=ATTACKS.get(run_file.attack.name) if run_file.attack else None,
    )
    _check_links(run_file, made, found)
    plain_change = type(made).message is AggregationRule.message
    if section.exchange == "gradients" and (made.needs_individual_messages or not plain_change):
        raise UserError(
            f"rule {made.name!r} does not send the change of what is trained, so that exchange = "
            '"gradients" has no meaning; choose another rule'
        )
    if isinstance(found, GroupRobust) and run_file.secure.sum != "plain":
        smallest = len(run_file.clouds) // found.groups
        for key in ("threshold", "minimum_clients"):
            wanted = getattr(run_file.secure, key)
            if wanted is not None and wanted > smallest:
                raise UserError(
                    f"[secure] {key} is {wanted}, and {found.groups} groups of "
                    f"{len(run_file.clouds)} clouds have as few as {smallest}; lower it, or groups"
                )
    if isinstance(found, GroupRobust):
        found.check(len(run_file.clouds))
    elif found is not None and not isinstance(found, NormalisedMean):
        found.check(sum(cloud.clients for cloud in run_file.clouds))


def _check_links(run_file: RunFile, made: AggregationRule, found: Combination | None) -> None:
    """Refuses what schedule and compression of a federation would refuse."""
    privacy, aggregation = run_file.privacy, run_file.aggregation
    promise = Promise(
        privacy.unit,
        # Clients of unit client; the others sample inside each cloud, whatever the schedule is.
        privacy.sampling != "full" or privacy.client_rate < 1,
        privacy.period > 1,
        privacy.unit != "none" and privacy.noise in CORRELATED,
        plans.adaptive(run_file) is not None,
        privacy.unit == "client" and privacy.noise in INTEGER,
        privacy.unit == "client" and privacy.noise not in INTEGER,
    )
    check_schedule(
        build.schedule(run_file),
        promise,
        rule=made,
        opens=0 if run_file.secure.sum == "plain" else build.fewest_opened(run_file),
        clouds=len(run_file.clouds),
        drift=build.drift(run_file),
        combine=found,
        by_loss=aggregation.weights.startswith("loss"),
        normalises=aggregation.normalise_steps,
        attacked=build.attackers(run_file) is not None,
        offline=any(cloud.offline_rounds for cloud in run_file.clouds),
    )
    shortened = in_fragments(build.compression(run_file), build.schedule(run_file))
    if shortened is not None:
        control = run_file.training.scaffold
        check_compression(
            shortened, promise, rule=made, combined=found is not None, control=control
        )
