"""What is known of a site, typed and closed: the dataclasses that a profile in `configs/site/` fills.

None, an empty list or an empty dict = not known or nothing there. Where a value comes from stands beside it, in
`officina.configs.sites.Site.facts`. Times in seconds, sizes in GB (10^9 bytes), bandwidths one way.
"""

import re
from dataclasses import field
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from officina.trainer.config import Positive, config
from officina.trainer.quantities import Count, Duration


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}") from None
    return text


def _cores(text: str) -> str:
    ranges = re.findall(r"(\d+)(?:-(\d+))?", text)
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text) or any(last and int(last) < int(first) for first, last in ranges):
        raise ValueError("is no range of cores, such as 72-143")
    return text


Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]

@config
class Gpu:
    """One schedulable device: what Slurm counts, what a rank gets."""

    vendor: Literal["nvidia", "amd"] | None = None
    model: str = ""
    per_node: Count | None = None
    memory_gb: Amount | None = None
    devices_per_card: Positive = 1
    """2 on MI250X, whose two dies are two devices."""
    peak_bf16_tflops: Amount | None = None
    """Dense."""
    memory_tb_s: Amount | None = None


@config
class Node:
    """A GPU node."""

    count: Positive | None = None
    arch: Literal["x86_64", "aarch64"] | None = None
    cpu: str = ""
    cores: Positive | None = None
    """Physical cores that jobs may use."""
    threads_per_core: Positive | None = None
    numa_domains: Positive | None = None
    memory_gb: Amount | None = None
    slurm_memory_mb: Positive | None = None
    """RealMemory, as Slurm counts it."""
    local_disk_gb: Amount | None = None
    """0 = none."""
    scratch: str = ""
    """Folder for caches that live as long as the job."""
    scratch_in_memory: bool | None = None
    """What is written there counts as the job's memory."""
    scratch_gb: Amount | None = None


@config
class Network:
    """Between nodes."""

    kind: str = ""
    nics: Positive | None = None
    nic_gbit_s: Amount | None = None
    node_gb_s: Amount | None = None
    """All NICs of a node together."""


@config
class Partition:
    """Limits of one partition, per job where nothing else is said."""

    nodes: Positive | None = None
    gpus: bool | None = None
    """Its nodes have GPUs."""
    min_nodes: Positive | None = None
    max_nodes: Positive | None = None
    max_gpus: Positive | None = None
    max_time: Duration | None = None
    default_time: Duration | None = None
    max_jobs: Positive | None = None
    """Submitted at once, of one user or project."""
    max_running: Positive | None = None
    whole_nodes: bool | None = None
    internet: bool | None = None
    """Its nodes reach the internet."""
    on_request: bool | None = None


@config
class Qos:
    """Limits of one quality of service; they stand beside those of the partition."""

    partition: str = ""
    """The one it belongs to."""
    gpus: bool | None = None
    """Its nodes have GPUs."""
    min_nodes: Positive | None = None
    max_nodes: Positive | None = None
    max_gpus: Count | None = None
    max_time: Duration | None = None
    max_jobs: Positive | None = None
    max_running: Positive | None = None


@config
class Queue:
    """Where a kind of job goes. `{account}` stands for the account that is charged."""

    partition: str = ""
    qos: str = ""


@config
class Queues:
    """Partition and qos by kind of job."""

    train: Queue = field(default_factory=Queue)
    debug: Queue = field(default_factory=Queue)
    data: Queue = field(default_factory=Queue)
    """CPU or serial: data sets, conversions."""


@config
class Request:
    """How a job asks."""

    gpus: Literal["gres", "gpus_per_node", "gpus", "gpus_per_task", "none"] | None = None
    """`gres`: --gres=gpu:N a node; `gpus`: --gpus=N of the whole job."""
    gres: str = "gpu"
    """Name of the resource, with a type where one must be given: `gpu:gh200`."""
    requires: list[str] = field(default_factory=list)
    """sbatch options that must be given."""
    forbids: list[str] = field(default_factory=list)
    """sbatch options that must not be given."""
    account_pattern: Annotated[str, AfterValidator(_pattern)] = ""
    """Regular expression that a whole account name matches."""
    memory_per_gpu_gb: Amount | None = None
    cpus_per_gpu: Positive | None = None
    """CPUs as Slurm counts them at this site: cores, or hardware threads."""
    threads_per_core: Positive | None = None
    """To be asked for with --threads-per-core."""
    exclusive: Literal["never", "several_nodes", "always"] | None = None
    """When --exclusive is asked for."""


@config
class Binding:
    """The step: what srun is told, and which cores, NUMA domains and NICs belong to a local rank (in its order)."""

    srun: list[str] = field(default_factory=list)
    cpu_bind: str = ""
    """Of one task per GPU."""
    cpu_masks: list[str] = field(default_factory=list)
    whole_nodes_only: bool | None = None
    """The masks are valid only if the job has all cores of the node."""
    rank_cores: list[Annotated[str, AfterValidator(_cores)]] = field(default_factory=list)
    rank_numa: list[int] = field(default_factory=list)
    rank_gpu_numa: list[int] = field(default_factory=list)
    """NUMA domains of the GPUs' own memory."""
    rank_nics: list[str] = field(default_factory=list)
    gpus_visible: Literal["all", "own"] | None = None
    """Does a rank see all GPUs of the node and take that of its local rank, or only its own."""
    torchrun: list[str] = field(default_factory=list)
    """Options of torchrun, in place of masks."""


@config
class Rendezvous:
    """How ranks find rank 0."""

    address: str = ""
    """`{host}` = first host of the job, `{ipv4}` = its IPv4 address; text around is kept, as in `{host}i`."""
    outside_container: bool | None = None
    """Slurm's programs are missing in the containers."""
    one_node_loopback: bool | None = None
    """On one node the address is 127.0.0.1."""
    port_base: Positive | None = None
    """Port = port_base + job id modulo port_span."""
    port_span: Positive | None = None


@config
class Env:
    """Environment variables, by name."""

    set: dict[str, str] = field(default_factory=dict)
    offer: dict[str, str] = field(default_factory=dict)
    """Used by some, not set by default."""
    forbid: dict[str, str] = field(default_factory=dict)
    """Known to be bad, and why."""
    unset: list[str] = field(default_factory=list)
    node_local: list[str] = field(default_factory=list)
    """Caches whose folder must be on the node and made inside the step; those that every site needs are not listed."""


@config
class Area:
    """One file system area."""

    path: str = ""
    """`{account}` and `{user}` stand for names."""
    quota_gb: Amount | None = None
    """0 = none."""
    quota_files: Count | None = None
    """0 = none."""
    purge_days: Positive | None = None
    """Files older than this may be deleted."""
    targets: Positive | None = None
    """Lustre OSTs one can stripe over."""
    target_mb_s: Amount | None = None
    """Write bandwidth of one OST."""


@config
class Internet:
    """From the site to the world."""

    compute: bool | None = None
    """GPU nodes reach it."""
    transfer: list[str] = field(default_factory=list)
    """Nodes for moving data."""


@config
class Container:
    """The runtime and what it needs."""

    runtime: Literal["singularity", "apptainer"] | None = None
    gpu_flag: str = ""
    """Brings the GPUs in; empty = `--nv` where they are NVIDIA's."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before the first use."""
    binds: list[str] = field(default_factory=list)
    images: str = ""
    """Where the site keeps its own: a pattern of paths."""
    pyxis: bool | None = None
    fakeroot: bool | None = None
    known_bad: list[str] = field(default_factory=list)


@config
class Software:
    """Of the host."""

    os: str = ""
    driver: str = ""
    setup: list[str] = field(default_factory=list)
    """Shell lines for modules."""


@config
class Slurm:
    """The scheduler."""

    version: str = ""
    requeue: bool | None = None
    """Jobs are requeued unless they say otherwise."""
    kill_on_bad_exit: bool | None = None
    """A dead task ends its step unless srun says otherwise."""
    max_jobs: Positive | None = None
    """Of one user, over all partitions."""
    launchers: list[str] = field(default_factory=list)
    """Of srun, torchrun and mpirun those that work, where not all do."""


@config
class Billing:
    """What a node costs for an hour."""

    unit: str = ""
    per_node_hour: Amount | None = None
    rule: str = ""
    command: str = ""
    """Shows what is left."""


@config
class Speed:
    """What a published run reached."""

    tflops_per_gpu: Amount | None = None
    """Of the model's arithmetic, attention counted in full."""
    of: str = ""
    """Model, precision, length and nodes."""


@config
class SiteProfile:
    """A system, whole."""

    name: str
    operator: str = ""
    factory: str = ""
    """The AI Factory it belongs to."""
    aliases: list[str] = field(default_factory=list)
    docs: str = ""
    """The site's own user documentation."""
    scheduler: Literal["slurm", "none"] = "slurm"
    hosts: list[str] = field(default_factory=list)
    """Patterns of the names of its login and compute nodes: `uan*`."""
    node: Node = field(default_factory=Node)
    gpu: Gpu = field(default_factory=Gpu)
    network: Network = field(default_factory=Network)
    slurm: Slurm = field(default_factory=Slurm)
    partitions: dict[str, Partition] = field(default_factory=dict)
    qos: dict[str, Qos] = field(default_factory=dict)
    queues: Queues = field(default_factory=Queues)
    request: Request = field(default_factory=Request)
    binding: Binding = field(default_factory=Binding)
    rendezvous: Rendezvous = field(default_factory=Rendezvous)
    env: Env = field(default_factory=Env)
    storage: dict[str, Area] = field(default_factory=dict)
    internet: Internet = field(default_factory=Internet)
    container: Container = field(default_factory=Container)
    software: Software = field(default_factory=Software)
    billing: Billing = field(default_factory=Billing)
    speed: Speed = field(default_factory=Speed)
    energy: list[str] = field(default_factory=list)
    """What can be read: sacct, pm_counters, nvml, rocm_smi, grace_hwmon."""
    remarks: dict[str, str] = field(default_factory=dict)
    """What a user should know and no other field holds."""
