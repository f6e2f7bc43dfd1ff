"""For which processor an image or a Python is made, read from the first bytes of the file."""

import re
from pathlib import Path

from officina.configs.job import expand

_SIF_MAGIC, _SIF_ARCHS = b"SIF_MAGIC\0", {b"02": "x86_64", b"04": "aarch64"}
"""github.com/apptainer/sif, pkg/sif/sif.go: 32 bytes of launcher, magic of 10, version of 3, architecture of 3."""
_ELF_MACHINES = {62: "x86_64", 183: "aarch64"}
"""elf.h: EM_X86_64, EM_AARCH64."""
_NAMES = (("x86_64", r"x86[_-]?64|amd64"), ("aarch64", r"aarch64|arm64"))


def machine_of(path: str) -> str | None:
    """`x86_64` or `aarch64`, for an image file or a virtual environment; None if it cannot be told.

    Where there is no such file here, or its kind is not known, the name counts if it says so.
    """
    file = expand(path)
    try:
        if file.is_dir():
            file = file / "bin/python"
        with open(file, "rb") as opened:
            head = opened.read(64)
    except OSError:
        head = b""
    if head[32:42] == _SIF_MAGIC:
        return _SIF_ARCHS.get(head[45:47])
    if head[:4] == b"\x7fELF":
        return _ELF_MACHINES.get(int.from_bytes(head[18:20], "little"))
    return next((machine for machine, pattern in _NAMES if re.search(pattern, Path(path).name)), None)
