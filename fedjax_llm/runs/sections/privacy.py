"""[privacy]: what is protected, by which noise and sampling, and what would protect nothing."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedjax_llm.runs.sections.problem import problem
from fedjax_llm.runs.sections.types import Count, NotNegative, Positive, Section

CORRELATED = ("banded", "buffered", "lambda-cgd")
INTEGER = ("discrete-gaussian", "skellam")


class AdaptiveSection(Section):
    """[privacy.adaptive]: the clip norm follows a quantile of the norms, from `clip_norm` on.

    `count_stddev`, the noise on the count of units within the norm, is a twentieth of the expected
    units if left out, but at least the noise multiplier.
    """

    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    learning_rate: Positive = 0.2
    count_stddev: Positive | None = None


class PrivacySection(Section):
    """[privacy]: the unit that is protected, the mechanism, and how units are sampled.

    | noise | what it is | its own keys |
    |---|---|---|
    | gaussian | independent Gaussian noise | |
    | banded | BandMF: noise that later noise takes off, over `period` steps | `bands` |
    | buffered | BLT: the same over all steps | `buffers` |
    | lambda-cgd | takes off a part of the last step's noise | `cancelled` |
    | discrete-gaussian, skellam | shares of all clients, inside the sum; unit client | `dropouts`,
      `colluding` |

    `colluding` clients may pool their shares with whoever reads the sum; left out it is those of
    the largest cloud, for each cloud knows its own. `trust` of unit client: "central", the server
    adds the noise; "distributed", the clients do, together; "local", each the whole of it. A unit's
    turn to be sampled comes every `period` steps (rounds, for unit client). `clip_norm_from` =
    "data" owns up to a norm that was tuned on the private data, which is refused. `clip`
    "per-factor" and "per-layer" part the clip norm evenly between the A and B factors, or among
    layers, for units example and user. A run stops before it would exceed `budget`, an epsilon.
    `gradients` "ghost" clips without holding the gradient of any example, which takes less memory
    where ranks are long against sequences; rules of plain factors and one rank have it.
    `generator` "system" takes noise and samples from a secret key in the run folder instead of the
    seed; without it nobody can repeat them or take them off.
    """

    unit: Literal["none", "example", "user", "client"] = "none"
    clip_norm: Positive = 1.0
    clip_norm_from: Literal["public", "data"] = "public"
    clip: Literal["joint", "per-factor", "per-layer"] = "joint"
    adaptive: AdaptiveSection | None = None
    gradients: Literal["vmap", "ghost"] = "vmap"
    noise_multiplier: NotNegative = 1.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    sampling: Literal["poisson", "full", "fixed"] = "poisson"
    client_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    period: Count = 1
    noise: Literal[
        "gaussian", "banded", "buffered", "lambda-cgd", "discrete-gaussian", "skellam"
    ] = "gaussian"
    bands: Count | None = None
    buffers: Annotated[int, Field(ge=1, le=10)] = 3
    cancelled: Annotated[float, Field(ge=0, lt=1)] = 0.5
    trust: Literal["central", "distributed", "local"] | None = None
    dropouts: Annotated[int, Field(ge=0)] = 0
    colluding: Annotated[int, Field(ge=0)] | None = None
    adjacency: Literal["add-remove", "replace"] = "add-remove"
    generator: Literal["seed", "system"] = "seed"
    budget: Positive | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.unit == "none":
            return self
        if self.sampling == "fixed":
            raise problem(
                ("sampling",),
                "fixed-size batches certify no epsilon; use poisson or full, or unit none",
                refused=True,
            )
        if self.unit == "client" and self.sampling == "full" and self.client_rate != 1:
            raise problem(
                ("client_rate",),
                f'must be 1 with sampling = "full", got {self.client_rate:g}; '
                'use sampling = "poisson"',
            )
        if self.adaptive is not None and self.clip != "joint":
            raise problem(
                ("clip",), 'must be "joint" with [privacy.adaptive], which moves one norm'
            )
        self._check_trust()
        self._check_unread()
        return self

    def _check_trust(self) -> None:
        integer = self.noise in INTEGER
        if integer and self.unit != "client":
            raise problem(
                ("noise",),
                f'"{self.noise}" is added by all clients to the integers of one sum a round, which '
                f'is unit client; use "gaussian" with unit {self.unit}',
                got=False,
            )
        if self.unit != "client" and self.trust not in (None, "local"):
            raise problem(
                ("trust",),
                f'must be "local" with unit {self.unit}: each cloud adds the whole noise in every '
                "step",
            )
        if integer and self.trust == "central":
            raise problem(
                ("trust",), f'the clients add "{self.noise}" noise; use "distributed" or "local"'
            )
        if self.unit == "client" and not integer and self.trust in ("distributed", "local"):
            raise problem(
                ("trust",),
                f'needs integer noise, which adds up exactly: noise = "skellam" or '
                f'"discrete-gaussian", not "{self.noise}"',
            )

    def _check_unread(self) -> None:
        shares = self.noise in INTEGER and self.trust != "local"
        unread = {
            "bands": (self.noise != "banded", 'noise = "banded"'),
            "buffers": (self.noise != "buffered", 'noise = "buffered"'),
            "cancelled": (self.noise != "lambda-cgd", 'noise = "lambda-cgd"'),
            "dropouts": (not shares, 'trust = "distributed"'),
            "colluding": (not shares, 'trust = "distributed"'),
            "client_rate": (self.unit != "client", "unit client"),
            "clip": (self.unit == "client", "unit example or user"),
            "gradients": (self.unit == "client", "unit example or user"),
        }
        for key, (idle, what) in unread.items():
            if idle and getattr(self, key) != PrivacySection.model_fields[key].default:
                raise problem((key,), f"goes with {what}; remove it", got=False)


def no_audit(privacy: PrivacySection) -> str | None:
    """Why no audit is written for these settings, with the cure; None if one is."""
    reasons = {
        'unit "none" promises nothing': privacy.unit == "none",
        f'noise "{privacy.noise}" is not independent Gaussian noise': privacy.noise != "gaussian",
        f"a period of {privacy.period} gives turns": privacy.period != 1,
        "the clip norm is adaptive": privacy.adaptive is not None,
        'adjacency is "replace"': privacy.adjacency == "replace",
    }
    why = next((reason for reason, there in reasons.items() if there), None)
    return why and (
        f'{why}; audits take a unit, noise = "gaussian", period = 1, a fixed clip norm and '
        "neighbours that are added or removed"
    )
