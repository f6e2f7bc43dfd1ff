"""Every shipped configuration of flash attention compiles for every architecture, without a GPU, and spills nothing."""

import re

import pytest

from officina.kernels.compiling import ARCHS, compile_for
from officina.kernels.flash_attention_launch import adds_atomically, compilations
from officina.kernels.flash_attention_tables import BACKWARD_FUSED, BACKWARD_KEYS, BACKWARD_QUERIES, FORWARD
from officina.kernels.tables import SAFE, is_amd

SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx90a": 64 * 1024, "gfx942": 64 * 1024}
"""What a program may have of an SM's shared memory (of a compute unit's LDS)."""
MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async|mma.sync", "gfx90a": "v_mfma", "gfx942": "v_mfma"}
ATOMIC = r"\b(atom|red)\.global[\w.:]*\.add|(global|buffer)_atomic(_pk)?_add"


def check(arch, table=None, **cases):
    for name, kernel, arguments, config in compilations(table or arch, **cases):
        if "fused" in name and not adds_atomically(arch if table is None else table_less(arch)):
            continue  # never launched there
        usage = compile_for(kernel, arguments, config, arch)
        assert usage.spill_bytes == 0 or "fp32" in name, f"{arch} {name} spills {usage.spill_bytes} bytes a thread"
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
    check(arch, head_dims=(head_dim,), causal=(True,))


def test_single_rows_heads_queries_and_keys_compile():
    check("sm_90", head_dims=(64,), causal=(False,), single=True, group=1, packed=True)


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
