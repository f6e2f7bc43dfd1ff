"""Every shipped configuration of flash attention compiles for every architecture, without a GPU, and spills nothing."""

import re
import subprocess

import pytest
import torch

from officina.kernels.compiling import ARCHS, compile_for
from officina.kernels.dispatch import triton
from officina.kernels.flash_attention_hopper import REGISTERS, why_not_hopper
from officina.kernels.flash_attention_launch import adds_atomically, compilations
from officina.kernels.flash_attention_tables import (
    BACKWARD_FUSED,
    BACKWARD_KEYS,
    BACKWARD_QUERIES,
    FORWARD,
    FORWARD_HOPPER,
)
from officina.kernels.tables import SAFE, is_amd

SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx90a": 64 * 1024, "gfx942": 64 * 1024}
"""What a program may have of an SM's shared memory (of a compute unit's LDS)."""
MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async|mma.sync", "gfx90a": "v_mfma", "gfx942": "v_mfma"}
COPY = r"cp\.async\.bulk\.tensor\.%s\.shared::(?:cluster|cta)\.global[\w.:]*mbarrier::complete_tx::bytes"
ATOMIC = r"\b(atom|red)\.global[\w.:]*\.add\.(\w+\.)*b?f|(global|buffer)_atomic(_pk)?_add"
"""Of floating-point numbers: the Hopper kernel counts tiles by one of an integer."""


def check(arch, table=None, spills=0, only="", **cases):
    for name, kernel, arguments, config in compilations(table or arch, **cases):
        if not name.startswith(only):
            continue
        if "fused" in name and not adds_atomically(arch if table is None else table_less(arch)):
            continue  # never launched there
        usage = compile_for(kernel, arguments, config, arch)
        assert usage.spill_bytes <= spills or "fp32" in name, f"{arch} {name} spills {usage.spill_bytes} bytes a thread"
        limit = 64 * 1024 if table == SAFE else SHARED_BYTES[arch]
        assert usage.shared_bytes <= limit, f"{arch} {name} takes {usage.shared_bytes} bytes of shared memory"
        if "fp32" not in name and "delta" not in name:
            assert re.search(MATRIX[arch], usage.assembly), f"{arch} {name} does not use the matrix units"
        assert "cmpswap" not in usage.assembly, f"{arch} {name} adds by compare-and-swap loops"
        atomics = re.search(ATOMIC, usage.assembly) is not None
        assert atomics == ("fused" in name), f"{arch} {name}: atomic additions {atomics}"


def table_less(arch):
    """An architecture of the same maker that no table knows."""
    return "gfx1100" if is_amd(arch) else "sm_120"


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("arch", ARCHS)
def test_common_configurations_do_not_spill_and_only_the_fused_backward_adds_atomically(arch, head_dim):
    check(arch, head_dims=(head_dim,), causal=(True,), packed=True)  # with documents, as training runs them


HOPPER = [pytest.param(name, head_dim, causal, marks=pytest.mark.slow if head_dim > 128 else [])  # wider ones do not run it
          for name in ("forward_hopper", "backward_keys_hopper", "backward_queries_hopper")
          for head_dim in ((64, 128, 256) if name == "forward_hopper" else (64, 128)) for causal in (True, False)]


@pytest.mark.skipif(why_not_hopper("sm_90", 64, 1, torch.bfloat16) is not None, reason="made for another triton")
@pytest.mark.parametrize("name,head_dim,causal", HOPPER)
def test_the_hopper_kernels_are_made_of_what_they_are_written_with(name, head_dim, causal, tmp_path):
    [(_, kernel, arguments, config)] = [case for case in compilations("sm_90", head_dims=(head_dim,), causal=(causal,),
                                                                             packed=causal)  # as above: compiled once
                                        if case[0].startswith(name)]
    usage = compile_for(kernel, arguments, config, "sm_90")
    assert usage.spill_bytes == 0 and usage.shared_bytes <= SHARED_BYTES["sm_90"]
    consumers = 2 if name.startswith("backward") else config.block_m // 64
    assert usage.registers * (consumers + 1) * 128 <= 65_536
    ptx = usage.assembly
    loads = len(re.findall(COPY % "4d", ptx))
    # Two tiles of each consumer, of q the next one and the last; two that pass by, of k once more; 64 features a copy.
    assert loads == (2 * consumers + (3 if name == "forward_hopper" else 2)) * head_dim // 64
    numbers = len(re.findall(COPY % "1d", ptx))
    assert numbers == (2 if name == "backward_keys_hopper" else 0)  # lse and delta
    stores = len(re.findall(r"cp\.async\.bulk\.tensor\.4d\.global\.shared", ptx))
    assert stores >= (2 if name == "backward_keys_hopper" else 1) * consumers
    for instruction in ("wgmma.mma_async.sync.aligned", "mbarrier.try_wait", "mbarrier.arrive.expect_tx", "fence.proxy.async",
                        "wgmma.wait_group.sync.aligned 1"):
        assert instruction in ptx, instruction
    registers = set(re.findall(r"setmaxnreg\.(\w+)\.sync\.aligned\.u32\s+(\d+)", ptx))
    assert {("inc", str(REGISTERS[consumers])), ("dec", "24")} <= registers
    assert "mma.sync.aligned.m16" not in ptx and "cp.async.c" not in ptx  # what Triton falls back to
    (tmp_path / "kernel.ptx").write_text(ptx)
    log = subprocess.run([triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "kernel.ptx", "-o", "kernel.cubin"],
                         cwd=tmp_path, check=True, capture_output=True, text=True).stderr
    # What it says where it waits after every product, or cannot give registers from one warpgroup to another.
    assert "Used" in log and "Potential Performance Loss" not in log, log
    sass = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-sass", "kernel.cubin"], cwd=tmp_path, check=True,
                          capture_output=True, text=True).stdout
    # What follows a change of the number of registers keeps to the new one, and none is kept in memory.
    first, *parts = re.split(r"USETMAXREG\.\w+\.CTAPOOL (?:UP\d, )?0x", sass)
    for part in parts:
        assert max(map(int, re.findall(r"\bR(\d+)\b", part)), default=0) < int(part.split()[0], 16)
    assert [part.split()[0] for part in parts if "UTMALDG" in part] == ["18"] and "UTMALDG" not in first  # 24 for the loader
    assert sum("HGMMA" in part for part in parts) == consumers and not re.search(r"\b(LDL|STL)\b", sass)


@pytest.mark.parametrize("only", ["forward", pytest.param("", marks=pytest.mark.slow)])
def test_single_rows_heads_queries_and_keys_compile(only):
    check("sm_90", only=only, head_dims=(64,), causal=(False,), single=True, group=1, packed=True)


def test_a_softcap_spills_little():
    """It takes registers that the tiles were not made for; the tables know no softcap."""
    spills = 72 if triton.__version__.startswith("3.6.") else 80  # what 3.7 makes of it
    check("sm_90", only="forward", spills=spills, head_dims=(128,), causal=(True,), softcap=True, packed=True)
    check("sm_90", only="forward_hopper", head_dims=(64, 128), causal=(True,), softcap=True, packed=True)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_a_softcap_spills_little_everywhere(arch):
    check(arch, spills=112 if arch == "sm_80" else 72, head_dims=(64, 128), causal=(True,), softcap=True, packed=True)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("arch", ARCHS)
def test_no_configuration_spills(arch, group, packed):
    check(arch, group=group, packed=packed)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_padded_heads_and_fp16_do_not_spill(arch):
    check(arch, head_dims=(80, 96, 192), causal=(True,))
    check(arch, dtypes=("fp16",), causal=(True,))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_the_safe_configurations_and_fp32_compile_everywhere(arch):
    check(arch, table=SAFE)
    check(arch, dtypes=("fp32",))


@pytest.mark.parametrize("table", [FORWARD, BACKWARD_FUSED, BACKWARD_KEYS, BACKWARD_QUERIES])
def test_every_architecture_has_all_head_widths(table):
    keys = {(width, causal, 16) for width in (64, 128, 256) for causal in (True, False)}
    assert all(set(table[arch]) == keys for arch in ARCHS if arch in table)
    assert set(ARCHS) - set(table) == ({"gfx90a"} if table is BACKWARD_FUSED else set())
    assert set(table[SAFE]) == keys | {(width, causal, 32) for width, causal, _ in keys}
    assert FORWARD_HOPPER.keys() == {"sm_90"} and set(FORWARD_HOPPER["sm_90"]) == keys
