"""summary.json: the result of a run, computed from its rounds and from nothing else."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedjax_llm.errors import UserError
from fedjax_llm.runs.folder.metrics import SECURE_STAGES, STAGES, RoundRecord, strict
from fedjax_llm.runs.folder.virtual import Virtual


@dataclass(frozen=True)
class CloudSummary:
    """One cloud's result. Losses are nats per target token on held-out text.

    `examples` counts the rows that it trained on in all rounds, repeats included.
    """

    loss_before_nats: float | None
    loss_after_nats: float | None
    examples: int
    uplink_bytes: int
    downlink_bytes: int
    epsilon: float | None = None
    epsilon_reason: str = ""
    seconds_link: float = 0.0


@dataclass(frozen=True)
class Sample:
    """One prompt, answered by the model before and after the run."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class Summary:
    """What a run came to.

    Attributes:
      name: the run's name.
      rounds: rounds finished.
      seed: the run's seed.
      clouds: result by cloud.
      epsilon: spent after the last round; None when it cannot be certified.
      epsilon_reason: why epsilon is None.
      delta: of (epsilon, delta); None without privacy.
      privacy_statement: what is protected and how, in words.
      secure_statement: who can decrypt, in words.
      uplink_bytes: from all clouds to the server, all rounds.
      downlink_bytes: from the server to all clouds, all rounds.
      seconds: real time by stage, all rounds; keys as in `metrics.STAGES`.
      seconds_total: real time of all rounds.
      seconds_virtual: simulated time: the clouds' links and training.
      tokens: trained on, all clouds and rounds.
      sample: a prompt and its answers before and after.
      parameters_trained: how many numbers a cloud uploads.
      encrypted_fraction: how much of them leaves a cloud encrypted or masked, 0 to 1.
      secure_share: seconds of encryption, addition and decryption over those of all rounds,
        evaluation and checkpoints included; None before the first.
      virtual: money, goodput and bytes in virtual time; None for a run that has not ended.
      versions: package versions.
      machine: what it ran on.
    """

    name: str
    rounds: int
    seed: int
    clouds: dict[str, CloudSummary]
    epsilon: float | None
    epsilon_reason: str
    delta: float | None
    privacy_statement: str
    secure_statement: str
    uplink_bytes: int
    downlink_bytes: int
    seconds: dict[str, float]
    seconds_total: float
    seconds_virtual: float
    tokens: int
    sample: Sample | None = None
    parameters_trained: int | None = None
    encrypted_fraction: float | None = None
    secure_share: float | None = None
    virtual: Virtual | None = None
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def loss_fell_in_every_cloud(self) -> bool:
        """Whether held-out loss after the run is lower than before in each cloud, as measured."""
        return bool(self.clouds) and all(
            cloud.loss_before_nats is not None
            and cloud.loss_after_nats is not None
            and cloud.loss_after_nats < cloud.loss_before_nats
            for cloud in self.clouds.values()
        )

    def to_json(self) -> str:
        """The content of summary.json."""
        fields = asdict(self)
        content = {
            "name": fields.pop("name"),
            "loss_fell_in_every_cloud": self.loss_fell_in_every_cloud,
            **fields,
        }
        return json.dumps(strict(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def summarise(
    records: Sequence[RoundRecord],
    *,
    name: str,
    seed: int,
    privacy_statement: str = "",
    secure_statement: str = "",
    sample: Sample | None = None,
    parameters_trained: int | None = None,
    encrypted_fraction: float | None = None,
    virtual: Virtual | None = None,
    versions: Mapping[str, str] | None = None,
    machine: Mapping[str, Any] | None = None,
) -> Summary:
    """Adds up the rounds of a run, finished or not.

    Args:
      records: metrics of the rounds in order, round 0 first.
      name: the run's name.
      seed: the run's seed.
      privacy_statement: what is protected and how, in words.
      secure_statement: who can decrypt, in words.
      sample: a prompt and its answers before and after.
      parameters_trained: how many numbers a cloud uploads.
      encrypted_fraction: how much of them leaves a cloud encrypted or masked.
      virtual: money, goodput and bytes in virtual time.
      versions: package versions.
      machine: what it ran on.
    """
    names = list(dict.fromkeys(cloud for record in records for cloud in record.get("clouds", {})))
    last: RoundRecord = records[-1] if records else {}
    return Summary(
        name=name,
        rounds=last.get("round", 0),
        seed=seed,
        clouds={cloud: _cloud(records, cloud) for cloud in names},
        epsilon=last.get("epsilon"),
        epsilon_reason=last.get("epsilon_reason", ""),
        delta=last.get("delta"),
        privacy_statement=privacy_statement,
        secure_statement=secure_statement,
        uplink_bytes=int(_total(records, "uplink_bytes")),
        downlink_bytes=int(_total(records, "downlink_bytes")),
        seconds={stage: _total(records, f"seconds_{stage}") for stage in STAGES},
        seconds_total=_total(records, "seconds_round"),
        seconds_virtual=_total(records, "seconds_virtual"),
        tokens=int(_total(records, "tokens")),
        sample=sample,
        parameters_trained=parameters_trained,
        encrypted_fraction=encrypted_fraction,
        secure_share=_secure_share(records),
        virtual=virtual,
        versions=dict(versions or {}),
        machine=dict(machine or {}),
    )


def read(path: Path) -> Summary | None:
    """The summary of a run that has ended, None for one that has not.

    Raises:
      UserError: the file is there and is not a summary.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        del content["loss_fell_in_every_cloud"]  # computed again from the measured numbers
        content["clouds"] = {
            name: CloudSummary(**cloud) for name, cloud in content["clouds"].items()
        }
        if content["sample"] is not None:
            content["sample"] = Sample(**content["sample"])
        if content.get("virtual") is not None:
            content["virtual"] = Virtual.from_json(content["virtual"])
        return Summary(**content)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path} is damaged or of another version; resume the run to write it again"
        ) from None


def _cloud(records: Sequence[RoundRecord], name: str) -> CloudSummary:
    own = [record["clouds"][name] for record in records if name in record.get("clouds", {})]
    losses = [part["loss_eval_nats"] for part in own if part.get("loss_eval_nats") is not None]
    last = own[-1]
    return CloudSummary(
        loss_before_nats=own[0].get("loss_eval_nats"),
        loss_after_nats=losses[-1] if len(losses) > 1 else None,
        examples=int(_total(own, "examples")),
        uplink_bytes=int(_total(own, "uplink_bytes")),
        downlink_bytes=int(_total(own, "downlink_bytes")),
        epsilon=last.get("epsilon"),
        epsilon_reason=last.get("epsilon_reason", ""),
        seconds_link=_total(own, "seconds_link"),
    )


def _secure_share(records: Sequence[RoundRecord]) -> float | None:
    rounds = [record for record in records if record["round"] > 0]
    whole = _total(rounds, "seconds_round")
    secure = sum(_total(rounds, f"seconds_{stage}") for stage in SECURE_STAGES)
    return secure / whole if whole else None


def _total(records: Sequence[Mapping[str, Any]], key: str) -> float:
    return sum(record.get(key) or 0 for record in records)
