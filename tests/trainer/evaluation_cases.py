"""What a rank of the pool does in the tests of evaluation."""

from pathlib import Path


def evaluate(ranks, folder: str) -> int:
    from officina.trainer.eval_rank import evaluate

    return evaluate(Path(folder), ranks)
