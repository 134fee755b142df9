"""From the data of each cloud to the rows that its clients train on."""

from typing import Protocol

from fedjax_llm.data import Corpus, CorpusSpec, Mapping, load_corpus, read_cloud
from fedjax_llm.models import DecoderConfig, Tokenizer
from fedjax_llm.runs.build import dividing, harmonising
from fedjax_llm.runs.events import Note, OnEvent, Stage
from fedjax_llm.runs.sections.schema import RunFile
from fedjax_llm.runs.sections.types import MappingSection

LABEL_FLIP = "label-flip"


class Outline(Protocol):
    """What the data need of a model; `Model` has it, and weights besides."""

    @property
    def config(self) -> DecoderConfig: ...
    @property
    def tokenizer(self) -> Tokenizer: ...


def corpora(run_file: RunFile, base: Outline, on_event: OnEvent) -> list[Corpus]:
    """Reads every cloud's data and tells what became of its rows."""
    training, attack = run_file.training, run_file.attack
    harmonising.check_tokenizers(run_file, base.tokenizer)
    steps = harmonising.settings(run_file)
    specs = {
        cloud.name: CorpusSpec(
            sources=data.sources,
            mapping=mapping(data.mapping),
            limit=data.limit,
            eval_fraction=data.eval_fraction,
            template=training.template,
            system=training.system_prompt,
            length=training.sequence_length,
            packing=training.packing,
            by_user=run_file.privacy.unit == "user",
            seed=run_file.seed,
            clients=cloud.clients,
            partition=dividing.way(cloud.partition, cloud),
            flipped=attack is not None
            and attack.name == LABEL_FLIP
            and cloud.name in attack.clouds,
            harmonise=steps[cloud.name],
        )
        for cloud in run_file.clouds
        if (data := cloud.data or run_file.partition) is not None
    }
    if run_file.partition is None:
        rows = {name: read_cloud(name, spec, base.tokenizer) for name, spec in specs.items()}
    else:
        # What is read and how it is rendered is the same for all clouds.
        whole = specs[run_file.clouds[0].name]
        rows = dividing.divided(run_file, whole, base.tokenizer, base.config, on_event)
    rows = harmonising.without_common(run_file, rows, on_event)
    found = []
    for name, spec in specs.items():
        corpus = load_corpus(name, spec, base.tokenizer, base.tokenizer.pad_id, read=rows[name])
        lines = corpus.report.lines()
        on_event(Stage("data", f"{name}: {lines[0]}"))
        for line in lines[2:]:
            on_event(Note(f"{name}: {line}"))
        found.append(corpus)
    return found


def mapping(section: MappingSection | None) -> Mapping | None:
    """How the columns of files become records; None where there are no files."""
    if section is None:
        return None
    columns = section.model_dump(exclude_none=True, exclude={"labels"})
    # `labels` translates the cells of the answer's column: numbers or codes to words.
    values = {section.answer: section.labels} if section.labels else {}
    return Mapping(**columns, values=values)
