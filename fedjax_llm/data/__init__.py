"""Data: from each cloud's own files to batches of tokens.

Rows are read (`readers`), mapped from a cloud's own columns to the common `Record` (`mapping`),
split so that no question is in training and in evaluation (`splitting`), rendered with the loss on
the answer (`rendering`) and laid out as rectangular batches (`packing`). In between, `harmonise`
makes what clouds keep in their own ways into data for one model. `load_corpus` does all of it for
one cloud; `builtin` holds corpora that need no download.
"""

from .builtin import BUILTIN_NAMES as BUILTIN_NAMES
from .builtin import builtin_capacity as builtin_capacity
from .builtin import builtin_mapping as builtin_mapping
from .builtin import builtin_rows as builtin_rows
from .cloud_records import ReadRows as ReadRows
from .cloud_records import load_records as load_records
from .cloud_records import read_cloud as read_cloud
from .cloud_records import read_rows_of as read_rows_of
from .corpus import Corpus as Corpus
from .corpus import load_corpus as load_corpus
from .corpus_report import CorpusReport as CorpusReport
from .corpus_spec import CorpusSpec as CorpusSpec
from .division import Division as Division
from .division import divide_rows as divide_rows
from .division import token_counts as token_counts
from .mapping import Mapping as Mapping
from .mapping import MappingReport as MappingReport
from .mapping import map_rows as map_rows
from .mapping import map_rows_counted as map_rows_counted
from .packing import to_batch as to_batch
from .partition import ByKey as ByKey
from .partition import Dirichlet as Dirichlet
from .partition import Iid as Iid
from .partition import Quantity as Quantity
from .partition import Shards as Shards
from .partition import Way as Way
from .partition import by_key as by_key
from .partition import by_label as by_label
from .partition import by_quantity as by_quantity
from .partition import by_shards as by_shards
from .partition import dirichlet as dirichlet
from .partition import dirichlet_to_size as dirichlet_to_size
from .partition import iid as iid
from .partition import partition as partition
from .partition import select as select
from .partition_plot import partition_svg as partition_svg
from .partition_statistics import ClientStatistics as ClientStatistics
from .partition_statistics import PartitionStatistics as PartitionStatistics
from .partition_statistics import partition_statistics as partition_statistics
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
    "ByKey",
    "ClientStatistics",
    "Corpus",
    "CorpusReport",
    "CorpusSpec",
    "Dirichlet",
    "Division",
    "Iid",
    "Mapping",
    "MappingReport",
    "PartitionStatistics",
    "Quantity",
    "ReadRows",
    "Record",
    "RenderReport",
    "Rendered",
    "Shards",
    "TextTokenizer",
    "TokenStatistics",
    "Way",
    "builtin_capacity",
    "builtin_mapping",
    "builtin_rows",
    "by_key",
    "by_label",
    "by_quantity",
    "by_shards",
    "describe",
    "dirichlet",
    "dirichlet_to_size",
    "divide_rows",
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
    "partition_statistics",
    "partition_svg",
    "prompt_text",
    "read_cloud",
    "read_rows",
    "read_rows_of",
    "render",
    "render_all",
    "select",
    "split_by_group",
    "to_batch",
    "token_counts",
]
