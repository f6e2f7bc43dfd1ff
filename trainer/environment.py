"""What a run ran on: code, packages, machine, ranks; for RUN/environment.json and the history.

No torch is imported here unless `device_facts` is called, so that a login node can describe itself. No user name and
no absolute path is recorded: a run may move and be published.
"""

import contextlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution, requires
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ENVIRONMENT_FILE = "environment.json"
MAX_DIFF_BYTES = 2 * 2**20
"""A longer diff is cut: somebody committed nothing for a long time, or has data in the repository."""
PACKAGES = ("torch", "triton", "numpy", "deepspeed", "mpi4py", "hydra-core", "omegaconf", "pydantic", "tokenizers",
            "safetensors", "xxhash", "datasets", "transformers", "psutil", "tensorboard", "wandb", "mlflow-skinny")
"""Packages whose version can change what a run computes or how it is stored; absent ones are left out."""
IMAGE_LABELS = "/.singularity.d/labels.json"
"""Where Apptainer and Singularity keep what an image says of its own making."""


@dataclass(frozen=True, slots=True)
class Code:
    """The source of one package: a commit, and what was changed since."""

    version: str | None
    commit: str | None
    """None: neither in a repository nor installed from one."""
    dirty: bool
    """True: tracked files differ from the commit; the difference is `code_diff`."""
    untracked_files: int
    """Python files beside the code that are not in the repository and therefore in no diff."""


def describe(*, launcher: str = "none", threads: int | None = None, device: Mapping[str, Any] | None = None,
             ranks: Sequence[Mapping[str, Any]] = (), modules: Sequence[str] = ()) -> dict[str, Any]:
    """The environment of this process as plain JSON values.

    launcher: who started the ranks. threads: CPU threads per rank. device: `device_facts()` of a rank. ranks: `rank_facts(...)`
    of every rank. modules: dotted names of a user's own code (model factory, loss), whose source counts as the run's code too.
    """
    packages = {name: version for name in PACKAGES if (version := _version(name)) is not None}
    code = {name: asdict(found) for name, (found, _) in _sources(modules).items()}
    return {
        "officina": _version("officina"),
        "code": code,
        "python": platform.python_version(),
        "packages": packages,
        "os": {"system": platform.system(), "release": platform.release(), "name": _os_name(), "libc": _libc()},
        "cpu": {"model": _cpu_model(), "architecture": platform.machine(), "cores": os.cpu_count(),
                "usable_cores": _usable_cores(), "memory_bytes": _memory_bytes()},
        "device": dict(device) if device is not None else {"kind": "unknown", **_driver()},
        "threads_per_rank": threads,
        "launcher": launcher,
        "image": _image(),
        "ranks": [dict(rank) for rank in ranks],
    }


def lacking(extra: str) -> str:
    """What `pip install 'officina[extra]'` would mend, in words: a package that is missing, or another version than
    pyproject.toml allows; empty if nothing."""
    for wanted in map(Requirement, requires("officina") or ()):
        if wanted.marker and wanted.marker.evaluate({"extra": extra}) and not wanted.marker.evaluate({"extra": ""}):
            if (found := _version(wanted.name)) is None:
                return f"needs the package {wanted.name}, which is not installed here"
            if not wanted.specifier.contains(found, prereleases=True):
                return f"needs {wanted.name}{wanted.specifier}, and {found} is installed here"
    return ""


def code_diff(modules: Sequence[str] = ()) -> str:
    """What was changed since the commits that `describe` names; empty if nothing was."""
    diffs = [diff for _, diff in _sources(modules).values() if diff]
    return "".join(dict.fromkeys(diffs))  # two packages of one repository have one diff


def write_environment(run_dir: Path, description: Mapping[str, Any]) -> None:
    """Write RUN/environment.json: the environment of the newest start. (The code's changes are in the history.)

    A disk that does not take it is no reason not to train.
    """
    text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
    try:
        _replace(Path(run_dir) / ENVIRONMENT_FILE, text)
    except OSError as error:
        with contextlib.suppress(OSError):
            print(f"{ENVIRONMENT_FILE} cannot be written ({error.strerror}). Training goes on; make room in the run directory.")


def rank_facts(rank: int, local_rank: int) -> dict[str, Any]:
    """What one rank says of itself; gathered by the loop."""
    return {"rank": rank, "local_rank": local_rank, "host": platform.node(), "pid": os.getpid()}


def device_facts() -> dict[str, Any]:
    """The device torch sees on this rank: names, memory, and the versions of the stack below. Imports torch."""
    import torch

    if not torch.cuda.is_available():
        return {"kind": "cpu", "capability": torch.backends.cpu.get_cpu_capability()}
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None
    return {
        "kind": "rocm" if torch.version.hip else "cuda",
        "names": [p.name for p in properties],
        "memory_bytes": [p.total_memory for p in properties],
        "architecture": getattr(properties[0], "gcnArchName", None) or f"sm_{properties[0].major}{properties[0].minor}",
        "cuda": torch.version.cuda, "rocm": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, nccl)) if nccl else None,
        **_driver(),
    }


# ---- code ----------------------------------------------------------------------------------------------------------
def _sources(modules: Sequence[str]) -> dict[str, tuple[Code, str]]:
    """Package name -> its code and diff, for officina and the top-level packages of `modules`."""
    found = {"officina": _source("officina", Path(__file__))}
    for module in modules:
        top = module.partition(":")[0].partition(".")[0]
        spec = find_spec(top) if top not in found else None
        if spec is None:
            continue
        file = spec.origin or next(iter(spec.submodule_search_locations or ()), None)
        if file and Path(file).exists():
            found[top] = _source(top, Path(file))
    return found


def _source(package: str, file: Path) -> tuple[Code, str]:
    """The code that `file` belongs to. Only a repository that tracks the file counts: a virtual environment may lie
    inside somebody else's repository."""
    version, folder = _version(package), file if file.is_dir() else file.parent
    tracked = _git(folder, "ls-files", "--", file.name if file.is_file() else ".")
    if not tracked:
        return Code(version, _commit_of_installation(package), False, 0), ""
    commit = _git(folder, "rev-parse", "HEAD")
    # `--no-ext-diff` and fixed prefixes: the diff must apply whatever the user's git configuration says.
    diff = _git(folder, "diff", "--no-ext-diff", "--no-color", "--src-prefix=a/", "--dst-prefix=b/", "HEAD") or ""
    untracked = _git(folder, "ls-files", "--others", "--exclude-standard", "--full-name", "--", ":/*.py") or ""
    if len(diff.encode()) > MAX_DIFF_BYTES:
        diff = diff.encode()[:MAX_DIFF_BYTES].decode(errors="ignore") + f"\n[cut at {MAX_DIFF_BYTES} bytes]"
    return Code(version, commit or None, bool(diff), len(untracked.splitlines())), diff + "\n" if diff else ""


def _git(folder: Path, *words: str) -> str | None:
    """Output of a git command, stripped; none where git or a repository is missing."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20,
                              errors="replace", env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"})
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _commit_of_installation(package: str) -> str | None:
    """Commit of a package that pip installed from a repository (PEP 610)."""
    try:
        direct = Distribution.from_name(package).read_text("direct_url.json")
        return json.loads(direct or "{}").get("vcs_info", {}).get("commit_id")
    except (PackageNotFoundError, ValueError):
        return None


def _version(package: str) -> str | None:
    try:
        return distribution(package).version
    except PackageNotFoundError:
        return None


# ---- machine -------------------------------------------------------------------------------------------------------
def _os_name() -> str:
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        return ""


def _libc() -> str:
    return " ".join(part for part in platform.libc_ver() if part)


def _cpu_model() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Processor", "cpu"):
            return re.sub(r"\s+", " ", value).strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int | None:
    """Cores this process may run on: Slurm and taskset bind fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _driver() -> dict[str, str]:
    """Version of the GPU driver, from the kernel: also right inside a container."""
    nvidia = re.search(r"Kernel Module.*?\s(\d+\.\d+[.\d]*)", _read("/proc/driver/nvidia/version"))
    amd = _read("/sys/module/amdgpu/version").strip()
    if nvidia:
        return {"driver": f"nvidia {nvidia[1]}"}
    return {"driver": f"amdgpu {amd}"} if amd else {}


def _image() -> dict[str, str] | None:
    """The Apptainer or Singularity image this runs in: its file's name without the folder, and its labels."""
    name = os.environ.get("APPTAINER_NAME") or os.environ.get("SINGULARITY_NAME")
    if not name:
        return None
    try:
        labels = json.loads(_read(IMAGE_LABELS) or "{}")
    except ValueError:
        labels = {}
    told = {key.removeprefix("org.label-schema."): str(value) for key, value in labels.items()
            if re.search(r"build-date|version|deffile\.from|digest|revision", key)}
    return {"name": Path(name).name, **told}


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _replace(path: Path, text: str) -> None:
    """Write a whole file or leave the old one."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
