"""Writes what all sides of a task start from: model, rows, adapter. Runs in our environment.

python experiments/benchmarks/peers/prepare.py --task NAME --folder FOLDER
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sides import SHARED
from tasks import TASKS, Task, model_folder, write_factors

# The decoder of the issue: stories15M's sizes with a vocabulary of 4,096.
RANDOM = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 288,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "vocab_size": 4096,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
# The sizes of Llama 3.2 1B: 1,235,814,400 weights. Its rotary stretching would change no product.
BILLION = RANDOM | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
}
# In its proportions, to try the whole path where there is no accelerator.
BILLION_TINY = BILLION | {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
DRAWN = {"random": RANDOM, "billion": BILLION, "billion-tiny": BILLION_TINY}


def prepare(task: Task, folder: Path) -> None:
    """Writes the files that `tasks` names; a folder that is complete is left as it is.

    Raises:
        UserError: the shared model is not there.
    """
    import jax

    from fedjax_llm.errors import UserError
    from fedjax_llm.lora import LoraConfig, init_adapter
    from fedjax_llm.models import DecoderConfig, init_base
    from fedjax_llm.models.checkpoint import write_base
    from fedjax_llm.models.model import load_config

    if (folder / "start.npz").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    key = jax.random.key(task.seed)
    if task.model in DRAWN:
        config = DecoderConfig.from_hf(DRAWN[task.model])
        # As one program, so that a billion weights are not in memory in float32 as well.
        drawn = jax.jit(
            lambda key: jax.tree.map(lambda w: w.astype(task.dtype), init_base(config, key))
        )
        write_base(model_folder(folder), config, drawn(key))
    else:
        source = SHARED / "models" / task.model
        if not source.is_dir():
            raise UserError(f"{source} is not there; set FEDJAX_LLM_SHARED")
        model_folder(folder).mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(source / name, model_folder(folder))
        config = load_config(model_folder(folder))
    np.save(folder / "tokens.npy", rows(task, config.vocab_size))
    lora = LoraConfig(rank=task.rank, alpha=task.alpha, targets=("all-linear",))
    adapter = init_adapter(config, lora, jax.random.fold_in(key, 1))
    # Complete: what is written last tells.
    write_factors(
        folder / "start.npz",
        {
            f"{name}.{side}": np.asarray(factor)
            for name, pair in adapter.factors.items()
            for side, factor in zip("ab", pair, strict=True)
        },
    )


def rows(task: Task, vocabulary: int) -> NDArray[np.int32]:
    """Rows that count upwards in a client's own step from a random start; int32 [K, B, T]."""
    draw = np.random.default_rng(task.seed)
    start_KxBx1 = draw.integers(0, vocabulary, (task.clients, task.batch, 1))
    step_Kx1x1 = 1 + np.arange(task.clients)[:, None, None] % 3
    return ((start_KxBx1 + step_Kx1x1 * np.arange(task.length)) % vocabulary).astype(np.int32)


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    asked = parser.parse_args()
    prepare(TASKS[asked.task], asked.folder)


if __name__ == "__main__":
    main()
