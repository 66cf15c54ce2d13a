"""Proof that an accelerated model computes what it computed before."""
