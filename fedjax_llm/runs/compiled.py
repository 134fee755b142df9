"""Programs that were compiled once, kept on disk for the runs that come after."""

import os
import time
from dataclasses import dataclass, field

import jax

from fedjax_llm.models.hub import cache_root
from fedjax_llm.runs.events import Event, Note, OnEvent, RoundFinished

# Below this, reading a program back is hardly faster than compiling it.
LEAST_SECONDS = 0.3
_GOT = "/jax/core/compile/backend_compile_duration"
_READ = "/jax/compilation_cache/cache_retrieval_time_sec"


def keep() -> None:
    """Keeps compiled programs in the user's cache, unless JAX is told another place.

    JAX addresses them by program, versions, flags and devices: what is found is what would have
    been compiled. What is read back is run, so that the folder has to be the user's own and closed
    to writing by others; one that is not, or cannot be made, costs the time of compiling and
    nothing else.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.jax_compilation_cache_dir:
        return
    folder = cache_root() / "compiled"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError:
        return
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)


@dataclass
class FirstRound:
    """Tells, after the first round of a process, how long that took and how much was compiling.

    An `on_event` around another one, and a context manager.

    Attributes:
      on_event: is told all that this one is told.
      started: seconds of `time.perf_counter`.
      compiling: seconds so far.
      compiled: programs so far.
      found: programs that came from the cache.
      told: whether it has been told.
    """

    on_event: OnEvent
    started: float = field(default_factory=time.perf_counter)
    compiling: float = 0.0
    compiled: int = 0
    found: int = 0
    told: bool = False

    def __call__(self, event: Event) -> None:
        self.on_event(event)
        if isinstance(event, RoundFinished) and event.record["round"] > 0 and not self.told:
            self.told = True
            self.on_event(Note(self._words(event.record["round"])))

    def __enter__(self) -> "FirstRound":
        jax.monitoring.register_event_duration_secs_listener(self._count)
        return self

    def __exit__(self, *error: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._count)

    def _count(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _GOT:
            self.compiling += duration_secs
            self.compiled += 1
        elif event == _READ:
            # Comes before the event above, which counts its time too.
            self.compiling -= duration_secs
            self.compiled -= 1
            self.found += 1

    def _words(self, number: int) -> str:
        whole = time.perf_counter() - self.started
        words = f"round {number} was done {whole:.1f} s after the start; {self.compiling:.1f} s of "
        words += f"it went into compiling {self.compiled} programs"
        return words + (f", {self.found} more came from the cache" if self.found else "")
