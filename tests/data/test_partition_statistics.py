"""Statistics of a partition against plain definitions, and a picture that says the same."""

import math
import xml.etree.ElementTree as ET
from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from fedjax_llm.data import Record, partition_statistics, partition_svg
from fedjax_llm.data.partition_statistics import entropy_bits, gini, js_bits, total_variation

SVG = "{http://www.w3.org/2000/svg}"
WEIGHTS = st.lists(st.integers(0, 20), min_size=3, max_size=3).filter(any)
# For each client the labels of its rows.
LABELS = st.lists(st.sampled_from("abc"), max_size=12)
CLIENTS = st.lists(LABELS, min_size=1, max_size=5).filter(any)


def records(labels: list[str]) -> list[Record]:
    return [Record(f"question {row}", "answer", label=label) for row, label in enumerate(labels)]


def distribution(weights: list[int]) -> np.ndarray:
    return np.array(weights, np.float64) / sum(weights)


@given(one=WEIGHTS, other=WEIGHTS)
def test_divergences_are_what_others_compute(one: list[int], other: list[int]) -> None:
    p_L, q_L = distribution(one), distribution(other)
    # SciPy returns the distance, which is the square root of the divergence.
    assert js_bits(p_L, q_L) == pytest.approx(jensenshannon(p_L, q_L, base=2) ** 2, abs=1e-9)
    subsets = product([False, True], repeat=3)
    largest = max(abs(p_L[list(s)].sum() - q_L[list(s)].sum()) for s in subsets)
    assert total_variation(p_L, q_L) == pytest.approx(largest)
    # Lin 1991, theorem 3: the divergence is at most the distance.
    assert js_bits(p_L, q_L) <= total_variation(p_L, q_L) + 1e-9


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=8).filter(any))
def test_gini_is_the_mean_difference_over_twice_the_mean(sizes: list[int]) -> None:
    mean = sum(sizes) / len(sizes)
    differences = [abs(a - b) for a in sizes for b in sizes]
    assert gini(sizes) == pytest.approx(sum(differences) / len(differences) / (2 * mean))


@given(clients=CLIENTS)
def test_statistics_of_clients_and_of_the_whole(clients: list[list[str]]) -> None:
    names = [f"client {number}" for number in range(len(clients))]
    found = partition_statistics(names, [records(labels) for labels in clients])
    whole = Counter(label for labels in clients for label in labels)
    assert found.labels == whole and list(found.labels.values()) == sorted(whole.values())[::-1]
    joint = {(k, label): n for k, own in enumerate(clients) for label, n in Counter(own).items()}
    rows = whole.total()
    bits = sum(
        n / rows * math.log2(n * rows / (len(clients[k]) * whole[label]))
        for (k, label), n in joint.items()
    )
    assert found.label_bits == pytest.approx(bits, abs=1e-9)
    assert found.largest == pytest.approx(max(map(len, clients)) * len(clients) / rows)
    for own, labels in zip(found.clients, clients, strict=True):
        assert own.rows == len(labels) and own.labels == Counter(labels)
        if not labels:
            assert math.isnan(own.js_bits) and math.isnan(own.total_variation)
            continue
        assert 1 <= own.effective_labels <= len(own.labels) + 1e-9
        assert 0 <= own.js_bits <= 1 and 0 <= own.total_variation <= 1


def test_alike_clients_are_at_zero_and_apart_ones_at_the_bounds() -> None:
    alike = partition_statistics(["x", "y"], [records(["a", "b"])] * 2)
    assert (alike.label_bits, alike.gini, alike.largest) == (0, 0, 1)
    assert [(c.js_bits, c.total_variation, c.effective_labels) for c in alike.clients] == [
        (0, 0, 2)
    ] * 2
    apart = partition_statistics(["x", "y"], [records(["a"] * 4), records(["b"] * 4)])
    assert (apart.label_bits, apart.effective_labels) == (1, 2)
    assert [(c.total_variation, c.effective_labels) for c in apart.clients] == [(0.5, 1)] * 2
    # Half the whole is its own: 3/2 log 2 - 3/4 log 3, in bits.
    assert apart.clients[0].js_bits == pytest.approx(1.5 - 0.75 * math.log2(3))


def test_shared_groups_are_counted_once_and_by_client() -> None:
    def asked(*prompts: str) -> list[Record]:
        return [Record(prompt, "answer") for prompt in prompts]

    found = partition_statistics(
        ["x", "y", "z"], [asked("why", "Why ", "how"), asked("why", "when"), asked("where")]
    )
    assert found.shared_groups == 1
    assert [(c.groups, c.shared_groups) for c in found.clients] == [(2, 1), (2, 1), (1, 0)]
    assert not found.has_labels and found.label_bits == 0


def test_sizes_are_tokens_where_these_are_known() -> None:
    own = [records(["a"]), records(["a"])]
    by_rows, by_tokens = (
        partition_statistics(["x", "y"], own),
        partition_statistics(["x", "y"], own, [30, 10]),
    )
    assert (by_rows.gini, by_rows.in_tokens, by_rows.clients[0].tokens) == (0, False, None)
    assert (by_tokens.gini, by_tokens.largest, by_tokens.in_tokens) == (0.25, 1.5, True)


@pytest.mark.parametrize(
    ("names", "rows"), [(["x"], []), (["x"], [[]]), (["x", "y"], [records(["a"])])]
)
def test_nothing_has_no_statistics(names: list[str], rows: list[list[Record]]) -> None:
    with pytest.raises(ValueError, match=r"no statistics|one element for each client"):
        partition_statistics(names, rows)


def test_entropy_of_missing_values_is_missing() -> None:
    assert math.isnan(entropy_bits(np.array([np.nan, 1.0])))


def drawn(svg: str) -> tuple[ET.Element, dict[str, list[tuple[float, str]]]]:
    """The root, and for each client's name the widths and colours of its pieces of label."""
    root = ET.fromstring(svg)
    pieces: dict[str, list[tuple[float, str]]] = {}
    for rect in root.iter(f"{SVG}rect"):
        title = rect.find(f"{SVG}title")
        if title is not None and title.text and " of " in title.text:
            name = title.text.rsplit(": ", 1)[0]
            pieces.setdefault(name, []).append((float(rect.get("width", 0)), rect.get("fill", "")))
    return root, pieces


@given(clients=CLIENTS)
def test_the_picture_shows_the_shares_of_each_client(clients: list[list[str]]) -> None:
    names = [f"client {number}" for number in range(len(clients))]
    found = partition_statistics(names, [records(labels) for labels in clients])
    root, pieces = drawn(partition_svg(found))
    assert set(pieces) == {"the whole", *(n for n, own in zip(names, clients, strict=True) if own)}
    order = list(found.labels)
    for client in found.clients:
        shares = [client.labels.get(label, 0) / max(client.rows, 1) for label in order]
        expected = [(430 * s, f"var(--label-{i})") for i, s in enumerate(shares) if s]
        assert [fill for _, fill in pieces.get(client.name, [])] == [fill for _, fill in expected]
        widths = [width for width, _ in pieces.get(client.name, [])]
        assert widths == pytest.approx([width for width, _ in expected], abs=0.01)
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert {*names, *found.labels, "the whole", "rows"} <= set(texts)


def test_rare_labels_share_one_colour_and_every_text_is_escaped() -> None:
    labels = [f"<label> & {number}" for number in range(12) for _ in range(20 - number)]
    found = partition_statistics(['a "<cloud>"'], [records(labels)], [1234])
    root, pieces = drawn(partition_svg(found))
    (own,) = (value for name, value in pieces.items() if name == 'a "<cloud>"')
    assert len(own) == 9 and own[-1][1] == "var(--rest)"
    assert own[-1][0] == pytest.approx(430 * (12 + 11 + 10 + 9) / len(labels), abs=0.01)
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert "4 other labels" in texts and "1,234" in texts


def test_the_picture_is_as_high_as_its_clients_and_its_legend_need() -> None:
    def height(clients: int, labels: int) -> tuple[float, float]:
        own = [records([f"a long name of label {n}" for n in range(labels)])] * clients
        root = ET.fromstring(partition_svg(partition_statistics(["x"] * clients, own)))
        # The background is the one without a place.
        bars = [e for e in root.iter(f"{SVG}rect") if e.get("y") is not None]
        lowest = max(float(e.get("y", 0)) + float(e.get("height", 0)) for e in bars)
        widest = max(float(e.get("x", 0)) for e in root.iter(f"{SVG}text"))
        assert widest < float(root.get("width", 0))
        return float(root.get("height", 0)), lowest

    for clients, labels in ((1, 1), (20, 8), (21, 3), (200, 12)):
        whole, lowest = height(clients, labels)
        assert lowest < whole < lowest + 30
    assert height(1, 8)[0] > height(1, 2)[0]
