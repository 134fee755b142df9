"""What the encrypted sum costs on this machine, as one JSON object.

``python -m fedjax_llm.secure.measure --parameters 100000 --clouds 3 --threshold 2``
"""

import argparse
import json
import time

import numpy as np

from fedjax_llm.secure.aggregator import chunks_of
from fedjax_llm.secure.threshold import ThresholdSum


def measure(
    count: int, clouds: int, threshold: int, bits: int, clients: int, threads: int | None
) -> dict[str, object]:
    """One ceremony and one round of random integers; seconds are wall-clock.

    Args:
        count: parameters per client.
        clouds: clouds that hold key shares.
        threshold: clouds that decrypt.
        bits: bits per parameter.
        clients: clients of the round, and the most that the sum allows for.
        threads: threads over ciphertexts; None is one per processor.
    """
    start = time.perf_counter()
    names = [f"cloud {number}" for number in range(clouds)]
    bound = 2 ** (bits - 1) - 1
    secure_sum = ThresholdSum(names, threshold, count, bound, clients, threads=threads)
    ceremony = time.perf_counter() - start
    rng = np.random.default_rng(0)
    expected = np.zeros(count, np.int64)
    messages = {}
    for number in range(clients):
        ints = rng.integers(-bound, bound + 1, count)
        expected += ints
        messages[f"client {number}"] = secure_sum.encode_message(f"client {number}", 0, ints)
    result = secure_sum.sum(messages, 0, names)
    upload = len(messages["client 0"])
    chosen = secure_sum.parameters
    seconds = {
        "ceremony": ceremony,
        "encrypt, per client": result.seconds["encrypt"] / clients,
        "add, per client": result.seconds["add"] / clients,
        "partial decrypt, all clouds": result.seconds["partial decrypt"],
        "fuse": result.seconds["fuse"],
    }
    return {
        "exact": bool(np.array_equal(result.total_P, expected)),
        "ring dimension": chosen.ring_dimension,
        "bits of Q": chosen.log_q,
        "bits of t": chosen.plaintext_modulus.bit_length(),
        "integers per slot": chosen.digits,
        "ciphertexts per client": chunks_of(secure_sum.bfv, count),
        "bytes per client": upload,
        "bytes per parameter": round(upload / count, 2),
        "bytes per cloud down, up": [
            max(result.bytes_down.values()),
            max(result.bytes_up.values()),
        ],
        "ceremony bytes per cloud up": max(secure_sum.ceremony_bytes_up.values()),
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=100_000)
    parser.add_argument("--clouds", type=int, default=3)
    parser.add_argument("--threshold", type=int, default=2)
    parser.add_argument("--bits", type=int, default=16)
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    given = parser.parse_args()
    print(
        json.dumps(
            measure(
                given.parameters,
                given.clouds,
                given.threshold,
                given.bits,
                given.clients,
                given.threads,
            ),
            indent=2,
        )
    )
