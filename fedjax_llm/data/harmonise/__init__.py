"""Harmonisation: data that clouds keep in their own ways becomes data for one model.

Inside a cloud: cleaning, common labels, filters of length and language, exact and near duplicates,
shares of domains. Between clouds: duplicates that several hold, found without showing text, and
agreement on one tokenizer. Every step is a pure function from rows to rows and a `Step` that counts
what it did; a `Ledger` of steps adds up or does not exist.
"""

from .across import Meeting as Meeting
from .across import drop_across as drop_across
from .blinding import Commutative as Commutative
from .blinding import Keyed as Keyed
from .cleaning import clean_records as clean_records
from .cleaning import clean_text as clean_text
from .conversations import open_conversations as open_conversations
from .duplicates import Likeness as Likeness
from .duplicates import drop_duplicates as drop_duplicates
from .duplicates import find_duplicates as find_duplicates
from .inspection import Inspection as Inspection
from .inspection import inspect_rows as inspect_rows
from .labels import LabelMap as LabelMap
from .labels import align_labels as align_labels
from .labels import read_label_map as read_label_map
from .languages import filter_languages as filter_languages
from .languages import language_of as language_of
from .ledger import Ledger as Ledger
from .ledger import Step as Step
from .lengths import LengthLimits as LengthLimits
from .lengths import filter_lengths as filter_lengths
from .mixing import Mix as Mix
from .mixing import mix_records as mix_records
from .party import Party as Party
from .party import meet as meet
from .pipeline import Harmonise as Harmonise
from .pipeline import harmonise_rows as harmonise_rows
from .pipeline import harmonise_sides as harmonise_sides
from .suggestions import Suggestion as Suggestion
from .suggestions import suggest_mapping as suggest_mapping
from .tokenizer_identity import TokenizerIdentity as TokenizerIdentity
from .tokenizer_identity import check_agreement as check_agreement
from .tokenizer_identity import identify as identify

__all__ = [
    "Commutative",
    "Harmonise",
    "Inspection",
    "Keyed",
    "LabelMap",
    "Ledger",
    "LengthLimits",
    "Likeness",
    "Meeting",
    "Mix",
    "Party",
    "Step",
    "Suggestion",
    "TokenizerIdentity",
    "align_labels",
    "check_agreement",
    "clean_records",
    "clean_text",
    "drop_across",
    "drop_duplicates",
    "filter_languages",
    "filter_lengths",
    "find_duplicates",
    "harmonise_rows",
    "harmonise_sides",
    "identify",
    "inspect_rows",
    "language_of",
    "meet",
    "mix_records",
    "open_conversations",
    "read_label_map",
    "suggest_mapping",
]
