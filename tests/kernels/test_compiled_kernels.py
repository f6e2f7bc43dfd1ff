"""What is shipped compiles for every architecture, without a GPU, and stays within its registers."""

import re

import pytest

from officina.kernels import activations, adamw, rms_norm, rope, symmetric
from officina.kernels.compiling import ARCHS, compile_for

MODULES = {module.__name__.rpartition(".")[2]: module for module in (activations, adamw, rms_norm, rope, symmetric)}


MOST_REGISTERS = {"symmetric": 240, "rms_norm": 208}
MOST_SHARED_BYTES = {"symmetric": 131_072, "rms_norm": 131_200}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("module", MODULES)
def test_shipped_configurations_do_not_spill(module, arch):
    for name, kernel, arguments, config in MODULES[module].compilations(arch):
        usage = compile_for(kernel, arguments, config, arch)
        assert usage.spill_bytes == 0, f"{name} spills {usage.spill_bytes} bytes a thread"
        most = MOST_REGISTERS.get(module, 128) if arch.startswith("sm") else 256
        assert usage.registers <= most, f"{name} takes {usage.registers} registers"
        most = MOST_SHARED_BYTES.get(module, 16_384) if arch == "sm_90" else 32_768
        assert usage.shared_bytes <= most, f"{name} takes {usage.shared_bytes} bytes of shared memory"
        loads_16_bytes = re.search(r"ld\.global[.\w:]*\.v4\.b32|cp\.async\.(cg|bulk)|load_dwordx4", usage.assembly)
        assert loads_16_bytes, f"{name} does not load 16 bytes at a time"


def test_what_only_some_shapes_take_does_not_spill():
    """Tiles of the norm that were measured for other widths, and RoPE of the widest heads."""
    for name, kernel, arguments, config in rms_norm.compilations("sm_90", widths=(2048, 8192)):
        assert compile_for(kernel, arguments, config, "sm_90").spill_bytes == 0, name
    config = rope.config_for("forward", 128, "sm_90")
    _, kernel, arguments, _ = next(rope.compilations("sm_90"))
    wide = {"K": 256, "P": 128, "REST": 1, "ROWS": config.block_m, "PAIRS": config.block_n}
    assert compile_for(kernel, arguments | wide, config, "sm_90").spill_bytes == 0


@pytest.mark.parametrize("arch,instruction", [
    ("sm_80", "mma.sync"), ("sm_90", "wgmma.mma_async"), ("gfx90a", "v_mfma_f32"), ("gfx942", "v_mfma_f32")])
def test_products_in_bf16_take_the_matrix_units(arch, instruction):
    _, kernel, arguments, config = next(symmetric.compilations(arch))
    assert instruction in compile_for(kernel, arguments, config, arch).assembly
