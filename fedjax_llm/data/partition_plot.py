"""A picture of a partition: each client's labels as a stacked bar, and its size beside it."""

import unicodedata
from collections.abc import Mapping, Sequence
from html import escape

from fedjax_llm.data.partition_statistics import PartitionStatistics

# Light and dark; the first six are those of a run's report.
_COLOURS = (
    ("#2a5bd7", "#82a8ff"),
    ("#d9642a", "#ff9a63"),
    ("#15876a", "#4fcba6"),
    ("#7c4bd0", "#b797ff"),
    ("#a97a00", "#e3bd4e"),
    ("#c03a78", "#ff86b9"),
    ("#1190ab", "#5fd0e8"),
    ("#7d5a4a", "#c9a48f"),
)
_ROLES = {
    "page": ("#ffffff", "#1c1e24"),
    "ink": ("#1c1d21", "#ececef"),
    "muted": ("#63656e", "#a2a5b0"),
    "rest": ("#c9cad1", "#565a66"),
}
_WIDTH, _LEFT, _BARS, _SIZES = 940, 170, 430, 200


def partition_svg(statistics: PartitionStatistics) -> str:
    """Draws a partition as an SVG file of its own, for light and for dark pages.

    One row for the whole and one for each client: on the left the shares of its labels, on the
    right its size in rows (or tokens, where these are known). Eight labels have colours; the rest,
    the rarest, are one. Every piece says its numbers when pointed at.

    Args:
      statistics: Of the partition.

    Returns:
      The text of the SVG, 940 units wide, as high as its clients need.
    """
    named = list(statistics.labels)[: len(_COLOURS)]
    pieces, top = _legend(statistics, named)
    clients = statistics.clients
    # Hundreds of clients still fit on a page that can be scrolled.
    pitch, bar, font = (34, 22, 13) if len(clients) <= 20 else (18, 13, 11)
    sizes = [client.rows if client.tokens is None else client.tokens for client in clients]
    unit = "tokens" if statistics.in_tokens else "rows"
    pieces.append(
        _text(_LEFT, top, "labels" if statistics.has_labels else "no labels", "muted", 13)
    )
    pieces.append(_text(_LEFT + _BARS + 30, top, unit, "muted", 13))
    y = top + 12
    pieces += _row(y, bar, font, "the whole", statistics.labels, named)
    pieces.append(_number(y, bar, font, 0.0, sum(sizes)))
    y += pitch + 8
    for client, size in zip(clients, sizes, strict=True):
        pieces += _row(y, bar, font, client.name, client.labels, named)
        width = _SIZES * size / max(sizes)
        pieces.append(
            f'<rect x="{_LEFT + _BARS + 30}" y="{y}" width="{width:.2f}" height="{bar}" '
            f'fill="var(--muted)"><title>{escape(client.name)}: {size:,} {unit}</title></rect>'
        )
        pieces.append(_number(y, bar, font, width, size))
        y += pitch
    return _document(pieces, height=y + 10)


def _document(pieces: Sequence[str], height: int) -> str:
    def palette(theme: int) -> str:
        roles = {name: pair[theme] for name, pair in _ROLES.items()}
        roles |= {f"label-{index}": pair[theme] for index, pair in enumerate(_COLOURS)}
        return " ".join(f"--{name}: {colour};" for name, colour in roles.items())

    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
            f'width="{_WIDTH}" height="{height}" role="img">',
            "<style>",
            f"svg {{ {palette(0)} font-family: system-ui, sans-serif; }}",
            f"@media (prefers-color-scheme: dark) {{ svg {{ {palette(1)} }} }}",
            "</style>",
            f'<rect width="{_WIDTH}" height="{height}" fill="var(--page)"/>',
            *pieces,
            "</svg>",
            "",
        ]
    )


def _legend(statistics: PartitionStatistics, named: Sequence[str]) -> tuple[list[str], int]:
    """The names of the colours, wrapped, and where what follows may begin."""
    if not statistics.has_labels:
        return [], 28
    entries = [(f"label-{index}", label or "no label") for index, label in enumerate(named)]
    if rest := len(statistics.labels) - len(named):
        entries.append(("rest", f"{rest} other labels"))
    pieces, x, y = [], _LEFT, 18
    for colour, label in entries:
        shown = _shortened(label, 30)
        width = 36 + round(sum(map(_letter, shown)))
        if x + width > _WIDTH and x > _LEFT:
            x, y = _LEFT, y + 24
        pieces.append(
            f'<rect x="{x}" y="{y - 1}" width="12" height="12" rx="3" fill="var(--{colour})"/>'
        )
        pieces.append(_text(x + 18, y + 10, shown, "ink", 13))
        x += width
    return pieces, y + 46


def _row(
    y: int, bar: int, font: int, name: str, labels: Mapping[str, int], named: Sequence[str]
) -> list[str]:
    """A name and its stacked bar of labels, every client's equally long."""
    rows = sum(labels.values())
    pieces = [_text(_LEFT - 12, y + bar - bar * 0.28, _shortened(name, 22), "ink", font, "end")]
    parts = [
        (f"label-{place}", label or "no label", labels.get(label, 0))
        for place, label in enumerate(named)
    ]
    others = rows - sum(count for _, _, count in parts)
    x = float(_LEFT)
    for colour, label, count in [*parts, ("rest", "other labels", others)]:
        if not count:
            continue
        width = _BARS * count / rows
        words = f"{name}: {label}, {count:,} of {rows:,} rows ({count / rows:.1%})"
        pieces.append(
            f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{bar}" '
            f'fill="var(--{colour})" stroke="var(--page)"><title>{escape(words)}</title></rect>'
        )
        x += width
    return pieces


def _number(y: int, bar: int, font: int, width: float, size: int) -> str:
    x = _LEFT + _BARS + 30 + width + (8 if width else 0)
    return _text(x, y + bar - bar * 0.28, f"{size:,}", "ink", font)


def _text(x: float, y: float, words: str, colour: str, font: int, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{font}" text-anchor="{anchor}" '
        f'fill="var(--{colour})">{escape(words)}</text>'
    )


def _letter(letter: str) -> float:
    """About the width of a letter at 13 px, in a wide font: a legend may be loose, not overlap."""
    if unicodedata.east_asian_width(letter) in "WF":
        return 13.0
    if letter == " ":
        return 4.5
    return 9.2 if letter.isupper() or letter in "mw" else 7.0


def _shortened(words: str, limit: int) -> str:
    words = " ".join(words.split())
    return words if len(words) <= limit else words[: limit - 1] + "…"
