"""The sections of a run file: frozen, typed objects, and what in them contradicts itself."""
