"""What a rank of the pool does in the tests of evaluation."""

from pathlib import Path


def evaluate(ranks, folder: str) -> int:
    from officina.trainer.eval_rank import evaluate

    return evaluate(Path(folder), ranks)


def evaluate_without_forks(ranks, folder: str) -> int:
    """Where the harness asks for processes of its own, it gets an error."""
    import multiprocessing
    from unittest import mock

    with mock.patch.object(multiprocessing, "Pool", side_effect=AssertionError("forks of a rank")):
        return evaluate(ranks, folder)


def refusal(ranks, folder: str) -> str:
    """Why the evaluation is refused; empty if it is not."""
    from officina.trainer.errors import OfficinaError

    try:
        evaluate(ranks, folder)
    except OfficinaError as error:
        return str(error)
    return ""
