"""The checkpoint on disk: names, the three kinds of file, and what a listing can tell. No torch here.

    RUN/checkpoints/step-00000100/
        rank-00000.bin    a 512-byte header, then this rank's pieces: aligned, cut into chunks of at most 4 MiB
        rank-00000.json   what every chunk is, where it lies, and its xxh3-64
        ...
        COMMIT            written last: run, step, world size, xxh3-128 of every manifest, train state, its own hash

A directory without a valid COMMIT does not count. Every byte is covered: chunks (with their padding) by the manifest,
manifests by COMMIT, COMMIT by itself, the header by what the manifest says it must be. Numbers are little-endian.
Nothing stored depends on user, host or path, so a run directory can be moved, renamed and resumed by a colleague.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import xxhash

FORMAT = 1
CHUNK_BYTES = 4 << 20
ALIGN_BYTES = 64
HEADER_BYTES = 512
COMMIT = "COMMIT"
LAYOUT = (f"flat ranges of named tensors in row-major order, little-endian; chunks of at most {CHUNK_BYTES} bytes, "
          f"aligned to {ALIGN_BYTES} after a header of {HEADER_BYTES}; xxh3-64 over chunk and padding")
_STEP_DIR = re.compile(r"step-(\d{8,})(\.old|\.damaged(?:-\d+)?)?")

Key = tuple[str, str]
"""(name, slot)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """All of a run that is not in the engine. JSON-ready: numbers, text, lists and dicts with text keys."""

    step: int
    """Optimizer steps done, skipped ones included."""
    tokens: int = 0
    """Loss-bearing tokens trained on so far, over all ranks."""
    position: int = 0
    """Global sample index of the next sample."""
    optimizer_steps: int = 0
    """Steps the optimizer applied; AdamW's bias correction follows it."""
    loader: Mapping[str, Any] = field(default_factory=dict)
    """Loader state, see `officina.trainer.data.loader_state`."""
    rng: Mapping[str, Any] = field(default_factory=dict)
    """Scheme and seed; all randomness is a function of (seed, step, place), so there are no generator states."""
    config_fingerprint: str = ""
    data_fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Of the data sets, by source: for people; the loader's state has what a resume compares."""
    spikes: Mapping[str, Any] = field(default_factory=dict)
    """Statistics of the spike detectors."""
    frozen: Mapping[str, str] = field(default_factory=dict)
    """Weights that an adapter leaves as they were and that are not stored: name -> content sum of their fp32 values (16 hex
    digits, see content.py)."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the loop wants back."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """At most 4 MiB of one slot of one tensor."""

    name: str
    slot: str
    dtype: str
    """As torch calls it, without `torch.`."""
    shape: tuple[int, ...]
    start: int
    stop: int
    offset: int
    """Bytes from the beginning of the file."""
    bytes: int
    """Without the padding that follows up to the next multiple of 64."""
    hash: str
    """xxh3-64 over chunk and padding, 16 hex digits."""

    @property
    def where(self) -> str:
        """For messages: what of which tensor this is."""
        return (f"bytes {self.offset} to {self.offset + self.bytes} ({self.name} {self.slot}, "
                f"elements {self.start} to {self.stop})")


@dataclass(frozen=True, slots=True)
class Manifest:
    """One rank's data file, described."""

    run_id: str
    step: int
    world_size: int
    rank: int
    file_bytes: int
    chunks: tuple[Chunk, ...]
    content: Mapping[str, Mapping[str, str]]
    """slot -> name -> this rank's share of the content sum (16 hex digits): see content.py."""


@dataclass(frozen=True, slots=True)
class Commit:
    """What makes a directory a checkpoint."""

    run_id: str
    step: int
    world_size: int
    data_bytes: int
    """Bytes of all data files together."""
    manifests: tuple[str, ...]
    """xxh3-128 of each rank's manifest, by rank."""
    train_state: TrainState


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """One checkpoint directory as a listing sees it: metadata and sizes are checked, the data is not read."""

    step: int
    path: Path
    status: Literal["complete", "incomplete", "damaged"]
    problem: str | None = None
    """What is wrong, with the file; None if nothing is known to be."""
    run_id: str | None = None
    world_size: int | None = None
    bytes: int | None = None
    tokens: int | None = None

    @property
    def name(self) -> str:
        return self.path.name


class Unreadable(ValueError):
    """A metadata file is not what it must be; the message says why, without the path."""


def checkpoints_dir(run_dir: Path) -> Path:
    """Where a run's checkpoints lie."""
    return Path(run_dir) / "checkpoints"


def step_dir(run_dir: Path, step: int) -> Path:
    """The directory of one step's checkpoint."""
    return checkpoints_dir(run_dir) / f"step-{step:08d}"


def parse_step_dir(name: str) -> tuple[int, str] | None:
    """(step, suffix) of a directory name, or None. The suffix is '', '.old' or '.damaged...'."""
    match = _STEP_DIR.fullmatch(name)
    return (int(match[1]), match[2] or "") if match else None


def data_name(rank: int) -> str:
    return f"rank-{rank:05d}.bin"


def manifest_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def padded(size: int) -> int:
    """`size` rounded up to the alignment."""
    return -(-size // ALIGN_BYTES) * ALIGN_BYTES


def header(run_id: str, step: int, world_size: int, rank: int) -> bytes:
    """First bytes of a data file, so that a file in the wrong place can be named for what it is."""
    text = json.dumps({"officina_checkpoint": FORMAT, "run_id": run_id, "step": step, "world_size": world_size,
                       "rank": rank}).encode()
    if len(text) >= HEADER_BYTES:
        raise ValueError(f"run id of {len(run_id)} characters: at most 300 fit into the header of a data file")
    return text.ljust(HEADER_BYTES - 1) + b"\n"


def describe_header(raw: bytes) -> str:
    """What a data file's header says of it, for messages."""
    try:
        found = json.loads(raw)
        return f"rank {found['rank']} of {found['world_size']}, step {found['step']}, run {found['run_id']}"
    except (ValueError, KeyError, TypeError):
        return "no readable header"


def pack_manifest(manifest: Manifest) -> bytes:
    """The manifest's file: JSON, one chunk a line."""
    head = {"format": FORMAT, "run_id": manifest.run_id, "step": manifest.step, "world_size": manifest.world_size,
            "rank": manifest.rank, "file_bytes": manifest.file_bytes, "content": manifest.content}
    chunks = ",\n".join(json.dumps({f: getattr(c, f) for f in Chunk.__slots__}) for c in manifest.chunks)
    return (json.dumps(head)[:-1] + ', "chunks": [\n' + chunks + "\n]}\n").encode()


def unpack_manifest(raw: bytes) -> Manifest:
    """Inverse of `pack_manifest`. Raises Unreadable."""
    try:
        found = json.loads(raw)
        chunks = tuple(Chunk(**{**c, "shape": tuple(c["shape"])}) for c in found["chunks"])
        return Manifest(found["run_id"], found["step"], found["world_size"], found["rank"], found["file_bytes"], chunks,
                        found["content"])
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise Unreadable(f"not a manifest ({type(e).__name__}: {e})") from e


def manifest_hash(raw: bytes) -> str:
    """xxh3-128 of a manifest's bytes, 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(raw)


def pack_commit(commit: Commit) -> bytes:
    """COMMIT's bytes: JSON whose `hash` is the xxh3-128 of the same JSON with an empty `hash`."""
    body = {"hash": "", "format": FORMAT, "run_id": commit.run_id, "step": commit.step,
            "world_size": commit.world_size, "layout": LAYOUT, "data_bytes": commit.data_bytes,
            "train_state": asdict(commit.train_state), "manifests": list(commit.manifests)}
    body["hash"] = xxhash.xxh3_128_hexdigest(json.dumps(body, indent=1).encode())
    return json.dumps(body, indent=1).encode() + b"\n"


def unpack_commit(raw: bytes) -> Commit:
    """Inverse of `pack_commit`; refuses a changed byte, wherever it is. Raises Unreadable."""
    try:
        body = json.loads(raw)
        if body["format"] != FORMAT:
            raise Unreadable(f"written in format {body['format']}; this officina reads format {FORMAT}")
        stated = body["hash"]
        blank = json.dumps({**body, "hash": ""}, indent=1).encode()
        if xxhash.xxh3_128_hexdigest(blank) != stated or json.dumps(body, indent=1).encode() + b"\n" != raw:
            raise Unreadable("its own hash does not fit: bytes were changed")
        known = {f.name for f in fields(TrainState)}
        state = TrainState(**{k: v for k, v in body["train_state"].items() if k in known})
        return Commit(body["run_id"], body["step"], body["world_size"], body["data_bytes"], tuple(body["manifests"]), state)
    except Unreadable:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise Unreadable(f"not a readable COMMIT ({type(e).__name__}: {e})") from e


def read_commit(directory: Path) -> Commit:
    """The directory's COMMIT. Raises Unreadable; OSError if it cannot be read; FileNotFoundError if there is none."""
    return unpack_commit((directory / COMMIT).read_bytes())
