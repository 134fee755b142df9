"""Numerical kernels, arrays in and arrays out, each with an XLA reference; imports only jax."""
