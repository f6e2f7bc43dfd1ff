"""Experiment trackers beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow. Offline first.

A tracker never holds up or breaks a run: all of them are fed by one background thread; one that fails is dropped with
one message, one that hangs is left behind. Their packages are imported only where they are used.
"""

import json
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from officina.trainer.config import RunConfig
from officina.trainer.keys import flat
from officina.trainer.metrics import EvalMetrics, StepMetrics, bits_per_byte

MAX_WAITING = 10_000
"""Records a slow tracker may be behind before new ones are dropped."""
CLOSE_S = 30.0
"""Longest wait for the trackers at the end of a run."""

class Tracker(Protocol):
    """One place where numbers go."""

    def log(self, values: Mapping[str, float], step: int, time_s: float) -> None:
        """Take the values of one step; time_s is Unix time."""
        ...

    def close(self, exit_status: int) -> None:
        """The run leaves; 0 is done, 75 is to be continued."""
        ...


def values_of(record: StepMetrics | EvalMetrics) -> dict[str, float]:
    """What trackers see of a record, by the names they show."""
    if isinstance(record, EvalMetrics):
        found = {"": (record.loss_nats, record.bits_per_byte)}
        for name, of in record.languages.items():
            found[f"{name}/"] = of["loss_nats"], bits_per_byte(of["loss_nats"], of["tokens"], of["text_bytes"])
        shown = {}
        for name, (loss, bits) in found.items():
            if loss is not None:
                shown[f"eval/{record.source}/{name}loss_nats"] = loss
            if bits is not None:
                shown[f"eval/{record.source}/{name}bits_per_byte"] = bits
        for name in ("token_accuracy", "sample_accuracy", "reward_accuracy", "reward_margin"):
            if (value := getattr(record, name)) is not None:
                shown[f"eval/{record.source}/{name}"] = value
        return shown
    names = ("loss_nats", "z_loss", "grad_norm", "lr", "step_time_s", "data_wait_s", "tokens_per_s", "filled_tokens",
             "filled_tokens_per_s", "reward_accuracy", "reward_margin", "mfu_causal", "mfu_full", "peak_memory_bytes")
    shown = {f"train/{name}": getattr(record, name) for name in names}
    shown["train/left_out"] = float(not record.applied)
    return {name: float(value) for name, value in shown.items() if value is not None}


class Trackers:
    """All trackers of a run on rank 0; elsewhere an empty one."""

    def __init__(self, trackers: Mapping[str, Tracker], say: Callable[[str], None]) -> None:
        self._trackers = dict(trackers)
        self._say = say
        self._queue: queue.Queue = queue.Queue(MAX_WAITING)
        self._dropped = 0
        self._thread = None
        if self._trackers:
            self._thread = threading.Thread(target=self._feed, name="trackers", daemon=True)
            self._thread.start()

    def write(self, record: StepMetrics | EvalMetrics) -> None:
        """Hand a record to every tracker; returns at once."""
        if not self._trackers:
            return
        try:
            self._queue.put_nowait((values_of(record), record.step, record.time or time.time()))
        except queue.Full:
            self._dropped += 1
            if self._dropped == 1:
                self._say("The trackers are too slow: some of their values are dropped. metrics.jsonl has all.")

    def close(self, exit_status: int = 0) -> None:
        """Wait until everything is written, at most CLOSE_S. A second call does nothing."""
        if self._thread is None:
            return
        deadline = time.monotonic() + CLOSE_S
        try:
            self._queue.put(exit_status, timeout=CLOSE_S)
        except queue.Full:
            pass
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._say(f"{' and '.join(self._trackers)} did not answer for {CLOSE_S:.0f} s and is left behind. "
                      "metrics.jsonl has all values.")
        self._thread, self._trackers = None, {}

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, exc_type: type | None, *exc: object) -> None:
        self.close(0 if exc_type is None else 1)

    def _feed(self) -> None:
        while not isinstance(found := self._queue.get(), int):
            self._each(lambda tracker, found=found: tracker.log(*found))
        self._each(lambda tracker: tracker.close(found))

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                act(tracker)
            except Exception as error:  # whatever a tracker raises: its trouble is not the run's
                self._trackers.pop(name, None)
                self._say(f"{name} failed and is switched off for this run: {type(error).__name__}: {error}. "
                          "metrics.jsonl has all values.")


def open_trackers(run: RunConfig, run_dir: Path, *, rank: int, start_step: int,
                  say: Callable[[str], None] = lambda text: None) -> Trackers:
    """The trackers that `run.logging` asks for, on rank 0; continued where the run directory has some already.

    One that cannot start (no login, no server) is left out with a message: a run that Slurm starts again at night must
    not die of it. What is not installed was refused before the start (`validate.missing_packages`).
    """
    opened: dict[str, Tracker] = {}
    if rank == 0:
        for name, opener in (("tensorboard", TensorBoard), ("wandb", WandB), ("mlflow", MLflow)):
            if getattr(run.logging, name):
                try:
                    opened[name] = opener(run, Path(run_dir), start_step)
                except Exception as error:
                    say(f"{name} could not be started and is left out: {type(error).__name__}: {error}")
    return Trackers(opened, say)


class TensorBoard:
    """Event files under RUN/tensorboard, written without TensorFlow and without a host name in their names."""

    FLUSH_S = 5.0

    def __init__(self, run: RunConfig, run_dir: Path, start_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder = run_dir / "tensorboard"
        folder.mkdir(exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        self._file = open(folder / f"events.out.tfevents.{time.time():017.6f}", "xb")
        self._writer = RecordWriter(self._file)
        self._flushed = 0.0
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # A start at this step makes TensorBoard forget what earlier files say of later steps: they were undone.
        self._write(Event(wall_time=time.time(), step=start_step + 1, session_log=SessionLog(status=SessionLog.START)))
        self._file.flush()

    def log(self, values: Mapping[str, float], step: int, time_s: float) -> None:
        shown = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(self._event(wall_time=time_s, step=step, summary=self._summary(value=shown)))
        if time.monotonic() - self._flushed > self.FLUSH_S:
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self, exit_status: int) -> None:
        self._file.close()

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())


class WandB:
    """Weights & Biases, to RUN/tracking/wandb unless WANDB_MODE=online. `wandb sync` uploads it later."""

    def __init__(self, run: RunConfig, run_dir: Path, start_step: int) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # no telemetry
        import wandb

        folder = run_dir / "tracking"
        folder.mkdir(exist_ok=True)
        settings = wandb.Settings(console="off", disable_code=True, disable_git=True, save_code=False, silent=True,
                                  x_disable_meta=True, x_disable_machine_info=True)
        mode = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(project=os.environ.get("WANDB_PROJECT", "officina"), name=run.name,
                               id=_tracking_id(run_dir, "wandb", lambda: uuid.uuid4().hex), dir=str(folder),
                               mode=mode, resume="allow" if mode == "online" else None, config=asdict(run),
                               settings=settings)
        # Steps have an axis of their own: the built-in one refuses to go back, as a resume may.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], step: int, time_s: float) -> None:
        self._run.log({**values, "step": step})

    def close(self, exit_status: int) -> None:
        self._run.finish(exit_code=exit_status)


class MLflow:
    """MLflow, to a file store in RUN/tracking/mlflow unless MLFLOW_TRACKING_URI names a server."""

    BATCH = 500
    FLUSH_S = 10.0

    def __init__(self, run: RunConfig, run_dir: Path, start_step: int) -> None:
        # MLflow 3 sends usage data unless it is told not to, and asks for consent to its file store, the one that
        # needs no database and works on Lustre.
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        folder = run_dir / "tracking" / "mlflow"
        folder.mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or folder.resolve().as_uri())
        known = _tracking_id(run_dir, "mlflow")
        self._id = known or _tracking_id(run_dir, "mlflow", lambda: self._create(run))
        if known:
            self._client.update_run(self._id, status="RUNNING")
        else:
            params = [Param(key, str(value)[:500]) for key, value in flat(asdict(run)).items()]
            for first in range(0, len(params), 100):  # MLflow takes at most 100 at a time
                self._client.log_batch(self._id, params=params[first:first + 100])
        self._waiting: list[Any] = []
        self._sent = time.monotonic()

    def _create(self, run: RunConfig) -> str:
        experiment = self._client.get_experiment_by_name("officina")
        # No artifacts are stored; a location of its own keeps the run directory's path out of the record.
        number = experiment.experiment_id if experiment else self._client.create_experiment(
            "officina", artifact_location="mlflow-artifacts:/officina")
        return self._client.create_run(number, run_name=run.name).info.run_id

    def log(self, values: Mapping[str, float], step: int, time_s: float) -> None:
        self._waiting += [self._metric(name, value, int(time_s * 1000), step) for name, value in values.items()]
        if len(self._waiting) >= self.BATCH or time.monotonic() - self._sent > self.FLUSH_S:
            self._send()

    def _send(self) -> None:
        while self._waiting:
            self._client.log_batch(self._id, metrics=self._waiting[:self.BATCH])
            del self._waiting[:self.BATCH]
        self._sent = time.monotonic()

    def close(self, exit_status: int) -> None:
        self._send()
        self._client.set_terminated(self._id, {0: "FINISHED", 75: "KILLED"}.get(exit_status, "FAILED"))


def _tracking_id(run_dir: Path, tracker: str, make: Callable[[], str] | None = None) -> str | None:
    """The id under which a tracker knows this run, from RUN/tracking/ids.json; a resumed run keeps it."""
    file = run_dir / "tracking" / "ids.json"
    ids = json.loads(file.read_text()) if file.exists() else {}
    if tracker not in ids and make is not None:
        ids[tracker] = make()
        file.parent.mkdir(exist_ok=True)
        partial = file.with_name(file.name + ".partial")
        partial.write_text(json.dumps(ids))
        partial.replace(file)
    return ids.get(tracker)
