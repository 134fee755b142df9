"""What a masked round costs on this machine, as one JSON object.

``python -m fedjax_llm.secure.masked_measure --clients 32 --parameters 10000``
"""

import argparse
import json
import time

import numpy as np

from fedjax_llm.secure.masked import MaskedSum


def measure(clients: int, count: int, bits: int, dropped: int, repeats: int) -> dict[str, object]:
    """Rounds of random integers; the fastest time of every stage, in milliseconds.

    Args:
        clients: n, all of which greet and deal.
        count: integers per client.
        bits: bits per integer.
        dropped: clients that send no upload and reveal nothing, fewer than n / 2.
        repeats: rounds to run.
    """
    bound = 2 ** (bits - 1) - 1
    names = [f"client {number:03}" for number in range(clients)]
    sums = MaskedSum(names, count, bound, clients)
    senders = names[dropped:]
    random = np.random.default_rng(0)
    ints = {name: random.integers(-bound, bound + 1, count) for name in senders}
    best: dict[str, float] = {}

    def note(stage: str, seconds: float) -> None:
        best[stage] = min(best.get(stage, seconds), seconds)

    for number in range(repeats):
        start = time.perf_counter()
        sums.rounds.parties(number)
        note("agree, per client", (time.perf_counter() - start) / clients)
        round_sum = sums.begin(number)
        start = time.perf_counter()
        uploads = {name: list(sums.upload(name, number, ints[name])) for name in senders}
        note("upload, per client", (time.perf_counter() - start) / len(senders))
        for name in senders:
            round_sum.add(name, uploads[name])
        total_P = np.concatenate(list(round_sum.pieces(senders)))
        if not np.array_equal(total_P, sum(ints.values())):
            raise AssertionError("the sum is wrong")
        costs = round_sum.costs
        note("add, per client", costs.seconds["add"] / len(senders))
        note("recover masks, all parties", costs.seconds["decrypt"])
        note("unmask", costs.seconds["unmask"])
    return {
        "clients": clients,
        "of which drop out": dropped,
        "parameters": count,
        "bits of a word": sums.layout.bits,
        "bytes per upload": sums.upload_bytes(names[0]),
        "other bytes per client up, down": [
            max(costs.bytes_up.values()),
            max(costs.bytes_down.values()),
        ],
        "milliseconds": {stage: round(1e3 * seconds, 2) for stage, seconds in best.items()},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--parameters", type=int, default=10_000)
    parser.add_argument("--bits", type=int, default=16)
    parser.add_argument("--dropped", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    figures = measure(given.clients, given.parameters, given.bits, given.dropped, given.repeats)
    print(json.dumps(figures, indent=2))
