"""[harmonise]: what is done to every cloud's data before it is divided and counted.

Without the section nothing is done. With it, cleaning is on and exact duplicates go, which loses no
information; all else is off until it is asked for.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedjax_llm.runs.sections import toml_errors
from fedjax_llm.runs.sections.problem import problem
from fedjax_llm.runs.sections.types import Count, NotNegative, Section, Text, Texts

# Names of a label; empty if the clouds use the common one.
Names = Annotated[tuple[Text, ...], Field(strict=False)]
Labels = dict[str, Names]

# As the packages below have them, which would bring JAX; a test compares the two.
Kind = Literal["off", "exact", "near"]
Compare = Literal["record", "prompt"]
How = Literal["off", "keyed", "private"]
By = Literal["source", "label"]
Unknown = Literal["refuse", "drop"]
Neighbours = Literal["before", "after"]


class MixSection(Section):
    """Shares of the domains (`by`) among a cloud's training rows.

    By `weights`, or by `temperature` T as n^(1/T) over their sizes n. `repeat` copies rows of
    scarce domains; otherwise rows of the others are left out.
    """

    by: By = "source"
    temperature: Annotated[float, Field(ge=1)] | None = None
    weights: dict[str, NotNegative] | None = None
    repeat: bool = False

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if (self.temperature is None) == (self.weights is None):
            given = "neither is" if self.weights is None else "both are"
            raise problem((), f"takes either temperature or weights, {given} given")
        if self.weights is not None and not any(self.weights.values()):
            raise problem(("weights",), "must have one above 0")
        return self


class CloudHarmoniseSection(Section):
    """[clouds.harmonise]: what is this cloud's own; keys that are left out are those of the run.

    `labels` adds the cloud's own names to the common labels. `tokenizer` is the hash that the cloud
    declares (`fedjax-llm data tokenizer FOLDER`); a run with another tokenizer is refused.
    """

    clean: bool | None = None
    min_characters: Count | None = None
    max_characters: Count | None = None
    min_tokens: Count | None = None
    max_tokens: Count | None = None
    languages: Texts | None = None
    labels: Labels | None = None
    labels_file: Text | None = None
    unknown_labels: Unknown | None = None
    mix: MixSection | None = None
    tokenizer: Text | None = None


class HarmoniseSection(Section):
    """[harmonise]: for all clouds; what a cloud has of its own is in [clouds.harmonise].

    `duplicates` inside a cloud are "off", "exact" (the same text) or "near" (equal but for case and
    spacing, or at least `threshold` alike in their 5-character pieces, found with `hashes` MinHash
    functions);
    `compare` says whether the answer counts. `across` finds the same between clouds: "keyed" by
    hashes under a shared secret, "private" by an intersection that shows no text.

    `neighbours` says which data the privacy guarantee is about: "before", the rows as they were
    read, which near duplicates and duplicates across clouds do not go with; or "after", the rows
    that harmonisation leaves.
    """

    clean: bool = True
    min_characters: Count | None = None
    max_characters: Count | None = None
    min_tokens: Count | None = None
    max_tokens: Count | None = None
    languages: Texts | None = None
    labels: Labels | None = None
    labels_file: Text | None = None
    unknown_labels: Unknown = "refuse"
    duplicates: Kind = "exact"
    compare: Compare = "record"
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.8
    hashes: Annotated[int, Field(ge=1, le=1024)] = 128
    across: How = "off"
    mix: MixSection | None = None
    tokenizer: Text | None = None
    neighbours: Neighbours = "before"

    @model_validator(mode="after")
    def _together(self) -> Self:
        for key in ("threshold", "hashes"):
            if self.duplicates != "near" and getattr(self, key) != _default(key):
                raise problem((key,), 'goes with duplicates = "near"; remove it', got=False)
        if self.duplicates == "off" and self.across != "off":
            raise problem(
                ("across",), 'needs duplicates = "exact" or "near", which say what a duplicate is'
            )
        return self


def check_harmonise(
    section: HarmoniseSection | None,
    clouds: Sequence[CloudHarmoniseSection | None],
    unit: str,
) -> None:
    """Refuses what does not go together with the clouds and with privacy.

    A guarantee for a unit holds for what the plan counts: the rows after harmonisation. It holds
    for the rows before only if one unit more or less changes nothing but its own rows. Steps that
    look at one row do that; duplicates let rows push each other out (arXiv 2309.05610).

    Args:
      section: Of the run, or None.
      clouds: Of each cloud, or None.
      unit: [privacy] unit.
    """
    for index, own in enumerate(clouds):
        if own is not None and section is None:
            raise problem(
                ("clouds", index, "harmonise"), "goes with [harmonise]; add it", got=False
            )
    if section is None:
        return
    if section.across != "off" and len(clouds) < 2:
        raise problem(("harmonise", "across"), "needs at least two clouds; remove it")
    mixes: list[tuple[toml_errors.Path, MixSection | None]] = [(("harmonise",), section.mix)]
    mixes += [(("clouds", index, "harmonise"), own.mix) for index, own in enumerate(clouds) if own]
    for path, mix in mixes:
        if mix is not None and mix.repeat and unit in ("example", "user"):
            raise problem(
                (*path, "mix", "repeat"),
                f'gives a row with r copies r times the influence that unit "{unit}" counts; '
                "remove it: rows of the other domains are then left out",
                refused=True,
            )
    if section.neighbours == "after" or unit == "none":
        return
    key, what = None, ""
    if section.across != "off":
        key, what = "across", "a cloud's row decides whether another cloud keeps its own"
    elif section.duplicates == "near" and unit in ("example", "user"):
        key, what = "duplicates", "a row decides which rows like it stay"
    elif section.duplicates == "exact" and unit == "user":
        key, what = "duplicates", "one user's row takes the place of another's"
    elif section.duplicates == "exact" and section.compare == "prompt" and unit == "example":
        key, what = "compare", "a row decides which answer to its question stays"
    if key is not None:
        raise problem(
            ("harmonise", key),
            f'does not go with unit "{unit}" for the rows as they were read: {what}; change it, '
            'or set neighbours = "after" to protect the rows that are left',
            refused=True,
        )


def _default(key: str) -> object:
    return HarmoniseSection.model_fields[key].default
