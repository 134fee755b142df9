"""A command that was interrupted, which says how to go on."""

from fedjax_llm.errors import FedJaxError

INTERRUPTED = 130


class Interrupted(FedJaxError):
    exit_code = INTERRUPTED
