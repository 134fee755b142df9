"""What weighs the clients of a mean, and which of it a privacy unit cannot bear."""

from typing import Literal

from fedjax_llm.errors import Refused

from .sampler import Unit

Weights = Literal["uniform", "examples", "tokens", "loss", "loss-bounded", "result"]

# What each way to weigh clients follows from, where that is not public or noised.
_UNCERTIFIED = {
    ("client", "examples"): "weights by number of examples depend on the data of the client",
    ("client", "tokens"): "weights by number of tokens depend on the data of the client",
    ("client", "loss"): "weights by loss have no bound and depend on the data of the client",
    ("client", "result"): "weights by the norm of a result have no bound and depend on the client",
    ("example", "tokens"): "weights by number of tokens follow from the examples without noise",
    ("example", "loss"): "weights by loss follow from the examples without noise",
    ("example", "loss-bounded"): "weights by loss follow from the examples without noise",
    ("user", "examples"): "weights by number of examples tell how many a user has",
    ("user", "tokens"): "weights by number of tokens follow from the users without noise",
    ("user", "loss"): "weights by loss follow from the users without noise",
    ("user", "loss-bounded"): "weights by loss follow from the users without noise",
}


def check_weights(unit: Unit, weights: Weights) -> None:
    """Refuses weights that follow from what a unit is to hide; see `PrivacyPlan`."""
    if (why := _UNCERTIFIED.get((unit, weights))) is not None:
        cure = {"client": "uniform or loss-bounded", "example": "uniform or examples"}
        raise Refused(f"{why} that unit {unit} is to hide; use {cure.get(unit, 'uniform')} weights")
