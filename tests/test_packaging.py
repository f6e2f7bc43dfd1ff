"""The wheel holds everything, and works where only the wheel is."""

import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("trainer", "kernels", "configs", "launch", "benchmarks")


@pytest.fixture(scope="module")
def setuptools_table():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, since setuptools leaves a build folder that would hide what is missing."""
    copy = tmp_path_factory.mktemp("source")
    for name in (*LAYERS, "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(source, copy / name, ignore=ignored) if source.is_dir() else shutil.copy(source, copy)
    built = subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--skip-dependency-check", "--outdir",
                            str(copy / "dist"), str(copy)], check=True, capture_output=True, text=True)
    assert "is absent from the `packages` configuration" not in built.stdout + built.stderr
    [path] = (copy / "dist").glob("*.whl")
    return path


def folders_with_code():
    return sorted(path.parent.relative_to(ROOT) for layer in LAYERS for path in (ROOT / layer).rglob("__init__.py"))


def test_every_folder_with_code_is_a_package(setuptools_table):
    """One that is left out imports in an editable install and is silently absent from the wheel."""
    folders = {".".join(("officina", *folder.parts)): folder.as_posix() for folder in folders_with_code()}
    assert sorted(setuptools_table["packages"]) == sorted(folders)
    assert setuptools_table["package-dir"] == folders


def test_every_folder_of_modules_has_an_init():
    wrong = {path.parent for layer in LAYERS for path in (ROOT / layer).rglob("*.py")
             if not (path.parent / "__init__.py").exists()}
    assert not wrong


def test_the_wheel_holds_every_module_and_option(wheel):
    expected = {f"officina/{path.relative_to(ROOT).as_posix()}" for layer in LAYERS
                for path in (ROOT / layer).rglob("*.py")}
    expected |= {f"officina/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("officina/")}
    assert len(expected) > 60 and not expected - held, sorted(expected - held)
    assert not {name for name in held if name.startswith("officina/tests")}


def test_bare_names_are_not_taken(wheel):
    """`kernels` and `trainer` are other people's packages."""
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"officina"}


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A fresh environment with the wheel; its dependencies are lent from this one, without their .pth files, so that an
    editable install here cannot stand in for the wheel."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index",
                    str(wheel)], check=True, capture_output=True, text=True)
    own = next((folder / "lib").glob("python*/site-packages"))
    (own / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_the_installed_script_answers(installed, tmp_path):
    done = subprocess.run([installed / "officina", "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "officina train --help" in done.stdout
    done = subprocess.run([installed / "officina", "check", "experiment=demo", "engine=zer02"], capture_output=True, text=True,
                          cwd=tmp_path)
    assert done.returncode == 2 and "Try: engine=zero2" in done.stderr  # options are found in the wheel


def test_every_installed_module_imports(installed, tmp_path):
    names = [".".join(("officina", *path.relative_to(ROOT).with_suffix("").parts)) for layer in LAYERS
             for path in sorted((ROOT / layer).rglob("*.py")) if path.stem not in ("__init__", "__main__")]
    program = ("import sys\nfrom importlib import import_module\n"
               f"for name in {names!r}:\n    module = import_module(name)\n"
               f"    assert {str(installed.parent)!r} in module.__file__, module.__file__\n")
    done = subprocess.run([installed / "python", "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_here_the_sources_are_imported():
    """An editable install: a change in the working tree is what the tests test."""
    program = "import officina.trainer as t, officina.configs.compose as c; print(t.__file__, c.__file__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/")
    assert done.stdout.split() == [str(ROOT / "trainer/__init__.py"), str(ROOT / "configs/compose.py")]


def test_python_and_torch_floors_are_stated():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11" and "torch>=2.9" in project["dependencies"]
    heavy = ("triton", "deepspeed", "mpi4py", "wandb", "mlflow")
    assert not [need for need in project["dependencies"] if need.startswith(heavy)], "these are extras"
