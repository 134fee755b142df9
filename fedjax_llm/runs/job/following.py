"""The share of a process that does not lead: it computes, and keeps and prints nothing."""

from fedjax_llm.federation import processes
from fedjax_llm.runs import build, compiled
from fedjax_llm.runs.events import ignore
from fedjax_llm.runs.folder import fingerprint
from fedjax_llm.runs.folder.run_folder import SECRET_BYTES
from fedjax_llm.runs.job import orders
from fedjax_llm.runs.job.orders import Order
from fedjax_llm.runs.sections.schema import RunFile


def follow(run_file: RunFile) -> None:
    """Does what the first process does in `job.run`, as far as it concerns all devices.

    Args:
      run_file: the same as the first process has.

    Raises:
      UserError, Refused: as `job.run`.
    """
    compiled.keep()
    build.check_devices(run_file)
    if orders.take() is Order.END:
        return
    base = build.model(run_file, ignore)
    corpora = build.corpora(run_file, base, ignore)
    orders.check_same(fingerprint.of(run_file, base, corpora), run_file)
    secret = None
    if build.secret_noise(run_file):
        secret = orders.shared_secret(bytes(SECRET_BYTES))
    federation = build.federation(run_file, base, corpora, secret)
    federation.keep_at_once(orders.shared_count(None))
    state = processes.from_first(federation.init())
    while (order := orders.take()) is not Order.END:
        if order is Order.ROUND:
            state, _ = federation.run_round(state, donate=True)
        else:
            federation.evaluate(state)
