"""Triton implementations, one module per op. Importing one imports triton; importing vidops does not."""
