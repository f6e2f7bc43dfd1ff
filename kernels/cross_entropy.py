"""Cross-entropy of rows of logits, with label smoothing, z-loss, softcap, and a vocabulary that ranks may share.

    z = softcap(logits),  lse = log sum_v exp z_v,  e = label_smoothing
    loss            = lse - (1 - e) z[label] - e / V sum_v z_v + z_loss lse^2
    d loss / d z_v  = (1 + 2 z_loss lse) exp(z_v - lse) - (1 - e) [v = label] - e / V

A row enters its loss by three sums only: lse, z[label] and sum_v z_v. They take one reading of the row, the gradient a
second, which finds the row in the L2 cache when the same program has just read it. Where ranks share a vocabulary, they
exchange these three numbers a token.
Sources: online softmax, arXiv:1805.02867; z-loss, PaLM, arXiv:2204.02311; label smoothing, arXiv:1512.00567.
Shapes: N tokens, V rows of the vocabulary (of this rank), R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from officina.kernels import cross_entropy_triton as kernels
from officina.kernels.dispatch import Impl, choose_impl, tl, why_not_triton
from officina.kernels.ops import define_op, differentiable_once, multiprocessors, wide_dtype, wide_type
from officina.kernels.tables import INTERPRETER, SAFE, Config, arch_of, look_up

IGNORE = -100
"""Label of a token without loss."""


@dataclass(frozen=True, slots=True)
class VocabShard:
    """The rows of a shared vocabulary that this rank holds: first, first + 1, ..."""

    first: int
    size: int
    """Rows of the whole vocabulary, those of all ranks."""
    combine: Callable[[Tensor], Tensor]
    """This rank's sums (3, N) -> those of the whole vocabulary, the same on all its ranks, called in the same order by all:
    `lambda sums: combine_sums(all_gather(sums))`."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What the loss is made of."""

    z_loss: float
    label_smoothing: float
    softcap: float

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"cross_entropy: label_smoothing={self.label_smoothing} must be at least 0 and below 1; 0 = none")
        if not 0 <= self.softcap < math.inf:
            raise ValueError(f"cross_entropy: softcap={self.softcap} must not be negative, and finite; 0 = none")


def cross_entropy(logits_NV: Tensor, labels_N: Tensor, *, z_loss: float = 0.0, label_smoothing: float = 0.0,
                  softcap: float = 0.0, shard: VocabShard | None = None, impl: Impl = "auto") -> Tensor:
    """The tokens' losses, (N,) fp32 (fp64 for fp64 logits); differentiable once in the logits.

    Args:
        labels_N: int64 rows of the whole vocabulary; IGNORE: no loss, no gradient. Any other that is no row gives the loss NaN,
            which is to be looked for: the gradient of its logits is zero.
        z_loss: weight of the squared log-partition function.
        label_smoothing: weight of the uniform distribution over the vocabulary in the target.
        softcap: tanh cap on the logits; 0 = none. The kernel's tanh is off by some 6e-8, so the capped logits by
            softcap * 6e-8: for caps far above the logits, 1e5 say, impl=reference is more exact.
        shard: where the logits are those of a part of the vocabulary; every rank then gets the whole loss.
        impl: `auto` takes the kernel where it can and says once if not; a named one never falls back.
    Raises ValueError where shapes, terms or a named impl do not fit.
    """
    terms = Terms(z_loss, label_smoothing, softcap)
    _check(logits_NV, labels_N, shard)
    own_3N = row_sums(logits_NV, labels_N, first=shard.first if shard else 0, softcap=softcap, impl=impl)
    sums_3N = _Combine.apply(own_3N, shard.combine) if shard else own_3N
    return losses_of(sums_3N, labels_N, shard.size if shard else logits_NV.shape[1], terms)[0]


def cross_entropy_(logits_NV: Tensor, labels_N: Tensor, *, z_loss: float = 0.0, label_smoothing: float = 0.0,
                   softcap: float = 0.0, shard: VocabShard | None = None, impl: Impl = "auto") -> Tensor:
    """As `cross_entropy`, but the logits become the gradient of the losses' sum, at once: for callers that have no other use
    for them and go on by hand. Half the memory, and two instead of three passes over it. Not recorded for autograd. Where a
    label is no row, the loss is NaN and the gradient finite: that of the loss without its z[label]."""
    terms = Terms(z_loss, label_smoothing, softcap)
    _check(logits_NV, labels_N, shard)
    N, V = logits_NV.shape
    if not _neighbouring(logits_NV) or (N > 1 and logits_NV.stride(0) < V):
        raise ValueError(f"cross_entropy_: logits of strides {logits_NV.stride()} cannot become their gradient; the last "
                         f"stride must be 1, and rows may not overlap: the first at least {V}. Call .contiguous() first")
    with torch.no_grad():
        losses_2N, gradient_NV = loss_and_gradient(logits_NV, labels_N, terms, shard, choose(logits_NV, labels_N, impl))
        if gradient_NV is not logits_NV:
            logits_NV.copy_(gradient_NV)
    return losses_2N[0]


def cross_entropy_reference(logits_NV: Tensor, labels_N: Tensor, *, z_loss: float = 0.0, label_smoothing: float = 0.0,
                            softcap: float = 0.0) -> Tensor:
    """Same contract in plain torch on a whole vocabulary; the oracle for tests and benchmarks."""
    sums_3N = _row_sums_reference(logits_NV, labels_N, 0, softcap)
    return losses_of(sums_3N, labels_N, logits_NV.shape[1], Terms(z_loss, label_smoothing, softcap))[0]


def row_sums(logits_NV: Tensor, labels_N: Tensor, *, first: int = 0, softcap: float = 0.0, impl: Impl = "auto") -> Tensor:
    """lse, z[label] and the sum of z of each row, (3, N) at least fp32, differentiable once; 0 for rows without a label.

    first: row of the whole vocabulary in column 0; z[label] is 0 where the label is not in these columns.
    """
    if choose(logits_NV, labels_N, impl) == "reference":
        return _row_sums_reference(logits_NV, labels_N, first, softcap)
    return torch.ops.officina.cross_entropy_sums(logits_NV, labels_N, first, softcap)


def combine_sums(sums_R3N: Tensor) -> Tensor:
    """The sums of all parts of a vocabulary, (R, 3, N), as those of the whole, (3, N)."""
    return torch.stack([sums_R3N[:, 0].logsumexp(0), sums_R3N[:, 1].sum(0), sums_R3N[:, 2].sum(0)])


def losses_of(sums_3N: Tensor, labels_N: Tensor, vocab_size: int, terms: Terms) -> Tensor:
    """Losses from the sums over the whole vocabulary, and the z-loss in each: (2, N)."""
    lse_N, target_N, total_N = sums_3N.unbind()
    losses_N = lse_N - (1 - terms.label_smoothing) * target_N
    if terms.label_smoothing:
        losses_N = losses_N - terms.label_smoothing / vocab_size * total_N
    z_N = terms.z_loss * lse_N.square() if terms.z_loss else torch.zeros_like(lse_N)
    # Looking for a wrong label on the host would wait for the device; NaN is noticed wherever losses are.
    no_row_N = (labels_N < 0) | (labels_N >= vocab_size)
    return torch.stack([losses_N + z_N, z_N]).masked_fill(no_row_N, torch.nan).masked_fill(labels_N == IGNORE, 0.0)


def loss_and_gradient(logits_NV: Tensor, labels_N: Tensor, terms: Terms, shard: VocabShard | None,
                      impl: str) -> tuple[Tensor, Tensor]:
    """Losses with the z-loss in each (2, N), and the gradient of the losses' sum in the logits (N, V): the logits' own memory
    for `triton`, wide for `reference`. Not for autograd."""
    if impl == "reference":
        return _loss_and_gradient_reference(logits_NV, labels_N, terms, shard)
    if shard is None:
        return torch.ops.officina.cross_entropy_(logits_NV, labels_N, terms.z_loss, terms.label_smoothing,
                                                 terms.softcap), logits_NV
    own_3N = torch.ops.officina.cross_entropy_sums(logits_NV, labels_N, shard.first, terms.softcap)
    sums_3N = shard.combine(own_3N)
    slopes_3N = _slopes(own_3N, sums_3N, labels_N, shard.size, terms)
    torch.ops.officina.cross_entropy_gradient_(logits_NV, labels_N, own_3N, slopes_3N, shard.first, terms.softcap)
    return losses_of(sums_3N, labels_N, shard.size, terms), logits_NV


def choose(logits_NV: Tensor, labels_N: Tensor, impl: Impl) -> str:
    """`triton` or `reference`."""
    return choose_impl("cross_entropy", impl, why_not_triton(logits_NV, labels_N))


def _check(logits_NV: Tensor, labels_N: Tensor, shard: VocabShard | None) -> None:
    if logits_NV.dim() != 2 or labels_N.shape != logits_NV.shape[:1] or not logits_NV.shape[1]:
        raise ValueError(f"cross_entropy: logits {tuple(logits_NV.shape)} and labels {tuple(labels_N.shape)} do not fit; need "
                         "(N, V) with V at least 1, and (N,)")
    if shard and not 0 <= shard.first <= shard.size - logits_NV.shape[1]:
        raise ValueError(f"cross_entropy: the shard's rows {shard.first} to {shard.first + logits_NV.shape[1]} are not among "
                         f"the vocabulary's {shard.size}")


# ---- plain torch ---------------------------------------------------------------------------------------------------
def _row_sums_reference(logits_NV: Tensor, labels_N: Tensor, first: int, softcap: float) -> Tensor:
    z_NV = capped(logits_NV.to(wide_dtype(logits_NV.dtype)), softcap)
    if z_NV.requires_grad:  # of a shard that is switched off, the gradient of lse is 0 and not exp(-inf - -inf)
        z_NV = z_NV.masked_fill(z_NV.detach().amax(1, keepdim=True) == -torch.inf, -torch.inf)
    here_N, index_N1 = _place(labels_N, first, z_NV.shape[1])
    target_N = torch.where(here_N, z_NV.gather(1, index_N1).squeeze(1), 0.0)
    return torch.stack([z_NV.logsumexp(1), target_N, z_NV.sum(1)]).masked_fill(labels_N == IGNORE, 0.0)


def _loss_and_gradient_reference(logits_NV: Tensor, labels_N: Tensor, terms: Terms,
                                 shard: VocabShard | None) -> tuple[Tensor, Tensor]:
    z_NV = capped(logits_NV.to(wide_dtype(logits_NV.dtype)), terms.softcap)
    vocab_size = shard.size if shard else z_NV.shape[1]
    here_N, index_N1 = _place(labels_N, shard.first if shard else 0, z_NV.shape[1])
    # One exponential serves loss and gradient: the largest probability is 1 / sum(exp(z - max z)), never below 1 / V.
    p_NV = z_NV.softmax(1)
    lse_N = z_NV.amax(1) - p_NV.amax(1).log()
    if shard:  # may be switched off as a whole
        off_N = z_NV.amax(1) == -torch.inf
        lse_N.masked_fill_(off_N, -torch.inf)
        p_NV.masked_fill_(off_N[:, None], 0.0)
    target_N = torch.where(here_N, z_NV.gather(1, index_N1).squeeze(1), 0.0)
    own_3N = torch.stack([lse_N, target_N, z_NV.sum(1) if terms.label_smoothing else torch.zeros_like(lse_N)])
    sums_3N = shard.combine(own_3N) if shard else own_3N
    dlse_N, dtarget_N, dtotal_N = _slopes(own_3N, sums_3N, labels_N, vocab_size, terms)
    gradient_NV = p_NV.mul_(dlse_N[:, None])
    gradient_NV.scatter_add_(1, index_N1, torch.where(here_N, dtarget_N, 0.0)[:, None])
    if terms.label_smoothing:
        gradient_NV += dtotal_N[:, None]
    if terms.softcap:
        gradient_NV *= 1 - (z_NV / terms.softcap).square()
    return losses_of(sums_3N, labels_N, vocab_size, terms), gradient_NV


def capped(logits: Tensor, softcap: float) -> Tensor:
    """softcap tanh(logits / softcap); the logits for softcap 0."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _slopes(own_3N: Tensor, sums_3N: Tensor, labels_N: Tensor, vocab_size: int, terms: Terms) -> Tensor:
    """Derivatives of the loss in this rank's own sums, (3, N)."""
    lse_N = sums_3N[0]
    dlse_N = (1 + 2 * terms.z_loss * lse_N) * _share(own_3N, sums_3N)
    dtarget_N = torch.full_like(lse_N, terms.label_smoothing - 1)
    dtotal_N = torch.full_like(lse_N, -terms.label_smoothing / vocab_size)
    return torch.stack([dlse_N, dtarget_N, dtotal_N]).masked_fill(labels_N == IGNORE, 0.0)


def _share(own_3N: Tensor, sums_3N: Tensor) -> Tensor:
    """Probability of this rank's part of the vocabulary, d lse / d own lse; 1 where it is all of it."""
    return torch.exp(own_3N[0] - sums_3N[0])


def _place(labels_N: Tensor, first: int, n_columns: int) -> tuple[Tensor, Tensor]:
    """Whether a label is in these columns, and a column (N, 1) that there is."""
    column_N = labels_N - first
    here_N = (column_N >= 0) & (column_N < n_columns) & (labels_N != IGNORE)
    return here_N, column_N.clamp(0, n_columns - 1)[:, None]


class _Combine(torch.autograd.Function):
    """The whole vocabulary's sums; backward to this rank's own, without another exchange: the loss is on every rank."""

    @staticmethod
    def forward(ctx: Any, own_3N: Tensor, combine: Callable[[Tensor], Tensor]) -> Tensor:
        sums_3N = combine(own_3N)
        ctx.save_for_backward(_share(own_3N, sums_3N), sums_3N)
        return sums_3N

    @staticmethod
    def backward(ctx: Any, slopes_3N: Tensor) -> tuple[Tensor, None]:
        share_N, sums_3N = ctx.saved_tensors
        with torch.no_grad():
            dlse_N, dtarget_N, dtotal_N = slopes_3N.unbind()
            own_3N = torch.stack([dlse_N * share_N, dtarget_N, dtotal_N])
        return *differentiable_once("the gradient of cross_entropy with a shard", "cross_entropy_reference",
                                    (sums_3N, slopes_3N), own_3N), None


# ---- Triton --------------------------------------------------------------------------------------------------------
def _each(one: Config, both: Config, gradient: Config | None = None) -> dict[Any, Config]:
    """Kernel -> its configuration; those that read a row once, and the one that reads it twice."""
    return {"sums": one, "gradient": gradient or one, "loss_and_gradient": both}


CONFIGS = {
    # block_m: programs a multiprocessor; block_n: columns of a tile, of which each warp has its part. The kernel that reads a
    # row twice has one program each: 132 rows of 131,072 bf16 logits are 34 MB, which an L2 of 50 MB holds, and 264 are not.
    "sm_80": _each(Config(4, 4096, 8, 1), Config(1, 16384, 32, 1)),
    "sm_90": _each(Config(4, 4096, 8, 1), Config(1, 16384, 32, 1), Config(2, 8192, 16, 1)),
    # An L2 of 4 to 8 MB holds no rows: many programs, to hide the way to memory.
    "gfx90a": _each(Config(4, 8192, 8, 1), Config(4, 8192, 8, 1)),
    "gfx942": _each(Config(4, 8192, 8, 1), Config(4, 8192, 8, 1)),
    SAFE: _each(Config(4, 4096, 8, 1), Config(2, 4096, 8, 1)),
    INTERPRETER: _each(Config(1, 64, 4, 1), Config(1, 64, 4, 1)),  # small, so that small shapes have many tiles
}
"""Launch configurations. Only sm_90's are measured: see kernels/NOTES.md."""


def compilations(arch: str, dtype: str = "bf16", softcap: float = 0.0) -> Iterator[tuple[str, Any, dict[str, Any], Config]]:
    """Name, kernel, arguments and configuration of each launch on `arch`, for `compiling.compile_for`."""
    for name, config in CONFIGS.get(arch, CONFIGS[SAFE]).items():
        kernel = {"sums": kernels.sums_kernel, "gradient": kernels.gradient_kernel,
                  "loss_and_gradient": kernels.loss_and_gradient_kernel}[name]
        values = {"logits": f"*{dtype}", "out": f"*{dtype}", "labels": "*i64", "sums": "*fp32", "slopes": "*fp32",
                  "losses": "*fp32", "N": "i32", "V": "i32:16", "first": "i32", "stride": "i64:16", "out_stride": "i64:16",
                  "Z_LOSS": 1e-4, "SMOOTHING": 0.1, "SOFTCAP": softcap, "WIDE": tl.float32, "BLOCK": config.block_n}
        yield f"cross-entropy, {name}", kernel, {key: values[key] for key in kernel.arg_names}, config


def _launch(name: str, kernel: Any, logits_NV: Tensor, *arguments: Any, **constants: float) -> None:
    N = logits_NV.shape[0]
    if not N:
        return
    arch = arch_of(logits_NV.device)
    config = look_up("cross_entropy", CONFIGS, arch, name)
    programs = min(N, multiprocessors(logits_NV.device) * config.block_m)
    kernel[(programs,)](logits_NV, *arguments, WIDE=wide_type(logits_NV.dtype), BLOCK=config.block_n, **constants,
                        **config.options(arch))


def _sums(logits_NV: Tensor, labels_N: Tensor, first: int, softcap: float) -> Tensor:
    logits_NV = _rows(logits_NV)
    sums_3N = _empty_sums(logits_NV, labels_N, first, softcap)
    _launch("sums", kernels.sums_kernel, logits_NV, labels_N.contiguous(), sums_3N, *logits_NV.shape, first,
            logits_NV.stride(0), SOFTCAP=softcap)
    return sums_3N


def _empty_sums(logits_NV: Tensor, labels_N: Tensor, first: int, softcap: float) -> Tensor:
    return logits_NV.new_empty(3, logits_NV.shape[0], dtype=wide_dtype(logits_NV.dtype))


def _gradient(logits_NV: Tensor, labels_N: Tensor, sums_3N: Tensor, slopes_3N: Tensor, first: int, softcap: float) -> Tensor:
    gradient_NV = logits_NV.new_empty(logits_NV.shape)
    _gradient_into(gradient_NV, _rows(logits_NV), labels_N, sums_3N, slopes_3N, first, softcap)
    return gradient_NV


def _gradient_(logits_NV: Tensor, labels_N: Tensor, sums_3N: Tensor, slopes_3N: Tensor, first: int, softcap: float) -> None:
    _gradient_into(logits_NV, logits_NV, labels_N, sums_3N, slopes_3N, first, softcap)


def _gradient_into(out_NV: Tensor, logits_NV: Tensor, labels_N: Tensor, sums_3N: Tensor, slopes_3N: Tensor, first: int,
                   softcap: float) -> None:
    _launch("gradient", kernels.gradient_kernel, logits_NV, labels_N.contiguous(), sums_3N.contiguous(), slopes_3N.contiguous(),
            out_NV, *logits_NV.shape, first, logits_NV.stride(0), out_NV.stride(0), SOFTCAP=softcap)


def _loss_and_gradient_(logits_NV: Tensor, labels_N: Tensor, z_loss: float, label_smoothing: float, softcap: float) -> Tensor:
    losses_2N = _empty_losses(logits_NV, labels_N, z_loss, label_smoothing, softcap)
    _launch("loss_and_gradient", kernels.loss_and_gradient_kernel, logits_NV, labels_N.contiguous(), losses_2N,
            *logits_NV.shape, logits_NV.stride(0), Z_LOSS=z_loss, SMOOTHING=label_smoothing, SOFTCAP=softcap)
    return losses_2N


def _empty_losses(logits_NV: Tensor, labels_N: Tensor, z_loss: float, label_smoothing: float, softcap: float) -> Tensor:
    return logits_NV.new_empty(2, logits_NV.shape[0], dtype=wide_dtype(logits_NV.dtype))


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    logits_NV, labels_N, ctx.first, ctx.softcap = inputs
    ctx.save_for_backward(logits_NV, labels_N, output)


def _sums_backward(ctx: Any, slopes_3N: Tensor) -> tuple[Tensor, None, None, None]:
    gradient_NV = torch.ops.officina.cross_entropy_gradient(*ctx.saved_tensors, slopes_3N, ctx.first, ctx.softcap)
    return gradient_NV, None, None, None


def _rows(logits_NV: Tensor) -> Tensor:
    return logits_NV if _neighbouring(logits_NV) else logits_NV.contiguous()


def _neighbouring(logits_NV: Tensor) -> bool:
    """Whether the columns of a row lie side by side, as the kernels read them."""
    return logits_NV.stride(1) == 1 or logits_NV.shape[1] == 1 or not logits_NV.shape[0]


define_op("cross_entropy_sums(Tensor logits, Tensor labels, int first, float softcap) -> Tensor", _sums, _empty_sums,
          _sums_backward, _save)
define_op("cross_entropy_gradient(Tensor logits, Tensor labels, Tensor sums, Tensor slopes, int first, float softcap) "
          "-> Tensor", _gradient, lambda logits, *_: logits.new_empty(logits.shape))
define_op("cross_entropy_gradient_(Tensor(a!) logits, Tensor labels, Tensor sums, Tensor slopes, int first, float softcap) "
          "-> ()", _gradient_, lambda *_: None)
define_op("cross_entropy_(Tensor(a!) logits, Tensor labels, float z_loss, float label_smoothing, float softcap) -> Tensor",
          _loss_and_gradient_, _empty_losses)
