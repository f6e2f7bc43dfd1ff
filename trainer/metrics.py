"""metrics.jsonl: one JSON object a line, written by rank 0, read without torch.

A line without `event` is an optimizer step; `event` names the others: eval, save, start, stop. A resumed run
appends to the same file. Numbers that JSON cannot hold are null, with their text in the line's `nonfinite`.

What counts when steps were done twice: a start at step S undoes every earlier step and evaluation beyond S,
and of two lines of one step the last one counts.
"""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

FILE = "metrics.jsonl"
MAX_PENDING_BYTES = 16 * 2**20
"""Lines kept in memory while the disk takes none: about 50,000 steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """One optimizer step, over all ranks."""

    event: ClassVar[str] = ""
    step: int
    """Number of this step; the first is 1."""
    tokens: int
    """Loss-bearing tokens (records for custom models, pairs for DPO) of this step over all ranks; padding does not count."""
    loss_nats: float
    """Mean loss of those tokens, before the update; of next_token the cross-entropy alone. NaN where there are none."""
    grad_norm: float
    """Global L2 norm before clipping."""
    lr: float
    """Learning rate of this step (of AdamW's groups; with Muon the matrices have their own)."""
    step_time_s: float
    """Wall time from the end of the step before to the end of this one, without evaluation and saving."""
    data_wait_s: float
    """Share of step_time_s that rank 0 waited for a batch: the next step's, which is fetched before this one ends."""
    tokens_per_s: float
    """tokens / step_time_s, over all ranks."""
    applied: bool = True
    """False: left out, parameters and moments are unchanged."""
    spike: bool = False
    """Loss or gradient norm was finite and beyond the bound of `objective.spike_sigma`."""
    filled_tokens: int | None = None
    """Tokens of the step that are no padding, trained on or only read; none for custom models."""
    filled_tokens_per_s: float | None = None
    """filled_tokens / step_time_s, over all ranks: the speed of a run that trains on answers only, or on pairs."""
    z_loss: float | None = None
    """Mean z-loss of those tokens in nats, minimised beside loss_nats; none = `objective.z_loss` is 0."""
    reward_accuracy: float | None = None
    """DPO: share of the pairs whose chosen answer has the higher reward."""
    reward_margin: float | None = None
    """DPO: mean of the chosen answer's reward less the rejected one's."""
    reward_chosen: float | None = None
    reward_rejected: float | None = None
    mfu_causal: float | None = None
    """Model FLOP utilisation with attention counted causally, 0 to 1; none = the device's peak is unknown."""
    mfu_full: float | None = None
    """The same with attention counted over the whole square."""
    peak_memory_bytes: int | None = None
    """Highest use so far, mean over ranks: allocated device memory, on the CPU the resident set of the process."""
    time: float = 0.0
    """Unix time of the line in seconds; 0 = now, when it is written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalMetrics:
    """Held-out loss of one source after `step` steps."""

    event: ClassVar[str] = "eval"
    step: int
    source: str
    loss_nats: float
    """Mean over `tokens`."""
    tokens: int
    """Loss-bearing tokens that were evaluated (pairs for DPO)."""
    text_bytes: float | None = None
    """UTF-8 bytes of text that these tokens stand for; none = not known."""
    languages: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """The same by language, where there are several: `tokens`, `loss_nats`, `text_bytes`."""
    lost_blocks: int = 0
    """Damaged blocks under the rows, whose tokens were not evaluated."""
    token_accuracy: float | None = None
    """Share of them that are the likeliest token."""
    samples: int | None = None
    """Documents, or samples, with loss-bearing tokens."""
    sample_accuracy: float | None = None
    """Share of the samples of which every token is the likeliest."""
    sample_loss_nats: float | None = None
    """Mean over the samples of their mean loss: each counts the same, however long."""
    reward_accuracy: float | None = None
    reward_margin: float | None = None
    reward_chosen: float | None = None
    reward_rejected: float | None = None
    eval_time_s: float | None = None
    time: float = 0.0

    @property
    def bits_per_byte(self) -> float | None:
        """Compares across tokenizers."""
        return bits_per_byte(self.loss_nats, self.tokens, self.text_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveMetrics:
    """One checkpoint: written when it is durable, or when writing it failed."""

    event: ClassVar[str] = "save"
    step: int
    path: str
    """Relative to the run directory, e.g. `checkpoints/step-00000100`."""
    bytes: int
    stall_s: float
    """Time the training stood still for it."""
    durable_s: float
    """Time until it was committed and synced."""
    problem: str | None = None
    """Why it failed; training went on."""
    time: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StartMetrics:
    """The ranks begin, or begin again, after `step` steps."""

    event: ClassVar[str] = "start"
    step: int
    """Steps already done: 0, or those of the checkpoint that was loaded."""
    action: str
    """`start`, `resume` or `branch`."""
    engine: str
    world_size: int
    device: str
    """`cpu`, or the name the device gives itself."""
    precision: str
    """`fp32`, `bf16` or `bf16_pure`: `auto` is decided here."""
    parameters: int | None = None
    """Elements of all parameters; a tied one counts once."""
    trained_parameters: int | None = None
    """Those that an optimizer step changes."""
    flops_per_token_causal: float | None = None
    """FLOPs of training on one token, forward and backward, recomputation not counted; attention causal."""
    flops_per_token_full: float | None = None
    peak_flops: float | None = None
    """FLOP/s of one device at this precision, from the exact table; none = unknown device, so no MFU."""
    checkpoint: str | None = None
    """Checkpoint that was loaded, relative to its run directory."""
    problems: tuple[str, ...] = ()
    """What was wrong with newer checkpoints that were not taken."""
    time: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StopMetrics:
    """The ranks leave in good order. A start without one was killed."""

    event: ClassVar[str] = "stop"
    step: int
    reason: str
    """`done`, `signal SIGTERM`, `signal to another rank`, `time limit`, `no progress`, `conditions of use`, `damaged data`."""
    exit_status: int
    message: str | None = None
    time: float = 0.0


def bits_per_byte(loss_nats: float | None, tokens: float, text_bytes: float | None) -> float | None:
    """Of a mean loss per token."""
    return loss_nats * tokens / math.log(2) / text_bytes if text_bytes and loss_nats is not None else None


def perplexity(loss_nats: float | None) -> float | None:
    """Of a mean loss per token; inf where no float holds it."""
    return None if loss_nats is None else math.inf if loss_nats > 700 else math.exp(loss_nats)


Record = StepMetrics | EvalMetrics | SaveMetrics | StartMetrics | StopMetrics
_RECORDS = (StepMetrics, EvalMetrics, SaveMetrics, StartMetrics, StopMetrics)
_KINDS: dict[str, type] = {kind.event: kind for kind in _RECORDS}
_NAMES = {kind: tuple(f.name for f in fields(kind)) for kind in _RECORDS}
_FLOATS = {kind: {f.name for f in fields(kind) if f.type in (float, float | None)} for kind in _RECORDS}
_REQUIRED = {kind: tuple(f.name for f in fields(kind) if f.default is MISSING) for kind in _RECORDS}


def to_line(record: Record) -> str:
    """The record as one line of strict JSON (no NaN, no Infinity), without the line break."""
    found: dict[str, Any] = {"step": record.step}
    if record.event:
        found["event"] = record.event
    nonfinite = {}
    for name in _NAMES[type(record)]:
        value = getattr(record, name)
        if type(value) is float and not math.isfinite(value):
            nonfinite[name] = str(value)
            value = None
        found[name] = value
    found["time"] = round(record.time or time.time(), 3)
    if nonfinite:
        found["nonfinite"] = nonfinite
    return json.dumps(found, allow_nan=False, ensure_ascii=False)


def from_line(line: str | bytes) -> Record | None:
    """The record of one line; none for a torn or foreign line. Keys of later versions are ignored."""
    try:
        found = json.loads(line)
        kind = _KINDS[found.get("event", "")]
        for name, text in found.get("nonfinite", {}).items():
            found[name] = float(text)
        known = {name: found[name] for name in _NAMES[kind] if name in found}
        if "problems" in known:
            known["problems"] = tuple(known["problems"])
        if any(known[name] is None for name in _REQUIRED[kind]):
            return None
        for name in _FLOATS[kind] & known.keys():
            known[name] = None if known[name] is None else float(known[name])
        return kind(**known)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


class MetricsWriter:
    """Appends to RUN/metrics.jsonl; every line is with the operating system when `write` returns.

    Only rank 0 has one. A line torn by a kill is healed on opening. Metrics never stop a run: where the disk takes no line, it
    stays in memory (up to MAX_PENDING_BYTES), the trouble is said once by `say`, and the next write tries again.
    """

    def __init__(self, run_dir: Path, *, say: Callable[[str], None] = lambda text: None) -> None:
        self._say = say
        self._pending = b""
        self._troubled = False
        self._lost = False
        self._file = os.open(Path(run_dir) / FILE, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        _heal(self._file)

    def write(self, record: Record) -> None:
        """Append one record."""
        self._pending += to_line(record).encode() + b"\n"
        try:
            while self._pending:
                # A short write leaves its rest pending, so that a line is never begun twice.
                self._pending = self._pending[os.write(self._file, self._pending):]
        except OSError as error:
            if not self._troubled:
                self._say(f"{FILE} cannot be written ({error.strerror}). Training goes on and its lines are "
                          "kept in memory; free space in the run directory.")
                self._troubled = True
            if len(self._pending) > MAX_PENDING_BYTES:
                # The line break ends a line that a short write may have left torn.
                self._pending = b"\n" + self._pending[-MAX_PENDING_BYTES // 2:].partition(b"\n")[2]
                self._lost = True
            return
        if self._troubled:
            self._say(f"{FILE} is written again; {'some lines were' if self._lost else 'no line was'} lost.")
            self._troubled = self._lost = False

    def close(self) -> None:
        """Hand the file back; a second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _heal(file: int) -> None:
    """End the file with a whole line: a kill or a power cut may have left a torn one, or zeros."""
    size = os.lseek(file, 0, os.SEEK_END)
    start, tail = size, b""
    while start > 0 and b"\n" not in tail:
        chunk = min(start, 1 << 16)
        start -= chunk
        tail = os.pread(file, chunk, start) + tail
    if not tail or tail.endswith(b"\n"):
        return
    torn = tail.rpartition(b"\n")[2]
    if from_line(torn) is not None:  # only the line break is missing
        os.write(file, b"\n")
    else:
        os.ftruncate(file, size - len(torn))


@dataclass(slots=True)
class Generation:
    """One life of the ranks, from their start to their stop or their death."""

    start: StartMetrics
    stop: StopMetrics | None = None
    """None: killed, crashed, or still running."""
    last_step: int = 0
    """Highest step reached."""
    last_time: float = 0.0
    """Unix time of its last line."""
    undone_steps: int = 0
    """Steps of earlier generations that this one gave up because it started behind them."""


@dataclass(slots=True)
class RunMetrics:
    """All that metrics.jsonl tells, with undone steps taken out."""

    steps: list[StepMetrics] = field(default_factory=list)
    """Rising, each once."""
    evals: list[EvalMetrics] = field(default_factory=list)
    """Rising in step; each (step, source) once."""
    saves: list[SaveMetrics] = field(default_factory=list)
    """In the order of the file, failed ones too."""
    generations: list[Generation] = field(default_factory=list)
    """In the order of the file."""
    repeated_steps: int = 0
    """Lines of steps that do not count: undone by a start behind them, or written again."""
    damaged_lines: int = 0
    """Lines that could not be read."""

    @property
    def tokens(self) -> int:
        """Loss-bearing tokens of all counted steps that were applied."""
        return sum(s.tokens for s in self.steps if s.applied)


def read_metrics(run_dir: Path) -> RunMetrics:
    """Read RUN/metrics.jsonl, also while it is being written or after a kill. No file gives an empty run."""
    found = RunMetrics()
    steps: dict[int, StepMetrics] = {}
    evals: dict[tuple[int, str], EvalMetrics] = {}
    try:
        file = open(Path(run_dir) / FILE, "rb")
    except FileNotFoundError:
        return found
    with file:
        for line in file:
            match from_line(line):
                case None:
                    found.damaged_lines += bool(line.strip())
                    continue
                case StartMetrics() as start:
                    kept = {step: record for step, record in steps.items() if step <= start.step}
                    undone, steps = len(steps) - len(kept), kept
                    evals = {key: record for key, record in evals.items() if key[0] <= start.step}
                    found.repeated_steps += undone
                    found.generations.append(Generation(start, None, start.step, start.time, undone))
                    continue
                case StepMetrics() as record:
                    found.repeated_steps += record.step in steps
                    steps[record.step] = record
                case EvalMetrics() as record:
                    evals[record.step, record.source] = record
                case SaveMetrics() as record:
                    found.saves.append(record)
                case StopMetrics() as record:
                    if found.generations:
                        found.generations[-1].stop = record
            if found.generations:
                generation = found.generations[-1]
                generation.last_step = max(generation.last_step, record.step)
                generation.last_time = record.time
    found.steps = [steps[step] for step in sorted(steps)]
    found.evals = [evals[key] for key in sorted(evals)]
    return found
