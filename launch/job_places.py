"""Where a run would be written, judged by the site's storage: not a home with a quota, and room for its checkpoints."""

import os
from pathlib import Path

from officina.launch.job_request import Request
from officina.trainer.errors import Problem


def place_problems(request: Request, run_dir: Path, *, checkpoint_bytes: int = 0, checkpoint_files: int = 0,
                   kept: int = 1) -> list[Problem]:
    """What is wrong with `run_dir` for checkpoints of this size, of which `kept` stay and one more is being written."""
    found = storage_area(request, run_dir)
    if found is None:
        return []
    name, root = found
    area = request.profile.storage[name]
    sizes = [(area.quota_gb, checkpoint_bytes / 1e9, "GB"), (area.quota_files, checkpoint_files, "files")]
    limits = [f"{quota:,.0f} {unit}" for quota, _, unit in sizes if quota]
    if name == "home" and limits:
        return [Problem("--runs-dir", run_dir.parent, f"lies in {root}, a home of {' and '.join(limits)}, which checkpoints "
                        "and caches fill", f"--runs-dir {suggest_area(request)}")]
    problems = []
    for quota, each, unit in sizes:
        if quota and each * (kept + 1) > quota:
            fits = int(quota // each) - 1
            problems.append(Problem(
                "checkpoint.keep_last", kept, f"{kept} checkpoints and the one being written are {each * (kept + 1):,.0f} "
                f"{unit}, and {name} ({root}) has {quota:,.0f}",
                f"checkpoint.keep_last={fits}" if fits >= 1 else f"--runs-dir {suggest_area(request)}"))
    return problems[:1]


def storage_area(request: Request, path: Path) -> tuple[str, str] | None:
    """(name, path) of the site's storage area that holds `path`; the longest match counts."""
    best = None
    for name, area in request.profile.storage.items():
        root = area_path(area.path, request.account)
        if root and (path == root or root in path.parents) and (best is None or len(str(root)) > len(best[1])):
            best = (name, str(root))
    return best


def area_path(template: str, account: str) -> Path | None:
    """An area's folder for this user and account; None where it is not known, or named by a variable that is not set here."""
    if not template or "*" in template:
        return None
    user = os.environ.get("USER") or Path.home().name
    text = os.path.expandvars(template.replace("{account}", account or "{account}").replace("{user}", user))
    return Path(text) if text.startswith("/") and "$" not in text and "{" not in text else None


def suggest_area(request: Request) -> str:
    """Where runs go best: in the area with the most room."""
    areas = request.profile.storage
    known = [name for name in areas if name not in ("home", "public") and areas[name].path and "*" not in areas[name].path]
    best = max(known, key=lambda name: areas[name].quota_gb or float("inf"), default="")
    return f"{areas[best].path.replace('{account}', request.account or 'PROJECT') if best else '/SCRATCH'}/runs"
