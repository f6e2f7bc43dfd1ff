import importlib.util
import json
import time

import pytest

from officina.trainer import loggers
from officina.trainer.config import LoggingConfig, RunConfig
from officina.trainer.loggers import Trackers, open_trackers
from officina.trainer.metrics import EvalMetrics, StepMetrics


def step(number: int, loss: float) -> StepMetrics:
    return StepMetrics(step=number, tokens=100, loss_nats=loss, grad_norm=1.0, lr=1e-3, step_time_s=0.5,
                       data_wait_s=0.1, tokens_per_s=200.0, time=1.8e9 + number)


def log_run(config: LoggingConfig, run_dir, start: int, stop: int, loss: float) -> list[str]:
    said = []
    with open_trackers(RunConfig(name="r", logging=config), run_dir, rank=0, start_step=start, say=said.append) as to:
        for number in range(start + 1, stop + 1):
            to.write(step(number, loss))
        to.write(EvalMetrics(step=stop, source="books", loss_nats=loss + 1, tokens=10, time=1.8e9))
    return said


def test_tensorboard_shows_a_resumed_run_without_the_undone_steps(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = LoggingConfig(tensorboard=True)
    assert log_run(config, tmp_path, 0, 10, loss=3.0) == []
    assert log_run(config, tmp_path, 6, 8, loss=2.0) == []
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    shown = [(e.step, e.value, e.wall_time) for e in read.Scalars("train/loss_nats")]
    assert shown == [(n, 3.0 if n <= 6 else 2.0, 1.8e9 + n) for n in range(1, 9)]
    assert [(e.step, e.value) for e in read.Scalars("eval/books/loss_nats")] == [(8, 3.0)]
    assert "train/mfu_causal" not in read.Tags()["scalars"], "an unknown device gets no MFU"
    import socket
    assert all(socket.gethostname() not in f.name for f in (tmp_path / "tensorboard").iterdir())


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_writes_offline_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = LoggingConfig(tensorboard=False, wandb=True)
    assert log_run(config, tmp_path, 0, 10, loss=3.0) == []
    time.sleep(1.1)  # wandb names its folders by the second
    assert log_run(config, tmp_path, 6, 8, loss=2.0) == []
    run_id = json.loads((tmp_path / "tracking/ids.json").read_text())["wandb"]
    files = sorted((tmp_path / "tracking/wandb").glob("offline-run-*/*.wandb"))
    assert [f.name for f in files] == [f"run-{run_id}.wandb"] * 2
    assert b"train/loss_nats" in files[0].read_bytes()


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_writes_to_the_run_directory_and_is_continued(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = LoggingConfig(tensorboard=False, mlflow=True)
    assert log_run(config, tmp_path, 0, 10, loss=3.0) == []
    assert log_run(config, tmp_path, 6, 8, loss=2.0) == []
    from mlflow import MlflowClient

    client = MlflowClient((tmp_path / "tracking/mlflow").as_uri())
    run_id = json.loads((tmp_path / "tracking/ids.json").read_text())["mlflow"]
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.params["optim.lr"] == "0.0003"
    assert "mlflow.user" not in run.data.tags
    assert [m.value for m in client.get_metric_history(run_id, "train/loss_nats")] == [3.0] * 10 + [2.0] * 2


def test_only_rank_0_tracks(tmp_path):
    with open_trackers(RunConfig(), tmp_path, rank=1, start_step=0) as to:
        to.write(step(1, 3.0))
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_cannot_start_is_left_out_with_a_message(tmp_path):
    (tmp_path / "tensorboard").write_text("a file is in the way")
    (said,) = log_run(LoggingConfig(), tmp_path, 0, 3, loss=1.0)
    assert said.startswith("tensorboard could not be started and is left out: FileExistsError")


class Flaky:
    """A tracker whose server goes away after three steps."""

    def __init__(self) -> None:
        self.seen = []

    def log(self, values, step, time_s):
        if step > 3:
            raise ConnectionError("server went away")
        self.seen.append(step)

    def close(self, exit_status):
        self.seen.append(f"closed {exit_status}")


class Patient(Flaky):
    def log(self, values, step, time_s):
        self.seen.append(step)


def test_a_tracker_that_fails_in_the_run_is_switched_off_once_and_the_others_go_on():
    flaky, patient, said = Flaky(), Patient(), []
    trackers = Trackers({"flaky": flaky, "patient": patient}, said.append)
    for number in range(1, 8):
        trackers.write(step(number, 1.0))
    trackers.close(75)
    trackers.close(75)
    assert flaky.seen == [1, 2, 3]
    assert patient.seen == [1, 2, 3, 4, 5, 6, 7, "closed 75"]
    assert len(said) == 1 and "flaky failed and is switched off for this run: ConnectionError: server went" in said[0]


def test_a_tracker_that_hangs_holds_up_neither_the_steps_nor_the_end(monkeypatch):
    class Hanging(Patient):
        def log(self, values, step, time_s):
            time.sleep(3600)

    monkeypatch.setattr(loggers, "CLOSE_S", 0.3)
    monkeypatch.setattr(loggers, "MAX_WAITING", 5)
    said, begun = [], time.monotonic()
    trackers = Trackers({"slow": Hanging()}, said.append)
    for number in range(1, 20):
        trackers.write(step(number, 1.0))
    trackers.close()
    assert time.monotonic() - begun < 60  # it would have waited for an hour
    assert "too slow" in said[0] and "slow did not answer" in said[1] and len(said) == 2
