"""Where a run's weights come from: at its beginning random ones, a folder in Hugging Face's form or another run's checkpoint;
later its own checkpoint, and for weights that an adapter leaves frozen still the beginning, checked by hash."""

import hashlib
import json
import math
import shutil
import threading
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from officina.trainer.checkpoint.content import ContentHasher, add_shares
from officina.trainer.checkpoint.read import OpenCheckpoint, open_checkpoint
from officina.trainer.checkpoint.verify import RankGroup, threads_here
from officina.trainer.config import LoraConfig, RunConfig
from officina.trainer.errors import CheckpointError, ConfigError, OfficinaError, listed
from officina.trainer.hf.base import BASE_DIR, Base, card_licence, open_base
from officina.trainer.hf.source import FolderSource
from officina.trainer.hf.tokenizers import TOKENIZER_FILES, tokenizer_text
from officina.trainer.init_from import init_problems
from officina.trainer.model.build import build_transformer
from officina.trainer.model.init import FillSource, InitSource
from officina.trainer.model.lora import AdapterSource, MergedSource
from officina.trainer.model.nf4 import RoundedSource
from officina.trainer.model.shapes import parameter_shapes
from officina.trainer.model.targets import choose
from officina.trainer.run_dir import CONFIG, load_config
from officina.trainer.state import PARAM, Source

WEIGHTS_FILE = "weights.json"
"""In RUN/base: name and hash of the weights that the run started from."""
VOCABULARY = ("embed.weight", "head.weight")
"""Matrices with a row per token."""
_PART = 1 << 22
"""Elements hashed at a time."""


@contextmanager
def initial_weights(run: RunConfig, random: Source, run_dir: Path, shapes: Mapping[str, tuple[int, ...]],
                    ranks: RankGroup) -> Iterator[Source]:
    """Where the model of a run that has no checkpoint yet gets its values. Collective over `ranks`.

    random: the source of a run without `init_from`. shapes: of every parameter of the model, adapters left out. What the
    weights are is written to RUN/base, beside the model's configuration and tokenizer. Raises ConfigError, OfficinaError or
    CheckpointError.
    """
    if ranks.rank == 0:
        shutil.rmtree(run_dir / BASE_DIR, ignore_errors=True)  # of a start that came to no checkpoint
    if not run.init_from:
        yield random
        return
    if problems := init_problems(run, force=True):  # whoever started it was asked for --force
        raise ConfigError(problems)
    base = open_base(run.init_from)
    with open_weights(base, shapes, ranks) as source:
        facts = {"name": base.name, "kind": "folder" if base.family else "run",
                 "hash": weights_hash(source, shapes, ranks), "parameters": sum(map(math.prod, shapes.values()))}
        if isinstance(source, GrownSource):
            facts["new_rows"] = {"first": source.old_rows, "stop": source.new_rows, "values": "mean of the rows before"}
        if ranks.rank == 0:
            keep_base(base, run_dir, facts)
        yield source


@contextmanager
def open_weights(base: Base, shapes: Mapping[str, tuple[int, ...]], ranks: RankGroup) -> Iterator[Source]:
    """The weights of `base`, checked to be those of a module with these parameters. Collective.

    Where `shapes` has more rows of the vocabulary than the base, the new ones are the mean of the old.
    """
    old_rows = base.model.vocab_size
    grown = {name: shape[0] for name, shape in shapes.items() if name in VOCABULARY and shape[0] > old_rows}
    own = {name: (old_rows, *shape[1:]) if name in grown else shape for name, shape in shapes.items()}
    with _open_own(base, own, ranks) as source:
        yield GrownSource(source, old_rows, max(grown.values()), base.model.d_model) if grown else source


@contextmanager
def _open_own(base: Base, shapes: Mapping[str, tuple[int, ...]], ranks: RankGroup) -> Iterator[Source]:
    if base.family:
        yield FolderSource(base, shapes)
        return
    with open_checkpoint(base.path, step=base.step, ranks=ranks) as opened, \
            plain_weights(base.path, opened, ranks) as source:
        if source is opened:
            opened.check_fits(shapes)
        yield source


@contextmanager
def initial_adapter(run: RunConfig, base: Source, new: FillSource, frozen: Mapping[str, int],
                    shapes: Mapping[str, tuple[int, ...]], ranks: RankGroup) -> Iterator[Source]:
    """All first values of a run with an adapter: a new one's, or those of the run that it begins with. Collective.

    frozen: content of the frozen weights. shapes: of all trained parameters. Raises CheckpointError for another base.
    """
    if not run.adapter.init_from:
        yield AdapterSource(base, new)
        return
    origin = open_base(run.adapter.init_from)
    with open_checkpoint(origin.path, step=origin.step, ranks=ranks) as opened:
        opened.check_fits(shapes)
        check_frozen(base, opened, frozen, f"init_from={load_config(origin.path).init_from or 'FOLDER'}")
        yield JoinedSource(opened, base, frozen)


# ---- frozen weights --------------------------------------------------------------------------------------------------
@contextmanager
def plain_weights(run_dir: Path, opened: OpenCheckpoint, ranks: RankGroup) -> Iterator[Source]:
    """The weights of a checkpoint as those of the plain transformer: adapters merged, in fp32, into the values that they were
    trained beside. Collective."""
    run = load_config(run_dir)
    if not isinstance(run.adapter, LoraConfig):
        yield opened
        return
    with all_weights(run_dir, opened, ranks) as source:
        yield MergedSource(RoundedSource(source, choose(run.model, run.adapter).packed), run.model, run.adapter)


@contextmanager
def all_weights(run_dir: Path, opened: OpenCheckpoint, ranks: RankGroup) -> Iterator[Source]:
    """All weights of a run with an adapter: its own from the checkpoint, frozen ones from the base, checked. Collective."""
    run = load_config(run_dir)
    shapes, frozen = parameter_shapes(run.model), choose(run.model, run.adapter).frozen
    random = InitSource(build_transformer(run.model), run.model, run.seed)  # no module that computes: it may not do so here
    with base_weights(run, random, shapes, ranks, run_dir) as base:
        check_frozen(base, opened, content_of(base, {name: shapes[name] for name in frozen}, ranks),
                     f"officina resume {run_dir} init_from=FOLDER")
        yield JoinedSource(opened, base, frozen)


@contextmanager
def base_weights(run: RunConfig, random: Source, shapes: Mapping[str, tuple[int, ...]], ranks: RankGroup,
                 run_dir: Path) -> Iterator[Source]:
    """What the run started from, again: for its frozen weights. Collective."""
    if not run.init_from:
        yield random
        return
    try:
        base = open_base(run.init_from)
    except OfficinaError as error:
        raise CheckpointError(f"the frozen weights of {run_dir} lie where it started from, init_from={run.init_from}: {error}. "
                              f"If they have moved, say where to: init_from in {run_dir / CONFIG}") from error
    with open_weights(base, shapes, ranks) as source:
        yield source


class JoinedSource:
    """A `state.Source` of a checkpoint whose frozen weights lie elsewhere."""

    def __init__(self, opened: Source, base: Source, frozen: Collection[str]) -> None:
        self._opened, self._base, self._frozen = opened, base, frozenset(frozen)

    def read(self, name: str, slot: str, start: int, stop: int) -> Tensor:
        return (self._base if name in self._frozen else self._opened).read(name, slot, start, stop)


class GrownSource:
    """A `state.Source` of a model whose vocabulary has grown: each new row of embedding and head is the mean of the old ones.

    The mean is taken in fp64 over whole columns in one order, so it does not depend on the sharding.
    """

    def __init__(self, source: Source, old_rows: int, new_rows: int, width: int) -> None:
        self.source, self.old_rows, self.new_rows = source, old_rows, new_rows
        self._width = width
        self._means: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def read(self, name: str, slot: str, start: int, stop: int) -> Tensor:
        border = self.old_rows * self._width
        if name not in VOCABULARY or stop <= border:
            return self.source.read(name, slot, start, stop)
        old = self.source.read(name, slot, start, border) if start < border else torch.empty(0)
        first = max(start, border) - border
        row, rows = first // self._width, -(-(stop - border) // self._width)
        new = self._mean(name).repeat(rows - row)
        return torch.cat([old, new[first - row * self._width:stop - border - row * self._width]])

    def _mean(self, name: str) -> Tensor:
        with self._lock:
            if name not in self._means:
                total, step = torch.zeros(self._width, dtype=torch.float64), max(1, _PART // self._width)
                for row in range(0, self.old_rows, step):
                    stop = min(self.old_rows, row + step)
                    part = self.source.read(name, PARAM, row * self._width, stop * self._width)
                    total += part.view(-1, self._width).sum(0, dtype=torch.float64)
                self._means[name] = (total / self.old_rows).float()
            return self._means[name]


def check_frozen(base: Source, opened: OpenCheckpoint, found: Mapping[str, int], remedy: str) -> None:
    """Raise CheckpointError unless the frozen weights have the content (of `content_of`) that the checkpoint names."""
    stated = opened.train_state.frozen
    wrong = [name for name, value in hex_sums(found).items() if stated.get(name) != value]
    if wrong:
        source = base.source if isinstance(base, GrownSource) else base
        where = [f"{name} in {source.where(name)}" if hasattr(source, "where") else name for name in wrong]
        raise CheckpointError(
            f"{opened.path} was trained beside other frozen weights than those that are there now. Different are:\n  "
            + listed(where) + f"\nName the folder or run that holds the very weights it started from: {remedy}")


def content_of(source: Source, shapes: Mapping[str, tuple[int, ...]], ranks: RankGroup) -> dict[str, int]:
    """Content sum of every tensor's fp32 values, whatever file, dtype, sharding or engine they come from: see content.py.

    Collective; each rank reads its share of every tensor.
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
    return dict(zip(own, add_shares(list(own.values()), ranks), strict=True))


def hex_sums(sums: Mapping[str, int]) -> dict[str, str]:
    """Content sums as a checkpoint names them."""
    return {name: f"{value:016x}" for name, value in sums.items()}


def weights_hash(source: Source, shapes: Mapping[str, tuple[int, ...]], ranks: RankGroup) -> str:
    """What the weights are, 32 hex digits: the SHA-256 of all (name, shape, content sum). Collective."""
    lines = (f"{name} {list(shapes[name])} {total:016x}\n" for name, total in content_of(source, shapes, ranks).items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:32]


def keep_tokenizer(run_dir: Path) -> str:
    """Give the run the tokenizer of the model it started from, as a tokenizer.json, if that has one. Returns why not."""
    folder = Path(run_dir) / BASE_DIR
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        try:
            (Path(run_dir) / "tokenizer.json").write_text(tokenizer_text(folder), encoding="utf-8")
        except OfficinaError as error:
            return str(error)
    return ""


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
        inherited = ("name", "kind", "hash", "licence", "base")
        facts = {**facts, **kept, "base": {key: before[key] for key in inherited if key in before}}
    (folder / WEIGHTS_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
