"""The task's model in PyTorch, with PEFT's adapter: what the plain loop, Flower and pfl share.

Needs PyTorch, transformers and PEFT; see make_env.sh.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from numpy.typing import NDArray
from tasks import ATTENTION, PROJECTIONS, Task, model_folder, read_factors


def load(task: Task, folder: Path, device: str = "cpu") -> peft.PeftModel:
    """The model with the adapter that everybody starts from, on a device.

    The adapter is float32 whatever the base is: PEFT sees to that.
    """
    base = transformers.AutoModelForCausalLM.from_pretrained(
        model_folder(folder), dtype=getattr(torch, task.dtype), attn_implementation="sdpa"
    ).to(device)
    base.config.use_cache = False
    model = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=task.rank,
            lora_alpha=task.alpha,
            lora_dropout=0.0,
            bias="none",
            target_modules=list(PROJECTIONS),
            task_type="CAUSAL_LM",
        ),
    )
    put_factors(model, read_factors(folder / "start.npz"))
    return model.train()


def trained(model: peft.PeftModel) -> list[torch.nn.Parameter]:
    """The adapter's parameters, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def local_steps(
    model: peft.PeftModel, task: Task, tokens_BxT: NDArray[np.int32]
) -> list[torch.Tensor]:
    """One client's local update in place; returns the loss of each step, in nats, no gradients."""
    optimizer = torch.optim.SGD(trained(model), lr=task.learning_rate)
    batch = torch.from_numpy(np.array(tokens_BxT, np.int64)).to(model.device)
    dtype = getattr(torch, task.dtype)
    losses = []
    for _ in range(task.steps):
        optimizer.zero_grad()
        # Without it the products of a float32 adapter on a bfloat16 base are float32 too.
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def values(model: peft.PeftModel) -> list[NDArray[np.float32]]:
    """Copies of the adapter's parameters, in the model's order."""
    return [parameter.detach().cpu().numpy().copy() for parameter in trained(model)]


@torch.no_grad()
def put_values(model: peft.PeftModel, new: Sequence[NDArray[np.float32]]) -> None:
    """Sets the adapter's parameters."""
    for parameter, value in zip(trained(model), new, strict=True):
        parameter.copy_(torch.from_numpy(value))


@torch.no_grad()
def put_factors(model: peft.PeftModel, factors: dict[str, NDArray[np.float32]]) -> None:
    """Sets the adapter to NAME.a [L, D, R] and NAME.b [L, R, F]."""
    for (name, layer, side), parameter in _places(model).items():
        # PEFT stores a linear map as [out, in].
        parameter.copy_(torch.from_numpy(factors[f"{name}.{side}"][layer].T))


def factors(model: peft.PeftModel) -> dict[str, NDArray[np.float32]]:
    """The adapter as `put_factors` takes it."""
    places = _places(model)
    layers = 1 + max(layer for _, layer, _ in places)
    return {
        f"{name}.{side}": np.stack(
            [places[name, layer, side].detach().cpu().numpy().T for layer in range(layers)]
        )
        for name in PROJECTIONS
        for side in "ab"
    }


def versions() -> dict[str, str]:
    """Of the libraries."""
    return {module.__name__: module.__version__ for module in (torch, transformers, peft)}


def _places(model: peft.PeftModel) -> dict[tuple[str, int, str], torch.nn.Parameter]:
    """The adapter's parameters by projection, layer and side."""
    found = {}
    for layer, block in enumerate(model.base_model.model.model.layers):
        for name in PROJECTIONS:
            module = getattr(block.self_attn if name in ATTENTION else block.mlp, name)
            found[name, layer, "a"] = module.lora_A["default"].weight
            found[name, layer, "b"] = module.lora_B["default"].weight
    return found
