"""The folder of an evaluation, which `officina eval` makes ready as `train` does a run directory; torch-free.

    RUN/evals/step-00000300-1a2b3c4d/config.yaml   the run's configuration with the words of the evaluation
    RUN/evals/step-00000300-1a2b3c4d/request.json  `Request`
    RUN/evals/step-00000300-1a2b3c4d/results.json  written at the end by rank 0
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from officina.trainer.data.manifest import write_whole
from officina.trainer.run_dir import REQUEST, RESULTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What an evaluation is of."""

    step: int
    """Of the checkpoint."""
    tasks: Sequence[str] = ()
    """Names of lm-evaluation-harness; none = the held-out loss."""
    tasks_dir: str = ""
    """Folder with task files (YAML) of one's own."""
    shots: int | None = None
    """Examples in the prompt; None = the task's own number."""
    limit: int | None = None
    """Documents of each task; None = all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What came out."""

    step: int
    run_id: str
    engine: str
    world_size: int
    held_out: list[dict[str, Any]] = field(default_factory=list)
    """Fields of `officina.trainer.metrics.EvalMetrics`, with bits_per_byte."""
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Task -> metric -> value, as lm-evaluation-harness gives them."""


def write_request(folder: Path, request: Request) -> None:
    """The last file that a rank waits for."""
    write_whole(folder / REQUEST, json.dumps(asdict(request)).encode())


def read_request(folder: Path) -> Request:
    """The request in the folder of an evaluation."""
    return Request(**json.loads((folder / REQUEST).read_bytes()))


def read_results(folder: Path) -> Results:
    """What rank 0 wrote."""
    return Results(**json.loads((folder / RESULTS).read_bytes()))
