"""Who can decrypt what in a federation, in the words that a run begins with."""

from fedjax_llm.federation.exchange import HiddenSums
from fedjax_llm.federation.recipe import Recipe
from fedjax_llm.federation.sums import Plain, Selective, SumMode


def statement(mode: SumMode, hidden: HiddenSums | None, recipe: Recipe) -> str:
    """Who can decrypt what.

    Args:
        mode: of the sum.
        hidden: the sums between the clouds; None on the devices.
        recipe: says which clients share a cloud, and what a round sums.
    """
    if hidden is None:
        return Plain().statement()
    words = hidden.statement()
    if len(set(recipe.clouds)) < len(recipe.clouds):
        words += (
            ". Clients of one cloud are summed inside it in the plain: their own cloud sees "
            "their updates, nobody else does"
        )
    sums = recipe.rule.stages + recipe.sums_weights
    if sums > 1:
        words += f". Each round opens {sums} sums of the same clouds"
    if recipe.sums_weights:
        words += ", the first of the clients' weights, and all see it"
    if isinstance(mode, Selective):
        words += (
            ". Each cloud adds the whole noise itself, so that the epsilon per example holds "
            "for what it sends in the clear as well; it hides one example, not what a cloud's "
            "examples have in common, which the clear part shows for each cloud by itself"
        )
    return words
