"""One step of Opacus on a Llama model with LoRA, for privacy.py to compare with.

    command   (started by privacy.py) FOLDER/bin/python opacus_step.py --model MODEL --inputs FILE

Runs in the environment that make_opacus_env.sh makes: CPython 3.11, PyTorch and Opacus, without
this project and without JAX. MODEL is a Hugging Face folder, FILE an npz with `tokens` [B, T] and
`NAME.a` [L, D, R], `NAME.b` [L, R, F] for each projection, the scale, the clip norm and the noise
multiplier. The first line on standard output is a JSON object with the loss and the versions. Then
for each line on standard input, the name of a way to step, one step is taken and its seconds are
written:

| way | what |
|---|---|
| plain | no privacy |
| hooks | `GradSampleModule`: per-example gradients |
| fast | `GradSampleModuleFastGradientClipping`, norms from per-example gradients of one layer |
| ghost | the same with norms from Gram matrices |

Letters: B examples, T positions, D width, H heads, K width of a head, L layers.
"""

import argparse
import copy
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import opacus
import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LEARNING_RATE = 1e-3


class LoraLinear(nn.Module):
    """A frozen linear map and a trained low-rank one, both as plain linear layers."""

    def __init__(self, weight_FxD: torch.Tensor, a_DxR: torch.Tensor, b_RxF: torch.Tensor, scale):
        super().__init__()
        self.base = _linear(weight_FxD, trained=False)
        self.lora_a = _linear(a_DxR.T, trained=True)
        self.lora_b = _linear(b_RxF.T, trained=True)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.lora_b(self.lora_a(x) * self.scale)


def _linear(weight_FxD: torch.Tensor, *, trained: bool) -> nn.Linear:
    layer = nn.Linear(weight_FxD.shape[1], weight_FxD.shape[0], bias=False)
    layer.weight = nn.Parameter(weight_FxD.contiguous().float(), requires_grad=trained)
    return layer


class Norm(nn.Module):
    """Root-mean-square normalisation with a frozen weight."""

    def __init__(self, weight_D: torch.Tensor, eps: float):
        super().__init__()
        self.weight = nn.Parameter(weight_D.float(), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Block(nn.Module):
    """One layer."""

    def __init__(self, config: dict, weights: dict, inputs: dict, layer: int):
        super().__init__()
        start = f"model.layers.{layer}."
        self.heads = config["num_attention_heads"]

        def projection(name: str) -> LoraLinear:
            room = "self_attn" if name in ATTENTION else "mlp"
            factors = (torch.from_numpy(inputs[f"{name}.{side}"][layer]) for side in "ab")
            weight = weights[f"{start}{room}.{name}.weight"]
            return LoraLinear(weight, *factors, float(inputs["scale"]))

        def norm(name: str) -> Norm:
            return Norm(weights[f"{start}{name}.weight"], config["rms_norm_eps"])

        for name in (*ATTENTION, "gate_proj", "up_proj", "down_proj"):
            setattr(self, name, projection(name))
        self.input_norm, self.post_norm = norm("input_layernorm"), norm("post_attention_layernorm")

    def forward(self, x_BxTxD: torch.Tensor, cos_TxK: torch.Tensor, sin_TxK: torch.Tensor):
        batch, length, width = x_BxTxD.shape
        h = self.input_norm(x_BxTxD)

        def heads(name: str) -> torch.Tensor:
            return getattr(self, name)(h).view(batch, length, self.heads, -1).transpose(1, 2)

        q, k = (_rotated(heads(name), cos_TxK, sin_TxK) for name in ("q_proj", "k_proj"))
        mixed = functional.scaled_dot_product_attention(q, k, heads("v_proj"), is_causal=True)
        x_BxTxD = x_BxTxD + self.o_proj(mixed.transpose(1, 2).reshape(batch, length, width))
        h = self.post_norm(x_BxTxD)
        return x_BxTxD + self.down_proj(functional.silu(self.gate_proj(h)) * self.up_proj(h))


def _rotated(x_BxHxTxK: torch.Tensor, cos_TxK: torch.Tensor, sin_TxK: torch.Tensor) -> torch.Tensor:
    first, second = x_BxHxTxK.chunk(2, dim=-1)
    return x_BxHxTxK * cos_TxK + torch.cat((-second, first), dim=-1) * sin_TxK


class Llama(nn.Module):
    """The model, from tokens to the mean loss of each example in nats a token."""

    def __init__(self, config: dict, weights: dict, inputs: dict):
        super().__init__()
        if config["num_key_value_heads"] != config["num_attention_heads"]:
            raise SystemExit("this model has grouped key heads, which the comparison leaves out")
        embed = weights["model.embed_tokens.weight"].float()
        self.embed = nn.Embedding.from_pretrained(embed, freeze=True)
        self.layers = nn.ModuleList(
            Block(config, weights, inputs, layer) for layer in range(config["num_hidden_layers"])
        )
        self.norm = Norm(weights["model.norm.weight"], config["rms_norm_eps"])
        width = config["hidden_size"] // config["num_attention_heads"]
        powers = torch.arange(0, width, 2, dtype=torch.float32) / width
        angles = torch.outer(
            torch.arange(inputs["tokens"].shape[1], dtype=torch.float32),
            1.0 / config["rope_theta"] ** powers,
        )
        # Plain attributes: Opacus refuses modules with buffers.
        self.cos, self.sin = (f(torch.cat((angles, angles), 1)) for f in (torch.cos, torch.sin))

    def forward(self, tokens_BxT: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens_BxT)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = functional.linear(self.norm(x)[:, :-1], self.embed.weight)
        nll = functional.cross_entropy(
            logits.flatten(0, 1), tokens_BxT[:, 1:].flatten(), reduction="none"
        )
        return nll.view(len(tokens_BxT), -1).mean(dim=1)


def ways(model: Llama, tokens: torch.Tensor, clip: float, noise: float) -> dict[str, Callable]:
    """A function that takes one step, for each way."""
    expected = len(tokens)
    private = {"noise_multiplier": noise, "max_grad_norm": clip, "expected_batch_size": expected}

    def trained(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], LEARNING_RATE)

    plain_model = copy.deepcopy(model)
    plain_optimizer = trained(plain_model)

    def plain() -> None:
        plain_optimizer.zero_grad()
        plain_model(tokens).mean().backward()
        plain_optimizer.step()

    hooked = GradSampleModule(copy.deepcopy(model), loss_reduction="mean")
    hooked_optimizer = DPOptimizer(trained(hooked), **private)

    def hooks() -> None:
        hooked_optimizer.zero_grad()
        hooked(tokens).mean().backward()
        hooked_optimizer.step()

    def two_passes(ghost: bool) -> Callable[[], None]:
        module = GradSampleModuleFastGradientClipping(
            copy.deepcopy(model),
            max_grad_norm=clip,
            use_ghost_clipping=ghost,
            loss_reduction="mean",
        )
        optimizer = DPOptimizerFastGradientClipping(trained(module), **private)

        def step() -> None:
            optimizer.zero_grad()
            DPTensorFastGradientClipping(module, optimizer, module(tokens), "mean").backward()
            optimizer.step()

        return step

    return {"plain": plain, "hooks": hooks, "fast": two_passes(False), "ghost": two_passes(True)}


def main() -> None:
    """Loads, reports the loss, then steps as it is told."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    # The first hooks hang on modules whose inputs need no gradient, because all before is frozen.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = json.loads((arguments.model / "config.json").read_text())
    with np.load(arguments.inputs) as stored:
        inputs = dict(stored)
    model = Llama(config, load_file(arguments.model / "model.safetensors"), inputs)
    tokens = torch.from_numpy(inputs["tokens"]).long()
    with torch.no_grad():
        loss = float(model(tokens).mean())
    steps = ways(model.train(), tokens, float(inputs["clip"]), float(inputs["noise"]))
    head = {"loss": loss, "torch": torch.__version__, "opacus": opacus.__version__}
    print(json.dumps({**head, "ways": list(steps)}), flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        steps[line.strip()]()
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main()
