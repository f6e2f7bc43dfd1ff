"""What the conformance tests run: batches, a plain reference written without the engines, and training on ranks.

A `Case` says everything about a run; `reference(case)` is what one process computes with plain torch, `train(ranks, case)`
what an engine computes on its ranks.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from officina.trainer.batch import IGNORE, Batch
from officina.trainer.config import (
    AdamWConfig,
    AdapterConfig,
    BatchConfig,
    DDPConfig,
    DecoderConfig,
    FSDP2Config,
    HSDPConfig,
    LoraConfig,
    MuonConfig,
    NoAdapterConfig,
    ObjectiveConfig,
    RunConfig,
    SingleConfig,
    ZeroConfig,
)
from officina.trainer.model.build import build_model
from officina.trainer.model.nf4 import RoundedSource
from officina.trainer.model.targets import choose
from officina.trainer.objective import next_token_loss
from officina.trainer.parallel.engine import Parts, build_engine
from officina.trainer.state import PARAM, Piece

SEQ_LEN, ROWS = 32, 8
MODEL = DecoderConfig(vocab_size=259, n_layers=3, d_model=64, n_heads=4, n_kv_heads=2, d_ff=128, qk_norm="head",
                      qkv_bias=True, o_bias=True, mlp_bias=True, attention_impl="sdpa")
NONE = NoAdapterConfig()
ADAMW = AdamWConfig(lr=1e-3, eps=1e-6, weight_decay=0.1, clip_norm=1.0)
MUON = MuonConfig(lr=1e-3, eps=1e-6, muon_lr=2e-3, newton_schulz_dtype="fp32")
ENGINES = {
    "single": SingleConfig(), "ddp": DDPConfig(), "fsdp2": FSDP2Config(),
    "fsdp2_fast": FSDP2Config(reshard_after_forward=False), "fsdp2_offload": FSDP2Config(cpu_offload=True),
    "hsdp": HSDPConfig(shard_size=2), "hsdp_fast": HSDPConfig(shard_size=2, reshard_after_forward=False),
    "zero1": ZeroConfig(stage=1), "zero2": ZeroConfig(stage=2), "zero3": ZeroConfig(stage=3, persistence_threshold=0),
    "zero3_persist": ZeroConfig(stage=3, persistence_threshold=1000),
    "zero1_offload": ZeroConfig(stage=1, offload_optimizer=True),
    "zero2_offload": ZeroConfig(stage=2, offload_optimizer=True),
    "zero3_offload": ZeroConfig(stage=3, offload_optimizer=True, offload_params=True, persistence_threshold=0),
}


@dataclass(frozen=True)
class Case:
    """One training run."""

    engine: str = "single"
    model: DecoderConfig = MODEL
    adapter: AdapterConfig = NONE
    optim: AdamWConfig = ADAMW
    precision: str = "fp32"
    objective: str = "next_token"
    """dpo: rows of two preference pairs; see `global_batch`."""
    z_loss: float = 0.0
    packed: bool = True
    rows: int = ROWS
    seq_len: int = SEQ_LEN
    splits: int = 2
    """Micro-batches per step and rank."""
    steps: int = 20
    first: int = 0
    """Step that the run begins with; the state it begins from must belong to it."""
    recompute: str = "none"
    compile: bool = False
    fault: str = ""
    """A deliberate mistake; see `_fault`."""
    poison: tuple[int, int] = (-1, 0)
    """(step, rank) where the loss becomes nan."""
    max_norms: tuple[tuple[int, float], ...] = ()
    """(step, bound on the gradient norm)."""
    evaluate_every: int = 0

    @property
    def run(self) -> RunConfig:
        engine = replace(ENGINES[self.engine], recompute=self.recompute, compile=self.compile)
        return RunConfig(engine=engine, model=self.model, adapter=self.adapter, optim=self.optim,
                         objective=ObjectiveConfig(kind=self.objective, beta=0.5, z_loss=self.z_loss),
                         batch=BatchConfig(global_tokens=self.rows * self.seq_len, seq_len=self.seq_len))


@dataclass(frozen=True)
class Trace:
    """What a run showed, and where it ended."""

    losses: list[float]
    norms: list[float]
    applied: list[bool]
    state: dict[tuple[str, str], np.ndarray]
    """(name, slot) -> values."""
    optimizer_steps: int
    eval_losses: list[float] = field(default_factory=list)


def global_batch(step: int, case: Case) -> dict[str, Tensor]:
    """The rows of one step: random documents, uneven padding, one row in four (at most) wholly empty.

    The tokens follow a rule (sums of the last two, mostly) so that there is something to learn and gradients have a size.
    """
    random, T = np.random.default_rng(1000 + step), case.seq_len
    tokens = random.integers(0, 259, (case.rows, T + 1))
    for t in range(2, T + 1):
        follows = random.random(case.rows) < 0.7
        tokens[follows, t] = (tokens[follows, t - 1] + tokens[follows, t - 2]) % 17
    if case.objective == "dpo":
        return _pairs(random, tokens)
    labels = tokens[:, 1:].copy()
    lengths = random.integers(3, T + 1, case.rows)
    lengths[random.random(case.rows) < 0.25] = 0
    lengths[0] = T
    labels[np.arange(T) >= lengths[:, None]] = IGNORE
    fields = {"tokens": tokens[:, :-1].copy(), "labels": labels}
    if case.packed:
        begins = random.random((case.rows, T)) < 0.1
        begins[:, 0] = True
        fields["documents"] = begins.cumsum(1).astype(np.int32)
        at = np.arange(T)
        fields["positions"] = at - np.maximum.accumulate(np.where(begins, at, 0), axis=1)
        labels[:, :-1][begins[:, 1:]] = IGNORE  # no label across a border
    return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in fields.items()}


def _pairs(random: np.random.Generator, tokens: np.ndarray) -> dict[str, Tensor]:
    """Rows of no, one or two pairs: documents of 7 or 8 tokens, the first 3 a prompt without loss; then padding."""
    labels, begins = tokens[:, 1:].copy(), np.zeros((len(tokens), SEQ_LEN), bool)
    begins[:, [0, 7, 15, 22]] = True
    begins[:, 30] = True
    for begin in (0, 7, 15, 22):
        labels[:, begin:begin + 2] = IGNORE
    labels[:, [6, 14, 21, 29, 30, 31]] = IGNORE  # no label across a border, none in the padding
    pairs = random.integers(0, 3, len(tokens))
    pairs[0] = 2
    labels[np.arange(SEQ_LEN) >= np.asarray([0, 15, 30])[pairs][:, None]] = IGNORE
    at = np.arange(SEQ_LEN)
    fields = {"tokens": tokens[:, :-1].copy(), "labels": labels, "documents": (begins.cumsum(1) - 1).astype(np.int32),
              "positions": at - np.maximum.accumulate(np.where(begins, at, 0), axis=1),
              "reference": random.normal(-25, 3, (len(tokens), 2, 2)).astype(np.float32)}
    return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in fields.items()}


def items_of(fields: Mapping[str, Tensor]) -> int:
    """Loss-bearing tokens; pairs where there is a reference."""
    labels = fields["labels"] != IGNORE
    if "reference" not in fields:
        return int(labels.sum())
    return int(labels[:, [3, 18]].sum())  # a label of each pair that is there


def micro_batches(fields: Mapping[str, Tensor], mine: range, splits: int) -> list[Batch]:
    """The rows `mine` in `splits` batches of one size; missing rows are copies of row 0 without labels."""
    size = -(-max(1, len(mine)) // splits)
    batches = []
    for first in range(0, splits * size, size):
        rows = [mine[i] if i < len(mine) else None for i in range(first, first + size)]
        part = {name: values[[row or 0 for row in rows]].clone() for name, values in fields.items()}
        part["labels"][[row is None for row in rows]] = IGNORE
        batches.append(Batch(part, items_of(part)))
    return batches


_REFERENCES: dict[str, "Trace"] = {}


def reference(case: Case) -> Trace:
    """`_reference(case)`, computed once a session."""
    key = repr(case)
    if key not in _REFERENCES:
        _REFERENCES[key] = _reference(case)
    return _REFERENCES[key]


def _reference(case: Case) -> Trace:
    """One process, plain torch, the whole batch at once: no engine and no optimizer of ours.

    Of `case` it heeds the model, the optimizer, the data, the steps, `precision` (fp64 too) and the steps left out.
    """
    run = case.run
    built = build_model(replace(run, adapter=NONE))
    module = built.module.to_empty(device="cpu").to(torch.float64 if case.precision == "fp64" else torch.float32)
    if run.model.tie_embeddings:
        assert module.head is None
    first = built.source
    if isinstance(case.adapter, LoraConfig):  # of a base in 4 bits the values that it is rounded to
        first = RoundedSource(first, choose(run.model, run.adapter).packed)
    for name, parameter in module.named_parameters():
        parameter.data.copy_(first.read(name, PARAM, 0, parameter.numel()).view(parameter.shape))
    if case.precision == "bf16":
        module.compute_dtype = torch.bfloat16
    optim, whole = run.optim, dict(module.named_parameters())
    if isinstance(case.adapter, LoraConfig):
        module, whole = _reference_lora(run, module)
    named = {name: p for name, p in whole.items() if p.requires_grad}
    by_muon = [p for n, p in named.items() if isinstance(optim, MuonConfig) and p.ndim == 2 and n.startswith("blocks")]
    taken = set(map(id, by_muon))
    decayed = [p for n, p in named.items() if p.ndim == 2 and not n.startswith("embed") and id(p) not in taken]
    rest = [p for n, p in named.items() if p.ndim != 2 or n.startswith("embed")]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        betas=(optim.beta1, optim.beta2), eps=optim.eps, foreach=False, fused=False)
    momenta = [torch.zeros_like(p) for p in by_muon]
    losses, norms, applied = [], [], []
    for step in range(case.steps):
        fields = global_batch(step, case)
        z = _reference_z_loss(module, fields, case.z_loss) if case.z_loss else 0.0
        loss = (_reference_dpo if case.objective == "dpo" else next_token_loss())(module, fields) / items_of(fields)
        for parameter in named.values():
            parameter.grad = None
        (loss + z / items_of(fields)).backward()
        losses.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(named.values(), optim.clip_norm or float("inf")).item()
        norms.append(float("nan") if step == case.poison[0] else norm)
        applied.append(step != case.poison[0] and norm <= dict(case.max_norms).get(step, norm))
        if not applied[-1]:
            continue
        for group in optimizer.param_groups:
            group["lr"] = optim.lr * lr_factor(step)
        optimizer.step()
        _reference_muon(optim, by_muon, momenta, lr_factor(step))
    state = {(name, PARAM): p.detach().double().numpy().reshape(-1) for name, p in whole.items()}
    return Trace(losses, norms, applied, state, sum(applied))


def _reference_z_loss(module, fields: Mapping[str, Tensor], weight: float) -> Tensor:
    """Of all logits, summed over the labels; the losses of a `Trace` are without it (section 5 of arXiv:2204.02311)."""
    logits = module(fields["tokens"], documents_BT=fields.get("documents"), positions_BT=fields.get("positions"))
    return weight * logits[fields["labels"] != IGNORE].exp().sum(-1).log().square().sum()


def _reference_dpo(module, fields: Mapping[str, Tensor]) -> Tensor:
    """DPO's loss, document by document, each in a row of its own and with all logits (equation 7 of arXiv:2305.18290)."""
    total = torch.zeros(())
    for b in range(len(fields["tokens"])):
        for pair in (pair for pair in range(2) if fields["labels"][b, [3, 18][pair]] != IGNORE):
            ratios = []
            for side in range(2):
                here = fields["documents"][b] == 2 * pair + side
                labels = fields["labels"][b][here]
                scores = torch.log_softmax(module(fields["tokens"][b][here][None])[0].float(), -1)
                kept = labels != IGNORE
                logp = scores[kept].gather(1, labels[kept][:, None]).sum()
                ratios.append(logp - fields["reference"][b, pair, side])
            total = total - torch.log(1 / (1 + torch.exp(-0.5 * (ratios[0] - ratios[1]))))
    return total


def _reference_lora(run: RunConfig, module: torch.nn.Module):
    """The model as a function of weights W + scale B A: no layer of ours, the product is formed in full."""
    lora, source = run.adapter, build_model(run).source
    scale = lora.alpha / (lora.rank**0.5 if lora.rslora else lora.rank)
    whole, plain = {}, dict(module.named_parameters())
    for name, weight in plain.items():
        whole[name] = weight.requires_grad_(any(part.lstrip("*") in name for part in lora.train))
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and weight.ndim == 2 and any(layer.endswith(end.lstrip("*")) for end in lora.targets):
            for side, shape in (("lora_a", (lora.rank, weight.shape[1])), ("lora_b", (weight.shape[0], lora.rank))):
                values = source.read(f"{layer}.{side}", PARAM, 0, shape[0] * shape[1]).view(shape)
                whole[f"{layer}.{side}"] = values.to(weight.dtype).requires_grad_()

    def forward(*args, **kwargs):
        weights = {name: p if f"{name[:-7]}.lora_a" not in whole else
                   p + scale * whole[f"{name[:-7]}.lora_b"] @ whole[f"{name[:-7]}.lora_a"] for name, p in plain.items()}
        return torch.func.functional_call(module, weights, args, kwargs)

    return forward, whole


@torch.no_grad()
def _reference_muon(optim, matrices, momenta, factor: float) -> None:
    """Muon as its author describes it: Nesterov momentum, five quintic Newton-Schulz iterations, decoupled decay."""
    for p, buffer in zip(matrices, momenta, strict=True):
        buffer.copy_(optim.momentum * buffer + (1 - optim.momentum) * p.grad)
        x = (1 - optim.momentum) * p.grad + optim.momentum * buffer
        rows, columns = x.shape
        x = x / (x.norm() + 1e-7)
        for _ in range(optim.newton_schulz_steps):
            if rows <= columns:
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            else:
                a = x.T @ x
                x = 3.4445 * x + x @ (-4.7750 * a + 2.0315 * a @ a)
        lr = optim.muon_lr * factor
        p.copy_(p * (1 - lr * optim.weight_decay) - lr * max(1.0, rows / columns) ** 0.5 * x)


def lr_factor(step: int) -> float:
    """A schedule that changes at every step, so that a rate applied late or twice is seen."""
    return min(1.0, (step + 1) / 5) * (1 - step / 100)


def train(ranks, case: Case, begin: Mapping[tuple[str, str], np.ndarray] | None = None, resume: str = "") -> dict:
    """Train under the engine of `case`; this rank's part of a Trace, for `join`.

    begin: state to begin from (None: the initial weights). resume: `moments` or, a deliberate mistake, `weights`.
    """
    run = case.run
    built = build_model(run)
    with _fault(case, ranks):
        now = [case.first]
        engine = build_engine(Parts(run, ranks, built.module, _poisoned(built.loss_fn, case, ranks.rank, now), case.precision))
        try:
            if begin is None:
                engine.import_state(built.source, optimizer_steps=None)
            else:
                engine.import_state(Values(begin), optimizer_steps=case.first if resume == "moments" else None)
            return _train(ranks, case, engine, now)
        finally:
            engine.close()


def _train(ranks, case: Case, engine, now: list[int]) -> dict:
    losses, norms, applied, evals = [], [], [], []
    for step in range(case.first, case.first + case.steps):
        now[0] = step
        fields = global_batch(step + (case.fault == "data_shift_step"), case)
        if case.fault == "data_shift":
            fields = {name: values.roll(1, 0) if ranks.rank == ranks.world_size - 1 else values
                      for name, values in fields.items()}
        if case.fault == "dropped_mask":
            del fields["documents"]
        tokens = items_of(fields)
        mine = range(ranks.rank * case.rows // ranks.world_size, (ranks.rank + 1) * case.rows // ranks.world_size)
        micros = micro_batches(fields, mine, case.splits)
        if case.fault == "wrong_divisor":
            tokens = sum(micro.loss_tokens for micro in micros) * ranks.world_size or 1
        total = 0.0
        for i, micro in enumerate(micros):
            last = i == len(micros) - 1 and not (case.fault == "missing_reduce" and case.engine == "ddp")
            total += engine.forward_backward(micro, step_tokens=tokens, last=last).reshape(-1)[0].item()
        outcome = engine.step(lr_factor(step), max_norm=dict(case.max_norms).get(step, float("inf")))
        losses.append(ranks.sum([total])[0] / items_of(global_batch(step, case)))
        norms.append(outcome.grad_norm)
        applied.append(outcome.applied)
        if case.evaluate_every and step % case.evaluate_every == 0:
            evals.append(ranks.sum([sum(engine.evaluate(micro).reshape(-1)[0].item() for micro in micros)])[0])
    pieces = [(p.name, p.slot, p.shape, p.start, p.stop, _numbers(p)) for p in engine.export_state()]
    return {"losses": losses, "norms": norms, "applied": applied, "pieces": pieces, "evals": evals,
            "optimizer_steps": engine.optimizer_steps}


def _numbers(piece: Piece) -> np.ndarray:
    assert piece.values.dtype == torch.float32, f"{piece.name}/{piece.slot} left as {piece.values.dtype}"
    return piece.values.detach().cpu().double().numpy()


def warned(ranks, case: Case) -> list[str]:
    """What is warned of while it trains."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        train(ranks, case)
    return [str(each.message) for each in found]


def join(parts: Sequence[dict]) -> Trace:
    """Put the ranks' parts together; every element must have come exactly once, and every rank must have seen the same."""
    first = parts[0]
    for key in ("losses", "norms", "applied", "optimizer_steps", "evals"):
        for rank, part in enumerate(parts):
            assert np.array_equal(part[key], first[key], equal_nan=True), f"rank {rank} saw other {key} than rank 0"
    values, times = {}, {}
    for part in parts:
        for name, slot, shape, start, stop, piece in part["pieces"]:
            key, numel = (name, slot), int(np.prod(shape))
            whole = values.setdefault(key, np.full(numel, np.nan))
            assert piece.shape == (stop - start,), f"{key}: piece of {piece.shape} for [{start}, {stop})"
            whole[start:stop] = piece
            times.setdefault(key, np.zeros(numel, int))[start:stop] += 1
    for key, count in times.items():
        assert (count == 1).all(), f"{key}: elements exported {sorted(set(count.tolist()))} times"
    return Trace(first["losses"], first["norms"], first["applied"], values, first["optimizer_steps"], first["evals"])


class Values:
    """A Source of (name, slot) -> flat array; refuses what is not there. keep: buffers, whose dtype is not fp32."""

    def __init__(self, state: Mapping[tuple[str, str], np.ndarray], keep: Sequence[str] = ()) -> None:
        self.state, self.keep = state, keep

    def read(self, name: str, slot: str, start: int, stop: int) -> Tensor:
        whole = self.state[name, slot]
        assert 0 <= start <= stop <= len(whole), f"{name}/{slot}: [{start}, {stop}) of {len(whole)}"
        values = torch.from_numpy(whole[start:stop])
        return values if name in self.keep else values.float()


@dataclass(frozen=True)
class Distance:
    """Largest differences between two traces."""

    loss: float
    norm: float
    """Relative."""
    params: float
    params_rms: float

    def within(self, loss: float = 1e-5, norm: float = 1e-5, params: float = 1e-5, params_rms: float = 1e-7) -> bool:
        """The conformance bounds of issue 2 by default; nan is never within."""
        return (self.loss <= loss and self.norm <= norm and self.params <= params and self.params_rms <= params_rms)


def distance(expected: Trace, found: Trace, first: int = 0) -> Distance:
    """How far `found`, which began at step `first`, is from `expected`."""
    losses, norms = np.array(expected.losses[first:]), np.array(expected.norms[first:])
    seen = np.isfinite(norms)  # where the reference's is not, the caller looks for itself
    names = [key for key in expected.state if key[1] == PARAM]
    assert set(names) == {key for key in found.state if key[1] == PARAM}
    differences = np.concatenate([found.state[key] - expected.state[key] for key in names])
    return Distance(float(np.abs(losses - found.losses).max()), float((np.abs(norms - found.norms) / norms)[seen].max()),
                    float(np.abs(differences).max()), float(np.sqrt((differences**2).mean())))


def _poisoned(loss_fn, case: Case, rank: int, now: list[int]):
    def loss(module, fields):
        total = loss_fn(module, fields)
        return total * float("nan") if (now[0], rank) == case.poison and torch.is_grad_enabled() else total

    return loss


@contextlib.contextmanager
def _fault(case: Case, ranks) -> Iterator[None]:
    """Deliberate mistakes below the engine, on the last rank only; those of data and divisor are in `_train`."""
    patches = []
    if case.fault == "positions" and ranks.rank == ranks.world_size - 1:
        from officina.trainer.model import transformer

        right = transformer.rope

        def keys_off_by_one(q, k, cos, sin, **options):
            queries, _ = right(q, k, cos, sin, **options)
            _, keys = right(q, k, cos.roll(1, -2), sin.roll(1, -2), **options)
            return queries, keys

        patches.append((transformer, "rope", keys_off_by_one))
    if case.fault == "missing_reduce" and ranks.rank == ranks.world_size - 1:
        for name in ("all_reduce", "reduce", "reduce_scatter_tensor", "reduce_scatter_single"):
            if hasattr(torch.distributed, name):
                patches.append((torch.distributed, name, _without_mine(getattr(torch.distributed, name))))
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for owner, name, wrong in patches:
        setattr(owner, name, wrong)
    try:
        yield
    finally:
        for owner, name, right in kept:
            setattr(owner, name, right)


def _without_mine(collective):
    """The collective, but what this rank adds to a sum of gradients (not of a few numbers) is zero."""
    def wrong(*args, **kwargs):
        for tensor in (*args, *kwargs.values()):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel() > 16:
                tensor.zero_()
        return collective(*args, **kwargs)

    return wrong
