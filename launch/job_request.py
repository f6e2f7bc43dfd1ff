"""What a job asks of its site: queue, nodes, GPUs, tasks, cores and memory, from the job's words and the site's profile."""

import os
from dataclasses import dataclass

from officina.configs.job import JobConfig, expand
from officina.configs.site_profile import Partition, Qos, Queue, SiteProfile
from officina.configs.sites import Site

PYXIS, IMAGE_FILE, NO_IMAGE = "pyxis", "image", ""


@dataclass(frozen=True, slots=True)
class Request:
    """One job as Slurm will see it; 0 or empty where neither words nor profile say. `officina.launch.job_rules` judges it."""

    site: Site
    job: JobConfig
    partition: str
    qos: str
    account: str
    nodes: int
    gpus: int
    """Of each node; 0 = a job without GPUs."""
    ranks_per_node: int
    tasks_per_node: int
    """What Slurm starts on each node: a rank, or one torchrun."""
    cpus_per_rank: int
    """As Slurm counts them; 0 = not known."""
    time_s: float
    """0 = not given."""
    what: str = "train"
    """The officina command."""
    wants_gpus: bool = True
    """A run that is not said to be for CPUs, or a command that computes."""
    runs: int = 1
    """Of a sweep: each is a task of one array."""

    @property
    def profile(self) -> SiteProfile:
        """What is known of the site."""
        return self.site.profile

    @property
    def world_size(self) -> int:
        """Ranks of the whole job."""
        return self.nodes * self.ranks_per_node

    @property
    def cpus_per_task(self) -> int:
        """CPUs of each task, 0 = not known."""
        return self.cpus_per_rank * self.ranks_per_node // max(self.tasks_per_node, 1)

    @property
    def cores_per_rank(self) -> int:
        """Cores of each rank: of sites that count hardware threads, a share of the threads; 0 = not known."""
        cores, threads = self.profile.node.cores or 0, self.profile.node.threads_per_core or 1
        counted = self.cpus_per_rank * (self.profile.gpu.per_node or 1) > cores > 0
        return max(self.cpus_per_rank // (threads if counted else 1), 1) if self.cpus_per_rank else 0

    @property
    def whole_nodes(self) -> bool:
        """Does the job take all GPUs, and with them all cores, of its nodes?"""
        return bool(self.gpus) and self.gpus == self.profile.gpu.per_node

    @property
    def image_kind(self) -> str:
        """`image` for a file that singularity or apptainer runs, `pyxis` for one that Slurm's plugin runs, empty for none."""
        name = self.job.container
        if not name:
            return NO_IMAGE
        return PYXIS if name.endswith((".sqsh", ".squashfs")) or "#" in name else IMAGE_FILE

    @property
    def image(self) -> str:
        """The image as the node finds it, with `~` and variables of who submits. pyxis takes `a/b.sqsh` for a registry's."""
        name = self.job.container
        if self.image_kind == PYXIS and "#" not in name:
            return str(expand(name))
        return os.path.expanduser(os.path.expandvars(name))

    @property
    def partition_limits(self) -> Partition:
        """Limits of the partition; none where it is not known, or implied by the qos."""
        return self.profile.partitions.get(self.partition) or Partition()

    @property
    def qos_limits(self) -> Qos:
        """Limits of the qos, which may stand under `{account}` where each project has one of its own."""
        return self.profile.qos.get(self.qos) or (self.qos == self.account and self.profile.qos.get("{account}")) or Qos()

    @property
    def online(self) -> bool | None:
        """Do its nodes reach the internet? None = not known."""
        own = self.partition_limits.internet
        return self.profile.internet.compute if own is None else own

    @property
    def memory(self) -> tuple[str, str] | None:
        """sbatch's option for memory and its value; None where the site forbids it or nothing is known.

        For all GPUs of a node all of its memory, which is billed anyway; else their share.
        """
        profile, rules = self.profile, self.profile.request
        if rules.memory_per_gpu_gb and self.gpus and "mem-per-gpu" not in rules.forbids:
            return "mem-per-gpu", f"{int(rules.memory_per_gpu_gb * 1e9) >> 20}M"  # Slurm's units are powers of two
        if profile.node.slurm_memory_mb and profile.gpu.per_node and self.gpus and "mem" not in rules.forbids:
            return "mem", f"{profile.node.slurm_memory_mb * self.gpus // profile.gpu.per_node}M"
        return None

    @property
    def gpu_option(self) -> tuple[str, str] | None:
        """sbatch's option for GPUs and its value, in the site's way."""
        style = self.profile.request.gpus
        if not self.gpus or style == "none":
            return None
        if style == "gpus_per_node":
            return "gpus-per-node", str(self.gpus)
        if style == "gpus":
            return "gpus", str(self.gpus * self.nodes)
        if style == "gpus_per_task":
            return "gpus-per-task", str(self.gpus // max(self.tasks_per_node, 1))
        return "gres", f"{self.profile.request.gres}:{self.gpus}"

    @property
    def exclusive(self) -> bool:
        """Must it ask for nodes of its own?"""
        when = self.profile.request.exclusive
        return when == "always" or (when == "several_nodes" and self.nodes > 1)


def make_request(site: Site, job: JobConfig, *, what: str = "train", account: str = "", cpu_ranks: int = 0) -> Request:
    """The request that the words come to. account: if the job names none. cpu_ranks: ranks a node of what is said to be
    device=cpu, which takes no GPU unless `gpus` is given; 0 = a rank for each GPU."""
    profile = site.profile
    on_cpus = bool(cpu_ranks) or (what not in RANKED and profile.request.gpus == "none")
    needs_gpus = what in GPU_COMMANDS and not (on_cpus and job.gpus is None)
    kind = job.queue or ("train" if needs_gpus else "data")
    queue = _queue(profile, kind, job)
    account = job.account or account
    qos = job.qos or queue.qos.replace("{account}", account)
    partition = job.partition or queue.partition or (profile.qos[qos].partition if qos in profile.qos else "")
    gpus = (job.gpus or profile.gpu.per_node or 0) if needs_gpus else 0
    ranks = gpus or cpu_ranks or 1
    one_per_node = job.launcher == "torchrun" or what not in RANKED
    share = 0
    if gpus and profile.gpu.per_node and profile.node.cores:
        share = profile.node.cores // profile.gpu.per_node
    cpus = job.cpus or (gpus and profile.request.cpus_per_gpu) or share
    return Request(
        site=site, job=job, partition=partition, qos=qos, account=account, nodes=job.nodes, gpus=gpus,
        ranks_per_node=ranks, tasks_per_node=1 if one_per_node else ranks, cpus_per_rank=cpus, time_s=job.time or 0.0,
        what=what, wants_gpus=needs_gpus)


RANKED = ("train", "resume")
"""Commands that are a rank under srun."""
GPU_COMMANDS = ("train", "resume", "bench", "generate", "eval")
"""Commands that go where GPUs are, if there are any; the others belong to the queue for data."""


def _queue(profile: SiteProfile, kind: str, job: JobConfig) -> Queue:
    """The site's queue of this kind. A partition or qos that is named stands alone: the queue's other half may not fit it."""
    queue = getattr(profile.queues, kind)
    if job.partition and job.partition != queue.partition:
        return Queue()
    if job.qos and job.qos != queue.qos and (named := profile.qos.get(job.qos)):
        return Queue(partition=named.partition or queue.partition)
    return queue
