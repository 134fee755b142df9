"""Data: from each cloud's own files to batches of tokens.

Rows are read (`readers`), mapped from a cloud's own columns to the common `Record` (`mapping`),
split so that no question is in training and in evaluation (`splitting`), rendered with the loss on
the answer (`rendering`) and laid out as rectangular batches (`packing`). `load_corpus` does all of
it for one cloud; `builtin` holds corpora that need no download.
"""

from .builtin import BUILTIN_NAMES as BUILTIN_NAMES
from .builtin import builtin_capacity as builtin_capacity
from .builtin import builtin_mapping as builtin_mapping
from .builtin import builtin_rows as builtin_rows
from .corpus import Corpus as Corpus
from .corpus import CorpusReport as CorpusReport
from .corpus import CorpusSpec as CorpusSpec
from .corpus import load_corpus as load_corpus
from .corpus import load_records as load_records
from .mapping import Mapping as Mapping
from .mapping import MappingReport as MappingReport
from .mapping import map_rows as map_rows
from .mapping import map_rows_counted as map_rows_counted
from .packing import to_batch as to_batch
from .partition import by_label as by_label
from .partition import dirichlet as dirichlet
from .partition import iid as iid
from .partition import partition as partition
from .partition import select as select
from .poisoning import flip_labels as flip_labels
from .readers import iter_rows as iter_rows
from .readers import read_rows as read_rows
from .records import Record as Record
from .records import normalise_text as normalise_text
from .rendering import Rendered as Rendered
from .rendering import RenderReport as RenderReport
from .rendering import TextTokenizer as TextTokenizer
from .rendering import prompt_text as prompt_text
from .rendering import render as render
from .rendering import render_all as render_all
from .splitting import group_key as group_key
from .splitting import split_by_group as split_by_group
from .statistics import TokenStatistics as TokenStatistics
from .statistics import describe as describe

__all__ = [
    "BUILTIN_NAMES",
    "Corpus",
    "CorpusReport",
    "CorpusSpec",
    "Mapping",
    "MappingReport",
    "Record",
    "RenderReport",
    "Rendered",
    "TextTokenizer",
    "TokenStatistics",
    "builtin_capacity",
    "builtin_mapping",
    "builtin_rows",
    "by_label",
    "describe",
    "dirichlet",
    "flip_labels",
    "group_key",
    "iid",
    "iter_rows",
    "load_corpus",
    "load_records",
    "map_rows",
    "map_rows_counted",
    "normalise_text",
    "partition",
    "prompt_text",
    "read_rows",
    "render",
    "render_all",
    "select",
    "split_by_group",
    "to_batch",
]
