"""Formats of packed bits: what their codes stand for."""
