"""One checkpoint format for all engines and all numbers of ranks: see layout.py."""
