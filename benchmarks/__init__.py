"""The benchmark suite: runnable measurements and their records."""
