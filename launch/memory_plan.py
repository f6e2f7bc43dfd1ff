"""How much of a GPU's memory a run will need, by part, from its configuration: an estimate by arithmetic, without torch.

Parameters, gradients and moments are exact (a test compares them with what ranks hold). What is alive at the peak of a step is
estimated: activations as the Triton kernels keep them, weights gathered by sharding engines, buffers of DeepSpeed.
"""

import math
from dataclasses import dataclass, fields

from officina.trainer.config import DDPConfig, DecoderConfig, FSDP2Config, HSDPConfig, RunConfig, SingleConfig, ZeroConfig
from officina.trainer.model.flops import ParameterCounts, parameter_count
from officina.trainer.model.shapes import NF4_BLOCK, nf4_row_bytes
from officina.trainer.model.targets import choose, trained_count

_LOSS_CHUNK = 2**28
"""Logits that exist at a time: `CHUNK_LOGITS_GPU` of kernels/linear_cross_entropy.py, which needs torch to be imported. In bf16
four times as many are done in two chunks, added up in bf16."""
_BUCKET = 500_000_000
"""DeepSpeed's default reduce_bucket_size, and half its stage3_max_live_parameters, in elements (runtime/zero/config.py)."""
_UNPACKING = 6
"""Bytes a weight takes while its matrix is unpacked from 4 bits: its value in fp32 beside two of its code, then beside bf16."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of one GPU by part."""

    parameters: int
    """Those this rank keeps: master weights, and what the engine holds of them all the time."""
    gathered: int
    """Weights brought together or cast for use, at the peak."""
    gradients: int
    """Also those not yet reduced."""
    moments: int
    activations: int
    """Of one micro-batch."""
    logits: int

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True, slots=True)
class _Bytes:
    """Bytes an element takes."""

    master: int
    compute: int
    """Of weights and activations in use."""
    gradient: int
    moment: int


_PRECISION = {"fp32": _Bytes(4, 4, 4, 4), "bf16": _Bytes(4, 2, 4, 4), "bf16_pure": _Bytes(2, 2, 2, 2)}


def plan_memory(run: RunConfig, world_size: int, *, precision: str = "") -> MemoryPlan | None:
    """The estimate; None for a user's own model, whose size only its code knows. precision: what `auto` will be (bf16)."""
    if not isinstance(run.model, DecoderConfig):
        return None
    precision = precision or ("bf16" if run.precision == "auto" else run.precision)
    size, counts = _PRECISION[precision], parameter_count(run.model)
    parameters, gathered, gradients, moments = _state(run, world_size, size, counts, pure=precision == "bf16_pure")
    gathered += _UNPACKING * max(_packed(run), default=0)
    tokens = min(run.batch.micro_rows, max(-(-run.batch.rows // world_size), 1)) * run.batch.seq_len
    return MemoryPlan(int(parameters), int(gathered), int(gradients), int(moments),
                      int(tokens * _activations(run, size.compute)), int(_logits(run, tokens, size)))


State = tuple[float, float, float, float]
"""(parameters, gathered, gradients, moments)."""


def _state(run: RunConfig, world: int, size: _Bytes, counts: ParameterCounts, pure: bool) -> State:
    engine = run.engine
    T, P = trained_count(run.model, run.adapter)
    packed = sum(_packed(run))
    frozen = (P - T - packed) * size.compute + packed * nf4_row_bytes(NF4_BLOCK) / NF4_BLOCK  # they have no master
    own, in_use = T * size.master + frozen, T * size.compute + frozen
    moments = _moments(run, size, counts)
    outside = counts.embedding + counts.head
    block = (P - outside) / run.model.n_layers
    trained = T / P
    cast = T * size.compute if size.compute != size.master else 0
    if isinstance(engine, ZeroConfig):
        return _zero(engine, world, size, in_use, T, moments, pure)
    if isinstance(engine, FSDP2Config | HSDPConfig):
        shards = engine.shard_size if isinstance(engine, HSDPConfig) else world
        gathered = 2 * (in_use - outside * size.compute) / run.model.n_layers + outside * size.compute
        whole = 2 * block * trained * (size.compute + size.gradient)
        if not engine.reshard_after_forward:
            gathered, whole = in_use, T * size.gradient
        if shards == 1:
            gathered, whole = cast, 0
        here = 0 if engine.cpu_offload else 1 / shards
        return own * here, gathered, T * size.gradient * here + whole, moments * here
    if not isinstance(engine, SingleConfig | DDPConfig):
        raise NotImplementedError(f"what the engine {engine.kind} keeps of the state is not told here")
    return own, cast, T * size.gradient, moments  # DDP's gradients are views of its buckets


def _packed(run: RunConfig) -> list[int]:
    """Weights of each matrix that is held in 4 bits."""
    return [math.prod(shape) for shape in choose(run.model, run.adapter).packed.values()] if run.adapter.kind != "none" else []


def _moments(run: RunConfig, size: _Bytes, counts: ParameterCounts) -> float:
    """AdamW keeps two numbers a trained parameter, Muon one for each of the blocks' matrices."""
    if run.adapter.kind != "none":
        return 2 * trained_count(run.model, run.adapter)[0] * size.moment
    inner = counts.non_embedding if run.optim.kind == "muon" else 0
    return (2 * (counts.total - inner) + inner) * size.moment


def _zero(engine: ZeroConfig, world: int, size: _Bytes, in_use: float, T: int, moments: float, pure: bool) -> State:
    """DeepSpeed: weights in use (bytes) beside the master partition; stage 1 and 2 hold all of them, stage 3 its share."""
    host = 0 if engine.offload_optimizer else 1
    masters = 0 if pure and engine.stage == 3 else T * size.master / world * host
    buckets = 2 * min(T, _BUCKET) * size.compute
    if engine.stage == 1:
        return in_use + masters, 0, T * (size.gradient + size.compute), moments / world * host
    if engine.stage == 2:
        return in_use + masters, 0, T * size.gradient / world * host + buckets, moments / world * host
    kept = 0 if engine.offload_params else in_use / world
    gathered, gradients = min(in_use, 2 * _BUCKET * size.compute), T * size.gradient / world * host + buckets
    return kept + masters, gathered, gradients, moments / world * host


def _activations(run: RunConfig, a: int) -> float:
    """Bytes a token that the blocks keep from forward to backward. a: bytes of an element.

    A block keeps its input, both norms' outputs and the stream between them (4 D), q, k, v, attention's output, gate, up
    and their product.
    """
    model = run.model
    D, Q, KV, F = model.d_model, model.n_heads * model.head_size, model.kv_heads * model.head_size, model.d_ff
    ups = 1 if model.mlp == "xielu" else 2
    whole = 4 * D + 2 * Q + 2 * KV + (ups + 1) * F + (2 * D if model.norm_placement == "sandwich" else 0)
    whole += Q + KV if model.qk_norm != "none" else 0
    whole = whole * a + 4 * model.n_heads  # attention's log-sum-exp, fp32
    if run.engine.recompute == "full":
        return model.n_layers * D * a + whole
    if run.engine.recompute == "selective":  # products and attention are kept
        return model.n_layers * (3 * D + 2 * Q + 2 * KV + ups * F) * a + whole
    return model.n_layers * whole


def _logits(run: RunConfig, tokens: int, size: _Bytes) -> float:
    """A chunk of the logits, what the last norm keeps, its gradient, and a trained head's as the loss makes it."""
    model = run.model
    head = "embed.weight" if model.tie_embeddings else "head.weight"
    trains_head = run.adapter.kind == "none" or head in choose(model, run.adapter).whole
    logits = tokens * model.vocab_size
    few = size.compute == 2 and logits <= 4 * _LOSS_CHUNK
    chunk = max(min(logits, _LOSS_CHUNK), logits / 2 if few else 0) * size.compute
    gradient = 2 if few else 4
    return chunk + 3 * tokens * model.d_model * size.compute + model.vocab_size * model.d_model * gradient * trains_head


def checkpoint_bytes(run: RunConfig) -> int:
    """Size of one checkpoint: trained parameters and their moments in fp32, whatever the engine; 0 for a user's own model."""
    if not isinstance(run.model, DecoderConfig):
        return 0
    counts = parameter_count(run.model)
    return trained_count(run.model, run.adapter)[0] * 4 + int(_moments(run, _PRECISION["fp32"], counts))


def checkpoint_files(world_size: int) -> int:
    """Files of one checkpoint: two for each rank, and COMMIT."""
    return 2 * world_size + 1


def checkpoints_kept(run: RunConfig) -> int:
    """Checkpoints that stand at the end of the run."""
    every = run.checkpoint.keep_every
    return run.checkpoint.keep_last + (run.steps // every if every else 0)
