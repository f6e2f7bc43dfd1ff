"""What `officina bench kernels` measures: each kernel over shapes, its baselines, and the work that no kernel can avoid.

A case is built on a device when its turn comes: random inputs, and for each phase (forward, backward, both, ...) what the
entrants do. `OURS` is the Triton kernel; `PLAIN` is its reference in eager torch; others are named with their back end.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from officina.benchmarks.kernel_timing import Work
from officina.kernels import flash_attention_hopper, flash_attention_hopper_backward
from officina.kernels.activations import swiglu, swiglu_reference
from officina.kernels.adamw import adamw_step_
from officina.kernels.cross_entropy import cross_entropy, cross_entropy_
from officina.kernels.flash_attention import flash_attention, flash_attention_reference
from officina.kernels.flash_attention_tables import BACKWARD_PATH, FORWARD_PATH, key_of
from officina.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from officina.kernels.masks import dense_mask, document_spans
from officina.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from officina.kernels.rope import rope, rope_reference
from officina.kernels.symmetric import symmetric_product, symmetric_product_reference
from officina.kernels.tables import arch_of

OURS, PLAIN, COMPILED, LIGER = "officina", "eager torch", "torch.compile", "Liger"
COPY = "copy of as many bytes"
PORTABLE, DETERMINISTIC, IN_PLACE = "officina, portable", "officina, portable, deterministic", "officina, in place"
FLEX, FLASH, CUDNN, VARLEN = "FlexAttention", "SDPA flash", "SDPA cuDNN", "torch varlen_attn"
SLOW_STARTERS = {COMPILED, FLEX}
"""Entrants that compile for seconds to minutes; left out where the time is short."""

EAGER_SCORES = 2**30
"""Attention scores that eager torch may hold, 4 GiB in fp32: it takes a hundred times as long as the others."""


@dataclass(frozen=True, slots=True)
class Floor:
    """Work that a phase cannot avoid."""

    bytes: float = 0.0
    """Inputs read once and outputs written once."""
    flops: float = 0.0


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel on one shape. kernel and shape name it in the record."""

    kernel: str
    shape: str
    floors: Mapping[str, Floor]
    """Phase -> floor."""
    build: Callable[[torch.device, str, bool], dict[str, Work]]
    """(device, phase, kernels) -> entrants. kernels false: the reference stands for the Triton kernel, to try the program."""
    goal: bool = False
    """Whether a goal is set for this shape; `--goals` measures these only."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the shape is, for the record."""


def cases(tiny: bool) -> list[Case]:
    """All cases. tiny: shapes that a processor does in milliseconds."""
    return [*_attention(tiny), *_documents(tiny), *_norms(tiny), *_rope(tiny), *_swiglu(tiny), *_cross_entropy(tiny),
            *_linear_cross_entropy(tiny), *_adamw(tiny), *_symmetric(tiny)]


# ---- attention -----------------------------------------------------------------------------------------------------
def _attention(tiny: bool) -> Iterator[Case]:
    """16k tokens and 2,048 features a case, as in the papers of FlashAttention, so that their figures can be compared."""
    tokens, width = (128, 64) if tiny else (16_384, 2_048)
    lengths = (32, 64) if tiny else (512, 1024, 2048, 4096, 8192, 16_384, 32_768)
    goals = {(128, True, 4096), (128, True, 16_384), (128, False, 8192), (64, True, 8192), (128, True, 8192), (64, False, 8192),
             (128, True, 32_768)}
    for D in (16,) if tiny else (64, 128):
        for causal in (True, False):
            for T in lengths:
                B, H = max(1, tokens // T), width // D
                flops = 4 * B * H * T * T * D / (2 if causal else 1)
                yield Case("attention", f"head {D}, {'causal' if causal else 'full'}, T {T}",
                           _attention_floors(flops, 2 * B * H * T * D), functools.partial(build_attention, B, H, T, D, causal),
                           (D, causal, T) in goals, {"B": B, "T": T, "H": H, "D": D, "causal": causal})


def _documents(tiny: bool) -> Iterator[Case]:
    """32k tokens in documents of 2k on average; operations are counted on what is not masked."""
    T, mean, width = (128, 16, 32) if tiny else (32_768, 2_048, 2_048)
    lengths = _document_lengths(T, mean)
    for D in (16,) if tiny else (64, 128):
        for causal in (True, False):
            H = width // D
            flops = sum(4 * H * n * n * D for n in lengths) / (2 if causal else 1)
            yield Case("attention", f"head {D}, {'causal' if causal else 'full'} documents, T {T}",
                       _attention_floors(flops, 2 * H * T * D),
                       functools.partial(build_attention, 1, H, T, D, causal, lengths=lengths), D != 64 and causal,
                       {"lengths": lengths})


def _attention_floors(flops: float, tensor_bytes: int) -> dict[str, Floor]:
    """Two products forward, five backward: the scores are made once more."""
    return {"forward": Floor(4 * tensor_bytes, flops), "backward": Floor(8 * tensor_bytes, 2.5 * flops),
            "both": Floor(12 * tensor_bytes, 3.5 * flops)}


def _document_lengths(tokens: int, mean: int) -> list[int]:
    """Lengths that add up to tokens, exponentially distributed, the same every time."""
    generator = torch.Generator().manual_seed(0)
    found: list[int] = []
    while sum(found) < tokens:
        found.append(1 + int(torch.empty(()).exponential_(1 / mean, generator=generator)))
    return [*found[:-1], tokens - sum(found[:-1])]


def build_attention(B: int, H: int, T: int, D: int, causal: bool, device: torch.device, phase: str, kernels: bool,
                    lengths: Sequence[int] = (), path: str = "") -> dict[str, Work]:
    """path: `hopper` or `portable` for OURS in place of what ships."""
    q, k, v = (_random(device, B, H, T, D).requires_grad_() for _ in range(3))
    spans = documents = None
    if lengths:
        documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].to(device)
        spans = document_spans(documents)

    def ours(q: Tensor, k: Tensor, v: Tensor, deterministic: bool = False) -> Tensor:
        return flash_attention(q, k, v, causal=causal, spans_B2S=spans, deterministic=deterministic, impl=_impl(kernels))[0]

    def by(path: str, work: Work) -> Work:
        """Forward and backward by the kernels of one path."""
        def run() -> Any:
            module = flash_attention_hopper if phase == "forward" else flash_attention_hopper_backward
            if path == "hopper" and (why := module.why_not_hopper(arch_of(device), D, T, q.dtype)):
                raise ValueError(why)
            table = {(arch_of(device), key_of(D, causal, 16)[0], causal): path}
            with mock.patch.dict(FORWARD_PATH, table), mock.patch.dict(BACKWARD_PATH, table):
                return work.run()
        return Work(run, work.before)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if B * H * T * T > EAGER_SCORES:
            raise ValueError(f"{B * H * T * T:.1e} scores do not fit")
        return flash_attention_reference(q, k, v, mask=dense_mask(T, T, causal, 0, spans, device), scale=D**-0.5)[0]

    def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    entrants: dict[str, Callable[..., Tensor]] = {OURS: ours, PORTABLE: ours}
    if phase != "forward":
        entrants[DETERMINISTIC] = functools.partial(ours, deterministic=True)
    if not lengths:
        entrants |= {FLASH: functools.partial(sdpa, SDPBackend.FLASH_ATTENTION),
                     CUDNN: functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION)}
    elif device.type == "cuda":
        ends = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
        entrants[VARLEN] = functools.partial(_varlen, ends, max(lengths), causal)
    if device.type == "cuda":
        entrants[FLEX] = flex(T, causal, documents, device)
    found = _phase(entrants | {PLAIN: eager}, (q, k, v), phase)
    paths = {OURS: path, PORTABLE: "portable", DETERMINISTIC: "portable"}
    return {name: by(paths[name], work) if paths.get(name) else work for name, work in found.items()}


def _varlen(ends: Tensor, longest: int, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # torch 2.10 and newer

    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (T, H, D)
    out = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0) if causal else (-1, -1))
    return out.transpose(0, 1)[None]


def flex(T: int, causal: bool, documents: Tensor | None, device: torch.device) -> Callable[..., Tensor]:
    """FlexAttention, compiled when it is first called; documents (1, T) are told apart by their numbers."""
    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j <= i if causal else j == j
        return seen if documents is None else seen & (documents[b, i] == documents[b, j])

    run = torch.compile(flex_attention, dynamic=False)
    mask = functools.cache(lambda: torch.compile(create_block_mask)(sees, None, None, T, T, device=device)
                           if causal or documents is not None else None)
    return lambda q, k, v: run(q, k, v, block_mask=mask())


# ---- rows ----------------------------------------------------------------------------------------------------------
def _norms(tiny: bool) -> Iterator[Case]:
    N = 32 if tiny else 8192
    for D in (64,) if tiny else (2048, 4096, 8192, 16_384):
        row = 2 * N * D
        yield Case("RMSNorm", f"{N} x {D}", _row_floors(2 * row, 3 * row), functools.partial(build_norm, N, D),
                   tiny or D == 4096)
        yield Case("add + RMSNorm", f"{N} x {D}", _row_floors(4 * row, 4 * row), functools.partial(_build_add_norm, N, D),
                   tiny or D == 4096)


def _row_floors(forward: int, backward: int) -> dict[str, Floor]:
    return {"forward": Floor(forward), "backward": Floor(backward), "both": Floor(forward + backward)}


def build_norm(N: int, D: int, device: torch.device, phase: str, kernels: bool) -> dict[str, Work]:
    x, weight = _random(device, N, D).requires_grad_(), _random(device, D).requires_grad_()
    return _phase({OURS: functools.partial(rms_norm, impl=_impl(kernels)), PLAIN: rms_norm_reference,
                   COMPILED: compiled(rms_norm_reference), "F.rms_norm": lambda x, w: F.rms_norm(x, (D,), w, 1e-6),
                   LIGER: _liger("liger_rms_norm", lambda f, x, w: f(x, w, 1e-6, in_place=False))}, (x, weight), phase)


def _build_add_norm(N: int, D: int, device: torch.device, phase: str, kernels: bool) -> dict[str, Work]:
    x, residual, weight = (_random(device, *shape).requires_grad_() for shape in ((N, D), (N, D), (D,)))
    return _phase({OURS: functools.partial(add_rms_norm, impl=_impl(kernels)), PLAIN: add_rms_norm_reference,
                   COMPILED: compiled(add_rms_norm_reference),
                   LIGER: _liger("liger_fused_add_rms_norm", lambda f, x, r, w: f(x, r, w, 1e-6, in_place=False))},
                  (x, residual, weight), phase)


def _rope(tiny: bool) -> Iterator[Case]:
    """Queries and four times fewer keys, as one product makes them: (B, T, heads, head width) in memory."""
    for T, H in ((16, 4),) if tiny else ((8192, 16), (8192, 32), (8192, 64)):
        K = 16 if tiny else 128
        moved = 2 * 2 * T * (H + H // 4) * K
        yield Case("RoPE", f"{T} x {H} heads", _row_floors(moved, moved), functools.partial(build_rope, T, H, K),
                   tiny or H == 32, {"T": T, "H": H, "G": H // 4, "K": K})


def build_rope(T: int, H: int, K: int, device: torch.device, phase: str, kernels: bool) -> dict[str, Work]:
    q, k = (_random(device, 1, T, heads, K).requires_grad_() for heads in (H, H // 4))
    angles = torch.outer(torch.arange(T, device=device), 10_000 ** -torch.linspace(0, 1, K // 2, device=device))[None]
    cos, sin = angles.cos(), angles.sin()
    wide = [torch.cat((x, x), -1).to(torch.bfloat16) for x in (cos, sin)]

    def turned(run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda q, k: run(q.transpose(1, 2), k.transpose(1, 2), cos[:, None], sin[:, None])

    found = _phase({OURS: turned(functools.partial(rope, impl=_impl(kernels))), PLAIN: turned(rope_reference),
                    COMPILED: compiled(turned(rope_reference))}, (q, k), phase)
    liger = _liger("liger_rope", lambda f, q, k: f(q.transpose(1, 2), k.transpose(1, 2), *wide))
    return found | {LIGER: _overwriting(liger, (q, k), phase)}  # it turns them where they lie


def _swiglu(tiny: bool) -> Iterator[Case]:
    N = 32 if tiny else 8192
    for width in (64,) if tiny else (5632, 14_336, 28_672, 53_248):
        row = 2 * N * width
        yield Case("SwiGLU", f"{N} x {width}", _row_floors(3 * row, 5 * row), functools.partial(build_swiglu, N, width),
                   tiny or width == 14_336)


def build_swiglu(N: int, width: int, device: torch.device, phase: str, kernels: bool) -> dict[str, Work]:
    gate, up = (_random(device, N, width).requires_grad_() for _ in range(2))
    found = _phase({OURS: functools.partial(swiglu, impl=_impl(kernels)), PLAIN: swiglu_reference,
                    COMPILED: compiled(swiglu_reference)}, (gate, up), phase)
    liger = _liger("liger_swiglu", lambda f, a, b: f(a, b))
    return found | {LIGER: _overwriting(liger, (gate, up), phase)}  # its backward writes the gradients over the inputs


# ---- the loss ------------------------------------------------------------------------------------------------------
def _cross_entropy(tiny: bool) -> Iterator[Case]:
    N = 16 if tiny else 8192
    for V in (320,) if tiny else (32_768, 65_536, 131_072, 262_144):
        logits = 2 * N * V
        yield Case("cross-entropy", f"{N} x {V}", {"forward": Floor(logits), "both": Floor(2 * logits)},
                   functools.partial(_build_cross_entropy, N, V), tiny or V == 131_072)


def _build_cross_entropy(N: int, V: int, device: torch.device, phase: str, kernels: bool) -> dict[str, Work]:
    fresh, labels = _random(device, N, V, scale=2.0), torch.randint(0, V, (N,), device=device)
    impl = _impl(kernels)

    def eager(x: Tensor) -> Tensor:
        return F.cross_entropy(x.float(), labels, reduction="none")

    leaf = fresh.clone().requires_grad_()
    found = _phase({OURS: lambda x: cross_entropy(x, labels, impl=impl), PLAIN: eager, COMPILED: compiled(eager)}, (leaf,),
                   phase)
    liger = _liger("liger_cross_entropy", lambda f, x: f(x, labels, reduction="sum"))
    found[LIGER] = _overwriting(liger, (leaf,), phase)  # its forward writes the gradient over the logits
    if phase == "both":
        logits = fresh.clone()
        found[IN_PLACE] = Work(lambda: cross_entropy_(logits, labels, impl=impl), lambda: logits.copy_(fresh))
    return found


def _linear_cross_entropy(tiny: bool) -> Iterator[Case]:
    N, D = (16, 32) if tiny else (8192, 4096)
    for V in (320,) if tiny else (32_768, 131_072, 262_144):
        flops = 2.0 * N * D * V
        yield Case("linear cross-entropy", f"{N} x {D} x {V}", {"forward": Floor(flops=flops), "both": Floor(flops=3 * flops)},
                   functools.partial(_build_linear_cross_entropy, N, D, V), tiny or V == 131_072,
                   {"gradient_bytes": 2 * D * (N + V)})


def _build_linear_cross_entropy(N: int, D: int, V: int, device: torch.device, phase: str, kernels: bool) -> dict[str, Work]:
    x, weight = _random(device, N, D).requires_grad_(), _random(device, V, D, scale=0.02).requires_grad_()
    labels = torch.randint(0, V, (N,), device=device)
    entrants = {OURS: lambda x, w: linear_cross_entropy(x, w, labels, impl=_impl(kernels)),
                PLAIN: lambda x, w: linear_cross_entropy_reference(x, w, labels),
                COMPILED: compiled(lambda x, w: linear_cross_entropy_reference(x, w, labels)),
                LIGER: _liger("liger_fused_linear_cross_entropy", lambda f, x, w: f(x, w, labels, reduction="sum"))}
    if phase == "forward":  # of an evaluation; in training ours makes the gradients in the forward pass
        return {name: Work(functools.partial(_without_gradient, run, (x, weight))) for name, run in entrants.items()}
    return _phase(entrants, (x, weight), phase)


# ---- the optimizer -------------------------------------------------------------------------------------------------
def _adamw(tiny: bool) -> Iterator[Case]:
    """1.0e9 parameters: bf16 gradient read, fp32 master and two moments read and written, bf16 copy written."""
    tensors, side = (3, 16) if tiny else (60, 4096)
    yield Case("AdamW", f"{tensors} x {side} x {side}", {"step": Floor(28 * tensors * side * side)},
               functools.partial(build_adamw, tensors, side), True)


def build_adamw(tensors: int, side: int, device: torch.device, phase: str, kernels: bool) -> dict[str, Work]:
    params, exp_avgs, exp_avg_sqs = ([torch.rand(side, side, device=device) for _ in range(tensors)] for _ in range(3))
    grads, copies = ([_random(device, side, side) for _ in range(tensors)] for _ in range(2))
    step = torch.zeros((), device=device)
    settings = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}

    def ours(impl: str) -> None:
        adamw_step_(params, grads, exp_avgs, exp_avg_sqs, step, copies=copies, impl=impl, **settings)

    @functools.cache
    def optimizer() -> torch.optim.Optimizer:
        for param in params:
            param.grad = torch.empty_like(param)
        return torch.optim.AdamW(params, 1e-4, (0.9, 0.95), 1e-8, 0.1, fused=True)

    def fused() -> None:
        optimizer()
        torch._foreach_copy_([param.grad for param in params], grads)
        optimizer().step()
        torch._foreach_copy_(copies, params)

    return {OURS: Work(lambda: ours(_impl(kernels))), "torch fused": Work(fused), PLAIN: Work(lambda: ours("reference"))}


def _symmetric(tiny: bool) -> Iterator[Case]:
    """The floor has half the operations of a general product."""
    for N, M in ((32, 64),) if tiny else ((2048, 2048), (4096, 4096), (4096, 16_384), (8192, 8192)):
        yield Case("X X^T", f"{N} x {M}", {"forward": Floor(2 * N * (N + M), N * N * M)},
                   functools.partial(build_symmetric, N, M), tiny or (N, M) == (4096, 4096))


def build_symmetric(N: int, M: int, device: torch.device, phase: str, kernels: bool) -> dict[str, Work]:
    x = _random(device, N, M)
    return _phase({OURS: functools.partial(symmetric_product, impl=_impl(kernels)), PLAIN: symmetric_product_reference},
                  (x,), phase)


# ---- parts of all --------------------------------------------------------------------------------------------------
def _phase(entrants: Mapping[str, Callable[..., Any]], inputs: Sequence[Tensor], phase: str) -> dict[str, Work]:
    """Work of each entrant in a phase: forward as in training, backward again and again from one forward, or both."""
    if phase == "forward":
        return {name: Work(functools.partial(run, *inputs)) for name, run in entrants.items()}
    leaves = [x for x in inputs if x.requires_grad]
    if phase == "both":
        return {name: Work(functools.partial(_forward_and_backward, run, inputs, leaves)) for name, run in entrants.items()}
    return {name: Work(_Backward(run, inputs, leaves)) for name, run in entrants.items()}


def _overwriting(run: Callable[..., Any], inputs: Sequence[Tensor], phase: str) -> Work:
    """An entrant that may write over its inputs: on copies, made anew before each call."""
    own = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]

    def restore() -> None:
        for mine, x in zip(own, inputs, strict=True):
            mine.data.copy_(x.detach())

    [work] = _phase({"": run}, own, phase).values()
    return Work(work.run, restore)


class _Backward:
    """The forward pass comes with the first call, so that one that fails does so among the measurements."""

    def __init__(self, run: Callable[..., Any], inputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
        self.run, self.inputs, self.leaves = run, inputs, leaves
        self.outputs: list[Tensor] = []

    def __call__(self) -> Sequence[Tensor]:
        if not self.outputs:
            self.outputs = _listed(self.run(*self.inputs))
            generator = torch.Generator(self.outputs[0].device).manual_seed(1)  # the same for all entrants
            self.upper = [torch.randn(y.shape, generator=generator, device=y.device, dtype=y.dtype) for y in self.outputs]
        return torch.autograd.grad(self.outputs, self.leaves, self.upper, retain_graph=True)


def _forward_and_backward(run: Callable[..., Any], inputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> Sequence[Tensor]:
    outputs = _listed(run(*inputs))
    return torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])


def _without_gradient(run: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
    with torch.no_grad():
        return run(*inputs)


def _listed(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else [y for y in outputs if y is not None and y.requires_grad]


def _random(device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, device=device)).to(torch.bfloat16)


def _impl(kernels: bool) -> str:
    return "triton" if kernels else "reference"


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function by torch.compile, compiled when it is first called."""
    made = functools.cache(lambda: torch.compile(function, dynamic=False))
    return lambda *inputs: made()(*inputs)


def _liger(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """A function of Liger-Kernel, looked up when it is first called."""
    @functools.cache
    def find() -> Callable[..., Any]:
        try:
            from liger_kernel.transformers import functional
        except ImportError:
            raise ModuleNotFoundError("not installed: pip install liger-kernel") from None
        return getattr(functional, name)

    return lambda *inputs: call(find(), *inputs)
