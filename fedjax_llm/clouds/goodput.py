"""What loss leaves of a bandwidth: TCP slows down after a loss, and what is lost is sent again."""

import math

# Payload of a full Ethernet frame: 1500 bytes less 20 each of IPv4 and TCP.
MSS_BYTES = 1460


def loss_limit_mbps(rtt_s: float, loss: float, streams: int = 1) -> float:
    """The bound on TCP's rate under random loss, in megabits per second.

    MSS / RTT x sqrt(3/2) / sqrt(p) for one stream (Mathis, Semke, Mahdavi, Ott, "The macroscopic
    behavior of the TCP congestion avoidance algorithm", ACM CCR 27(3), 1997, equation 3, with an
    acknowledgement for every packet); parallel streams lose independently, so their rates add up.

    It holds for loss that is rare enough for fast retransmission: above about 2 % timeouts
    dominate and the truth is lower; CUBIC and BBR reach more on long paths.

    | loss | rtt | limit |
    |---|---|---|
    | 0 | any | infinite |
    | any | 0 | infinite |

    Args:
        rtt_s: round trip in seconds, zero or more.
        loss: the part p of packets that is lost, in [0, 1).
        streams: parallel connections.

    >>> round(loss_limit_mbps(0.1, 1e-4), 1)
    14.3
    """
    if not loss or not rtt_s:
        return math.inf
    return streams * MSS_BYTES * 8e-6 / rtt_s * math.sqrt(1.5 / loss)
