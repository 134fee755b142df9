"""What a privacy plan promises, in one paragraph for people."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plan import PrivacyPlan


def statement(plan: "PrivacyPlan") -> str:
    """Unit, neighbours, sampler, trust, what is released and what is not covered."""
    if plan.unit == "none":
        return "No differential privacy: no differential privacy was asked for."
    covered = _clients(plan) if plan.unit == "client" else _examples(plan)
    return f"{covered} {_mechanism(plan)} {plan.report()}."


def _examples(plan: "PrivacyPlan") -> str:
    user = plan.unit == "user"
    unit = (
        "user of one cloud with all its examples there" if user else "training example of one cloud"
    )
    left = (
        "users with examples in several clouds" if user else "people or texts with several examples"
    )
    return (
        f"Differential privacy per {plan.unit}. Neighbours: one {unit} {_differs(plan)}; the "
        f"number of {plan.unit}s of each cloud is public. Trust: each cloud trusts itself alone, "
        "and its noised updates are private towards everyone, the server included. Released: the "
        "updates of every round and all that is computed from them. Not covered: losses (training "
        f"and held-out), counts and timings of a cloud, which must stay in it, and {left}."
    )


def _clients(plan: "PrivacyPlan") -> str:
    hidden = []
    if plan.sampler.kind == "poisson" and plan.integer is None:
        hidden.append("which clouds took part in a round must stay with the server")
    if plan.trust != "local":
        hidden.append("the messages themselves")
    hidden.append(
        "losses (training and held-out), counts (clipped and diverged updates too), timings of a "
        "cloud and the aggregation error"
    )
    released = (
        "the messages and the global adapter of every round"
        if plan.trust == "local"
        else "the global adapter of every round"
    )
    return (
        f"Differential privacy per client. Neighbours: one client with all its data "
        f"{_differs(plan)}; a client is a cloud, or one of the clients inside a cloud where it has "
        f"several; the number of clients is public. Trust: {_trust(plan)} Released: {released}. "
        f"Not covered: {', '.join(hidden)}."
    )


def _differs(plan: "PrivacyPlan") -> str:
    if plan.integer is not None:
        return "or without any, its messages zeros then; that it takes part is public"
    return "replaced by another" if plan.adjacency == "replace" else "added or removed"


def _trust(plan: "PrivacyPlan") -> str:
    if plan.integer is None:
        return (
            "the server sees the sum before noise and adds the noise; what it passes on is private "
            "towards the other clouds and the public."
        )
    shares = plan.integer.shares
    if plan.trust == "local":
        return "each client trusts itself alone and adds the whole noise to its own message."
    known = (
        f"Up to {shares.colluding} clients may pool what they know, the reader of the sum among "
        "them with its own share (in a cloud of several, all of theirs)"
        if shares.colluding
        else "No client may tell or use what it knows: towards the other clients, each of which "
        "knows its own share, count one as colluding"
    )
    return (
        "each client adds a share of the noise to its integers before they are summed, and a "
        f"server that follows the protocol opens no sum of fewer than "
        f"{shares.clients - shares.dropouts} shares, {shares.counted} of which are the noise that "
        f"is counted on. {known}. Clients inside one cloud are summed there in the plain."
    )


def _mechanism(plan: "PrivacyPlan") -> str:
    noise = (
        "Gaussian noise"
        if plan.integer is None
        else f"integer noise ({type(plan.integer.shares).__name__})"
    )
    hangs = ""
    if plan.correlation is not None and plan.correlation.bands > 1:
        hangs = (
            f" It hangs together over the steps ({plan.correlation.name}, "
            f"{plan.correlation.source}): the deviation is that of its independent draws."
        )
    return (
        f"Sampler: {plan.sampler.describe()}. Contributions are clipped to an l2 norm of "
        f"{plan.clip_norm:g}{_moves(plan)} and {noise} of standard deviation {plan.noise_stddev:g} "
        f"is added to their sum.{hangs} {_generator(plan)}"
    )


def _moves(plan: "PrivacyPlan") -> str:
    if plan.adaptive is None:
        return ""
    return (
        f" at first, which then follows the {plan.adaptive.quantile:g} quantile of their norms by "
        f"a count with noise of standard deviation {plan.adaptive.count_stddev:g} (arXiv "
        "1905.03871), paid for by the same noise multiplier,"
    )


def _generator(plan: "PrivacyPlan") -> str:
    if plan.generator == "seed":
        return (
            "Noise and samples follow from the run's seed, as in any simulation: whoever knows the "
            "seed can take them off."
        )
    return (
        "Noise and samples come from a key of the operating system's generator, which whoever runs "
        "the simulation holds and nobody else may."
    )
