"""The ledger of any run, stopped, killed and changed as it may be, proves the order; a wrong one does not."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_sets import make_run, write_tokens

from officina.trainer.config import RunConfig, SourceConfig
from officina.trainer.data.ledger import Ledger, audit, read_ledger
from officina.trainer.data.loader import Loader
from officina.trainer.data.order import Mixture, extend_timeline
from officina.trainer.errors import DataError
from officina.trainer.run_dir import LEDGER, save_config


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp("data") / name for name in "ab"}
    for i, folder in enumerate(made.values()):
        write_tokens(folder, {"train": [7, 40, 100, 3, 90]}, base=10**6 * i)  # 29 rows of 8
    return made


def leg(run_dir: Path, run: RunConfig, world_size: int, step: int, position: int, steps: int) -> int:
    """Train `steps` steps from `step`, as the ranks would; returns the new position."""
    save_config(run, run_dir / "config.yaml")
    loaders = [Loader(run, rank=r, world_size=world_size, position=position) for r in range(world_size)]
    with Ledger(run_dir) as ledger:
        for done in range(step + 1, step + steps + 1):
            found = [loader.next_step() for loader in loaders]
            ledger.write(done, found[0], float(sum(s.digest for s in found)))
            position = found[0].stop_sample
    for loader in loaders:
        loader.close()
    return position


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / LEDGER).read_text().splitlines()]


def rewrite(run_dir: Path, changed: list[dict]) -> None:
    (run_dir / LEDGER).write_text("".join(json.dumps(line) + "\n" for line in changed))


def test_a_plain_run_over_several_epochs(folders, tmp_path: Path) -> None:
    run = make_run({"a": (folders["a"], 0.7), "b": (folders["b"], 0.3)}, rows=6)
    leg(tmp_path, run, 2, 0, 0, 30)
    report = audit(tmp_path)
    assert report.ok and (report.steps, report.first_sample, report.stop_sample, report.samples) == (30, 0, 180, 180)
    assert report.sources["a"].used == 126 and report.sources["b"].used == 54
    assert report.sources["a"].epochs == pytest.approx(126 / 29)


def test_kills_resumes_skips_and_new_mixtures(folders, tmp_path: Path) -> None:
    """Random stops, going back to earlier checkpoints, other ranks and batches, a source that joins: still proved."""
    rng = np.random.default_rng(5)
    for case in range(8):
        run_dir = tmp_path / str(case)
        run_dir.mkdir()
        run = make_run({"a": (folders["a"], 1)}, rows=int(rng.integers(1, 8)), skip=[[13, 17], [40, 41]])
        checkpoints = {0: 0}
        for number in range(5):
            step = int(rng.choice(list(checkpoints)[-3:]))  # often not the newest: the newest was damaged
            position = checkpoints[step]
            checkpoints = {s: p for s, p in checkpoints.items() if s <= step}
            if number == 2:
                mixture = {n: SourceConfig(path=str(p), weight=1.0) for n, p in folders.items()}
                run = dataclasses.replace(run, data=extend_timeline(run.data, position, mixture))
            elif position < max((s.from_sample for s in run.data.timeline), default=0):
                run = dataclasses.replace(run, data=extend_timeline(run.data, position, run.data.sources))
            steps = int(rng.integers(1, 9))
            checkpoints[step + steps] = leg(run_dir, run, int(rng.integers(1, 4)), step, position, steps)
            if rng.random() < 0.5:
                with open(run_dir / LEDGER, "a") as file:
                    file.write('{"step":99,"first_sam')  # killed while writing
        report = audit(run_dir)
        assert report.ok, report.faults
        assert report.starts == 5 and report.stop_sample == max(checkpoints.values())
        assert sum(use.used for use in report.sources.values()) == report.samples


_KILLED = """if True:
    import json, os, sys, time
    from pathlib import Path
    from officina.trainer.data.ledger import Ledger
    from officina.trainer.data.loader import Loader
    from officina.trainer.run_dir import load_config
    run_dir, world_size = Path(sys.argv[1]), int(sys.argv[2])
    saved = run_dir / "saved"
    step, state = json.loads(saved.read_text()) if saved.exists() else (0, None)
    loaders = [Loader(load_config(run_dir), rank=r, world_size=world_size, position=state["position"] if state else 0)
               for r in range(world_size)]
    if state:
        loaders[0].check_state(state)
    with Ledger(run_dir) as ledger:
        while True:
            step += 1
            found = [loader.next_step() for loader in loaders]
            ledger.write(step, found[0], sum(s.digest for s in found))
            if step % 7 == 0:
                (run_dir / "partial").write_text(json.dumps([step, loaders[0].state()]))
                os.replace(run_dir / "partial", saved)
            print(step, flush=True)
            time.sleep(0.001)"""


def test_kill_9_of_real_processes(folders, tmp_path: Path) -> None:
    run = make_run({"a": (folders["a"], 0.6), "b": (folders["b"], 0.4)}, rows=6)
    save_config(run, tmp_path / "config.yaml")
    for world_size, steps in ((1, 40), (3, 25), (2, 61)):
        process = subprocess.Popen([sys.executable, "-c", _KILLED, tmp_path, str(world_size)], stdout=subprocess.PIPE)
        for _ in range(steps):
            assert process.stdout.readline()
        process.kill()
        process.communicate()
    report = audit(tmp_path)
    assert report.ok, report.faults
    assert report.starts == 3 and report.steps > 61 and report.samples == 6 * report.steps


def test_every_lie_is_told(folders, tmp_path: Path) -> None:
    run = make_run({"a": (folders["a"], 1), "b": (folders["b"], 1)}, rows=4)
    leg(tmp_path, run, 1, 0, 0, 10)
    true = lines(tmp_path)

    def faults(changed: list[dict]) -> str:
        rewrite(tmp_path, changed)
        report = audit(tmp_path)
        assert not report.ok
        return "\n".join(report.faults)

    assert "steps 4 to 4 are missing" in faults(true[:4] + true[5:])
    assert "samples 12 to 16 were never read" in faults(true[:4] + true[5:])
    assert "begins with step 3 at sample 8" in faults([true[0], *true[3:]])
    other = [dict(line) for line in true]
    other[5]["digest"] ^= 1
    assert f"step 5: the ledger's digest is {other[5]['digest']}" in faults(other)
    twice = [dict(line) for line in true]
    twice[6] |= {key: twice[5][key] for key in ("first_sample", "stop_sample", "digest")}
    assert "step 6: samples 16 to 20 were read twice" in faults(twice)
    assert "rows of epoch 0 a second time" in faults(twice)
    uneven = [dict(line) for line in true]
    uneven[7]["source_rows"] = {"a": 4}
    assert "step 7: read rows {'a': 4}, planned {'a': 2, 'b': 2}" in faults(uneven)
    secret_skip = [dict(line) for line in true]
    secret_skip[8]["skipped"] = [[29, 30]]
    assert "step 8: the ledger's digest" in faults(secret_skip)
    rewrite(tmp_path, true)
    assert audit(tmp_path).ok
    for changed, told in ((dataclasses.replace(run, seed=9), "digest"),
                          (make_run({"a": (folders["a"], 3), "b": (folders["b"], 1)}, rows=4), "planned"),
                          (make_run({"a": (folders["b"], 1), "b": (folders["a"], 1)}, rows=4), "shards have changed")):
        save_config(changed, tmp_path / "config.yaml")
        assert told in "\n".join(audit(tmp_path).faults)


def test_a_wrong_permutation_would_be_found(folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the order itself were broken, ledger and audit would agree on it; the marks of the rows would not."""
    monkeypatch.setattr("officina.trainer.data.order.permute", lambda index, size, keys: index // 2)
    run = make_run({"a": (folders["a"], 1)}, rows=4)
    leg(tmp_path, run, 1, 0, 0, 9)
    told = "\n".join(audit(tmp_path).faults)
    assert "rows of epoch 0 a second time" in told and "rows of epoch 0 were left out" in told


@pytest.mark.parametrize(("step", "told"), [
    (-3, ["step 4: source a goes from row 12 on to 9: the mixture lost or repeats rows",
          "step 4: source a uses 3 rows of epoch 0 a second time"]),
    (3, ["step 4: source a goes from row 12 on to 15: the mixture lost or repeats rows",
         "source a: 24 rows of epoch 0 used, planned 27"])])
def test_a_mixture_that_loses_or_repeats_rows_would_be_found(folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                             step: int, told: list[str]) -> None:
    """Ledger and audit take the same wrong cursors, as if a change of the mixture had moved them."""
    place = Mixture.place

    def moved(self: Mixture, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        source, cursor = place(self, samples)
        return source, np.where(samples >= 12, cursor + step, cursor)

    monkeypatch.setattr(Mixture, "place", moved)
    run = make_run({"a": (folders["a"], 1)}, rows=4)
    leg(tmp_path, run, 1, 0, 0, 6)
    assert set(told) <= set(audit(tmp_path).faults)


def test_a_branch_begins_in_the_middle(folders, tmp_path: Path) -> None:
    run = make_run({"a": (folders["a"], 1)}, rows=4)
    leg(tmp_path, run, 1, 10, 40, 12)
    assert "its beginning is missing" in audit(tmp_path).faults[0]
    (tmp_path / "history.jsonl").write_text('{"action": "branch", "step": 10}\n')
    report = audit(tmp_path)
    assert report.ok and (report.first_sample, report.stop_sample) == (40, 88)
    assert report.sources["a"].first_row == 40 and report.sources["a"].used == 48


def test_files_that_are_no_ledger(tmp_path: Path, folders) -> None:
    save_config(make_run({"a": (folders["a"], 1)}), tmp_path / "config.yaml")
    with pytest.raises(DataError, match=r"ledger\.jsonl does not exist: no step of this run has read data"):
        audit(tmp_path)
    (tmp_path / LEDGER).write_text('{"start": 0}\n')
    with pytest.raises(DataError, match=r"has no step yet"):
        audit(tmp_path)
    (tmp_path / LEDGER).write_text('{"start": 0}\n{"step": 1, "digits": 3}\n')
    with pytest.raises(DataError, match=r"line 2: no line of a ledger"):
        read_ledger(tmp_path)
