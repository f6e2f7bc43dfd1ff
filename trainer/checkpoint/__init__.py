"""One checkpoint format for all engines and all numbers of ranks: layout.py says what it is, write.py and read.py use it."""
