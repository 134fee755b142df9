"""Dividing: from [partition] to the rows of each cloud, and from a way's name to the way."""

from fedjax_llm.data import (
    ByKey,
    CorpusSpec,
    Dirichlet,
    Division,
    Iid,
    Quantity,
    ReadRows,
    Shards,
    TextTokenizer,
    Way,
    divide_rows,
    read_rows_of,
    token_counts,
)
from fedjax_llm.errors import UserError
from fedjax_llm.models import DecoderConfig
from fedjax_llm.runs.build.cloud_profiles import profiles
from fedjax_llm.runs.events import Note, OnEvent
from fedjax_llm.runs.sections.partition import DividingKeys, How
from fedjax_llm.runs.sections.schema import RunFile


def way(how: How, keys: DividingKeys) -> Way:
    """The way that a run file names, with what it takes."""
    granularity = keys.granularity
    if how == "iid":
        return Iid(granularity=granularity)
    if how == "dirichlet":
        return Dirichlet(concentration=keys.concentration, granularity=granularity)
    if how == "quantity":
        return Quantity(
            concentration=keys.concentration, exponent=keys.exponent, granularity=granularity
        )
    if how == "shards":
        return Shards(shards=keys.shards, granularity=granularity)
    return ByKey(key=keys.key or "label", granularity=granularity)


def shares(run_file: RunFile, config: DecoderConfig) -> tuple[float, ...] | None:
    """The sizes to aim for, by [partition] balance; None leaves them to the way.

    Args:
      run_file: With [partition].
      config: Of the model, from which a speed in FLOP/s becomes one in tokens.
    """
    section = run_file.partition
    assert section is not None
    if section.balance is None:
        return None
    if section.balance == "equal":
        return (1.0,) * len(run_file.clouds)
    computes = [profile.compute for profile in profiles(run_file, config)]
    # The run file was refused otherwise.
    return tuple(compute.speed for compute in computes if compute is not None)


def divided(
    run_file: RunFile,
    whole: CorpusSpec,
    tokenizer: TextTokenizer,
    config: DecoderConfig,
    on_event: OnEvent,
) -> dict[str, ReadRows]:
    """Reads the corpus of [partition] and divides it among the clouds.

    Args:
      run_file: With [partition].
      whole: What to read, and how its rows are rendered.
      tokenizer: Of the base model.
      config: Of the base model.
      on_event: Is told what became of the rows before they are divided.

    Raises:
      UserError: Any mistake in the section or in the data, in one line that names the section.
    """
    section = run_file.partition
    assert section is not None
    try:
        read = read_rows_of(whole, tokenizer)
        for line in read.lines():
            on_event(Note(f"[partition]: {line}"))
        division = Division(
            way(section.how, section),
            shares(run_file, config),
            run_file.seed if section.seed is None else section.seed,
        )
        parts = divide_rows(
            read,
            [cloud.name for cloud in run_file.clouds],
            division,
            eval_fraction=section.eval_fraction,
            seed=run_file.seed,
            sizes=(
                token_counts(read.records, whole, tokenizer)
                if section.measure == "tokens"
                else None
            ),
        )
    except UserError as error:
        raise UserError(f"[partition]: {error}") from error
    return {cloud.name: part for cloud, part in zip(run_file.clouds, parts, strict=True)}
