"""Keeping: the public rule by which two clouds agree who keeps what both have.

Both clouds know the same bipartite graph, rows here against rows there that are duplicates, and
name its components by a hash of what the rows share. They go through the components in the order of
those names. The cloud that has lost more rows so far keeps its rows of the component and the other
loses its own; after a tie, a bit of the name decides. Hence:

- at least one cloud keeps its rows of every component: nothing is lost that one of them had;
- no duplicate of the graph is left: in every component one side has nothing;
- the clouds' losses differ by at most the largest number of rows that one of them has in one
  component, by one where no row has two duplicates;
- the outcome depends on the data and the seed alone, not on secrets or on who begins.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Component:
    """Rows of two clouds that are duplicates of each other, directly or through others.

    Attributes:
      name: A hash that both clouds compute from what the rows share.
      here: Rows of the one cloud.
      there: Rows of the other.
    """

    name: bytes
    here: tuple[int, ...]
    there: tuple[int, ...]


def components(edges: Sequence[tuple[int, int]], names: Sequence[bytes]) -> list[Component]:
    """The connected components of a bipartite graph.

    Args:
      edges: Pairs (row here, row there), each pair once.
      names: For each edge, a hash of all that its two rows share.

    Returns:
      The components in the order of their names, each named by the least of its edges' names. No
      two have the same name: rows that share the same values are duplicates of each other.
    """
    parent: dict[tuple[str, int], tuple[str, int]] = {}

    def root(node: tuple[str, int]) -> tuple[str, int]:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for here, there in edges:
        parent[root(("here", here))] = root(("there", there))
    least: dict[tuple[str, int], bytes] = {}
    for (here, _), name in zip(edges, names, strict=True):
        top = root(("here", here))
        least[top] = min(least.get(top, name), name)
    members: dict[tuple[str, int], tuple[list[int], list[int]]] = {top: ([], []) for top in least}
    for node in parent:
        members[root(node)][node[0] == "there"].append(node[1])
    found = [
        Component(least[top], tuple(sorted(here)), tuple(sorted(there)))
        for top, (here, there) in members.items()
    ]
    return sorted(found, key=lambda component: component.name)


def lost_here(found: Sequence[Component], first: bool) -> list[int]:
    """The rows that the cloud "here" loses.

    Args:
      found: The components in the order of their names.
      first: Whether this cloud is the first of the two by name, which settles ties.

    Returns:
      Its rows that go, ascending. The other cloud, with here and there exchanged and `not first`,
      finds the complement: of each component exactly one side goes.
    """
    gone: list[int] = []
    losses = [0, 0]
    for component in found:
        if losses[0] == losses[1]:
            here_keeps = bool(component.name[-1] & 1) == first
        else:
            here_keeps = losses[0] > losses[1]
        if here_keeps:
            losses[1] += len(component.there)
        else:
            losses[0] += len(component.here)
            gone += component.here
    return sorted(gone)
