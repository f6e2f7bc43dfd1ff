"""Hydra groups and the one module that composes them."""
