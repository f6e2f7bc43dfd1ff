"""`officina submit`: the words that train on a laptop become a job on a cluster. Composed, checked, planned, rendered, sent."""

import argparse
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from officina.configs.job import JobConfig, read_job, split_words
from officina.configs.job import expand as expand_path
from officina.configs.sites import Site, detect_site, find_site
from officina.configs.sweep import expand
from officina.launch.cli import read_arguments
from officina.launch.job_commands import active_jobs
from officina.launch.job_cost import chain_length, sweep_problems
from officina.launch.job_places import place_problems
from officina.launch.job_plan import JobPlan, make_plan, memory_problems, plan_lines
from officina.launch.job_record import JobRecord, append_job
from officina.launch.job_request import RANKED, Request, make_request
from officina.launch.job_rules import missing_paths, site_problems
from officina.launch.memory_plan import checkpoint_bytes, checkpoint_files, checkpoints_kept
from officina.launch.render import Script, bind_folders, render
from officina.launch.start import Plan, free_name, plan_resume, plan_train, refuse_existing, write_start
from officina.launch.step_script import quote
from officina.trainer.errors import EXIT_DONE, ConfigError, LaunchError, OfficinaError, Problem
from officina.trainer.hf.base import open_base
from officina.trainer.run_dir import claim, split_step, unwritable

COMMANDS = ("train", "resume", "data", "convert", "generate", "eval", "bench", "report", "check")
"""Commands that can be put on a cluster; without one of them the words are those of `train`."""
SCRIPT = "job.sbatch"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A submission that is composed and judged; nothing of it is written yet."""

    request: Request
    script: Script
    plans: tuple[Plan, ...]
    """The runs: one, several of a sweep, none for other commands."""
    problems: list[Problem]
    notes: list[str]
    """What a person should know, and is no fault."""
    planned: JobPlan | None = None

    @property
    def text(self) -> str:
        """The sbatch script."""
        return render(self.script)


def submit(args: argparse.Namespace) -> int:
    """Submit, or with --dry-run show the script (stdout) and the plan (stderr)."""
    args = _own_options(args)
    runs_dir = Path(os.path.expanduser(os.path.expandvars(args.runs_dir)))  # no shell does it in --runs-dir=~/runs
    prepared = prepare(args.words, runs_dir, dry_run=args.dry_run, force=args.force)
    if prepared.problems:
        raise ConfigError(prepared.problems, "the job")
    if prepared.planned:
        show_plan(plan_lines(prepared.planned))
    for note in prepared.notes:
        print(f"note: {note}", file=sys.stderr)
    if args.dry_run:
        print("note: nothing is written: the script needs what these words, without --dry-run, put into "
              f"{prepared.script.folder}", file=sys.stderr)
        print(prepared.text, end="")
        return EXIT_DONE
    return send(prepared)


def _own_options(args: argparse.Namespace) -> argparse.Namespace:
    """Options of `submit` that stand among the words: a command's own options are words too, and after `--` all are."""
    words, rest = list(args.words), []
    while words and words[0] != "--":
        word = words.pop(0)
        if word in ("--dry-run", "--force"):
            setattr(args, word[2:].replace("-", "_"), True)
        elif word.startswith("--runs-dir"):
            args.runs_dir = word.partition("=")[2] or (words.pop(0) if words else args.runs_dir)
        else:
            rest.append(word)
    args.words = [*rest, *words]
    if split_command(args.words)[0] in RANKED and (unknown := [word for word in args.words if word.startswith("-")]):
        raise LaunchError(f"{' '.join(unknown)}: is no option of submit. Try: officina submit --help")
    return args


def show_plan(lines: list[tuple[str, str]]) -> None:
    """On stderr: stdout may be the script."""
    for name, text in lines:
        print(f"{name:<7} {text}", file=sys.stderr)


# ---- words -------------------------------------------------------------------------------------------------------------
def split_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """(command, its words and those of the job)."""
    for i, word in enumerate(words):
        if "=" not in word and not word.startswith("-"):
            if word in COMMANDS:
                return word, [*words[:i], *words[i + 1:]]
            break
    return "train", list(words)


def prepare(words: Sequence[str], runs_dir: Path, *, dry_run: bool = False, force: bool = False,
            environ: Mapping[str, str] = os.environ) -> Prepared:
    """What the words come to, with every fault. `--` ends the words of the job: what follows is the command's own."""
    what, rest = split_command(words)
    end = rest.index("--") if "--" in rest else len(rest)
    job_words, own_words = split_words(rest[:end])
    own_words += rest[end + 1:]
    job, problems, _ = read_job(job_words, environ)
    if what not in RANKED:
        own_words = [word for word in own_words if not word.startswith("site=")]
        return _prepare_command(what, job, problems, own_words, words, runs_dir, dry_run, environ)
    if job.site and not any(word.startswith("site=") for word in own_words):
        own_words.append(f"site={job.site}")
    sweep = expand(own_words)
    makers = [_planner(what, one, runs_dir, force, len(sweep) > 1) for one, _ in sweep]
    first = makers[0](None)
    site = _site(job, first, environ, problems)
    request = make_request(site, job, what=what, account=first.run.site.account,
                           cpu_ranks=(first.run.ranks or 1) if first.run.device == "cpu" else 0)
    request = replace(request, runs=len(sweep))
    plans, planned = [], []
    for place, make in enumerate(makers):
        plan = make(request.world_size)
        if len(sweep) > 1:  # of one stem, also where the sweep varies the name: Slurm finds the logs by the task's number
            run = replace(plan.run, name=f"{first.run.name}-{place}")
            plan = replace(plan, run=run, run_dir=runs_dir / run.name)
        if request.gpus and plan.run.device == "auto":
            plan = replace(plan, run=replace(plan.run, device="cuda"))  # a rank without its GPU must not train on the CPU
        plans.append(plan)
        planned.append(make_plan(request, plan.run, run_dir=plan.run_dir if what == "resume" else None,
                                 steps_done=plan.origin.step if plan.origin else 0,
                                 position=plan.origin.position if plan.origin else 0))
    problems += _unique([p for plan in plans for p in [*plan.problems, *_ranks(request, plan)]])
    problems += [*site_problems(request), *sweep_problems(request)]
    if not problems:
        problems += _unique([p for one in planned for p in memory_problems(one)])
    notes = [f"{plan.run_dir}: {' '.join(varied)}" for plan, (_, varied) in zip(plans, sweep, strict=True) if varied]
    notes += dict.fromkeys(line for plan in plans for line in plan.notes())
    places = [*_unique([p for plan in plans for p in _places(request, plan)]), *missing_paths(request)]
    if detect_site(socket.gethostname(), environ) != site.id and dry_run:
        # Planned from elsewhere: what lies at the site cannot be seen.
        unseen = [p for p in problems if p.key.startswith("data.sources") and p.rule.startswith("is no data set")]
        problems = [p for p in problems if p not in unseen]
        notes += [f"seen from this host, which is not one of {site.profile.name}: {p}" for p in [*places, *unseen]]
    else:
        problems += places
    return Prepared(request, _script(request, plans, words, environ), tuple(plans), problems, notes, planned[0])


def _places(request: Request, plan: Plan) -> list[Problem]:
    return place_problems(request, expand_path(str(plan.run_dir)), checkpoint_bytes=checkpoint_bytes(plan.run),
                          checkpoint_files=checkpoint_files(request.world_size), kept=checkpoints_kept(plan.run))


def _unique(problems: Iterable[Problem]) -> list[Problem]:
    """Runs of a sweep have most faults in common."""
    return list({str(problem): problem for problem in problems}.values())


def _planner(what: str, words: list[str], runs_dir: Path, force: bool, in_sweep: bool) -> Callable[[int | None], Plan]:
    """Plans the run for a number of ranks."""
    if what == "resume":
        run = next((word for word in words if "=" not in word), None)
        if run is None:
            raise LaunchError("resume: names no run directory. Try: officina submit resume runs/mine site=lumi nodes=2 time=8h")
        words = [word for word in words if word != run]
        if in_sweep:
            raise LaunchError(f"resume: goes on with one run, and {' '.join(words)} asks for several. Try: officina submit "
                              f"train from={run} {' '.join(words)}")
        return lambda n: plan_resume(Path(run), words, world_size=n, force=force)
    return lambda n: plan_train(words, runs_dir, world_size=n, force=force)


def _site(job: JobConfig, plan: Plan, environ: Mapping[str, str], problems: list[Problem]) -> Site:
    """The site that was named, else that of the run's defaults, else the one this host belongs to."""
    named = job.site or (plan.run.site.name if plan.run.site.name != "local" else "")
    if any(problem.key == "site" for problem in plan.problems):
        raise ConfigError([problem for problem in plan.problems if problem.key == "site"], "the job")
    found = named or detect_site(socket.gethostname(), environ)
    if not found:
        raise ConfigError([*problems, _no_site()], "the job")
    return find_site(found, environ)


def _no_site() -> Problem:
    return Problem("site", None, f"is not named, and {socket.gethostname()} is no host of a site that is known",
                   "site=lumi; `officina sites` lists them, and site=slurm is any cluster")


def _ranks(request: Request, plan: Plan) -> list[Problem]:
    if plan.run.ranks and plan.run.ranks != request.ranks_per_node and request.gpus:
        return [Problem("ranks", plan.run.ranks, f"each rank needs a GPU of its own, and each node gives {request.gpus}",
                        f"ranks=0, or gpus={plan.run.ranks}")]
    return []


# ---- the script --------------------------------------------------------------------------------------------------------
def _script(request: Request, plans: list[Plan], words: Sequence[str], environ: Mapping[str, str]) -> Script:
    venv, python = _python(request)
    folders = [expand_path(str(plan.run_dir)) for plan in plans]
    data = [expand_path(source.path) for plan in plans for source in plan.run.data.sources.values()]
    own = [folders[0].parent, *data, *_begins(plans), *([Path(venv)] if venv else [])]
    name = plans[0].run.name
    name = name.rpartition("-")[0] if len(plans) > 1 else name
    return Script(request, name, folders[0], tuple(words), python=python, venv=venv,
                  run_dirs=tuple(folders) if len(plans) > 1 else (),
                  binds=bind_folders(request, own) if request.image_kind else (), chdir=Path.cwd())


def _begins(plans: list[Plan]) -> Iterator[Path]:
    """What the runs start from, `init_from`: an image must see it too. A run that has begun may have lost it."""
    for text in dict.fromkeys(plan.run.init_from for plan in plans if plan.run.init_from):
        with contextlib.suppress(OfficinaError):
            yield expand_path(str(open_base(text).path))


def _python(request: Request) -> tuple[str, str]:
    """(virtual environment, interpreter) where the ranks are: the one named, else the image's, else the one we run in."""
    if request.job.venv:
        venv = str(expand_path(request.job.venv))
        return venv, f"{venv}/bin/python"
    if request.image_kind:
        return "", "python3"
    if sys.prefix != sys.base_prefix:
        return sys.prefix, f"{sys.prefix}/bin/python"
    return "", sys.executable


def _prepare_command(what: str, job: JobConfig, problems: list[Problem], own: list[str], words: Sequence[str], runs_dir: Path,
                     dry_run: bool, environ: Mapping[str, str]) -> Prepared:
    found = job.site or detect_site(socket.gethostname(), environ)
    if not found:
        raise ConfigError([*problems, _no_site()], "the job")
    site = find_site(found, environ)
    request = make_request(site, job, what=what, cpu_ranks=int("device=cpu" in own))
    args = read_arguments([what, *own]) if what not in ("generate", "convert") else None  # those two bring torch in
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join([what, *[w for w in own[:1] if not w.startswith("-")]]))
    folder = expand_path(str(_free(runs_dir, name)))
    venv, python = _python(request)
    own_paths = [folder.parent, Path.cwd(), *([Path(venv)] if venv else [])]
    script = Script(request, name, folder, tuple(words), command=(what, *own), python=python, venv=venv, chdir=Path.cwd(),
                    binds=bind_folders(request, own_paths) if request.image_kind else ())
    problems = problems + site_problems(request)
    if request.nodes > 1:
        problems.append(Problem("nodes", request.nodes, f"{what} runs on one node", "nodes=1"))
    if (job.jobs or 1) > 1:
        problems.append(Problem("jobs", job.jobs, f"{what} is no run that a next job could go on with", "jobs=1"))
    if not dry_run:
        problems += missing_paths(request)
        if what in ("eval", "report") and not split_step(args.run)[0].is_dir():
            problems.append(Problem(what, args.run, "there is no such run directory", f"{what} runs/mine"))
    return Prepared(request, script, (), problems, [])


def _free(runs_dir: Path, name: str) -> Path:
    return next(folder for i in range(1, 100_000) if not (folder := runs_dir / f"{name}-{i}").exists())


# ---- sending -----------------------------------------------------------------------------------------------------------
def send(prepared: Prepared) -> int:
    """Write the run directory and the script, and hand it to sbatch, once for each job of the chain."""
    request, script = prepared.request, prepared.script
    if shutil.which("sbatch") is None:
        raise LaunchError(f"{socket.gethostname()} has no sbatch. Submit on a login node of {request.profile.name}; "
                          "here, --dry-run shows the script")
    for plan in prepared.plans:
        refuse_existing(plan)
        _heed_waiting(plan)
    folder = script.folder
    try:
        for plan in prepared.plans:
            with claim(plan.run_dir):
                write_start(plan, request.world_size)
            _supervisor(plan.run_dir)
        for run_dir in script.run_dirs or (folder,):
            (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        path = _write_script(folder, prepared.text)
    except OSError as error:
        raise unwritable(folder, error) from error
    jobs = 1 if request.job.requeue else chain_length(request)
    about = JobRecord(job_id="", what=request.what, site=request.site.id, cluster=_cluster(), script=path.name,
                      nodes=request.nodes)
    first, shown = "", quote(os.path.relpath(folder))
    for place in range(1, jobs + 1):
        try:
            job_id = _sbatch(path)
        except LaunchError as error:
            if not first:
                raise
            raise LaunchError(f"{error}\nOf the chain's {jobs} jobs {place - 1} are submitted and will run: "
                              f"officina jobs {shown}; to end them: officina cancel {shown}") from None
        first = first or job_id
        if not script.run_dirs:  # at once: should sbatch refuse the next, this one is known
            append_job(folder, replace(about, job_id=job_id, chain=first if jobs > 1 else "", place=place))
    for index, run_dir in enumerate(script.run_dirs):
        append_job(run_dir, replace(about, job_id=f"{first}_{index}", array_index=index, script=os.path.relpath(path, run_dir)))
    more, whole = f" and {jobs - 1} more of its chain" if jobs > 1 else "", shown
    if script.run_dirs:
        more = f", an array of {len(script.run_dirs)} runs"
        whole = quote(os.path.relpath(folder).removesuffix("0")) + f"{{0..{len(script.run_dirs) - 1}}}"  # for the shell
    print(f"Submitted batch job {first}{more}: {folder}\n"
          f"See it: officina jobs {whole}; its output: officina logs {shown} -f; end it: officina cancel {whole}")
    return EXIT_DONE


def _heed_waiting(plan: Plan) -> None:
    """Jobs read the configuration when they start: those that still wait for this run would train with these words."""
    if not (waiting := active_jobs(plan.run_dir)):
        return
    jobs = f"job{'s' * (len(waiting) > 1)} {', '.join(waiting)}"
    if plan.action == "resume":
        print(f"note: {jobs} of {plan.run_dir} will go on with these words, too", file=sys.stderr)
        return
    raise ConfigError([Problem("name", plan.run.name, f"{plan.run_dir} has {jobs} in the queue, which would train with these "
                               "words in place of their own",
                               f"name={free_name(plan)}, or first: officina cancel {plan.run_dir}")])


def _supervisor(run_dir: Path) -> None:
    """A copy in the run directory: the job must not depend on what is installed later."""
    spec = find_spec("officina.launch.supervise")
    if spec is None or spec.origin is None:
        raise LaunchError("officina.launch.supervise is missing from this installation. "
                          "Try: pip install --force-reinstall officina")
    shutil.copyfile(spec.origin, run_dir / "supervise.py")


def _write_script(folder: Path, text: str) -> Path:
    """`job.sbatch`, or `job-2.sbatch` and so on: what was submitted stays readable."""
    path = next(p for i in range(1, 100_000) if not (p := folder / (SCRIPT if i == 1 else f"job-{i}.sbatch")).exists())
    path.write_text(text, encoding="utf-8")
    return path


def clean_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """Without SBATCH_* and the SLURM_* of a job we may stand in, which would override what the script says."""
    return {name: value for name, value in environ.items()
            if not name.startswith(("SBATCH_", "SLURM_", "SRUN_")) or name == "SLURM_CONF"}


def _sbatch(path: Path) -> str:
    done = _ask("sbatch", "--parsable", os.fspath(path))
    if done.returncode:
        raise LaunchError(f"sbatch refused {path}: {done.stderr.strip()}\n"
                          "The profile may be older than the site's rules. Compare them: officina sites probe")
    return done.stdout.strip().split(";")[0]


def _ask(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, env=clean_environ(os.environ), capture_output=True, text=True, check=False)


def _cluster() -> str:
    found = re.search(r"^ClusterName\s*=\s*(\S+)", _ask("scontrol", "show", "config").stdout, re.MULTILINE)
    return found[1] if found else ""
