"""The run directory: config.yaml read strictly, history told whole."""

import errno
import json
import os
import subprocess
import sys

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from officina.launch.supervise import claimed
from officina.trainer.config import AdamWConfig, FSDP2Config, MuonConfig, RunConfig, ZeroConfig
from officina.trainer.errors import ConfigError, LaunchError, OfficinaError
from officina.trainer.run_dir import (
    Start,
    append_history,
    claim,
    committed_steps,
    config_text,
    keep_diff,
    load_config,
    new_run_id,
    read_history,
    read_run_id,
    save_config,
    unwritable,
)

START = Start(run_id="abc", action="start", words=["seed=1"], step=0, world_size=2, engine="fsdp2", commit=None)


@settings(max_examples=50, deadline=None)
@example(lr=1e-3, eps=1e-8, seed=0, account="\x85 \u2028", engine=FSDP2Config(), limit=None)
@given(lr=st.floats(1e-12, 1.0), eps=st.floats(1e-300, 1e-3), seed=st.integers(0, 2**63 - 1), account=st.text(max_size=12),
       engine=st.sampled_from([FSDP2Config(), ZeroConfig(stage=3)]), limit=st.none() | st.floats(0, 1e9))
def test_a_run_comes_back_as_it_was(tmp_path_factory, lr, eps, seed, account, engine, limit):
    from officina.trainer.config import SiteConfig

    run = RunConfig(optim=AdamWConfig(lr=lr, eps=eps), seed=seed, engine=engine, time_limit=limit,
                    site=SiteConfig(account=account))
    folder = tmp_path_factory.mktemp("run")
    save_config(run, folder)
    assert load_config(folder) == load_config(folder / "config.yaml") == run
    assert (folder / "config.yaml").read_text(encoding="utf-8") == config_text(run)


def test_floats_are_numbers_to_every_reader(tmp_path):
    """PyYAML writes 1e-05, which YAML 1.1 reads as text."""
    save_config(RunConfig(optim=MuonConfig(eps=1e-5)), tmp_path)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["optim"]["eps"] == 1e-5


@pytest.mark.parametrize(("change", "key"), [
    (lambda v: v.update(extra=1), "extra"), (lambda v: v["optim"].update(lrr=1), "optim.lrr"),
    (lambda v: v.update(steps="many"), "steps"), (lambda v: v["engine"].update(kind="magic"), "engine.kind"),
    (lambda v: v["model"].update(n_heads=0), "model.n_heads")])
def test_a_changed_file_is_refused_by_key(tmp_path, change, key):
    save_config(RunConfig(), tmp_path)
    path = tmp_path / "config.yaml"
    values = yaml.safe_load(path.read_text())
    change(values)
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path)
    assert [p.key for p in caught.value.problems] == [key] and str(path) in str(caught.value)


def test_a_file_of_an_older_version_takes_defaults(tmp_path):
    save_config(RunConfig(seed=5), tmp_path)
    values = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del values["profile"], values["optim"]["clip_norm"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert load_config(tmp_path) == RunConfig(seed=5)


@pytest.mark.parametrize(("content", "says"), [("[", "cannot be read"), ("just text", "holds no run"), ("", "holds no run")])
def test_an_unreadable_file_is_named(tmp_path, content, says):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(OfficinaError, match=says) as caught:
        load_config(tmp_path)
    assert str(tmp_path / "config.yaml") in str(caught.value)


def test_no_run_directory(tmp_path):
    with pytest.raises(OfficinaError, match="no run directory"):
        load_config(tmp_path / "nowhere" / "config.yaml")


def test_saving_leaves_nothing_half_written(tmp_path, monkeypatch):
    save_config(RunConfig(seed=1), tmp_path)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        save_config(RunConfig(seed=2), tmp_path)
    assert load_config(tmp_path).seed == 1


def test_nothing_of_user_host_or_place_is_stored(tmp_path):
    save_config(RunConfig(), tmp_path)
    append_history(tmp_path, START)
    for path in tmp_path.iterdir():
        text = path.read_text()
        assert str(tmp_path) not in text and os.uname().nodename not in text


def test_history_grows_by_a_line_a_start(tmp_path):
    append_history(tmp_path, START)
    append_history(tmp_path, Start(**{**{f: getattr(START, f) for f in START.__slots__}, "action": "resume",
                                      "step": 7}))
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["action"] for line in lines] == ["start", "resume"]
    assert [start["step"] for start in read_history(tmp_path)] == [0, 7]
    assert all(start["time"].endswith("+00:00") for start in read_history(tmp_path))
    assert read_run_id(tmp_path) == "abc"


def test_a_line_cut_short_by_a_crash_costs_only_itself(tmp_path):
    append_history(tmp_path, START)
    with open(tmp_path / "history.jsonl", "a") as file:
        file.write('{"time": "2026-')
    append_history(tmp_path, START)
    assert len(read_history(tmp_path)) == 2


@pytest.mark.parametrize("line", [b"[1]", b"\xff\xfe", b"7", b"null"])
def test_a_damaged_line_of_history_costs_only_itself(tmp_path, line):
    append_history(tmp_path, START)
    path = tmp_path / "history.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes() + line + b"\n")
    assert len(read_history(tmp_path)) == 1 and read_run_id(tmp_path) == "abc"


def test_a_directory_without_history_has_no_id(tmp_path):
    assert read_history(tmp_path) == [] and read_run_id(tmp_path) == ""
    assert new_run_id() != new_run_id()


def test_each_diff_is_kept_once(tmp_path):
    assert keep_diff(tmp_path, "") is None
    one, two = keep_diff(tmp_path, "a\n"), keep_diff(tmp_path, "b\n")
    assert one != two and keep_diff(tmp_path, "a\n") == one
    assert (tmp_path / one).read_text() == "a\n" and len(list((tmp_path / "code").iterdir())) == 2


def test_only_committed_checkpoints_count(tmp_path):
    for name, committed in (("step-00000100", True), ("step-00000200", False), ("step-00000050.damaged", True),
                            ("step-00000100.old", True), ("step-00000200.old", True)):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if committed:
            (tmp_path / "checkpoints" / name / "COMMIT").write_text("{}")
    assert committed_steps(tmp_path) == [100, 200], "a kill came while step 200 was being written anew"


def test_a_claim_ends_with_its_process(tmp_path):
    code = ("import sys, time, pathlib; from officina.trainer.run_dir import claim\n"
            f"with claim(pathlib.Path({str(tmp_path)!r})): print('claimed', flush=True); time.sleep(600)")
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "claimed\n"
        with pytest.raises(LaunchError, match=rf"trained by another start \(process {other.pid} on "), claim(tmp_path):
            pass
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    with claim(tmp_path):
        pass


def test_a_full_disk_keeps_nobody_from_claiming(mount):
    disk = mount("size=64k")
    (disk / ".claim").touch()
    with pytest.raises(OSError, match="No space left"):
        (disk / "ballast").write_bytes(bytes(2**17))
    with claim(disk):
        assert (disk / ".claim").read_text() == ""
    with claimed(str(disk)) as holder:
        assert holder == ""


def test_a_run_that_cannot_be_written_is_not_offered_what_resume_has_not(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "history.jsonl"))
    assert "cannot be made. Choose another place: --runs-dir DIR" in str(unwritable(tmp_path, full))
    save_config(RunConfig(), tmp_path)
    told = str(unwritable(tmp_path, full))
    assert told.startswith(f"{tmp_path}/history.jsonl: No space left on device") and "officina resume COPY" in told
    assert "--runs-dir" not in told


def test_no_claim_where_the_file_system_keeps_no_locks(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", unsupported)
    with claim(tmp_path):
        pass
