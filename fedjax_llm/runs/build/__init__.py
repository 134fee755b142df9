"""From a run file to the objects of the federation. The only place that knows both."""

from fedjax_llm.runs.build.base_model import check_devices as check_devices
from fedjax_llm.runs.build.base_model import mesh as mesh
from fedjax_llm.runs.build.base_model import model as model
from fedjax_llm.runs.build.base_model import model_folder as model_folder
from fedjax_llm.runs.build.combining import attackers as attackers
from fedjax_llm.runs.build.combining import combination as combination
from fedjax_llm.runs.build.combining import robust as robust
from fedjax_llm.runs.build.combining import rule as rule
from fedjax_llm.runs.build.combining import weights as weights
from fedjax_llm.runs.build.federating import federation as federation
from fedjax_llm.runs.build.federating import participants as participants
from fedjax_llm.runs.build.federating import plan as plan
from fedjax_llm.runs.build.federating import secret_noise as secret_noise
from fedjax_llm.runs.build.federating import state as state
from fedjax_llm.runs.build.local import drift as drift
from fedjax_llm.runs.build.local import local_training as local_training
from fedjax_llm.runs.build.local import lora as lora
from fedjax_llm.runs.build.rows import LABEL_FLIP as LABEL_FLIP
from fedjax_llm.runs.build.rows import Outline as Outline
from fedjax_llm.runs.build.rows import corpora as corpora
from fedjax_llm.runs.build.sending import compression as compression
from fedjax_llm.runs.build.sending import fewest_opened as fewest_opened
from fedjax_llm.runs.build.sending import schedule as schedule
from fedjax_llm.runs.build.sending import sum_mode as sum_mode

__all__ = [
    "LABEL_FLIP",
    "Outline",
    "attackers",
    "check_devices",
    "combination",
    "compression",
    "corpora",
    "drift",
    "federation",
    "fewest_opened",
    "local_training",
    "lora",
    "mesh",
    "model",
    "model_folder",
    "participants",
    "plan",
    "robust",
    "rule",
    "schedule",
    "secret_noise",
    "state",
    "sum_mode",
    "weights",
]
