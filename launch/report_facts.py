"""What a run report says. `officina.launch.report_gather` reads it from the run directory.

Every part can be missing: a run that was killed in its first second still has a report.
"""

from dataclasses import dataclass, field
from typing import Any

FINAL_STEPS = 20
"""The final training loss is the mean over the tokens of this many last steps: one step's loss is noise."""
SAMPLE_FILE = "samples.txt"
MAX_SAMPLE_CHARACTERS = 6000
ACCURACIES = {"token_accuracy": "of tokens right", "sample_accuracy": "of samples right in every token",
              "reward_accuracy": "of pairs with the chosen answer preferred"}
"""Of `EvalMetrics`, and what they are shares of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Held-out loss of one source, or of all together (source `all`, weighted by tokens)."""

    source: str
    step: int
    loss_nats: float
    perplexity: float | None
    """exp(loss_nats); none for custom models and DPO, whose loss is not that of tokens."""
    tokens: int
    bits_per_byte: float | None = None
    """Compares across tokenizers; none where the bytes of the texts are not known."""
    languages: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """tokens, loss_nats and text_bytes by language, where there are several."""
    accuracies: dict[str, float] = field(default_factory=dict)
    """`token_accuracy`, `sample_accuracy`, `reward_accuracy`: those that were measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """One start of the run, until its stop or its death."""

    action: str
    """`start`, `resume` or `branch`."""
    time: float
    """Unix time of the start."""
    from_step: int
    to_step: int
    """Last step reached; later generations may have started behind it."""
    engine: str
    world_size: int
    device: str
    precision: str
    wall_s: float
    """From the start to its last line in metrics.jsonl."""
    ended: str
    """`done`, `time limit` ..., or `no stop recorded` for one that was killed, crashed or still runs."""
    undone_steps: int
    """Steps of earlier lives beyond `from_step`, which this one did again."""
    words: list[str] = field(default_factory=list)
    """What was typed."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """`{"key", "old", "new"}` against the configuration before."""
    checkpoint_problems: list[str] = field(default_factory=list)
    """What was wrong with newer checkpoints that were not taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One save, as metrics.jsonl tells it."""

    step: int
    path: str
    bytes: int
    stall_s: float
    durable_s: float
    state: str
    """`kept`, `removed` (by keep_last), `failed`."""
    problem: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One data set of the mixture."""

    name: str
    weight: float
    rows: int | None
    """Rows read, from the ledger; none if there is no ledger."""
    tokens: int | None
    """Rows x seq_len, padding included."""
    packed: bool = False
    """Rows hold whole documents and padding: how many a pass has, `officina data audit` knows."""
    dataset: str | None = None
    """Name and version by its manifest; none if the manifest is not where the configuration says."""
    licence: str | None = None
    fingerprint: str | None = None
    available_tokens: int | None = None
    """Tokens of the split that is trained on."""
    shows_text: bool | None = None
    """May text of it be shown? None: unknown, taken as no."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The keys of report.json."""

    format: int = 1
    officina: str | None
    """Version that trained last."""
    name: str
    run_id: str | None
    status: str
    """`done`, `to be continued`, `stopped`, `no stop recorded` (running, killed or crashed), `not started`."""
    steps_planned: int | None
    steps_done: int
    model: dict[str, Any]
    """`kind`, `parameters`, `trained_parameters` (those that steps change), `summary`, `flops_per_token_causal`,
    `flops_per_token_full` (training, by formula)."""
    final_loss_nats: float | None
    """Training loss: mean over the tokens of the last FINAL_STEPS applied steps."""
    final_perplexity: float | None
    held_out: list[HeldOut]
    """The last evaluation: per source, and `all` first where there are several."""
    best_held_out: HeldOut | None
    """Lowest held-out loss over the run, all sources together."""
    useful_tokens: int
    """Loss-bearing tokens of the steps that count and were applied."""
    wall_s: float
    """Sum over the lives of the run; pauses between them do not count."""
    items: str
    """What carries loss and is counted: tokens, pairs (DPO), records (custom models)."""
    tokens_per_s: float | None
    """Those of them, median over the steps of the last life."""
    filled_tokens_per_s: float | None
    """All tokens that are no padding, the same median; none for custom models and old records."""
    tokens_per_wall_s: float | None
    """useful_tokens / wall_s: with everything in it, evaluation, saving and steps done twice too."""
    data_wait_share: float | None
    """Waiting for data / step time, over all steps that count."""
    mfu_causal: float | None
    """Median over the last life; none where the device's peak is not known."""
    mfu_full: float | None
    peak_memory_bytes: int | None
    """Highest use, mean over the ranks: allocated device memory, on the CPU resident memory."""
    lives: list[Life]
    checkpoints: list[Checkpoint]
    left_out: list[dict[str, Any]]
    """Steps without an update: `step`, `grad_norm`, `loss_nats` (text where not finite)."""
    spikes: list[dict[str, Any]]
    repeated_steps: int
    damaged_lines: int
    skipped_samples: list[list[int]]
    """data.skip."""
    damaged_blocks: dict[str, dict[str, list[int]]]
    """Source -> shard -> blocks that did not match their checksums: their tokens gave no loss."""
    sources: list[Source]
    config: dict[str, Any]
    overrides: dict[str, list[str]]
    """Key -> the words that set it, oldest first."""
    environment: dict[str, Any]
    sample: str | None
    """Text from SAMPLE_FILE, where every source allows it."""
    missing: list[str]
    """What could not be read, and why."""
