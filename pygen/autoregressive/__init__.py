"""Autoregressive generation."""
