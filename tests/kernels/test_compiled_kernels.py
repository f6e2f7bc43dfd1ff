"""What is shipped compiles for every architecture, without a GPU, and stays within its registers."""

import re

import pytest

from officina.kernels import activations, adamw, rms_norm, rope
from officina.kernels.compiling import ARCHS, compile_for

MODULES = {module.__name__.rpartition(".")[2]: module for module in (activations, adamw, rms_norm, rope)}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("module", MODULES)
def test_shipped_configurations_do_not_spill(module, arch):
    for name, kernel, arguments, config in MODULES[module].compilations(arch):
        usage = compile_for(kernel, arguments, config, arch)
        assert usage.spill_bytes == 0, f"{name} spills {usage.spill_bytes} bytes a thread"
        assert usage.registers <= (128 if arch.startswith("sm") else 256), f"{name} takes {usage.registers} registers"
        assert usage.shared_bytes <= 16_384, f"{name} takes {usage.shared_bytes} bytes of shared memory"
        loads_16_bytes = re.search(r"ld\.global[.\w:]*\.v4\.b32|load_dwordx4", usage.assembly)
        assert loads_16_bytes, f"{name} does not load 16 bytes at a time"
