"""The compile table of docs/kernels.md: what each shipped configuration takes on each architecture. Needs triton, no GPU.

    python -m officina.benchmarks.kernels_table            # write it anew: a few minutes
    python -m officina.benchmarks.kernels_table --check    # exit status 1 if the page says something else

The table stands between `<!-- compiled -->` and `<!-- end -->`.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from officina.kernels import activations, adamw, cross_entropy, flash_attention_launch, rms_norm, rope, symmetric
from officina.kernels.compiling import ARCHS, Usage, compile_for
from officina.kernels.dispatch import triton
from officina.kernels.tables import Config

PAGE = Path(__file__).parent.parent / "docs" / "kernels.md"
MODULES = {"flash attention": flash_attention_launch, "cross-entropy": cross_entropy, "norms": rms_norm, "RoPE": rope,
           "activations": activations, "AdamW": adamw, "symmetric product": symmetric}
_PLACE = re.compile(r"(<!-- compiled -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str, table: str) -> str:
    """The page with the table anew."""
    return _PLACE.sub(lambda m: f"{m[1]}\n{table}\n\n{m[2]}", text)


def table(archs: Sequence[str] = ARCHS) -> str:
    """The table with a line that says what compiled it."""
    usages: dict[str, dict[str, Usage]] = {}
    for arch in archs:
        for name, kernel, arguments, config in shipped(arch):
            print(f"{arch} {name}", file=sys.stderr)
            usages.setdefault(name, {})[arch] = compile_for(kernel, arguments, config, arch)
    head = f"| kernel | {' | '.join(archs)} |\n| --- |{' ---: |' * len(archs)}\n"
    rows = [f"| {name} | {' | '.join(_cell(found.get(arch)) for arch in archs)} |" for name, found in usages.items()]
    made = f"*triton {triton.__version__}: registers and spilled bytes of a thread, shared bytes of a program*"
    return f"{made}\n\n{head}" + "\n".join(rows)


def shipped(arch: str) -> Iterator[tuple[str, Any, dict[str, Any], Config]]:
    """All that is shipped for an architecture, by the names of the table's rows."""
    for group, module in MODULES.items():
        for name, *rest in module.compilations(arch):
            yield name if name.lower().startswith(group.lower()) else f"{group}: {name}", *rest


def _cell(usage: Usage | None) -> str:
    """Nothing where an architecture has no such kernel."""
    return "" if usage is None else f"{usage.registers} / {usage.spill_bytes} / {usage.shared_bytes:,}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m officina.benchmarks.kernels_table", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit status 1 if the page is not what the compilers say")
    args = parser.parse_args(argv)
    text = PAGE.read_text()
    new = fill(text, table())
    if args.check:
        if new != text:
            print(f"{PAGE} is not what the compilers say: python -m officina.benchmarks.kernels_table", file=sys.stderr)
        return int(new != text)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
