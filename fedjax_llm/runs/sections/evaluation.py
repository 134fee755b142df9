"""[evaluation] and [audit]: what a run measures of its model, and of its own promises."""

from typing import Annotated

from pydantic import Field

from fedjax_llm.runs.sections.types import Count, Positive, Section, Text


class EvaluationSection(Section):
    """[evaluation]: held-out loss every `every_rounds`, and one sample answer before and after.

    `aggregation_error` compares each round's result with the mean of the clients' products, which
    takes memory for every client's adapter. The run ends after the first evaluated round whose
    held-out loss, the mean over the clouds, is at most `target_loss` nats; with a privacy unit that
    end tells about held-out rows, which no epsilon covers.
    """

    every_rounds: Count = 1
    examples_per_cloud: Count = 32
    microbatch: Count = 8
    prompt: Text | None = None
    max_new_tokens: Count = 64
    aggregation_error: bool = True
    target_loss: Positive | None = None


class AuditSection(Section):
    """[audit]: after the last round, a twin of the run with `canaries` bounds epsilon from below.

    `rows` real rows of one cloud stand among them, at most. Sampled as thinly as in many runs,
    canaries show little: with `full` all take part in every step of the twin, whose epsilon is
    larger then, under the run's own clip and noise. `rounds` of the twin are the run's if left out.
    `inversion` attacks the text of one row from its gradient as well, without protection and with
    that of the run (units example, user).
    """

    canaries: Annotated[int, Field(ge=8)] = 500
    rows: Count = 64
    full: bool = False
    rounds: Count | None = None
    inversion: bool = False
