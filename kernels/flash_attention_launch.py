"""Launches of the flash attention kernels: which configuration, how many programs, which strides."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from officina.kernels import flash_attention_hopper as hopper
from officina.kernels import flash_attention_hopper_backward as hopper_backward
from officina.kernels import flash_attention_triton as kernels
from officina.kernels import hopper_descriptors as descriptors
from officina.kernels.dispatch import log_once
from officina.kernels.flash_attention_tables import (
    BACKWARD_FUSED,
    BACKWARD_KEYS,
    BACKWARD_KEYS_HOPPER,
    BACKWARD_PATH,
    BACKWARD_QUERIES,
    BACKWARD_QUERIES_HOPPER,
    FORWARD,
    FORWARD_HOPPER,
    FORWARD_PATH,
    key_of,
    padded,
)
from officina.kernels.ops import multiprocessors
from officina.kernels.tables import Config, Table, arch_of, is_amd, look_up

LOG2_E = 1.4426950408889634
CACHE_BYTES = 24 * 2**20
"""Keys and values of the heads worked on at a time: they should stay in the L2 cache (A100 40 MB, H100 50 MB)."""
PACKED_ROWS = 2048
"""Keys of a head that programs read at a time where documents are packed into rows: a launch knows no lengths. 2,048 was 2 %
faster than 4,096 for documents of that mean length (H200, 2026-11-27), 32,768 6 % slower."""
MAX_ROW_STRIDE = 2**22
"""Elements from row to row up to which offsets within a tile fit into 32 bits."""
DELTA = Config(32, 0, 4, 1)


def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Tensor | None, causal: bool, scale: float,
            window: int, softcap: float) -> None:
    """Fill `out` and `lse`."""
    B, H, T, D = q.shape
    G, S = k.shape[1:3]
    if not out.numel():
        return
    spans, window = _contiguous(spans), _reach(window, T, S)
    if forward_path(q, k, causal) == "hopper":
        _forward_hopper(q, k, v, out, lse, spans, causal, scale, window, softcap)
        return
    q, k, v = map(_rows, (q, k, v))
    arch, config = _configure("forward", FORWARD, q, causal)
    _run(kernels.forward_kernel, B * H * -(-T // config.block_m), config, arch, q, k, v, out, lse, spans,
         *_strides(q, k, v, out), B, H, T, S, _wave(S, k, spans) * (H // G), window, *_units(scale, softcap),
         GROUP=H // G, CAUSAL=causal, SOFTCAP=softcap > 0, N=config.block_n, **_widths(D), M=config.block_m)


def forward_path(q: Tensor, k: Tensor, causal: bool) -> str:
    """`hopper` or `portable`: what FORWARD_PATH says, or the portable kernel for what the other cannot do, said once."""
    return _path(FORWARD_PATH, hopper.why_not_hopper, q, k, causal)


def backward_path(q: Tensor, k: Tensor, causal: bool) -> str:
    """The same by BACKWARD_PATH."""
    return _path(BACKWARD_PATH, hopper_backward.why_not_hopper, q, k, causal)


def _path(paths: Mapping[tuple[str, int, bool], str], why_not: Callable[..., str | None], q: Tensor, k: Tensor,
          causal: bool) -> str:
    arch = arch_of(q.device)
    head_width, *_ = key_of(q.shape[-1], causal, 16)
    path = paths.get((arch, head_width, causal), "portable")
    if path == "hopper" and (why := why_not(arch, q.shape[-1], k.shape[2], q.dtype)):
        log_once(f"flash_attention: the portable kernel in place of the one for Hopper: {why}")
        return "portable"
    return path


def _forward_hopper(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Tensor | None, causal: bool, scale: float,
                    window: int, softcap: float) -> None:
    B, H, T, D = q.shape
    G, S = k.shape[1:3]
    q, k, v = map(descriptors.loadable, (q, k, v))
    key = key_of(D, causal, 16)
    config = hopper.with_softcap(look_up("flash_attention_forward_hopper", FORWARD_HOPPER, "sm_90", key), softcap > 0)
    tiles = _descriptors((q, k, v, out), hopper.tile_rows(config), key[0])
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)  # of tiles that are taken
    programs = min(B * H * -(-T // config.block_m), multiprocessors(q.device))
    _run(hopper.forward_kernel, programs, config, "sm_90", *tiles, lse, spans, counter, B, H, H // G, T, S,
         _wave(S, k, spans) * (H // G), window, *_units(scale, softcap), CAUSAL=causal, SOFTCAP=softcap > 0,
         **hopper.constants(config))


def _descriptors(tensors: Sequence[Tensor], tile_rows: Mapping[str, int], width: int) -> list[Any]:
    return [descriptors.descriptor(x, rows, width) if x.dim() == 4 else descriptors.numbers_descriptor(x, rows)
            for x, rows in zip(tensors, tile_rows.values(), strict=True)]


def backward(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, dq: Tensor,
             dk: Tensor, dv: Tensor, spans: Tensor | None, causal: bool, scale: float, window: int, softcap: float,
             deterministic: bool) -> None:
    """Fill `dq`, `dk` and `dv`."""
    B, H, T, D = q.shape
    G, S = k.shape[1:3]
    if not dq.numel() or not dk.numel():
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return
    spans, window = _contiguous(spans), _reach(window, T, S)
    if causal and T > S:  # the first rows see nothing; merging partial results yields NaN for them, and 0 NaN is NaN
        dout = dout.clone()
        dout[:, :, :T - S] = 0
    arch = arch_of(q.device)
    out, rows = _rows(out), _rows(dout)
    delta = torch.empty_like(lse)
    _run(kernels.delta_kernel, B * H * -(-T // DELTA.block_m), DELTA, arch, out, rows, dlse, lse, delta,
         *_strides(out, rows), *((0, 0, 0) if dlse is None else dlse.stride()), H, T, M=DELTA.block_m, **_widths(D))
    if backward_path(q, k, causal) == "hopper":
        _backward_hopper(dout, lse, delta, q, k, v, dq, dk, dv, spans, causal, scale, window, softcap)
        return
    q, k, v, dout = *map(_rows, (q, k, v)), rows
    arch, split = _configure("backward_queries", BACKWARD_QUERIES, q, causal)
    switches = {"GROUP": H // G, "CAUSAL": causal, "SOFTCAP": softcap > 0, **_widths(D)}
    numbers = window, *_units(scale, softcap), scale
    fused = not deterministic and adds_atomically(arch)
    arch, config = _configure("backward", BACKWARD_FUSED if fused else BACKWARD_KEYS, q, causal)
    total = torch.zeros(dq.shape, dtype=torch.float32, device=dq.device) if fused else dq
    _run(kernels.backward_keys_kernel, B * G * -(-S // config.block_n), config, arch, q, k, v, dout, lse, delta, total, dk, dv,
         spans, *_strides(q, k, v, dout, dk, dv), B, H, T, S, max(1, _wave(T, q, spans) // (H // G)), *numbers,
         FUSED=fused, M=config.block_m, N=config.block_n, **switches)
    if fused:
        dq.copy_(total)
        return
    _run(kernels.backward_queries_kernel, B * H * -(-T // split.block_m), split, arch, q, k, v, dout, lse, delta, dq, spans,
         *_strides(q, k, v, dout, dq), B, H, T, S, _wave(S, k, spans) * (H // G), *numbers,
         M=split.block_m, N=split.block_n, **switches)


def _backward_hopper(dout: Tensor, lse: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor,
                     dv: Tensor, spans: Tensor | None, causal: bool, scale: float, window: int, softcap: float) -> None:
    B, H, T, D = q.shape
    G, S = k.shape[1:3]
    q, k, v, dout = map(descriptors.loadable, (q, k, v, dout))
    key = key_of(D, causal, 16)
    lengths, numbers = (B, H, H // G, T, S), (window, *_units(scale, softcap), scale)
    switches = {"CAUSAL": causal, "SOFTCAP": softcap > 0}
    config = look_up("flash_attention_backward_keys_hopper", BACKWARD_KEYS_HOPPER, "sm_90", key)
    spaced = [hopper_backward.spaced(x) for x in (lse, delta)]
    tiles = _descriptors((k, v, q, dout, *spaced, dk, dv), hopper_backward.keys_tiles(config), key[0])
    _run(hopper_backward.keys_kernel, B * G * -(-S // config.block_n), config, "sm_90", *tiles, spans, *lengths,
         spaced[0].shape[-1], max(1, _wave(T, q, spans) // (H // G)), *numbers, **switches, **hopper_backward.constants(config))
    config = look_up("flash_attention_backward_queries_hopper", BACKWARD_QUERIES_HOPPER, "sm_90", key)
    tiles = _descriptors((q, dout, k, v, dq), hopper_backward.queries_tiles(config), key[0])
    _run(hopper_backward.queries_kernel, B * H * -(-T // config.block_m), config, "sm_90", *tiles, lse, delta, spans, *lengths,
         _wave(S, k, spans) * (H // G), *numbers, **switches, **hopper_backward.constants(config))


def adds_atomically(arch: str) -> bool:
    """Whether the architecture adds floats in memory by one instruction; of AMD's only those in the table are known to."""
    return not is_amd(arch) or arch in BACKWARD_FUSED


def compilations(arch: str, *, head_dims: Iterable[int] = (64, 128, 256), dtypes: Iterable[str] = ("bf16",),
                 causal: Sequence[bool] = (True, False), packed: bool = False, softcap: bool = False, group: int = 4,
                 single: bool = False) -> Iterator[tuple[str, Any, dict[str, Any], Config]]:
    """(name, kernel, arguments, configuration) of what `arch` runs, for compiling.compile_for.

    SAFE's configurations where that is named or the architecture is unknown. `single`: one row, head, query and key, which
    Triton compiles as constants.
    """
    tables = {"forward": (kernels.forward_kernel, FORWARD), "backward_fused": (kernels.backward_keys_kernel, BACKWARD_FUSED),
              "backward_keys": (kernels.backward_keys_kernel, BACKWARD_KEYS),
              "backward_queries": (kernels.backward_queries_kernel, BACKWARD_QUERIES), "delta": (kernels.delta_kernel, None)}
    if not adds_atomically(arch):
        del tables["backward_fused"]
    for (name, (kernel, table)), dtype, head_dim, triangle in itertools.product(tables.items(), dtypes, head_dims, causal):
        if table is None and triangle is not causal[0]:
            continue  # it knows no masks: once is enough
        key = key_of(head_dim, triangle, 32 if dtype == "fp32" else 16)
        config = look_up(f"flash_attention_{name}", table, arch, key) if table else DELTA
        constants = {"GROUP": group, "CAUSAL": triangle, "SOFTCAP": softcap, "FUSED": name == "backward_fused",
                     "M": config.block_m, "N": config.block_n, **_widths(head_dim), **dict.fromkeys("BHTS" * single, 1)}
        types = {**dict.fromkeys(("q", "k", "v", "out", "dout", "dq", "dk", "dv"), f"*{dtype}"),
                 **dict.fromkeys(("lse", "dlse", "delta"), "*fp32"), **dict.fromkeys(("scale", "cap", "dscale"), "fp32"),
                 "spans": "*i32" if packed else None}
        if name == "backward_fused":
            types["dq"] = "*fp32"
        arguments = {parameter: "i32:16" if parameter.startswith("stride") else {**types, **constants}.get(parameter, "i32")
                     for parameter in kernel.arg_names}
        switches = "".join((" causal" * triangle, " packed" * packed, " softcap" * softcap)) if table else ""
        yield f"{name} {dtype} head_dim={head_dim}{switches}", kernel, arguments, config
    there = hopper_backward
    by_tma = (("forward_hopper", hopper, hopper.forward_kernel, FORWARD_HOPPER, hopper.tile_rows),
              ("backward_keys_hopper", there, there.keys_kernel, BACKWARD_KEYS_HOPPER, there.keys_tiles),
              ("backward_queries_hopper", there, there.queries_kernel, BACKWARD_QUERIES_HOPPER, there.queries_tiles))
    for (name, module, kernel, table, tile_rows), dtype, head_dim, triangle in itertools.product(
            by_tma, dtypes, head_dims, causal):
        if dtype == "fp32" or module.why_not_hopper(arch, head_dim, 1, torch.bfloat16):
            continue
        key = key_of(head_dim, triangle, 16)
        config = look_up(f"flash_attention_{name}", table, arch, key)
        config = hopper.with_softcap(config, softcap) if module is hopper else config
        types = {**dict.fromkeys(("lse", "delta"), "*fp32"), **dict.fromkeys(("scale", "cap", "dscale"), "fp32"),
                 "spans": "*i32" if packed else None, "counter": "*i32", "CAUSAL": triangle, "SOFTCAP": softcap,
                 **module.constants(config)}
        for tile, rows in tile_rows(config).items():
            numbers = tile in ("lse_desc", "delta_desc")
            types[tile] = descriptors.numbers_type(rows) if numbers else descriptors.descriptor_type(dtype, rows, key[0])
        switches = "".join((" causal" * triangle, " packed" * packed, " softcap" * softcap))
        yield (f"{name} {dtype} head_dim={head_dim}{switches}", kernel,
               {parameter: types.get(parameter, "i32") for parameter in kernel.arg_names}, config)


def _run(kernel: Any, programs: int, config: Config, arch: str, *arguments: Any, **constants: Any) -> None:
    kernel[(programs,)](*arguments, **constants, **config.options(arch))


def _configure(name: str, table: Table, q: Tensor, causal: bool) -> tuple[str, Config]:
    arch = arch_of(q.device)
    bits = 8 * q.element_size()
    return arch, look_up(f"flash_attention_{name}", table, arch, key_of(q.shape[-1], causal, bits))


def _widths(head_dim: int) -> dict[str, int]:
    return {"D": padded(head_dim), "HEAD_DIM": head_dim}


def _units(scale: float, softcap: float) -> tuple[float, float]:
    """Factors that bring a product q k^T into log2 units: times the first, or with a softcap second * tanh(first * product)."""
    return (scale / softcap, softcap * LOG2_E) if softcap else (scale * LOG2_E, 0.0)


def _wave(n_rows: int, x: Tensor, spans: Tensor | None) -> int:
    """How many heads to work on at a time, if each has two tensors like x of `n_rows` rows that all its programs read.

    With documents a program reads one or two of them, and programs take very different times: the more heads are worked on at
    a time, the less a long one of the last leaves the others without work.
    """
    rows = n_rows if spans is None else min(n_rows, PACKED_ROWS)
    heads = x.shape[0] * x.shape[1]
    most = max(1, CACHE_BYTES // max(1, 2 * rows * x.shape[-1] * x.element_size()))
    return -(-heads // -(-heads // most))  # no wave much smaller than the others


def _reach(window: int, n_queries: int, n_keys: int) -> int:
    """The window for the kernels, who add it to places in 32 bits; so wide that it cuts nothing where there is none."""
    return min(window or n_queries + n_keys, n_queries + n_keys)


def _contiguous(spans: Tensor | None) -> Tensor | None:
    return None if spans is None else spans.contiguous()


def _rows(x: Tensor) -> Tensor:
    """x itself, or a copy where the kernels could not walk it: heads must lie in one piece, rows not too far apart."""
    return x if x.stride(-1) == 1 and abs(x.stride(-2)) <= MAX_ROW_STRIDE else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]
