"""Linears whose frozen weights are kept in packed bits."""
