"""report.html: the result of a run on one page that asks nothing of any network.

It is made from the run folder alone, so it can be made again at any time, and also of a run that
was interrupted.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedjax_llm.errors import UserError
from fedjax_llm.runs import text
from fedjax_llm.runs.folder import (
    RunFolder,
    audit_file,
    forecast_file,
    harmonise_file,
    metrics,
    summary,
    timeline_file,
)
from fedjax_llm.runs.report import figures, harmonise_card, timeline_card

# Stage of a round -> what a reader calls it; the order is that of the stacked bar.
STAGE_NAMES = {
    "train": "training",
    "encrypt": "encrypting",
    "add": "adding ciphertexts",
    "decrypt": "decrypting the sum",
    "evaluate": "evaluating",
    "checkpoint": "checkpointing",
}


@dataclass(frozen=True)
class Share:
    """One part of the bar that shows where the time went."""

    name: str
    seconds: float
    percent: float
    stage: int


def write(folder: RunFolder) -> Path:
    """Writes the report of a run folder and returns its path.

    Raises:
      UserError: the folder holds no finished round, or its metrics or summary are damaged.
    """
    return folder.write(folder.report.name, render(folder))


def render(folder: RunFolder) -> str:
    """The HTML of the report of a run folder."""
    import jinja2

    records = metrics.read(folder.metrics)
    if not records:
        raise UserError(f"{folder.path} has no finished round to report on yet; resume it first")
    run_toml = folder.run_toml.read_text()
    settings = tomllib.loads(run_toml)
    result = summary.read(folder.summary)
    audited = audit_file.read(folder)
    harmonised = harmonise_file.read(folder)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedjax_llm.runs.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        bytes=text.bytes_text,
        seconds=text.seconds_text,
        loss=text.loss_text,
        share=text.share_text,
        dollars=text.dollars_text,
        capitalize_first=lambda words: words[:1].upper() + words[1:],
    )
    return environment.get_template("report.html.j2").render(
        finished=result is not None,
        result=result
        or summary.summarise(records, name=str(settings["name"]), seed=settings.get("seed", 0)),
        planned_rounds=settings["rounds"],
        settings=settings,
        records=records,
        charts=_charts(records) | {"bounds": _bounds(audited)},
        audit=audited,
        harmonised=harmonise_card.cards(harmonised),
        timeline=_timeline(folder, result is not None),
        money=_money(folder, result),
        shares=_shares(records),
        change=_change,
        aggregation=_aggregation(settings, records),
        epsilon_text=text.epsilon_text,
        delta_text=text.delta_text,
        run_toml=run_toml,
    )


def _charts(records: list[metrics.RoundRecord]) -> dict[str, Any]:
    import markupsafe

    epsilon = figures.epsilon(records)
    drawn = {
        "losses": figures.losses(records),
        "epsilon": epsilon,
        "uplink": figures.uplink(records, wide=epsilon is None),
    }
    # Matplotlib has escaped every text in its SVG; anything else stays subject to autoescape.
    return {name: markupsafe.Markup(svg) if svg else None for name, svg in drawn.items()}


def _timeline(folder: RunFolder, finished: bool) -> dict[str, Any] | None:
    import markupsafe

    card = timeline_card.timeline_card(timeline_file.read(folder), finished)
    # As for the charts: text in it has been escaped.
    return None if card is None else {**vars(card), "svg": markupsafe.Markup(card.svg)}


def _money(folder: RunFolder, result: summary.Summary | None) -> timeline_card.MoneyCard | None:
    if result is None:
        return None
    forecast = forecast_file.read(folder)
    outcome = None if forecast is None else forecast_file.outcome(folder)
    return timeline_card.money_card(result.virtual, forecast, outcome)


def _bounds(audited: dict[str, Any] | None) -> Any:
    import markupsafe

    if audited is None:
        return None
    found = audited["report"]
    return markupsafe.Markup(figures.bounds(found["lower_bound"], found["upper_bound"]))


def _shares(records: list[metrics.RoundRecord]) -> list[Share]:
    spent = summary.summarise(records, name="", seed=0)
    seconds = {name: spent.seconds[stage] for stage, name in STAGE_NAMES.items()}
    seconds["other"] = max(spent.seconds_total - sum(seconds.values()), 0.0)
    total = sum(seconds.values())
    return [
        Share(name, value, 100 * value / total, index)
        for index, (name, value) in enumerate(seconds.items())
        if value > 0
    ]


def _aggregation(settings: dict[str, Any], records: list[metrics.RoundRecord]) -> str:
    """The rule, what goes with it, and how far its results were from the mean of the products."""
    section = settings.get("aggregation", {})
    words = [f"Rule {section.get('rule', 'ffa')}"]
    if section.get("combine", "mean") != "mean":
        groups = f" over {section['groups']} groups" if section.get("groups") else ""
        words.append(f"combined by {section['combine']}{groups}")
    words.append(f"weights {section.get('weights', 'uniform')}")
    words.append(f"server optimiser {section.get('server_optimizer', 'sgd')}")
    sentence = ", ".join(words) + "."
    errors = [e for record in records if (e := record.get("aggregation_error")) is not None]
    if errors:
        sentence += (
            f" The global product differed from the mean of the clients' products by "
            f"{errors[-1]:.1e} of its norm in the last round, by {max(errors):.1e} at most; "
            "clipping, rounding and noise included."
        )
    if (attack := settings.get("attack")) is not None:
        sentence += f" Simulated attack: {', '.join(attack['clouds'])} did {attack['name']}."
    return sentence


def _change(before: float | None, after: float | None) -> str:
    """Relative change of a loss, such as `−12.3 %`; empty when either is missing."""
    if before is None or after is None or before == 0:
        return ""
    percent = 100 * (after - before) / before
    return f"{'−' if percent < 0 else '+'}{abs(percent):.1f} %"
