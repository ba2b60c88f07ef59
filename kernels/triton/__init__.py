"""Triton kernels, one module per op: ``launch`` runs it, ``sources`` says what can be compiled ahead of time."""
