"""Sums of rows by index; beside its adjoint, with which it shares its implementations."""

from vidops.reference.gather_tokens import scatter_tokens as scatter_tokens
