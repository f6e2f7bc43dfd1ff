"""Every value a run is made of: frozen dataclasses, closed (an unknown key is an error) and typed.

Only standard library and pydantic here, so that a login node without torch can read, check and plan a run.
Each field's docstring says its unit and meaning; `Problem`s across fields are found by `officina.trainer.validate`.
Values that depend on the machine (world size, micro-batches) are computed by functions, never stored.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from officina.trainer.quantities import Count, Duration

_CLOSED = ConfigDict(extra="forbid")
Positive = Annotated[Count, Field(ge=1)]
NonNegative = Annotated[Count, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def config(cls):
    """A frozen, keyword-only dataclass that pydantic reads strictly: unknown keys are refused."""
    cls.__pydantic_config__ = _CLOSED
    return dataclass(frozen=True, kw_only=True)(cls)


# ---- model ---------------------------------------------------------------------------------------------------------
@config
class RopeConfig:
    """Rotary position embedding of the layers that have one. Source: Su et al., arXiv:2104.09864."""

    theta: Annotated[float, Field(gt=0)] = 10_000.0
    """Base of the wavelengths."""
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    """How positions beyond `original_seq_len` are reached."""
    factor: Annotated[float, Field(gt=0)] = 1.0
    """Context extension factor of the scaling."""
    original_seq_len: NonNegative = 0
    """Tokens the unscaled model was trained for (llama3 and yarn)."""
    low_freq_factor: float = 1.0
    """llama3: below original_seq_len / this, wavelengths are scaled in full."""
    high_freq_factor: float = 4.0
    """llama3: above original_seq_len / this, wavelengths are kept."""
    beta_fast: float = 32.0
    """yarn: rotations above which a dimension is kept."""
    beta_slow: float = 1.0
    """yarn: rotations below which a dimension is interpolated."""
    attention_factor: float | None = None
    """yarn: factor on cos and sin; none = 0.1 ln(factor) + 1."""


@config
class DecoderConfig:
    """The decoder-only transformer. Every switch is one that an open model in use needs."""

    kind: Literal["decoder"] = "decoder"
    vocab_size: Positive = 4096
    """Rows of the embedding; at least the tokenizer's size."""
    n_layers: Annotated[Positive, Field(le=10_000)] = 4
    d_model: Positive = 256
    n_heads: Positive = 4
    n_kv_heads: NonNegative = 0
    """Key and value heads (GQA); 0 = n_heads."""
    head_dim: NonNegative = 0
    """0 = d_model / n_heads."""
    d_ff: Positive = 768
    """Inner width of the MLP."""
    mlp: Literal["swiglu", "geglu", "xielu"] = "swiglu"
    """Gated SiLU, gated tanh-GELU, or ungated xIELU (arXiv:2411.13010)."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMSNorm on q and k: per head (Qwen3) or over the full width before the head split (OLMo 2)."""
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    """Before each sublayer (Llama), after it (OLMo 2), or both (Gemma)."""
    norm_weight: Literal["plain", "zero_centred"] = "plain"
    """Scale by w, or by 1 + w (Gemma)."""
    norm_cast: Literal["before", "after"] = "before"
    """Cast to the compute dtype before (Llama) or after (OLMo 2, Gemma) the scaling by the weight."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    tie_embeddings: bool = False
    embed_scale: float = 1.0
    """Factor on the embedding's output (Gemma: sqrt(d_model))."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    local_rope: RopeConfig | None = None
    """RoPE of windowed layers where it differs (Gemma 3); none = rope."""
    rope_pattern: list[bool] = field(default_factory=lambda: [True])
    """Repeated over the layers: does the layer use RoPE (SmolLM3: [true, true, true, false])."""
    window: NonNegative = 0
    """Sliding window in tokens, the current one included; 0 = none."""
    window_pattern: list[bool] = field(default_factory=lambda: [True])
    """Repeated over the layers: is the layer windowed (Gemma 2: [true, false])."""
    attn_scale: float | None = None
    """Softmax scale; none = head_dim ** -0.5."""
    attn_softcap: Annotated[float, Field(ge=0)] = 0.0
    """tanh cap on attention logits; 0 = none (Gemma 2: 50)."""
    logit_softcap: Annotated[float, Field(ge=0)] = 0.0
    """tanh cap on output logits; 0 = none (Gemma 2: 30)."""
    attention_impl: Literal["auto", "triton", "reference", "sdpa", "flex"] = "auto"
    """`auto` takes the fastest that can do the case and logs which once; a named one never falls back."""
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """Norms, RoPE, activations, the loss and Muon's products as Triton kernels or in plain torch. `auto` takes the kernels
    where they can run and says once where not; `triton` never falls back."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the initial matrices; output projections get init_std / sqrt(2 n_layers)."""

    @property
    def kv_heads(self) -> int:
        """Key and value heads with the default filled in."""
        return self.n_kv_heads or self.n_heads

    @property
    def head_size(self) -> int:
        """Width of one head with the default filled in."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def windows(self) -> list[int]:
        """Window of each layer in tokens, 0 = none."""
        return [self.window if self.window_pattern[i % len(self.window_pattern)] else 0 for i in range(self.n_layers)]

    @property
    def roped(self) -> list[bool]:
        """Does each layer use RoPE?"""
        return [self.rope_pattern[i % len(self.rope_pattern)] for i in range(self.n_layers)]


@config
class CustomModelConfig:
    """A user's own model: three dotted paths `package.module:name`. See docs/bring_your_own_model.md."""

    kind: Literal["custom"] = "custom"
    factory: str
    """Called with `**args`, returns the nn.Module."""
    loss: str
    """`loss(module, fields) -> (B,)` losses per record, summed over the record's loss-bearing items."""
    decoder: str
    """`decode(record: bytes) -> dict[str, Tensor]`: one record as read from a shard, without a batch dimension."""
    blocks: str = "blocks"
    """Attribute of the module that holds the nn.ModuleList of repeated blocks: the unit of sharding, recomputation and
    compilation."""
    args: dict[str, int | float | bool | str | list[int | float | bool | str] | None] = field(default_factory=dict)
    """Keyword arguments of the factory: numbers, words, booleans, null, and lists of them."""


ModelConfig = Annotated[DecoderConfig | CustomModelConfig, Field(discriminator="kind")]


# ---- adapter -------------------------------------------------------------------------------------------------------
@config
class NoAdapterConfig:
    """Every weight is trained."""

    kind: Literal["none"] = "none"


@config
class LoraConfig:
    """Low-rank adapters beside frozen weights, y = W x + scale B (A x). Hu et al., arXiv:2106.09685."""

    kind: Literal["lora"] = "lora"
    rank: Positive = 16
    """Rows of A, columns of B."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """scale = alpha / rank."""
    rslora: bool = False
    """scale = alpha / sqrt(rank), so that high ranks learn as fast (arXiv:2312.03732)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of A's inputs that are zeroed in training."""
    targets: list[str] = field(default_factory=lambda: ["attn.*", "mlp.*"])
    """Layers with an adapter: names or ends of names, `*` for anything: [attn.q, attn.v], [blocks.3.mlp.*]."""
    train: list[str] = field(default_factory=list)
    """Modules trained in full beside the adapters, by the same patterns: [embed, head], ['*norm']."""
    base: Literal["full", "nf4"] = "full"
    """The blocks' frozen matrices as they are, or rounded to 4 bits (NF4 in blocks of 64, arXiv:2305.14314) and held so."""
    init_from: str = ""
    """RUN or RUN@STEP whose adapter this one begins as; of a folder in PEFT's form `officina convert import` makes a run.
    Empty = a new one."""

    @property
    def scale(self) -> float:
        """Factor on B A."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


AdapterConfig = Annotated[NoAdapterConfig | LoraConfig, Field(discriminator="kind")]


# ---- engine --------------------------------------------------------------------------------------------------------
@config
class _EngineBase:
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation checkpointing per block: keep everything, keep matrix products only, keep nothing."""
    compile: bool = False
    """torch.compile each block."""


@config
class SingleConfig(_EngineBase):
    """One process, nothing sharded."""

    kind: Literal["single"] = "single"


@config
class DDPConfig(_EngineBase):
    """Everything replicated; gradients summed over ranks."""

    kind: Literal["ddp"] = "ddp"


@config
class FSDP2Config(_EngineBase):
    """Parameters, gradients and moments sharded over all ranks (torch `fully_shard`)."""

    kind: Literal["fsdp2"] = "fsdp2"
    reshard_after_forward: bool = True
    """Free the gathered parameters between forward and backward (ZeRO-3's memory); false keeps them (ZeRO-2's speed)."""
    cpu_offload: bool = False
    """Keep the shards in host memory."""


@config
class HSDPConfig(_EngineBase):
    """FSDP2 within groups of `shard_size` ranks, replicated over the groups."""

    kind: Literal["hsdp"] = "hsdp"
    shard_size: Positive = 2
    """Ranks that share one copy; usually the GPUs of a node. Must divide the number of ranks."""
    reshard_after_forward: bool = True
    cpu_offload: bool = False


@config
class ZeroConfig(_EngineBase):
    """DeepSpeed ZeRO."""

    kind: Literal["zero"] = "zero"
    stage: Annotated[Count, Field(ge=1, le=3)] = 2
    """1 shards moments, 2 also gradients, 3 also parameters."""
    offload_optimizer: bool = False
    """Keep moments and their arithmetic on the host."""
    offload_params: bool = False
    """Keep parameters on the host between uses (stage 3)."""
    persistence_threshold: NonNegative = 100_000
    """Stage 3: parameters with fewer elements stay gathered."""


EngineConfig = Annotated[
    SingleConfig | DDPConfig | FSDP2Config | HSDPConfig | ZeroConfig, Field(discriminator="kind")]


# ---- data ----------------------------------------------------------------------------------------------------------
@config
class SourceConfig:
    """One data set in the mixture."""

    path: str
    """Folder of the data set (it holds `dataset.json`). Not part of the fingerprint: a data set may move."""
    key: str = ""
    """Of a sealed data set: a file that its owner alone may read, or `command:PROGRAM ARGS` that prints it; never the key."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of rows, relative to the other sources."""


@config
class TimelineStage:
    """The mixture from one global sample index on. Written by officina, not by users."""

    from_sample: NonNegative = 0
    """First global sample index of the stage."""
    weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    """Source name -> share of rows, relative to the others of the stage; a source that is not named gives no rows."""


@config
class PlannedStage:
    """The mixture from one step on, as a user plans it."""

    from_step: NonNegative
    """Optimizer steps that are done when it begins."""
    weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    """As in a `TimelineStage`."""


@config
class DataConfig:
    """What is read, and in which order."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Name -> data set. Names are free and appear in ledger and report."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Weights as tokens ** (1 / temperature) in place of those of the sources; written out as weights when a run is planned."""
    temperature_over: Literal["sources", "languages"] = "sources"
    """What is sampled by temperature; `languages`: sources of one language each, those of a language together."""
    split: str = "train"
    """Split of each data set that is trained on."""
    validation_split: str = "validation"
    """Split that is held out; used from every source that has it."""
    shuffle: bool = True
    """Keyed permutation of each source's rows, another one each epoch; false reads in order."""
    shuffle_block: Annotated[Positive, Field(le=2**31)] = 1
    """Neighbouring rows that stay together: blocks of so many come in keyed order, each shuffled inside. 1 shuffles every row
    by itself; 256 is for data larger than memory on disks, parallel file systems or object stores: they read whole blocks."""
    mask_documents: bool = True
    """Attention never crosses a document border, and no label does."""
    packing: Literal["auto", "cut", "best_fit"] = "auto"
    """How documents come into rows: laid end to end and cut, or packed whole, longest first, each where it fits best
    (arXiv:2404.10830), the rest of the row left empty. `auto`: best_fit for samples and pairs, cut for documents."""
    overlong: Literal["auto", "split", "truncate", "leave_out", "refuse"] = "auto"
    """best_fit, what is longer than a row: into several rows, no token lost; cut off at the end; left out; or the run is
    refused. `auto`: documents are split, samples and pairs refused. What is cut off or left out is counted and said."""
    skip: list[list[Count]] = field(default_factory=list)
    """Ranges [a, b) of global sample indices to leave out, e.g. [[1000, 1064]]."""
    timeline: list[TimelineStage] = field(default_factory=list)
    """How the mixture changed over the run and will change, written by officina; empty = the sources' weights from the first
    sample on."""
    stages: list[PlannedStage] = field(default_factory=list)
    """Mixtures of later steps, such as the last tenth on better data: [{from_step: 9000, weights: {web: 1, math: 3}}]. Until
    then the weights of the sources hold. They are written into the timeline when a run begins or goes on, and keep their steps
    where the batch or `skip` changes."""
    planned_at: Count | None = None
    """Global sample index at which the timeline's stages behind it were planned, written by officina; none = none is."""
    read: Literal["auto", "mmap", "pread"] = "auto"
    """How shards are read: auto maps them, but reads them on Lustre, GPFS, NFS, WekaFS, BeeGFS, CephFS and PanFS."""
    prefetch_batches: Annotated[Positive, Field(le=1024)] = 4
    """Batches a background thread holds ready."""
    max_damaged_blocks: NonNegative = 16
    """Blocks (256 KiB) of the run that do not match their checksum and are not to be had elsewhere: their tokens carry no loss,
    and the ledger names them. One more that was not repaired, and it stops in good order with their names; 0 = at the first."""


@config
class UseConfig:
    """What the run is for, declared once and judged by the conditions of every data set before a rank starts.

    What is not declared is refused only where a condition asks for it.
    """

    purpose: str = ""
    """One word: research, academic-research, education, product, ..."""
    organisation: str = ""
    """Organisation or project that trains, as the conditions of the data call it."""
    country: str = ""
    """Country of the site, ISO 3166-1 alpha-2: FI."""
    commercial: bool | None = None
    """Is the use commercial?"""
    release: bool | None = None
    """Will the weights be released to others?"""
    agreement: str = ""
    """Identifier of the agreement with the data's provider, for data that asks for one."""
    allow_personal: bool = False
    """Train on data with personal data in it, on the legal basis named."""
    legal_basis: Literal["", "consent", "contract", "legal-obligation", "vital-interests", "public-task",
                         "legitimate-interests"] = ""
    """Article 6(1) GDPR."""
    weights_derive: bool = True
    """Read no-derivatives and share-alike as if released weights were a derivative of the data. Not settled in law: false
    is the reading that they are none."""
    register: str = ""
    """Folder where uses of data sets with a maximum of use are counted; empty = the folder `use` in the data set."""


# ---- optimisation --------------------------------------------------------------------------------------------------
@config
class AdamWConfig:
    """AdamW with decoupled decay (arXiv:1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 3e-4
    """Peak learning rate."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """On matrices only; norms, biases and embeddings are not decayed."""
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """Global L2 norm the gradient is scaled down to; 0 = off."""


@config
class MuonConfig(AdamWConfig):
    """Muon on the matrices of the blocks (https://kellerjordan.github.io/posts/muon/), AdamW on the rest."""

    kind: Literal["muon"] = "muon"
    muon_lr: Annotated[float, Field(gt=0)] = 0.02
    """Peak learning rate of the matrices; follows the same schedule as lr."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    nesterov: bool = True
    newton_schulz_steps: Positive = 5
    newton_schulz_dtype: Literal["bf16", "fp32"] = "bf16"


OptimConfig = Annotated[AdamWConfig | MuonConfig, Field(discriminator="kind")]


@config
class LrScheduleConfig:
    """Factor on the learning rates as a pure function of the step."""

    kind: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """After the warm-up: constant, cosine or linear down to min_ratio at the last step, or stable and then decay (WSD)."""
    warmup_steps: NonNegative = 100
    """Linear from 0 to the peak."""
    decay_steps: NonNegative = 0
    """wsd: length of the final decay (1 - sqrt shape, arXiv:2405.18392)."""
    min_ratio: Fraction = 0.1
    """Lowest learning rate as a share of the peak."""


@config
class ObjectiveConfig:
    """Loss, and what is done when it misbehaves."""

    kind: Literal["next_token", "dpo"] = "next_token"
    """Cross-entropy of the next token; or direct preference optimisation over pairs (arXiv:2305.18290), against the model that
    the run began with."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """dpo: how strongly the model is held to the one it began with."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """next_token: weight of the mean squared log-partition function; minimised and shown beside the loss, not within it."""
    max_nonfinite_steps: Positive = 5
    """A step with a non-finite gradient norm is skipped; after this many in a row the run stops (exit status 76)."""
    spike_sigma: Annotated[float, Field(ge=0)] = 0.0
    """A finite loss or gradient norm further than this many standard deviations above its mean of the last
    `spike_window` steps is a spike; 0 = off."""
    spike_window: Annotated[Positive, Field(le=1_000_000)] = 128
    on_spike: Literal["flag", "skip", "stop"] = "flag"
    """Record it; also leave the step out, for which ranks exchange the loss before each update; or stop the run (status 76)."""


@config
class BatchConfig:
    """How much one optimizer step sees."""

    global_tokens: Positive = 16_384
    """Tokens per optimizer step over all ranks and micro-batches: rows x seq_len (records x seq_len for custom models)."""
    seq_len: Positive = 256
    """Tokens per row. 1 for custom models, where a row is a record."""
    micro_rows: Positive = 4
    """Rows per rank and micro-batch: as many as memory allows."""

    @property
    def rows(self) -> int:
        """Rows per optimizer step over all ranks."""
        return self.global_tokens // self.seq_len

    def rows_of_rank(self, rank: int, world_size: int) -> range:
        """Places within the global batch that `rank` reads: as even as possible, contiguous, never overlapping."""
        return range(rank * self.rows // world_size, (rank + 1) * self.rows // world_size)

    def micro_steps(self, world_size: int) -> int:
        """Micro-batches per step, the same on every rank."""
        most_rows = -(-self.rows // world_size)
        return -(-most_rows // self.micro_rows)


# ---- life of a run -------------------------------------------------------------------------------------------------
@config
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every_steps: NonNegative = 500
    """0 = only at the end and when the run is stopped."""
    keep_last: Positive = 2
    """Newest checkpoints kept."""
    keep_every: NonNegative = 0
    """Checkpoints whose step is a multiple of this are kept for good; 0 = none."""
    asynchronous: bool = False
    """Copy the state, go on training, write in the background."""


@config
class EvalConfig:
    """Held-out loss in the loop."""

    every_steps: NonNegative = 0
    """0 = only at the end."""
    max_rows: Positive = 256
    """Rows of the validation split per evaluation and source, always the first ones."""


@config
class LoggingConfig:
    """Where numbers go besides metrics.jsonl, which is always written."""

    tensorboard: bool = True
    wandb: bool = False
    """Weights & Biases, offline unless WANDB_MODE says otherwise."""
    mlflow: bool = False
    """MLflow, to a file store in the run directory unless MLFLOW_TRACKING_URI says otherwise."""
    every_steps: Positive = 1
    """Steps between the lines of rank 0's log; metrics.jsonl has every step."""


@config
class ProfileConfig:
    """A torch trace and a memory snapshot of chosen steps and ranks."""

    steps: list[Count] = field(default_factory=list)
    """First and last step to record, e.g. [10, 12]; empty = off."""
    ranks: list[Count] = field(default_factory=lambda: [0])
    memory: bool = True
    """Also a memory snapshot (CUDA and ROCm)."""


@config
class SiteConfig:
    """The machine the run is on."""

    name: str = "local"
    """Id of its profile, which only those who submit read: `officina sites`."""
    account: str = ""
    """Project that is charged; text, never a number."""
    grace: Duration = 60.0
    """Time a rank gets to save after a stop signal before it is killed."""


@config
class RunConfig:
    """One run, whole. What a rank reads from RUN/config.yaml."""

    name: str = "run"
    """Name of the run directory under the runs folder."""
    seed: NonNegative = 0
    """Initial weights, data order and sampling follow from it."""
    steps: Positive = 1000
    """Optimizer steps of the whole run."""
    ranks: Annotated[NonNegative, Field(le=4096)] = 0
    """Ranks that `officina train` starts on this machine (in an allocation: on each); 0 = one per visible GPU, or one on
    the CPU. Not used inside srun, torchrun or mpirun."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`cuda` stands for ROCm too."""
    precision: Literal["auto", "fp32", "bf16", "bf16_pure"] = "auto"
    """`bf16`: bf16 arithmetic, fp32 master weights and reduction. `bf16_pure`: weights, gradients and moments in bf16.
    `auto`: bf16 where the device has it in hardware, else fp32; the run says which."""
    threads: Annotated[NonNegative, Field(le=4096)] = 0
    """CPU threads per rank; 0 = cores / ranks on the host, at each start. Sums differ between thread counts."""
    time_limit: Duration | None = None
    """Stop in good order (exit status 75) after this time."""
    stall_after: Duration = 600.0
    """A step that lasts longer, and ten times longer than usual, stands still: every rank tells where, and the run ends
    and can go on from its checkpoint. Not the first three of a start, in which kernels are compiled. 0 = never."""
    init_from: str = ""
    """Initial weights of the model: a folder with a Hugging Face model (config.json and safetensors), or an officina RUN or
    RUN@STEP. Empty = random ones. `model=from_init` takes the model itself from there too."""
    model: ModelConfig = field(default_factory=DecoderConfig)
    adapter: AdapterConfig = field(default_factory=NoAdapterConfig)
    engine: EngineConfig = field(default_factory=SingleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    use: UseConfig = field(default_factory=UseConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=AdamWConfig)
    lr_schedule: LrScheduleConfig = field(default_factory=LrScheduleConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    site: SiteConfig = field(default_factory=SiteConfig)

    @property
    def engine_name(self) -> str:
        """The engine as people call it, e.g. `zero2`."""
        return self.engine.kind + (str(self.engine.stage) if self.engine.kind == "zero" else "")

    @property
    def batch_unit(self) -> str:
        """What batches count: `tokens`, or a custom model's `records`."""
        return "records" if isinstance(self.model, CustomModelConfig) else "tokens"
