"""Our side in two processes with a core each, started by our own launcher. Started by run.py.

Takes the arguments of ours.py. The first process talks; rounds are not waited for.
"""

import os
import sys

from fedjax_llm.runs.processes import distributed, launch_places, launching

PROCESSES = 2


def main() -> None:
    """Launches this file again, once for each process, or is one of them."""
    if distributed.LIFELINE in os.environ:
        world = distributed.join()
        # Not before: it imports JAX, which has to know of the others first.
        import ours

        ours.main(world.leads)
        return
    cores = sorted(os.sched_getaffinity(0))[:PROCESSES]
    ended = launching.launch(
        [sys.executable, __file__, *sys.argv[1:]],
        launch_places.places(PROCESSES, cores),
        echo=lambda words: print(words, end="", file=sys.stderr),
    )
    if ended.code:
        raise SystemExit(launching.why(ended, PROCESSES))


if __name__ == "__main__":
    main()
