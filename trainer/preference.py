"""The reference of preference optimisation: log-probabilities of all answers under the model that the run begins with.

They are computed once, before the first step, by the run's own engine, so that no second model is ever in memory, and kept:

    RUN/reference/SOURCE-SPLIT.logp    a line of JSON, then (pairs, 2) fp32, little-endian: chosen, rejected
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import xxhash

from officina.trainer.config import RunConfig
from officina.trainer.data.loader import packed_rows
from officina.trainer.data.manifest import write_whole
from officina.trainer.data.order import sources_in_use
from officina.trainer.data.reader import open_source, validation_streams
from officina.trainer.data.stream import Stream
from officina.trainer.errors import DataError
from officina.trainer.objective import document_logp
from officina.trainer.parallel.engine import Engine
from officina.trainer.ranks import Ranks
from officina.trainer.run_dir import REFERENCE_DIR

References = dict[str, dict[str, np.ndarray]]
"""Split -> source -> (pairs, 2) fp32."""
_AT_ONCE = 1 << 20


def references(run: RunConfig, run_dir: Path, engine: Engine, ranks: Ranks, *, fresh: bool,
               say: Callable[[str], None] = lambda text: None) -> References:
    """The reference's log-probabilities of every pair in use; nothing for other objectives.

    fresh: the engine holds the model that the run begins with, and they are computed and written; else read. Raises DataError
    if what was written is missing, damaged or of other data.
    """
    found: References = {run.data.split: {}, run.data.validation_split: {}}
    if run.objective.kind != "dpo":
        return found
    for name, split, stream in _streams(run):
        path = run_dir / REFERENCE_DIR / f"{name}-{split}.logp"
        head = {"fingerprint": stream.dataset.manifest.fingerprint, "pairs": len(stream.pair_starts)}
        if fresh:
            say(f"log-probabilities of {len(stream.pair_starts):,} pairs ({name}, {split}) under the model as it is")
            values = _computed(run, stream, engine, ranks)
            if ranks.rank == 0:
                _write(path, values, head)
            ranks.barrier()
        found[split][name] = values if fresh else _read(path, head)
    return found


def _streams(run: RunConfig) -> Iterator[tuple[str, str, Stream]]:
    for name in sources_in_use(run.data):
        stream = Stream(open_source(run, name), run.data.split)
        yield name, run.data.split, stream.lay_out(run.data, run.batch.seq_len, f"data.sources.{name}")
    for name, stream in validation_streams(run).items():
        yield name, run.data.validation_split, stream


def _computed(run: RunConfig, stream: Stream, engine: Engine, ranks: Ranks) -> np.ndarray:
    """(pairs, 2) fp32, the same on every rank; zeros where a pair is in no row."""
    values, plan = np.zeros((len(stream.pair_starts), 2)), stream.plan
    assert plan is not None
    for rows, batch in packed_rows(run, stream, ranks.rank, ranks.world_size, ranks.device):
        logp_BD = engine.infer(document_logp, batch.to(ranks.device)).cpu().numpy()
        piece, row = plan.pieces(rows)
        nth = np.arange(len(row)) - np.searchsorted(row, row)
        pair = np.searchsorted(stream.pair_starts, plan.starts[piece])
        values[pair] = np.stack((logp_BD[row, 2 * nth], logp_BD[row, 2 * nth + 1]), 1)
    flat = values.reshape(-1)
    summed = [number for first in range(0, len(flat), _AT_ONCE) for number in ranks.sum(flat[first:first + _AT_ONCE].tolist())]
    return np.asarray(summed, np.float32).reshape(-1, 2)


def _write(path: Path, values: np.ndarray, head: dict[str, object]) -> None:
    content = values.astype("<f4").tobytes()
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps(head | {"xxh3": xxhash.xxh3_64_hexdigest(content)}).encode() + b"\n" + content)


def _read(path: Path, head: dict[str, object]) -> np.ndarray:
    line, _, content = (path.read_bytes() if path.is_file() else b"").partition(b"\n")
    try:
        found = json.loads(line)
    except ValueError:
        found = {}
    if found != head | {"xxh3": xxhash.xxh3_64_hexdigest(content)}:
        why = "is of other data" if found.get("xxh3") == xxhash.xxh3_64_hexdigest(content) else "is missing or damaged"
        raise DataError(f"{path}: {why}. It holds what the model at the run's beginning made of the pairs, and cannot be made "
                        "from a later one: restore it from a copy, or start the run anew.")
    return np.frombuffer(content, "<f4").reshape(-1, 2)
