"""The demo's steps, and samples made of Python sources."""

import io
import json
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from officina.launch import demo, demo_finetune, demo_samples
from officina.launch.demo_samples import DOCSTRING, SIGNATURE, samples_of, write_samples
from officina.trainer.data.sources import standard_library
from officina.trainer.errors import LaunchError
from officina.trainer.run_dir import read_run_id
from tests.lives import begin, plain_run

SOURCE = b'''
class Reader:
    def count(self, path, *, strict=False):
        """Return the number of lines in a file.

        More of it.
        """
        with open(path) as file:
            return sum(1 for _ in file)

    def bare(self):
        """Only what it is, without a body."""

    def short(self):
        """Too short."""
        return 1

    def silent(self):
        return 2
'''


@pytest.mark.parametrize(("lack", "engine"), [("needs deepspeed", "engine=ddp"), ("", "engine=zero2")])
def test_without_deepspeed_the_demo_goes_on_under_ddp_and_says_so(lack, engine, monkeypatch, tmp_path, capsys):
    ran = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "lacking", lambda extra: lack)
    monkeypatch.setattr(demo, "run_step", lambda console, title, run, *words, **_: ran.append((title, words)))
    assert demo.main() == 0
    [(title, _)] = [(title, words) for title, words in ran if engine in words]
    assert ("DDP" if lack else "DeepSpeed ZeRO-2") in title
    assert ("pip install 'officina[deepspeed]'" in capsys.readouterr().out) is bool(lack)


def test_a_run_that_is_there_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "run_step", lambda *words, **_: pytest.fail("it went on"))
    mine = tmp_path / "demo/first-run/checkpoints/step-00000001/COMMIT"
    mine.parent.mkdir(parents=True)
    mine.write_text("{}")
    with pytest.raises(LaunchError, match="demo/first-run is there already.* officina report .* rm -r demo/first-run"):
        demo.main()
    assert mine.exists()


def test_a_fine_tuned_run_is_left_alone_too_unless_a_demo_made_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_finetune, "committed_steps", lambda run: [1])
    monkeypatch.setattr(demo_finetune, "run_step", lambda *words, **_: sys.exit("it went on"))
    tuned = demo.FOLDER / "finetuned"
    begin(tuned, plain_run(tmp_path))
    with pytest.raises(LaunchError, match="demo/finetuned is there already.* rm -r demo/finetuned"):
        demo_finetune.main()
    training = subprocess.Popen(["sleep", "60"])  # stands for `officina train`
    (tuned / "metrics.jsonl").touch()
    demo._watch(tuned, training, 0)
    training.kill()
    training.wait()
    with pytest.raises(SystemExit, match="it went on"):
        demo_finetune.main()
    assert not tuned.exists()


def test_the_run_of_an_earlier_demo_makes_way_unless_it_trains(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    begin(demo.RUN, plain_run(tmp_path))
    demo.made(demo.RUN).write_text(read_run_id(demo.RUN))
    holder = subprocess.Popen([sys.executable, "-c", f"""
from officina.trainer.run_dir import claim
with claim("{demo.RUN}"):
    print("held", flush=True), input()"""], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(LaunchError, match="demo/first-run is being trained by another start"):
        demo.make_way(demo.RUN)
    assert read_run_id(demo.RUN)
    holder.communicate("\n")
    demo.make_way(demo.RUN)
    assert not demo.RUN.exists()
    begin(demo.RUN, plain_run(tmp_path))  # another run, made by hand since
    with pytest.raises(LaunchError, match="not known to be of an earlier demo"):
        demo.make_way(demo.RUN)


def test_the_commands_it_shows_can_be_pasted(monkeypatch, tmp_path):
    shown = io.StringIO()
    monkeypatch.setattr(demo.sys, "executable", "true")
    words = ["generate", str(demo.RUN), demo.PROMPT, "~data.sources.python", "optim.lr=[1,2]", "x" * 100]
    demo.run_step(Console(file=shown, width=60), "A step", tmp_path, *words)
    [line] = [line for line in shown.getvalue().splitlines() if line.startswith("$ ")]
    assert shlex.split(line) == ["$", "officina", *words]


def test_a_function_gives_its_signature_and_its_docstring():
    rows = list(samples_of(SOURCE, "reader.py"))
    count = "def count(self, path, *, strict=False):\n"
    assert rows[:2] == [
        {"prompt": SIGNATURE.format("Return the number of lines in a file."), "completion": count, "source": "reader.py"},
        {"prompt": DOCSTRING.format(count + "    with open(path) as file:\n        return sum(1 for _ in file)"),
         "completion": '    """Return the number of lines in a file."""\n', "source": "reader.py"}]
    assert [row["completion"] for row in rows[2:]] == ["def bare(self):\n"]


def test_what_is_no_python_gives_nothing():
    assert not list(samples_of(b"def broken(:\n", "broken.py")) and not list(samples_of(b"\0", "nul.py"))


def test_long_functions_give_no_docstring_sample(monkeypatch):
    monkeypatch.setattr(demo_samples, "_LONGEST", 100)
    assert all(row["prompt"].startswith("# Write the signature") for row in samples_of(SOURCE, "reader.py"))


def test_the_standard_library_gives_the_same_samples_twice(tmp_path, monkeypatch):
    [source], words = standard_library()
    some = replace(source, files=source.files[::8])
    monkeypatch.setattr(demo_samples, "standard_library", lambda: ([some], words))
    n = write_samples(tmp_path / "a" / "1.jsonl")
    assert n == write_samples(tmp_path / "2.jsonl") > 300
    first = (tmp_path / "a" / "1.jsonl").read_bytes()
    assert first == (tmp_path / "2.jsonl").read_bytes()
    assert all(set(json.loads(line)) == {"prompt", "completion", "source"} for line in first.splitlines())
