"""Hydra groups and profiles of sites, and what reads the words of a person: runs, jobs, sweeps, defaults."""
