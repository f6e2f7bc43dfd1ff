"""The console script `officina`: words in, exit status out. Imports nothing heavy until a command needs it."""

import argparse
import difflib
import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from officina.trainer.errors import EXIT_USER, OfficinaError

_INTERRUPTED = 130
"""128 + SIGINT, as a shell reports it."""
_UNREAD = 141
"""128 + SIGPIPE, likewise."""
_TRAIN_EXAMPLES = """\
examples:
  officina train experiment=demo
  officina train experiment=demo name=warm optim.lr=1e-3 steps=1e3 engine=zero2
  officina train model=eurollm_1b7 engine=fsdp2 batch.seq_len=4096 data.sources.wiki.path=data/wiki
  officina train experiment=./my_run.yaml time_limit=8h
  officina train from=runs/demo@600 name=decay steps=1000 lr_schedule=wsd lr_schedule.decay_steps=100   a branch
"""
_SUBMIT_EXAMPLES = """\
examples:
  officina submit experiment=./my_run.yaml site=leonardo nodes=16 account=IscrX_mine time=8h --dry-run
  officina submit experiment=./my_run.yaml site=lumi nodes=4 account=project_465000000 time=2d jobs=3
  officina submit experiment=./my_run.yaml site=jupiter nodes=8 account=mine time=12h container=/e/project1/mine/pytorch.sif
  officina submit resume runs/mine site=mn5 nodes=8 account=ehpc00 time=1d budget=20000
  officina submit experiment=./my_run.yaml optim.lr=1e-3,3e-4 site=lumi account=project_465000000 time=4h at_once=2   a sweep
  officina submit site=lumi account=project_465000000 time=2h data build corpus texts

words of the job:
  site= nodes= gpus= account= partition= qos= queue=train|debug|data time= launcher=srun|torchrun|mpirun
  container=IMAGE venv=DIR setup=[LINES] prologue=[LINES] cpus= cpu_bind=
  stop_before=5m attempts=3 jobs=N budget=COST requeue=true at_once=N tflops=N
  slurm.extra=[--OPTION=VALUE,...] env.extra.NAME=VALUE
What is the same for all your jobs may stand in ~/.config/officina/mine.yaml below `submit:`.
"""
_COMMANDS = {
    "train": "start a run (or a branch of one) on this machine; inside srun, torchrun or mpirun, be one rank",
    "resume": "go on with a run from its newest checkpoint, also with other ranks, engine, rate, length or mixture",
    "submit": "put a run, or any other command, on a cluster: checked against its rules, rendered to sbatch, sent",
    "plan": "what a run will take: ranks, mesh, memory by part, hours, cost; on a site or on a number of ranks",
    "jobs": "the jobs of runs on a cluster: state, step, loss, speed, time left, and why one waits",
    "logs": "what a run's newest job printed, or one rank's log",
    "cancel": "end all jobs of a run, those that wait first; the one that runs saves",
    "check": "every problem of a configuration at once, else what the run would be",
    "generate": "text from a run's checkpoint",
    "convert": "models in Hugging Face's form, in and out",
    "eval": "held-out loss or benchmarks of a run's checkpoint",
    "data": "build, check, describe, stage and audit data sets",
    "report": "report.html and report.json of a run",
    "sites": "the supercomputers officina knows: shape, limits and rules of each, and where every value comes from",
    "demo": "the whole way of a run in four minutes on two cores",
    "bench": "the benchmark suite",
}

_MODULES = {"submit": "submit:submit", "plan": "plan_command:plan", "jobs": "job_commands:jobs", "logs": "job_commands:logs",
            "cancel": "job_commands:cancel", "eval": "eval_commands:evaluate", "sites": "site_commands:sites"}
"""Command -> where it is, if not in commands.py."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. 0 done; 2 the user can mend it (message on stderr); 75 to be continued; 76 no progress; 1 our bug."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if None in (sys.stdin, sys.stdout, sys.stderr):
        import_module("officina.trainer.rank_log").fill_standard_streams()
    try:
        if argv == ["--version"]:
            print(f"officina {import_module('importlib.metadata').version('officina')}")
            return 0
        if argv[:1] == ["generate"]:  # what computes where it is called brings torch in
            return import_module("officina.trainer.generate").main(argv[1:])
        if argv[:1] == ["convert"]:
            return import_module("officina.trainer.convert").main(argv[1:])
        args = read_arguments(argv)
        module, function = args.command.split(":")
        status: int = getattr(import_module(module), function)(args)
        sys.stdout.flush()
        return status
    except OfficinaError as error:
        print(f"officina {argv[0]}: {error}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:  # whoever read what we print has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        return _UNREAD
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"officina {argv[0]}: {str(error.filename)[:60]}...: is too long for a path. Try a shorter one", file=sys.stderr)
        return EXIT_USER
    except KeyboardInterrupt:
        print(f"officina {argv[0]}: interrupted", file=sys.stderr)
        return _INTERRUPTED


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """What the words come to; leaves with usage and status 2 where they are none of a command."""
    parser = _parser(argv)
    if argv and not argv[0].startswith("-") and argv[0] not in _COMMANDS:
        near = difflib.get_close_matches(argv[0], _COMMANDS, 1)
        parser.error(f"there is no command {argv[0]}. Try: officina {near[0] if near else '--help'}")
    args, rest = parser.parse_known_args(argv)
    if rest:
        if not hasattr(args, "words") or any(word.startswith("-") for word in rest):
            parser.error(f"{argv[0]} does not know {' '.join(rest)}; see officina {argv[0]} --help")
        args.words = [*args.words, *rest]  # words that stood after an option
    return args


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="officina",
        description="Train language models on one machine or a supercomputer: the run you asked for, provably.",
        epilog="Each command shows examples: officina train --help\nThe whole way in four minutes: officina demo",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="print officina's version")
    commands = parser.add_subparsers(dest="name", metavar="COMMAND", required=True)
    for name, help_text in _COMMANDS.items():
        command = commands.add_parser(name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".",
                                      formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        command.set_defaults(command=f"officina.launch.{_MODULES.get(name, f'commands:{name}')}")
        if name in _ARGUMENTS:  # generate and convert read their own
            _ARGUMENTS[name](command)
        if argv[:1] == [name] == ["data"]:  # its options come from the module that does the work
            import_module("officina.launch.data_commands").add_parsers(
                command.add_subparsers(dest="data_command", metavar="COMMAND", required=True))
    return parser


def _train(command: argparse.ArgumentParser) -> None:
    _words(command)
    _runs_dir(command)
    _force(command)
    command.epilog = _TRAIN_EXAMPLES


def _check(command: argparse.ArgumentParser) -> None:
    _words(command)
    _runs_dir(command)
    _force(command)
    command.add_argument("--ranks", type=int, default=None, metavar="N", help="judge for N ranks, wherever they will be")
    command.add_argument("--explain", action="store_true", help="also every condition of use of the data, and what keeps it")
    command.add_argument("--yaml", action="store_true", help="print the whole configuration instead of a summary")
    command.epilog = """\
examples:
  officina check experiment=demo
  officina check experiment=demo engine=hsdp engine.shard_size=4 --ranks 16
  officina check experiment=demo --yaml
  officina check experiment=demo use=research use.country=FI --explain
  officina check from=runs/demo steps=1000 lr_schedule=wsd lr_schedule.decay_steps=100
"""


def _resume(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", metavar="RUN", help="run directory, such as runs/demo")
    _words(command)
    _force(command)
    command.epilog = """\
examples:
  officina resume runs/demo
  officina resume runs/demo steps=2000 ranks=4 engine=zero2
  officina resume runs/demo steps=2000 lr_schedule=wsd lr_schedule.decay_steps=500
  officina resume runs/demo data.sources.code.path=data/code data.sources.code.weight=0.3
  officina resume runs/demo precision=fp32 --force
"""


def _submit(command: argparse.ArgumentParser) -> None:
    command.add_argument("words", nargs=argparse.REMAINDER, metavar="WORD",
                         help="words of the run and of the job, or another command with its own words and options")
    command.add_argument("--dry-run", action="store_true", help="print script (stdout) and plan (stderr), write nothing")
    _runs_dir(command)
    _force(command)
    command.epilog = _SUBMIT_EXAMPLES


def _jobs(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", nargs="*", metavar="RUN", help="run directories (default: all in --runs-dir)")
    command.add_argument("--all", action="store_true", help="also jobs that have ended")
    _runs_dir(command)
    command.epilog = """\
examples:
  officina jobs
  officina jobs runs/mine --all
"""


def _logs(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", metavar="RUN", help="run directory")
    command.add_argument("-f", "--follow", action="store_true", help="go on until no job of the run waits or runs")
    command.add_argument("--rank", type=int, default=None, metavar="N", help="the log of rank N instead of the job's output")
    command.epilog = """\
examples:
  officina logs runs/mine
  officina logs -f runs/mine
  officina logs runs/mine --rank 3
"""


def _cancel(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    command.epilog = """\
examples:
  officina cancel runs/mine
"""


def _plan(command: argparse.ArgumentParser) -> None:
    command.add_argument("words", nargs="*", metavar="WORD", help="words of the run, and of the job where a site is named")
    command.add_argument("--ranks", type=int, default=None, metavar="N",
                         help="without a site: for N ranks (default: the run's own, else 1)")
    _runs_dir(command)
    command.epilog = """\
examples:
  officina plan model=llama3_8b engine=fsdp2 batch.seq_len=4096 batch.global_tokens=1048576 --ranks 64
  officina plan experiment=./my_run.yaml site=leonardo nodes=16 account=IscrX_mine time=8h tflops=120
"""


def _eval(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", metavar="RUN", help="run directory, such as runs/demo, or RUN@STEP")
    command.add_argument("words", nargs="*", metavar="WORD",
                         help="step=N (default: the newest), tasks=NAME,NAME, or a key=value of the configuration")
    command.add_argument("--tasks-dir", default="", metavar="DIR", help="folder with task files of your own")
    command.add_argument("--shots", type=int, default=None, metavar="N", help="examples in the prompt (default: the task's)")
    command.add_argument("--limit", type=int, default=None, metavar="N", help="documents of each task (default: all)")
    command.epilog = """\
examples:
  officina eval runs/demo                                  loss, bits per byte and perplexity by source and language
  officina eval runs/demo step=600 eval.max_rows=1000 engine=ddp ranks=2
  officina eval runs/demo data.sources.laws.path=data/laws   also on data it was not trained on
  officina eval runs/demo tasks=belebele_fin_Latn --shots 5  lm-evaluation-harness, offline
  officina eval runs/demo tasks=mine --tasks-dir my_tasks    a task of your own on local files
"""


def _data(command: argparse.ArgumentParser) -> None:
    command.epilog = """\
examples:
  officina data build demo/data --vocab-size 2048
  officina data build chats sft.jsonl --samples --tokenizer MODEL
  officina data inspect demo/data
  officina data stage demo/data /scratch/data
  officina data audit runs/demo
  officina data build --help
"""


def _report(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", metavar="RUN", help="run directory")
    command.epilog = """\
examples:
  officina report runs/demo
"""


def _sites(command: argparse.ArgumentParser) -> None:
    command.add_argument("words", nargs="*", metavar="WORD", help="NAME (id, alias or file), probe [NAME], or new NAME")
    command.epilog = """\
examples:
  officina sites                            # all of them, in a table
  officina sites lumi                       # every value of one, with grade, source and date
  officina sites probe                      # on a login node: where Slurm says something else than the profile
  officina sites probe leonardo >my.yaml    # keep the difference, then use it: site=./my.yaml
  officina sites new mycluster              # on a login node: a profile for a cluster of your own
"""


def _demo(command: argparse.ArgumentParser) -> None:
    command.add_argument("--finetune", action="store_true",
                         help="adapt the demo's model to a task with LoRA, export it, load it in transformers")
    command.epilog = """\
examples:
  officina demo
  officina demo --finetune
"""


def _bench(command: argparse.ArgumentParser) -> None:
    command.add_argument("words", nargs="*", metavar="NAME", help="benchmarks to run; none lists them, `all` runs all")
    command.add_argument("--out", metavar="DIR", help="folder for the records (default: benchmarks/results in a clone, else "
                         "bench-results)")
    command.add_argument("--quick", action="store_true", help="only see that they run; needs --out")
    command.epilog = """\
examples:
  officina bench
  officina bench all
  officina bench step --quick --out quick-results
"""


def _words(command: argparse.ArgumentParser) -> None:
    command.add_argument("words", nargs="*", metavar="WORD", help="group=option, key=value, +key=value or ~key")


def _runs_dir(command: argparse.ArgumentParser) -> None:
    command.add_argument("--runs-dir", default="runs", metavar="DIR",
                         help="folder of run directories; the run goes to DIR/name (default: runs)")


def _force(command: argparse.ArgumentParser) -> None:
    command.add_argument("--force", action="store_true",
                         help="allow changes that ask for it: see What may change in docs/life_of_a_run.md")


_ARGUMENTS = {"train": _train, "resume": _resume, "submit": _submit, "plan": _plan, "jobs": _jobs, "logs": _logs,
              "cancel": _cancel, "check": _check, "eval": _eval, "data": _data,
              "report": _report, "sites": _sites, "demo": _demo, "bench": _bench}

if __name__ == "__main__":
    sys.exit(main())
