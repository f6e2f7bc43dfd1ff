"""The first values of a run's weights: random ones, a folder in Hugging Face's form, or another run's checkpoint."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from officina.trainer.checkpoint.content import ContentHasher, add_shares
from officina.trainer.checkpoint.read import open_checkpoint
from officina.trainer.checkpoint.verify import RankGroup, threads_here
from officina.trainer.config import RunConfig
from officina.trainer.errors import ConfigError
from officina.trainer.hf.base import BASE_DIR, Base, card_licence, open_base
from officina.trainer.hf.source import FolderSource
from officina.trainer.init_from import init_problems
from officina.trainer.state import PARAM, Source

WEIGHTS_FILE = "weights.json"
"""In RUN/base: name and hash of the weights that the run started from."""
_PART = 1 << 22
"""Elements hashed at a time."""


@contextmanager
def initial_weights(run: RunConfig, random: Source, run_dir: Path, shapes: Mapping[str, tuple[int, ...]],
                    ranks: RankGroup) -> Iterator[Source]:
    """Where the model of a run that has no checkpoint yet gets its values. Collective over `ranks`.

    random: the source of a run without `init_from`. shapes: of every parameter. What the weights are is written to
    RUN/base, beside the model's configuration and tokenizer. Raises ConfigError, OfficinaError or CheckpointError.
    """
    if not run.init_from:
        yield random
        return
    if problems := init_problems(run, force=True):  # whoever started it was asked for --force
        raise ConfigError(problems)
    base = open_base(run.init_from)
    with open_weights(base, shapes, ranks) as source:
        facts = {"name": base.name, "kind": "folder" if base.family else "run",
                 "hash": weights_hash(source, shapes, ranks), "parameters": sum(map(math.prod, shapes.values()))}
        if ranks.rank == 0:
            keep_base(base, run_dir, facts)
        yield source


@contextmanager
def open_weights(base: Base, shapes: Mapping[str, tuple[int, ...]], ranks: RankGroup) -> Iterator[Source]:
    """The weights of `base`, checked to be those of a module with these parameters. Collective."""
    if base.family:
        yield FolderSource(base, shapes)
        return
    with open_checkpoint(base.path, step=base.step, ranks=ranks) as opened:
        opened.check_fits(shapes)
        yield opened


def weights_hash(source: Source, shapes: Mapping[str, tuple[int, ...]], ranks: RankGroup) -> str:
    """What the weights are, 32 hex digits: the same for equal fp32 values, whatever file, dtype, sharding or engine they come
    from. Collective; each rank reads its share of every tensor.

    It is the SHA-256 of all (name, shape, content sum of the values); content sums are those of checkpoints.
    """
    parts = []
    for name, shape in sorted(shapes.items()):
        numel = math.prod(shape)
        start, stop = (numel * (ranks.rank + i) // ranks.world_size for i in (0, 1))
        parts += [(name, at, min(stop, at + _PART)) for at in range(start, stop, _PART)]

    def share(part: tuple[str, int, int]) -> tuple[str, int]:
        name, start, stop = part
        values = source.read(name, PARAM, start, stop).float()
        return name, ContentHasher().share(memoryview(values.view(torch.uint8).numpy()), 4 * start)

    own = dict.fromkeys(sorted(shapes), 0)
    with ThreadPoolExecutor(threads_here(ranks)) as threads:
        for name, value in threads.map(share, parts):
            own[name] = (own[name] + value) % 2**64
    sums = add_shares(list(own.values()), ranks)
    lines = (f"{name} {list(shapes[name])} {total:016x}\n" for name, total in zip(own, sums, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:32]


def read_weights_record(run_dir: Path) -> dict[str, Any]:
    """What RUN/base says of the weights that the run started from; empty for a run from random ones."""
    path = Path(run_dir) / BASE_DIR / WEIGHTS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def keep_base(base: Base, run_dir: Path, facts: Mapping[str, object]) -> None:
    """Write RUN/base: what the run started from, without its weights."""
    folder = Path(run_dir) / BASE_DIR
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in base.small_files.items():
        shutil.copyfile(path, folder / name)
    if base.tensors:
        if licence := card_licence(base.path):
            facts = {**facts, "licence": licence}
        dtypes = {name: stored.dtype for name, stored in base.tensors.items()}
        common = max(set(dtypes.values()), key=list(dtypes.values()).count)
        facts = {**facts, "dtype": common, "other_dtypes": {n: d for n, d in dtypes.items() if d != common}}
    elif before := read_weights_record(base.path):
        kept = {key: before[key] for key in ("dtype", "other_dtypes", "licence") if key in before}
        facts = {**facts, **kept, "base": {key: before[key] for key in ("name", "kind", "hash", "base") if key in before}}
    (folder / WEIGHTS_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
