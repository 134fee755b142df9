"""Writes what both sides of FedJAX's task start from; see dense_tasks.py.

python experiments/benchmarks/peers/prepare_dense.py --task NAME --folder FOLDER
"""

import argparse
from pathlib import Path

from dense_tasks import DENSE, write


def main() -> None:
    """Parses the command line; a folder that is complete is left as it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=DENSE, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    asked = parser.parse_args()
    if not (asked.folder / "rows.npz").exists():
        write(DENSE[asked.task], asked.folder)


if __name__ == "__main__":
    main()
