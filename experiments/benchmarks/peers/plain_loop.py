"""A plain PyTorch and PEFT loop: one client after the other, no framework. Started by run.py.

The adapter is copied before and added up after each client, on one model in memory; nothing else
is done that the arithmetic does not ask for.
"""

import numpy as np
import torch
import torch_lora
from tasks import TASKS, read_tokens, write_factors
from turns import Turns, arguments


def main() -> None:
    """Loads, then trains a round a turn."""
    parser = arguments(__doc__.splitlines()[0], list(TASKS))
    parser.add_argument("--compile", action="store_true", help="the model, with torch.compile")
    asked = parser.parse_args()
    turns, task = Turns(asked.wait), TASKS[asked.task]
    torch.set_num_threads(asked.threads)
    model = torch_lora.load(task, asked.folder)
    tokens_KxBxT = read_tokens(asked.folder)
    if asked.compile:
        model.compile()
    turns.ready(threads=asked.threads, compile=asked.compile, **torch_lora.versions())
    for _ in range(asked.rounds):
        started = turns.go()
        before = torch_lora.values(model)
        total = [np.zeros_like(value) for value in before]
        losses = []
        for tokens_BxT in tokens_KxBxT:
            torch_lora.put_values(model, before)
            losses += torch_lora.local_steps(model, task, tokens_BxT)
            for summed, value in zip(total, torch_lora.values(model), strict=True):
                summed += value
        torch_lora.put_values(model, [summed / task.clients for summed in total])
        turns.done(started, float(torch.stack(losses).mean()))
    if asked.out:
        write_factors(asked.out, torch_lora.factors(model))
    turns.end()


if __name__ == "__main__":
    main()
