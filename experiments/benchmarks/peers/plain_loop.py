"""A plain PyTorch and PEFT loop: one client after the other, no framework. Started by run.py.

The adapter is copied before and added up after each client, on one model in memory; nothing else
is done that the arithmetic does not ask for. All of it stays on the device.
"""

import torch
import torch_lora
from tasks import TASKS, read_tokens, write_factors
from turns import Turns, arguments


@torch.no_grad()
def put(parameters: list[torch.nn.Parameter], values: list[torch.Tensor]) -> None:
    """Sets parameters."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def main() -> None:
    """Loads, then trains a round a turn."""
    parser = arguments(__doc__.splitlines()[0], list(TASKS))
    parser.add_argument("--compile", action="store_true", help="the model, with torch.compile")
    parser.add_argument("--device", default="cpu", help="as PyTorch names it")
    asked = parser.parse_args()
    turns, task = Turns(asked.wait), TASKS[asked.task]
    torch.set_num_threads(asked.threads)
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"PyTorch {torch.__version__} finds no CUDA device")
    model = torch_lora.load(task, asked.folder, asked.device)
    adapter = torch_lora.trained(model)
    tokens_KxBxT = read_tokens(asked.folder)
    if asked.compile:
        model.compile()
    turns.ready(threads=asked.threads, compile=asked.compile, **torch_lora.versions())
    for _ in range(asked.rounds):
        started = turns.go()
        before = [parameter.detach().clone() for parameter in adapter]
        total = [torch.zeros_like(value) for value in before]
        losses = []
        for tokens_BxT in tokens_KxBxT:
            put(adapter, before)
            losses += torch_lora.local_steps(model, task, tokens_BxT)
            for summed, parameter in zip(total, adapter, strict=True):
                summed += parameter.detach()
        put(adapter, [summed / task.clients for summed in total])
        # Reading the loss waits for all that the device was given before.
        turns.done(started, float(torch.stack(losses).mean()))
    if asked.out:
        write_factors(asked.out, torch_lora.factors(model))
    turns.end()


if __name__ == "__main__":
    main()
