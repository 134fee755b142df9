"""[model], [adapter] and [training]: what is trained, and how one client trains it."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedjax_llm.runs.sections.problem import problem
from fedjax_llm.runs.sections.types import Count, NotNegative, Optimizer, Positive, Section, Texts


class ModelSection(Section):
    """[model]: a model of the catalogue by `name`, or a Hugging Face folder by `path`.

    `dtype` is of activations and matrix products; adapters, optimisers, clipping and messages are
    float32. `weights` says how the frozen weights are kept, as `dtype` if left out: in "int8" or
    "nf4" only the kernels of the layers, the rest in `dtype`; "nf4-double" keeps the scales of nf4
    in eight bits.
    """

    name: str | None = Field(None, min_length=1)
    path: str | None = Field(None, min_length=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    weights: Literal["float32", "bfloat16", "int8", "nf4", "nf4-double"] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.name is None) == (self.path is None):
            given = "neither" if self.name is None else "both"
            raise problem((), f"[model] takes either name or path, {given} given")
        return self


class AdapterSection(Section):
    """[adapter]: low-rank adapters. `targets` are shell-style patterns over projection names."""

    rank: Count = 8
    alpha: Positive = 16.0
    targets: Texts = ("q_proj", "v_proj")


class TrainingSection(Section):
    """[training]: one client's local update. `batch_size` is the expected batch size.

    `proximal` is the mu of FedProx; `scaffold` adds control variates, and as much again to send.
    With `keep_optimizer` a client goes on with its optimiser's state from round to round; without,
    it begins anew, and memory does not grow with the clients by it. `unroll` layers are compiled in
    a row: faster on a CPU, and longer to compile.
    """

    local_steps: Count = 4
    batch_size: Count = 8
    microbatch: Count = 4
    sequence_length: Annotated[int, Field(ge=8)] = 256
    optimizer: Optimizer = "adamw"
    learning_rate: Positive = 1e-3
    keep_optimizer: bool = True
    proximal: NotNegative = 0.0
    scaffold: bool = False
    template: Literal["chat", "plain"] = "chat"
    system_prompt: str = ""
    packing: bool = False
    remat: bool = False
    unroll: Count = 1
    clients_at_once: Annotated[int | Literal["auto"], Field(union_mode="left_to_right")] = "auto"

    @model_validator(mode="after")
    def _clients_at_once(self) -> Self:
        if self.clients_at_once != "auto" and self.clients_at_once < 1:
            raise problem(("clients_at_once",), 'must be at least 1 or "auto"')
        return self
