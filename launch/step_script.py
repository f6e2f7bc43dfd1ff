"""The step that starts the ranks: the words of one attempt, and what each of its tasks does before it becomes a rank."""

import re
import shlex
from collections.abc import Iterator, Sequence

from officina.launch.job_request import IMAGE_FILE, PYXIS, Request

_SHELL_SAFE = re.compile(r"[A-Za-z0-9_./:@%+,=-]+")
_CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TORCH_EXTENSIONS_DIR": "extensions",
           "XDG_CACHE_HOME": "xdg"}
"""Variables of caches that every site needs on the node -> folder."""


def quote(text: object) -> str:
    """Text as one word of a shell, bare where that is safe."""
    return str(text) if _SHELL_SAFE.fullmatch(str(text)) else shlex.quote(str(text))


def caches(request: Request) -> Iterator[str]:
    """Shell lines that make the node's caches and name them."""
    scratch = "/tmp" if request.image_kind else request.profile.node.scratch or "${TMPDIR:-/tmp}"  # images see /tmp, no $TMPDIR
    if scratch.startswith("$") and scratch[1:].isidentifier():
        scratch = f"${{{scratch[1:]}:-/tmp}}"
    folders = dict(_CACHES) if request.gpus or request.what in ("train", "resume") else {"XDG_CACHE_HOME": "xdg"}
    if request.gpus:
        folders |= {name: name.lower().replace("_", "-") for name in request.profile.env.node_local}
    folders = {name: folder for name, folder in folders.items() if name not in request.job.env.extra}
    yield f'cache={scratch}/officina-$SLURM_JOB_ID'
    yield "mkdir -p " + " ".join(f'"$cache/{folder}"' for folder in folders.values())
    yield from (f'export {name}="$cache/{folder}"' for name, folder in folders.items())


def step_lines(request: Request) -> Iterator[str]:
    """What `bash -c` does in each task; its arguments are the program to become."""
    profile = request.profile
    yield from caches(request)
    if profile.gpu.vendor == "amd" and request.gpus:
        yield 'export AITER_JIT_DIR="$cache/aiter-${SLURM_LOCALID:-$OMPI_COMM_WORLD_LOCAL_RANK}"'
    if request.job.launcher == "torchrun":
        yield "trap \"\" USR1  # torchrun would die of the signal that its ranks wait for; they set it anew"
        yield (f'exec "$@" --nnodes={request.nodes} --nproc-per-node={request.ranks_per_node} --node-rank="$SLURM_NODEID" \\')
        yield '    --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" -m officina.trainer "$RUN"'
    else:
        yield 'exec "$@"'


def step_words(request: Request, *, python: str, binds: Sequence[str]) -> list[list[str]]:
    """The words of one attempt, ready for the shell, in lines that belong together."""
    lines = _mpirun(request) if request.job.launcher == "mpirun" else [_srun(request)]
    if request.image_kind == PYXIS:
        mounts = ",".join(f"{path}:{path}" for path in [*request.profile.container.binds, *binds])
        lines.append([f"--container-image={quote(request.image)}", f"--container-mounts={quote(mounts)}"])
    elif request.image_kind == IMAGE_FILE:
        lines.append(image_words(request, binds))
    program = ["-m", "torch.distributed.run"] if request.job.launcher == "torchrun" else ["-m", "officina.trainer", '"$RUN"']
    lines.append(["bash", "-c", '"$step"', "step", python, *program])
    return lines


def image_words(request: Request, binds: Sequence[str]) -> list[str]:
    """`singularity exec ...` up to the image. Where the site has a module that binds what is needed, only our own are added."""
    container = request.profile.container
    flag = container.gpu_flag or ("--nv" if request.profile.gpu.vendor == "nvidia" else "")  # brings the host's driver in
    wanted = [*([] if container.setup else container.binds), *binds]
    return [container.runtime or "apptainer", "exec", *([flag] if flag and request.gpus else []),
            *([f"--bind={quote(','.join(wanted))}"] if wanted else []), quote(request.image)]


# ---- srun ----------------------------------------------------------------------------------------------------------------
def _srun(request: Request) -> list[str]:
    """`srun` of one step. A dead rank ends it, and it waits a minute, not for ever, for the others."""
    given = {"--mpi": "none", "--wait": "60", "--kill-on-bad-exit": "1"}
    for text in request.profile.binding.srun:
        name, _, value = text.partition("=")
        given[name] = value
    if request.profile.request.gpus == "gpus_per_task" and request.tasks_per_node > 1:
        given["--gpu-bind"] = "none"  # each rank would see its own GPU only, and could not reach its neighbours' memory
    if bind := cpu_bind(request):
        given["--cpu-bind"] = bind
    return ["srun", *(f"{name}={quote(value)}" if value else name for name, value in given.items())]


def cpu_bind(request: Request) -> str:
    """srun's --cpu-bind: as said, else the site's masks where they are valid, else its rule."""
    binding = request.profile.binding
    if request.job.cpu_bind:
        return request.job.cpu_bind
    if request.job.launcher == "torchrun" or not request.gpus:
        return "none" if request.job.launcher == "torchrun" else ""
    if request.whole_nodes and request.tasks_per_node == request.gpus:
        if binding.cpu_masks:
            return "mask_cpu:" + ",".join(binding.cpu_masks)
        if binding.rank_cores:
            return "mask_cpu:" + ",".join(_mask(cores) for cores in binding.rank_cores)
    return binding.cpu_bind or ("cores" if binding.cpu_masks or binding.rank_cores else "")


def _mask(cores: str) -> str:
    """`72-143` as Slurm's hexadecimal mask."""
    bits = 0
    for part in cores.split(","):
        first, _, last = part.partition("-")
        for core in range(int(first), int(last or first) + 1):
            bits |= 1 << core
    return hex(bits)


# ---- mpirun --------------------------------------------------------------------------------------------------------------
_PASSED = ("PATH", "LD_LIBRARY_PATH", "TERM", "RUN", "MASTER_ADDR", "MASTER_PORT", "OFFICINA_ATTEMPT", "OFFICINA_END_TIME",
           "OMP_NUM_THREADS", "PYTHONUNBUFFERED", "PYTHONSAFEPATH", "PYTHONNOUSERSITE", "SLURM_JOB_ID")


def _mpirun(request: Request) -> list[list[str]]:
    """Open MPI's mpirun: other nodes get only the variables that are named."""
    profile = request.profile
    offline = () if request.online is True else (
        "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "WANDB_MODE")
    site = profile.env.set if request.gpus else {}
    names = dict.fromkeys([*_PASSED, *offline, *site, *request.job.env.extra])
    cores = f":PE={request.cores_per_rank}" if request.cores_per_rank else ""
    passed = [f"-x {name}" for name in names]
    return [["mpirun", "-np", str(request.world_size), f"--map-by ppr:{request.ranks_per_node}:node{cores}"],
            *(passed[i:i + 5] for i in range(0, len(passed), 5))]
