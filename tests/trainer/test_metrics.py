import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from officina.trainer.metrics import (
    FILE,
    EvalMetrics,
    MetricsWriter,
    SaveMetrics,
    StartMetrics,
    StepMetrics,
    StopMetrics,
    from_line,
    read_metrics,
    to_line,
)

ISSUE_FIELDS = {
    "step", "tokens", "loss_nats", "grad_norm", "lr", "step_time_s", "data_wait_s", "tokens_per_s"}


def step(number: int, loss: float = 2.0, **changes) -> StepMetrics:
    return StepMetrics(**{"step": number, "tokens": 100, "loss_nats": loss, "grad_norm": 1.0, "lr": 1e-3,
                          "step_time_s": 0.5, "data_wait_s": 0.1, "tokens_per_s": 200.0} | changes)


def start(number: int, action: str = "resume") -> StartMetrics:
    return StartMetrics(
        step=number, action=action, engine="fsdp2", world_size=2, device="cpu", precision="fp32")


def test_every_kind_survives_the_way_through_the_file(tmp_path):
    records = [
        start(0, "start"), step(1, time=5.0),
        EvalMetrics(step=1, source="stdlib", loss_nats=3.5, tokens=4096, eval_time_s=0.5, time=6.0),
        SaveMetrics(step=1, path="checkpoints/step-00000001", bytes=10, stall_s=0.1, durable_s=0.2, time=7.0),
        StopMetrics(step=1, reason="time limit", exit_status=75, time=8.0),
    ]
    with MetricsWriter(tmp_path) as writer:
        for record in records:
            writer.write(record)
    found = read_metrics(tmp_path)
    assert found.steps == [records[1]]
    assert found.evals == [records[2]]
    assert found.saves == [records[3]]
    (generation,) = found.generations
    assert generation.start.engine == "fsdp2" and generation.start.time > 1.7e9, "the clock's time"
    assert generation.stop == records[4] and generation.last_time == 8.0 and generation.last_step == 1
    first, second = (json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()[:2])
    assert first["event"] == "start"
    assert "event" not in second and ISSUE_FIELDS <= second.keys()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_non_finite_number_is_strict_json_and_comes_back(value):
    line = to_line(step(3, grad_norm=value, applied=False))
    parsed = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert parsed["grad_norm"] is None and parsed["nonfinite"] == {"grad_norm": str(value)}
    back = from_line(line)
    assert str(back.grad_norm) == str(value) and not back.applied


def test_a_start_behind_earlier_steps_undoes_them(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(start(0, "start"))
        for number in range(1, 11):
            writer.write(step(number, loss=5.0))
        writer.write(EvalMetrics(step=5, source="a", loss_nats=1.0, tokens=1))
        writer.write(EvalMetrics(step=10, source="a", loss_nats=2.0, tokens=1))
    with MetricsWriter(tmp_path) as writer:  # killed at 10, the last good checkpoint was 6
        writer.write(start(6))
        writer.write(step(7, loss=4.0))
        writer.write(step(7, loss=3.0))
        writer.write(step(8, loss=4.0, applied=False))
    found = read_metrics(tmp_path)
    assert [s.step for s in found.steps] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [s.loss_nats for s in found.steps] == [5.0] * 6 + [3.0, 4.0]
    assert [e.step for e in found.evals] == [5]
    assert found.repeated_steps == 4 + 1
    assert [g.undone_steps for g in found.generations] == [0, 4]
    assert [g.last_step for g in found.generations] == [10, 8]
    assert found.generations[0].stop is None, "a killed generation has no stop"
    assert found.tokens == 700, "a step that was left out trained on nothing"


@pytest.mark.parametrize("cut", [1, 20, 120])
def test_a_torn_last_line_is_tolerated_by_readers_and_healed_by_the_next_writer(tmp_path, cut):
    with MetricsWriter(tmp_path) as writer:
        writer.write(step(1))
        writer.write(step(2))
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes()[:-cut])
    whole = cut == 1  # only the line break is missing
    found = read_metrics(tmp_path)
    assert [s.step for s in found.steps] == ([1, 2] if whole else [1])
    assert found.damaged_lines == (0 if whole else 1)
    with MetricsWriter(tmp_path) as writer:
        writer.write(step(2))
    healed = read_metrics(tmp_path)
    assert [s.step for s in healed.steps] == [1, 2] and healed.damaged_lines == 0
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_zeros_of_a_power_cut_longer_than_one_read_are_healed(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(step(1))
    with open(tmp_path / FILE, "ab") as file:
        file.write(b"\0" * 200_000)
    MetricsWriter(tmp_path).close()
    assert (tmp_path / FILE).read_bytes().count(b"\0") == 0
    assert [s.step for s in read_metrics(tmp_path).steps] == [1]


def test_foreign_lines_and_keys_of_later_versions_do_not_hurt(tmp_path):
    later = json.loads(to_line(step(1))) | {"energy_j": 5.0}
    lines = [json.dumps(later), "[1, 2]", "7", '{"event": "moon landing", "step": 1}', '{"step": 2}', ""]
    (tmp_path / FILE).write_text("\n".join(lines) + "\n")
    found = read_metrics(tmp_path)
    assert [s.step for s in found.steps] == [1] and found.damaged_lines == 4


def test_no_file_is_an_empty_run(tmp_path):
    assert read_metrics(tmp_path).steps == []


KILLED = """
import os, sys
from pathlib import Path
from officina.trainer.metrics import MetricsWriter, StepMetrics
writer = MetricsWriter(Path(sys.argv[1]))
for number in range(1, 51):
    writer.write(StepMetrics(step=number, tokens=1, loss_nats=1.0, grad_norm=1.0, lr=1.0, step_time_s=1.0,
                             data_wait_s=0.0, tokens_per_s=1.0))
os.kill(os.getpid(), 9)
"""


def test_kill_9_loses_no_written_line(tmp_path):
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)]).returncode == -9
    assert len(read_metrics(tmp_path).steps) == 50


FULL = """
import resource, signal, sys
from pathlib import Path
from officina.trainer import metrics
from officina.trainer.metrics import MetricsWriter, StepMetrics
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
metrics.MAX_PENDING_BYTES = int(sys.argv[2])
said = []
writer = MetricsWriter(Path(sys.argv[1]), say=said.append)
for number in range(1, 101):
    if number == 10:
        full = (Path(sys.argv[1]) / metrics.FILE).stat().st_size + 100  # the disk becomes full within a line
    limit = full if 10 <= number < 90 else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    writer.write(StepMetrics(step=number, tokens=1, loss_nats=1.0, grad_norm=1.0, lr=1.0, step_time_s=1.0,
                             data_wait_s=0.0, tokens_per_s=1.0))
print("\\n".join(said))
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize(("memory_bytes", "lost"), [(2**20, False), (6000, True)])
def test_a_full_disk_stops_nothing(tmp_path, memory_bytes, lost):
    command = [sys.executable, "-c", FULL, str(tmp_path), str(memory_bytes)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    trouble, over = done.stdout.splitlines()
    assert trouble.startswith(f"{FILE} cannot be written (File too large). Training goes on")
    assert over == f"{FILE} is written again; " + ("some lines were lost." if lost else "no line was lost.")
    found = read_metrics(tmp_path)
    numbers = [s.step for s in found.steps]
    if lost:
        assert numbers[-10:] == list(range(91, 101)) and len(numbers) < 100
        assert found.damaged_lines == 1, "the line that was torn when the disk became full"
        assert all(line.count('"step"') <= 1 for line in (tmp_path / FILE).read_text().splitlines())
    else:
        assert numbers == list(range(1, 101)) and found.damaged_lines == 0


def test_reading_metrics_needs_no_torch():
    code = "import sys, officina.trainer.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path("/")).returncode == 0
