"""What the sections of a run file are made of: the base of a section and the types of its keys."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedjax_llm.runs.sections import toml_errors
from fedjax_llm.runs.sections.problem import problem

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


class MappingSection(Section):
    """Column names (or `"{column} text"` templates) from a cloud's schema to the record.

    Without `prompt`, rows are plain text to be learnt as it is.
    """

    prompt: Text | None = None
    answer: str = Field(min_length=1)
    context: str | None = None
    label: str | None = None
    group: str | None = None
    user: str | None = None
    source: str | None = None
    labels: dict[str, str] | None = None


def check_sources(
    key: toml_errors.Path, sources: tuple[str, ...], mapping: MappingSection | None
) -> None:
    """Embedded corpora exist, and files come with a mapping of their columns.

    Args:
      key: of the sources, from the section that is validated.
      sources: files, folders or `builtin:NAME`.
      mapping: for the files and folders.
    """
    for index, source in enumerate(sources):
        if not source.startswith(BUILTIN_PREFIX):
            if mapping is None:
                raise problem(
                    (),
                    "needs a mapping from columns to prompt and answer, "
                    'as mapping = {prompt = "question", answer = "answer"}',
                )
            continue
        if source.removeprefix(BUILTIN_PREFIX) not in BUILTIN_CORPORA:
            valid = ", ".join(BUILTIN_PREFIX + corpus for corpus in BUILTIN_CORPORA)
            raise problem((*key, index), f"must be a file, a folder or one of {valid}")
