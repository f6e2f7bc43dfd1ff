"""One checkpoint format for all engines and all numbers of ranks."""
