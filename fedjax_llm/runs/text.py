"""Numbers as people read them, the same in the terminal and in the report."""

import math


def bytes_text(count: float) -> str:
    """Decimal units, three significant digits.

    >>> bytes_text(1234567), bytes_text(12)
    ('1.23 MB', '12 bytes')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} bytes"


def seconds_text(seconds: float) -> str:
    """Milliseconds to hours.

    >>> seconds_text(0.0421), seconds_text(3.21), seconds_text(75), seconds_text(7260)
    ('42 ms', '3.2 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def dollars_text(dollars: float) -> str:
    """Three significant digits below 100 dollars, no cents above.

    >>> dollars_text(0.01234), dollars_text(1234.5), dollars_text(0), dollars_text(3.2e-5)
    ('$0.0123', '$1,234', '$0', '$0.000032')
    """
    if dollars >= 100 or not dollars:
        return f"${dollars:,.0f}"
    digits = max(2, 2 - math.floor(math.log10(dollars)))
    text = f"{dollars:.{digits}f}"
    return "$" + (text.rstrip("0") if dollars < 0.01 else text)


def loss_text(loss: float | None) -> str:
    """Four digits after the point; a dash for what was not measured.

    >>> loss_text(2.34567), loss_text(None)
    ('2.3457', '–')
    """
    return "–" if loss is None else f"{loss:.4f}"


def delta_text(delta: float) -> str:
    """As in a run file.

    >>> delta_text(1e-05)
    '1e-5'
    """
    return f"{delta:g}".replace("e-0", "e-")


def epsilon_text(epsilon: float | None, reason: str = "") -> str:
    """Epsilon, or why there is none.

    >>> epsilon_text(3.14159), epsilon_text(None, "no noise is added")
    ('3.14', 'not certified: no noise is added')
    """
    if epsilon is not None:
        return f"{epsilon:.3g}"
    return f"not certified: {reason}" if reason else "not certified"


def share_text(share: float) -> str:
    """A part of a whole, two significant digits below a tenth.

    >>> share_text(0.0123), share_text(0.25), share_text(1.0), share_text(0.0)
    ('1.2 %', '25 %', '100 %', '0 %')
    """
    percent = 100 * share
    return f"{percent:.2g} %" if percent < 10 else f"{percent:.0f} %"
