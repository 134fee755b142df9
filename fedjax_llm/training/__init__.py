"""Local training: one client's update as a pure function, with or without example privacy."""

from fedjax_llm.training.example_privacy import ExamplePrivacy as ExamplePrivacy
from fedjax_llm.training.example_privacy import NoiseStream as NoiseStream
from fedjax_llm.training.local import ClientMetrics as ClientMetrics
from fedjax_llm.training.local import ClientTable as ClientTable
from fedjax_llm.training.local import Drift as Drift
from fedjax_llm.training.local import LocalTraining as LocalTraining
from fedjax_llm.training.local import Trained as Trained
from fedjax_llm.training.local import client_update as client_update
from fedjax_llm.training.local import each_row as each_row
from fedjax_llm.training.optimizers import MOMENTUM as MOMENTUM
from fedjax_llm.training.optimizers import OPTIMIZERS as OPTIMIZERS
from fedjax_llm.training.optimizers import optimizer_init as optimizer_init
from fedjax_llm.training.optimizers import optimizer_step as optimizer_step

__all__ = [
    "MOMENTUM",
    "OPTIMIZERS",
    "ClientMetrics",
    "ClientTable",
    "Drift",
    "ExamplePrivacy",
    "LocalTraining",
    "NoiseStream",
    "Trained",
    "client_update",
    "each_row",
    "optimizer_init",
    "optimizer_step",
]
