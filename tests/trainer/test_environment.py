import getpass
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from officina.trainer import environment
from officina.trainer.environment import (
    Code,
    code_diff,
    describe,
    device_facts,
    rank_facts,
    write_environment,
)

REPOSITORY = Path(environment.__file__).parents[1]


def git(folder: Path, *words: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A user's repository with a package that holds a model factory."""
    root = tmp_path / "project"
    (root / "mymodels").mkdir(parents=True)
    (root / "mymodels/__init__.py").write_text("")
    (root / "mymodels/vit.py").write_text("WIDTH = 64\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    monkeypatch.syspath_prepend(str(root))
    return root


def test_a_description_is_json_without_user_or_path():
    found = describe(launcher="srun", threads=4, device=device_facts(), ranks=[rank_facts(0, 0), rank_facts(1, 1)])
    text = json.dumps(found)
    assert str(REPOSITORY) not in text and str(Path.home()) + "/" not in text and sys.prefix not in text
    user = getpass.getuser()
    assert user not in [v for v in _leaves(found)]
    assert found["packages"]["torch"].startswith("2.") and found["python"].startswith("3.")
    assert found["cpu"]["memory_bytes"] > 2**28 and 1 <= found["cpu"]["usable_cores"] <= found["cpu"]["cores"]
    assert found["cpu"]["model"] and found["os"]["name"]
    assert [r["rank"] for r in found["ranks"]] == [0, 1] and found["ranks"][0]["host"]
    assert found["device"]["kind"] in ("cpu", "cuda", "rocm")
    assert found["launcher"] == "srun" and found["threads_per_rank"] == 4


def _leaves(value):
    if isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield str(value)


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="the tests do not run from a repository")
def test_the_commit_of_officina_is_recorded():
    assert describe()["code"]["officina"]["commit"] == git(REPOSITORY, "rev-parse", "HEAD")


def test_a_users_own_code_counts_with_its_changes(project):
    before = describe(modules=["mymodels.vit:build", "mymodels.vit:loss"])["code"]["mymodels"]
    assert before == {"version": None, "commit": git(project, "rev-parse", "HEAD"), "dirty": False,
                      "untracked_files": 0}
    (project / "mymodels/vit.py").write_text("WIDTH = 128\n")
    (project / "mymodels/new.py").write_text("")
    git(project, "config", "diff.noprefix", "true")  # the user's taste must not reach the stored diff
    after = describe(modules=["mymodels.vit:build"])["code"]["mymodels"]
    assert after["dirty"] and after["untracked_files"] == 1
    diff = code_diff(["mymodels.vit:build"])
    assert "-WIDTH = 64\n+WIDTH = 128" in diff
    git(project, "checkout", "-q", "mymodels/vit.py")
    (project / "stored.diff").write_text(diff[diff.index("diff --git a/mymodels"):])
    git(project, "apply", "stored.diff")
    assert (project / "mymodels/vit.py").read_text() == "WIDTH = 128\n"


def test_an_endless_diff_is_cut(project, monkeypatch):
    monkeypatch.setattr(environment, "MAX_DIFF_BYTES", 500)
    (project / "mymodels/vit.py").write_text("x = 1\n" * 1000)
    (found, diff) = environment._source("mymodels", project / "mymodels/vit.py")
    assert found.dirty and len(diff) < 600 and diff.endswith("[cut at 500 bytes]\n")


def test_a_repository_that_does_not_hold_the_code_is_not_its_repository(project):
    """As with a virtual environment inside the user's own repository."""
    (project / ".gitignore").write_text(".venv\n")
    package = project / ".venv/site-packages/other"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (found, diff) = environment._source("other", package / "__init__.py")
    assert found == Code(None, None, False, 0) and diff == ""


def test_without_git_the_rest_is_still_described(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = describe()
    assert found["code"]["officina"]["commit"] is None and found["python"]


def test_the_image_is_named_without_its_folder(monkeypatch, tmp_path):
    labels = {"org.label-schema.usage.singularity.deffile.from": "rocm/pytorch@sha256:abc", "org.x.secret": "no"}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    monkeypatch.setattr(environment, "IMAGE_LABELS", str(tmp_path / "labels.json"))
    monkeypatch.setenv("APPTAINER_NAME", "/scratch/someone/train.sif")
    assert describe()["image"] == {"name": "train.sif", "usage.singularity.deffile.from": "rocm/pytorch@sha256:abc"}
    monkeypatch.delenv("APPTAINER_NAME")
    assert describe()["image"] is None or "SINGULARITY_NAME" in os.environ


def test_the_newest_start_is_the_one_that_is_described(tmp_path):
    write_environment(tmp_path, {"python": "3.11"})
    write_environment(tmp_path, {"python": "3.12"})
    assert json.loads((tmp_path / "environment.json").read_text()) == {"python": "3.12"}
    assert sorted(f.name for f in tmp_path.iterdir()) == ["environment.json"]


def test_a_disk_that_takes_no_description_is_no_reason_not_to_train(mount, capsys):
    disk = mount("nr_inodes=2")  # one for the folder
    (disk / "file").touch()
    write_environment(disk, {"python": "3.11"})
    assert "environment.json cannot be written (No space left on device). Training goes on" in capsys.readouterr().out


def test_describing_a_login_node_needs_no_torch():
    code = "import sys; from officina.trainer.environment import describe; describe(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
