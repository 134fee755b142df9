"""Labels: each cloud's own names of the classes become the common ones."""

import difflib
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from fedjax_llm.data.harmonise.ledger import Step, counted
from fedjax_llm.data.records import Record
from fedjax_llm.errors import UserError

Unknown = Literal["refuse", "drop"]
_SHOWN = 5


@dataclass(frozen=True)
class LabelMap:
    """The common set of labels, and what clouds call them.

    Names are compared without regard to case, spacing and Unicode compatibility forms; a common
    label stands for itself.

    Attributes:
      labels: For each common label, the other names of it: `{"positive": ("bullish", "2")}`.

    Raises:
      UserError: No label, an empty name, or one name for two labels.
    """

    labels: Mapping[str, Sequence[str]]
    _common: dict[str, str] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Checks that every name stands for one label."""
        if not self.labels:
            raise UserError("labels is empty; name the common labels")
        for label, names in self.labels.items():
            for name in (label, *names):
                key = fold_label(name)
                if not key:
                    raise UserError(f"labels: {label!r} has an empty name; remove it")
                other = self._common.setdefault(key, label)
                if other != label:
                    raise UserError(
                        f"labels: {name!r} stands for {other!r} and for {label!r}; remove one"
                    )

    def common(self, name: str) -> str | None:
        """The common label of a name, or None."""
        return self._common.get(fold_label(name))

    def nearest(self, name: str) -> str | None:
        """The label whose name is most like an unknown one."""
        near = difflib.get_close_matches(fold_label(name), list(self._common), n=1, cutoff=0.6)
        return self._common[near[0]] if near else None


def fold_label(name: str) -> str:
    """A name as it is compared.

    >>> fold_label("  Very\tPOSITIVE ")
    'very positive'
    """
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def read_label_map(path: str | Path) -> LabelMap:
    """Reads a TOML file of lines such as `positive = ["bullish", "2"]`.

    Raises:
      UserError: The file is missing, not TOML, or not of that form.
    """
    path = Path(path)
    try:
        data = tomllib.loads(path.read_bytes().decode())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"cannot read the labels {path}: {reason}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    for label, names in data.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(
                f'{path}: {label} must be a list of texts, as {label} = ["name", "other name"]'
            )
    try:
        return LabelMap(data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def align_labels(
    records: Sequence[Record], labels: LabelMap, unknown: Unknown = "refuse"
) -> tuple[list[Record], Step]:
    """Gives every labelled record its common label.

    Where the answer is the label itself, it is aligned too: it is what the model learns to say.
    Records without a label stay as they are. What becomes of a row depends on that row alone.

    Args:
      records: N records of one cloud.
      labels: The common labels and their other names.
      unknown: What to do with a label that the map does not know.

    Returns:
      The records in their order, and the count.

    Raises:
      UserError: Unknown labels, with their names, under "refuse".
    """
    found = {record.label for record in records if fold_label(record.label)}
    common = {label: labels.common(label) for label in found}
    strange = Counter(r.label for r in records if r.label in common and common[r.label] is None)
    if strange and unknown == "refuse":
        raise UserError(_unknown_labels(strange, labels))
    kept = []
    changed = 0
    for record in records:
        if record.label not in common:
            kept.append(record)
            continue
        label = common[record.label]
        if label is None:
            continue
        says_label = fold_label(record.answer) == fold_label(record.label)
        aligned = replace(record, label=label, answer=label if says_label else record.answer)
        changed += aligned != record
        kept.append(aligned)
    dropped = counted({f"unknown label {name[:40]!r}": n for name, n in strange.most_common()})
    return kept, Step("labels", len(records), dropped, changed)


def _unknown_labels(strange: Counter[str], labels: LabelMap) -> str:
    shown = ", ".join(f"{name[:40]!r} ({n} rows)" for name, n in strange.most_common(_SHOWN))
    more = f" and {len(strange) - _SHOWN} more" if len(strange) > _SHOWN else ""
    first = next(iter(strange.most_common()))[0]
    near = labels.nearest(first)
    hint = f"; is {first[:40]!r} {near!r}?" if near else ""
    return (
        f"unknown labels {shown}{more}; the common labels are {', '.join(labels.labels)}{hint} "
        f'Add the names to labels, or set unknown_labels = "drop"'
    )
