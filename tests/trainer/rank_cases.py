"""What ranks of the pool do for `test_ranks.py`."""

from officina.trainer.ranks import Ranks


def exchange(ranks: Ranks) -> dict:
    """Every way in which ranks exchange something."""
    ranks.barrier()
    return {
        "sum": ranks.sum([1.0, ranks.rank, 2.0**40 + ranks.rank]),
        "gathered": ranks.gather_text("é" * ranks.rank),
        "nothing": ranks.gather_text(""),
        "broadcast": ranks.broadcast_text("zażółć" if ranks.rank == 0 else "ignored"),
        "broadcast_nothing": ranks.broadcast_text(""),
    }
