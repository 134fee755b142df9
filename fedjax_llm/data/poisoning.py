"""Poisoning: the data of a hostile client, to test robust aggregation with."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from fedjax_llm.data.records import Record
from fedjax_llm.data.splitting import keyed_hash
from fedjax_llm.errors import UserError


def flip_labels(records: Sequence[Record], seed: int) -> list[Record]:
    """The label-flip attack: every record gets the answer and the label of another class.

    The labels stand in a cycle, ordered by a keyed hash (BLAKE2b). A record gets the next label,
    and an answer that some record with that label has; a label whose every answer equals the
    record's own is passed over, its own label coming last. So every answer changes, and every
    label too wherever another label has a different answer. Where all records share one label,
    such as none, each distinct answer is its own class: answers go round a cycle of the distinct
    answers, and labels stay.

    What becomes of a record depends on the record, the seed and the set of pairs of label and
    answer, not on the order of the rows or on the machine. Prompt, context and group stay. Plain
    text (no prompt, no context) is merely exchanged for other plain text, which is no attack.

    Args:
      records: The records of the hostile client; an empty label beside others is a class.
      seed: Any integer.

    Returns:
      One poisoned record for each of `records`, in their order.

    Raises:
      UserError: Fewer than two distinct answers, so that none can be wrong.
    """
    if len({record.answer for record in records}) < 2:
        known = f"all are {records[0].answer[:40]!r}" if records else "there is none"
        raise UserError(
            f"{len(records)} records cannot be poisoned by flipping labels: {known}; choose a "
            f"client with at least two distinct answers"
        )
    labelled = len({record.label for record in records}) > 1
    found: defaultdict[str, set[str]] = defaultdict(set)
    for record in records:
        found[record.label if labelled else record.answer].add(record.answer)
    # Sorted by name as well, so that a collision of hashes cannot bring the row order in.
    cycle = sorted(found, key=lambda name: (keyed_hash(f"flip\0{name}", seed), name))
    answers = {name: sorted(found[name]) for name in cycle}
    place = {name: index for index, name in enumerate(cycle)}

    def flipped(record: Record) -> Record:
        start = place[record.label if labelled else record.answer] + 1
        # Chosen by content, so that the answers of a class are spread over its victims.
        text = f"donor\0{record.prompt}\0{record.context}\0{record.answer}"
        choice = int.from_bytes(keyed_hash(text, seed), "big")
        for step in range(len(cycle)):
            name = cycle[(start + step) % len(cycle)]
            donors = answers[name]
            # Donors are distinct, so of two in a row at most one is the record's own answer.
            for answer in (donors[choice % len(donors)], donors[(choice + 1) % len(donors)]):
                if answer != record.answer:
                    return replace(record, answer=answer, label=name if labelled else record.label)
        raise AssertionError("two distinct answers exist")

    return [flipped(record) for record in records]
