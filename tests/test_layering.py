"""The architecture, as tests: imports point one way, login nodes need no torch, importing changes nothing."""

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {"kernels": set(), "trainer": {"kernels"}, "configs": {"trainer"}, "launch": {"configs", "trainer"},
              "benchmarks": {"kernels", "trainer", "configs", "launch"}}
"""Layer -> the layers below it that it may import."""

LEVELS = (
    {"errors", "quantities", "slurm_env", "signals"},
    {"config", "keys", "schema", "run_dir", "environment", "state", "batch", "rank_env", "rank_log", "metrics",
     "memory",
     "schedule", "spikes", "stall", "time_left", "progress", "profile", "loggers", "objective", "muon", "optim"},
    {"ranks"},
    {"model", "data", "parallel", "hf"},
    {"checkpoint"},
    {"step", "validate", "resume", "init_from", "initial", "evaluation", "evaluate", "preference"},
    {"assemble"},
    {"loop", "generate", "card", "harness", "import_adapter"},
    {"convert", "eval_rank"},
    {"__main__"},
)
"""Modules and packages of trainer from the ground up; those of one level may import each other, but see SIBLINGS."""
SIBLINGS = {"model", "data", "parallel"}
"""These know nothing of each other: the model is single-device code, engines take any module, data knows neither."""

HEAVY = {"torch", "triton", "deepspeed", "transformers"}
"""What a login node does not have."""
BRINGS_TORCH = {
    ("launch/cli.py", "officina.trainer.generate"): "computes where it is called",
    ("launch/cli.py", "officina.trainer.convert"): "reads and writes weights where it is called",
}
"""Modules with torch that launch may load when a command needs them, and why."""
ONLY_IN = {"hydra": {"configs/compose.py"}, "omegaconf": {"configs/compose.py"},
           "deepspeed": {"trainer/parallel/zero.py"},
           "mpi4py": {"trainer/ranks.py"}, "wandb": {"trainer/loggers.py"}, "mlflow": {"trainer/loggers.py"}}
"""Packages that only these files know."""


def sources():
    return [path for layer in MAY_IMPORT for path in sorted((ROOT / layer).rglob("*.py"))]


def relative(path):
    return path.relative_to(ROOT).as_posix()


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("officina", *(parts[:-1] if parts[-1] == "__init__" else parts)))


MODULES = {module_name(path): path for path in sources()}


@cache
def imports(path):
    """[(dotted module, at import time?)]: import statements and `import_module("literal")`, the deepest module of ours."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []

    def visit(node, at_import):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            at_import = False
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno} imports relatively"
            found.extend((sub if (sub := f"{node.module}.{alias.name}") in MODULES else node.module, at_import)
                         for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module":
            if node.args and isinstance(node.args[0], ast.Constant):
                found.append((node.args[0].value, at_import))
        for child in ast.iter_child_nodes(node):
            visit(child, at_import)

    visit(tree, True)
    return found


def ours(path, *, at_import=None):
    return {name for name, early in imports(path) if name.split(".")[0] == "officina" and at_import in (None, early)}


def loaded_by(name, seen=None):
    """Top-level packages outside of ours that importing `name` brings in."""
    seen = set() if seen is None else seen
    if name in seen or name not in MODULES:
        return set()
    seen.add(name)
    outside = set()
    for target, early in imports(MODULES[name]):
        if early and target.split(".")[0] == "officina":
            outside |= loaded_by(target, seen)
        elif early:
            outside.add(target.split(".")[0])
    return outside


def test_layers_point_one_way():
    wrong = [f"{relative(path)} imports {target}" for path in sources() for target in ours(path)
             for layer, below in [(path.relative_to(ROOT).parts[0], target.split(".")[1:2])]
             if below and below[0] != layer and below[0] not in MAY_IMPORT[layer]
             and (relative(path), target) != ("launch/commands.py", "officina.benchmarks.suite")]
    assert not wrong, "\n".join(wrong)


def level_of(name):
    return next((i for i, level in enumerate(LEVELS) if name in level), None)


def test_every_part_of_trainer_has_its_level():
    parts = {path.relative_to(ROOT / "trainer").parts[0].removesuffix(".py")
             for path in (ROOT / "trainer").rglob("*.py")}
    assert parts - {"__init__"} == set().union(*LEVELS)


def test_trainer_is_built_from_the_ground_up():
    wrong = []
    for path in sorted((ROOT / "trainer").rglob("*.py")):
        here = path.relative_to(ROOT / "trainer").parts[0].removesuffix(".py")
        for target in ours(path):
            parts = target.split(".")
            there = parts[2] if parts[1] == "trainer" and len(parts) > 2 else None
            if here == "__init__" or there is None or there == here:
                continue
            if level_of(there) > level_of(here) or {here, there} <= SIBLINGS:
                wrong.append(f"{relative(path)} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_by_a_detour():
    graph = {name: {t for t in ours(path) if t in MODULES and t != name} for name, path in MODULES.items()}
    done, cycles = set(), []

    def visit(name, trail):
        if name in trail:
            cycles.append(" -> ".join([*trail[trail.index(name):], name]))
        elif name not in done:
            for target in sorted(graph[name]):
                visit(target, [*trail, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    assert not cycles, "\n".join(cycles)


def test_every_import_of_ours_exists():
    wrong = [f"{relative(path)}: {target}" for path in sources() for target in ours(path)
             if target not in MODULES and target not in ("officina", "officina.benchmarks.suite")]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_package_is_known_to_its_own_files_only(package):
    users = {relative(path) for path in sources() if any(name.split(".")[0] == package for name, _ in imports(path))}
    wrong = {user for user in users if user not in ONLY_IN[package] and user.split("/")[0] not in ONLY_IN[package]}
    assert not wrong, wrong
    assert not {place for place in ONLY_IN[package] if not any(user.startswith(place) for user in users)}, "no longer"


# ---- a login node ----------------------------------------------------------------------------------------------------
def test_launch_needs_no_torch_to_be_imported():
    heavy = {name: found for name in MODULES if name.startswith(("officina.launch", "officina.configs"))
             if (found := loaded_by(name) & HEAVY)}
    assert not heavy, heavy


def test_what_launch_loads_later_brings_torch_only_where_allowed():
    bringing = {(relative(path), target) for path in sorted((ROOT / "launch").rglob("*.py")) for target in ours(path)
                if loaded_by(target) & HEAVY}
    assert bringing == set(BRINGS_TORCH)


def test_launch_works_where_torch_is_not_installed():
    """Not only by reading: everything of launch and configs is imported, and a run is checked, without torch."""
    names = [name for name in MODULES if name.startswith(("officina.launch", "officina.configs"))]
    program = ("import sys\nfrom importlib import import_module\n"
               f"for heavy in {sorted(HEAVY)!r}: sys.modules[heavy] = None\n"
               f"for name in {names!r}: import_module(name)\n"
               "from officina.launch.cli import main\n"
               "sys.exit(main(['check', 'experiment=demo', 'steps=0']) - 2)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0 and "steps=0" in done.stderr, done.stderr


def test_the_command_line_loads_no_torch():
    heavy = {"torch", "hydra", "numpy", "pydantic"}
    program = f"import sys, officina.launch.cli; print(sorted({heavy!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_rank_that_compiles_nothing_loads_no_compiler_and_on_a_cpu_no_attention_kernels():
    """A second of processor time, and many hundred files that all ranks would read at once from a parallel file system."""
    program = """
import sys
from officina.trainer.rank_env import LONE
from officina.trainer.ranks import start_ranks
from tests.trainer.parallel.cases import Case, train
train(start_ranks(LONE, device="cpu", threads=1), Case("single", steps=1))
print([name in sys.modules for name in ("torch", "torch._dynamo", "officina.kernels.flash_attention_launch")])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONSAFEPATH": "", "PYTHONPATH": str(ROOT)})
    assert done.stdout.strip() == "[True, False, False]", done.stderr


# ---- importing changes nothing -------------------------------------------------------------------------------
SNAPSHOT = '''
import importlib, logging, os, random, signal, sys, threading, warnings
absent = set()
for name in {outside!r}:
    try:
        importlib.import_module(name)
    except ImportError:
        absent.add(name)
import numpy, torch

def snapshot():
    loggers = {{n: (l.level, l.propagate, len(l.handlers)) for n, l in logging.root.manager.loggerDict.items()
               if isinstance(l, logging.Logger) and not (n.startswith("officina") and not l.handlers and l.level == 0)}}
    return {{
        "environment": dict(os.environ), "loggers": loggers,
        "root logger": (logging.root.level, len(logging.root.handlers), logging.root.manager.disable),
        "threads": [t.name for t in threading.enumerate()], "files": sorted(os.listdir(".")),
        "signals": [signal.getsignal(s) for s in sorted(signal.valid_signals())],
        "hooks": (sys.excepthook, sys.displayhook),
        "process group": torch.distributed.is_initialized(), "torch threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(), "grad": torch.is_grad_enabled(), "random": random.getstate(),
        "numpy random": numpy.random.get_state()[1].tolist(), "torch random": torch.get_rng_state().tolist(),
        "matmul": torch.get_float32_matmul_precision(), "cudnn": torch.backends.cudnn.benchmark,
        "deterministic": torch.are_deterministic_algorithms_enabled(), "cuda": torch.cuda.is_initialized(),
        "warnings": list(warnings.filters), "path": list(sys.path), "directory": os.getcwd(),
    }}

before = snapshot()
for name in {names!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # of a part that needs an optional package, which is not installed here
        if error.name not in absent:
            raise
    after = snapshot()
    changed = [what for what in before if before[what] != after[what]]
    if changed:
        sys.exit(f"importing {{name}} changes: {{', '.join(changed)}}")
'''


def test_importing_a_module_changes_nothing(tmp_path):
    outside = sorted({name for path in sources() for name, early in imports(path)
                      if early and name.split(".")[0] != "officina"} - {"officina"})
    names = [name for name in MODULES if not name.endswith("__main__")]
    program = SNAPSHOT.format(outside=outside, names=names)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
