"""Runs side by side: their results, and the run-file keys in which they differ."""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedjax_llm.errors import UserError
from fedjax_llm.runs import text
from fedjax_llm.runs.folder import RunFolder, metrics, summary
from fedjax_llm.runs.sections import toml_errors


def table(paths: Sequence[Path]) -> list[tuple[str, list[str]]]:
    """Rows of (what, one value per run): results first, then the keys that differ.

    Raises:
      UserError: a folder is no run folder or has no finished round.
    """
    results, settings = [], []
    for path in paths:
        folder = RunFolder.open(path)
        keys = flat(tomllib.loads(folder.run_toml.read_text()))
        records = metrics.read(folder.metrics)
        if not records:
            raise UserError(f"{path} has no finished round to compare yet")
        result = summary.read(folder.summary)
        results.append(
            result or summary.summarise(records, name=str(keys["name"]), seed=keys.get("seed", 0))
        )
        settings.append(keys)
    clouds = dict.fromkeys(name for result in results for name in result.clouds)
    rows = [("rounds", [str(result.rounds) for result in results])]
    rows += [(f"loss {name}", [_loss(result, name) for result in results]) for name in clouds]
    rows += [
        ("epsilon", [text.epsilon_text(run.epsilon, run.epsilon_reason) for run in results]),
        ("sent to the server", [text.bytes_text(result.uplink_bytes) for result in results]),
        ("sent back", [text.bytes_text(result.downlink_bytes) for result in results]),
        ("encryption, of the rounds", [_secure_share(result) for result in results]),
        ("time", [text.seconds_text(result.seconds_total) for result in results]),
        ("virtual time", [text.seconds_text(result.seconds_virtual) for result in results]),
        ("virtual money", [_virtual(run, "dollars", text.dollars_text) for run in results]),
        ("goodput", [_virtual(run, "goodput", text.share_text) for run in results]),
    ]
    return rows + differing(settings)


def differing(settings: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Rows of the flat keys on which the runs do not all agree."""
    rows = []
    for key in dict.fromkeys(key for keys in settings for key in keys):
        values = [toml_errors.shown(keys[key]) if key in keys else "–" for keys in settings]
        if len(set(values)) > 1:
            rows.append((key, values))
    return rows


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys; a cloud is addressed by its name, as in `--set`.

    >>> flat({"rounds": 2, "clouds": [{"name": "a", "link": {"up_mbps": 5}}]})
    {'rounds': 2, 'clouds.a.name': 'a', 'clouds.a.link.up_mbps': 5}
    """
    keys: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            keys |= flat(value, f"{prefix}{key}.")
        elif key == "clouds" and not prefix:
            for cloud in value:
                keys |= flat(cloud, f"clouds.{cloud['name']}.")
        else:
            keys[f"{prefix}{key}"] = value
    return keys


def _secure_share(result: summary.Summary) -> str:
    return text.share_text(result.secure_share) if result.secure_share else "–"


def _virtual(result: summary.Summary, name: str, shown: Callable[[float], str]) -> str:
    return "–" if result.virtual is None else shown(getattr(result.virtual, name))


def _loss(result: summary.Summary, name: str) -> str:
    cloud = result.clouds.get(name)
    if cloud is None:
        return "–"
    return f"{text.loss_text(cloud.loss_before_nats)} → {text.loss_text(cloud.loss_after_nats)}"
