"""The part of a round that crosses the boundary between clouds: who sent what, and how long."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedjax_llm.secure.sums import SecureSum

OnStage = Callable[[str], None]


@dataclass
class Ledger:
    """What a round has cost so far.

    Attributes:
        sent: bytes by cloud towards the server.
        received: bytes by cloud from the server.
        seconds: measured seconds by stage.
    """

    sent: dict[str, int]
    received: dict[str, int]
    seconds: dict[str, float] = field(
        default_factory=lambda: {"encrypt": 0.0, "add": 0.0, "decrypt": 0.0}
    )

    @classmethod
    def of(cls, names: Sequence[str]) -> "Ledger":
        """Returns a ledger in which no cloud has sent or received anything."""
        return cls(dict.fromkeys(names, 0), dict.fromkeys(names, 0))


def encrypted_sum(
    secure_sum: SecureSum,
    ints_KxP: np.ndarray,
    names: Sequence[str],
    online: Sequence[str],
    round_number: int,
    ledger: Ledger,
    on_stage: OnStage,
) -> np.ndarray:
    """Encrypts each cloud's integers, adds the ciphertexts, decrypts the sum.

    Clouds that were not sampled send encrypted zeros: who was is not to be seen.

    Args:
        secure_sum: keys and parties.
        ints_KxP: int32, each cloud's message in the order of `names`; further rows are padding.
        names: all clouds.
        online: those that send and can decrypt.
        round_number: of this sum; larger than that of any before.
        ledger: is added to.
        on_stage: called as encryption and decryption begin.

    Returns:
        int64 [P], the exact sum.
    """
    on_stage("encrypt")
    started = time.perf_counter()
    messages = {
        name: secure_sum.encode_message(
            name, round_number, ints_KxP[names.index(name)].astype(np.int64)
        )
        for name in online
    }
    ledger.seconds["encrypt"] += time.perf_counter() - started
    on_stage("decrypt")
    result = secure_sum.sum(messages, round_number, online)
    ledger.seconds["add"] += result.seconds.get("add", 0.0)
    ledger.seconds["decrypt"] += sum(
        spent for stage, spent in result.seconds.items() if stage not in ("encrypt", "add")
    )
    for name in online:
        ledger.sent[name] += len(messages[name]) + result.bytes_up.get(name, 0)
        ledger.received[name] += result.bytes_down.get(name, 0)
    return result.total_P
