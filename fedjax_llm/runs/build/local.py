"""What one client trains, and how."""

from fedjax_llm.lora import LoraConfig
from fedjax_llm.models import Model
from fedjax_llm.runs.build import plans
from fedjax_llm.runs.sections.schema import RunFile
from fedjax_llm.training import OPTIMIZERS, Drift, ExamplePrivacy, LocalTraining


def lora(run_file: RunFile) -> LoraConfig:
    """Rank, alpha and targets."""
    section = run_file.adapter
    return LoraConfig(section.rank, section.alpha, tuple(section.targets))


def drift(run_file: RunFile) -> Drift:
    """What keeps the clients from drifting apart."""
    return Drift(run_file.training.proximal, run_file.training.scaffold)


def local_training(run_file: RunFile, base: Model) -> LocalTraining:
    """One client's local update, as the run file describes it, on a model."""
    training, privacy = run_file.training, run_file.privacy
    gradients = run_file.aggregation.exchange == "gradients"
    return LocalTraining(
        # A step of sgd at rate 1 is minus the gradient: the server's optimiser takes the real one.
        optimizer=(
            OPTIMIZERS["sgd"](1.0)
            if gradients
            else OPTIMIZERS[training.optimizer](training.learning_rate)
        ),
        steps=training.local_steps,
        batch_size=training.batch_size,
        microbatch=training.microbatch,
        privacy=(
            ExamplePrivacy(
                plans.clip(run_file, base.config.num_layers),
                privacy.noise_multiplier,
                plans.correlation(run_file),
                privacy.period,
                plans.adaptive(run_file),
                privacy.gradients,
            )
            if privacy.unit in ("example", "user")
            else None
        ),
        drift=drift(run_file),
        keeps_optimizer=training.keep_optimizer,
    )
