"""The client that Flower's workers run: trains the adapter it is sent on the rows of its partition.

In a module of its own, because the workers import it. A worker loads the model once.
"""

import functools
from pathlib import Path

import peft
import torch
import torch_lora
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from tasks import TASKS, read_tokens

app = ClientApp()


@functools.cache
def _model(task: str, folder: str, threads: int) -> peft.PeftModel:
    torch.set_num_threads(threads)
    return torch_lora.load(TASKS[task], Path(folder))


@app.train()
def train(message: Message, context: Context) -> Message:
    """One client's local update."""
    asked = message.content["config"]
    name, folder = asked["task"], asked["folder"]
    model, task = _model(name, folder, asked["threads"]), TASKS[name]
    torch_lora.put_values(model, message.content["arrays"].to_numpy_ndarrays())
    tokens_BxT = read_tokens(Path(folder))[context.node_config["partition-id"]]
    losses = torch_lora.local_steps(model, task, tokens_BxT)
    content = RecordDict(
        {
            "arrays": ArrayRecord(torch_lora.values(model)),
            "metrics": MetricRecord(
                {"loss": float(torch.stack(losses).mean()), "num-examples": task.batch}
            ),
        }
    )
    return Message(content=content, reply_to=message)
