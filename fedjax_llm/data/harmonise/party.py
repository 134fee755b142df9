"""Party: one cloud's side of finding duplicates that another cloud has too.

A party holds its own rows' values and nothing of the other's but messages. Values are MinHash bands
(near duplicates) or a hash of the whole text (exact ones), made with a seed that all clouds share;
two rows are duplicates if they share at least `shared` values. The values never leave the party:
messages hold elements that `blinding` has disguised, and places.

What each party learns, beyond its own rows:

1. how many distinct values the other has, rounded up by `padded`;
2. which of its own values the other has too;
3. for each of the other's rows with at least `shared` of these, in random order, which ones: the
   row has no name and no place, but its likeness to one's own rows can be estimated;
4. from `keeping`, which of these rows the other drops.

Nothing else follows from the messages for a party that follows the protocol (see `blinding` for the
assumption). A party can always enter a guess as a row of its own and see whether it matches; that
is what an intersection is, and no protocol for it can prevent it.
"""

import hashlib
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedjax_llm.data.harmonise.blinding import Blinding
from fedjax_llm.data.harmonise.keeping import components, lost_here
from fedjax_llm.data.harmonise.messages import Elements, Groups

_DECOY_BYTES = 32


def padded(count: int) -> int:
    """How many elements are sent for so many: the next number with few significant bits.

    Padmé (arXiv 1806.03160, section 4): the size tells O(log log n) bits, for at most 12 percent
    more elements.

    >>> [padded(count) for count in (0, 1, 9, 100, 1000, 100_000)]
    [0, 1, 10, 104, 1024, 100352]
    """
    if count < 2:
        return count
    exponent = count.bit_length() - 1
    low_bits = exponent - exponent.bit_length()
    mask = (1 << max(low_bits, 0)) - 1
    return (count + mask) & ~mask


@dataclass
class Party:
    """One cloud in one meeting with another. Call the methods in the order of `messages`.

    Attributes:
      values: For each row, the distinct values by which it is compared.
      shared: How many common values make two rows duplicates, at least 1.
      blinding: The disguise, with a secret of this meeting.
      first: Whether this cloud is the first of the two, which only settles ties.
      seed: Public; of the names of components.
      rng: Shuffles, and makes decoys; the operating system's generator outside tests.
    """

    values: Sequence[Sequence[bytes]]
    shared: int
    blinding: Blinding
    first: bool
    seed: int
    rng: random.Random = field(default_factory=random.SystemRandom, repr=False)

    def __post_init__(self) -> None:
        """Puts the distinct values in an order that tells nothing of the rows."""
        # Sorted first: the order of rows in a file must not show, whatever the generator does.
        self._distinct = sorted({value for row in self.values for value in row})
        self._sent = padded(len(self._distinct))
        places = list(range(self._sent))
        self.rng.shuffle(places)
        self._place = dict(zip(self._distinct, places, strict=False))
        self._theirs: tuple[bytes, ...] = ()
        self._own_twice: tuple[bytes, ...] = ()

    def offer(self) -> bytes:
        """Own values, disguised once, with decoys in the places that are left."""
        elements = [b""] * self._sent
        for value, element in zip(self._distinct, self.blinding.first(self._distinct), strict=True):
            elements[self._place[value]] = element
        filled = [e or self.blinding.decoy(self.rng.randbytes(_DECOY_BYTES)) for e in elements]
        return Elements(tuple(filled)).to_bytes()

    def disguise(self, offer: bytes) -> bytes:
        """The other's elements, disguised by this party too, in their order.

        Raises:
          UserError: The message is damaged, or an element is not one.
        """
        self._theirs = tuple(self.blinding.second(Elements.from_bytes(offer).elements))
        return Elements(self._theirs).to_bytes()

    def receive(self, disguised: bytes) -> None:
        """Takes back its own elements, disguised by both.

        Raises:
          UserError: The message is damaged.
        """
        self._own_twice = Elements.from_bytes(disguised, expected=self._sent).elements

    def groups(self) -> bytes:
        """Where in the other's list the values of each own row are, for rows that can match."""
        rows = [tuple(sorted(hits.values())) for hits in self._hits() if len(hits) >= self.shared]
        self.rng.shuffle(rows)
        return Groups(tuple(rows)).to_bytes()

    def losses(self, groups: bytes) -> list[int]:
        """The own rows that go because the other cloud keeps their duplicates, ascending.

        Args:
          groups: The other's message.

        Raises:
          UserError: The message is damaged.
        """
        theirs = Groups.from_bytes(groups, self._sent).places
        value_at = {place: value for value, place in self._place.items()}
        rows_of: defaultdict[bytes, list[int]] = defaultdict(list)
        for row, hits in enumerate(self._hits()):
            for value in hits:
                rows_of[value].append(row)
        edges: list[tuple[int, int]] = []
        names: list[bytes] = []
        for other, places in enumerate(theirs):
            common: defaultdict[int, list[bytes]] = defaultdict(list)
            for value in (value_at[place] for place in places if place in value_at):
                for row in rows_of.get(value, ()):
                    common[row].append(value)
            for row, values in common.items():
                if len(values) >= self.shared:
                    edges.append((row, other))
                    names.append(self._name(values))
        return lost_here(components(edges, names), self.first)

    def _hits(self) -> list[dict[bytes, int]]:
        """For each own row, its values that the other has too, and their places there."""
        where = {element: place for place, element in enumerate(self._theirs)}
        place_of = {
            value: where[twice]
            for value, place in self._place.items()
            if (twice := self._own_twice[place]) in where
        }
        return [{v: place_of[v] for v in row if v in place_of} for row in self.values]

    def _name(self, values: Sequence[bytes]) -> bytes:
        # Both clouds hold shared values in plain, so that names need no message; that they depend
        # on no secret makes the outcome the same when a run is taken up again. All values count:
        # two pairs that share the same ones are of one component, pairs that share one need not be.
        digest = hashlib.blake2b(
            digest_size=16, key=self.seed.to_bytes(16, "big", signed=True), person=b"duplicate"
        )
        for value in sorted(values):
            digest.update(len(value).to_bytes(4, "big") + value)
        return digest.digest()


def meet(one: Party, two: Party) -> tuple[list[int], list[int], list[bytes]]:
    """Passes the messages between two parties.

    Returns:
      The rows that each loses, and all messages in their order.
    """
    offer = one.offer()
    disguised, back = two.disguise(offer), two.offer()
    one.receive(disguised)
    returned = one.disguise(back)
    two.receive(returned)
    groups_one, groups_two = one.groups(), two.groups()
    messages = [offer, disguised, back, returned, groups_one, groups_two]
    return one.losses(groups_two), two.losses(groups_one), messages
