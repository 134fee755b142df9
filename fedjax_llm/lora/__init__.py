"""Low-rank adapters: the pytree, its start, its dense form, and PEFT's files."""

from fedjax_llm.lora import algebra as algebra
from fedjax_llm.lora.adapter import Adapter as Adapter
from fedjax_llm.lora.adapter import LoraConfig as LoraConfig
from fedjax_llm.lora.adapter import LowRank as LowRank
from fedjax_llm.lora.adapter import init_adapter as init_adapter
from fedjax_llm.lora.adapter import target_names as target_names
from fedjax_llm.lora.merge import add_dense as add_dense
from fedjax_llm.lora.merge import delta as delta
from fedjax_llm.lora.merge import merge as merge
from fedjax_llm.lora.peft import read_peft as read_peft
from fedjax_llm.lora.peft import write_peft as write_peft

__all__ = [
    "Adapter",
    "LoraConfig",
    "LowRank",
    "add_dense",
    "algebra",
    "delta",
    "init_adapter",
    "merge",
    "read_peft",
    "target_names",
    "write_peft",
]
