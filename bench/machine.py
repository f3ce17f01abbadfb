"""Say on what machine a measurement was made."""

import os
import platform
from pathlib import Path

import torch
import transformers


def describe_machine() -> str:
    """Return one line: processor, cores, memory, versions."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in _read("/proc/cpuinfo").splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    memory_kb = next((int(line.split()[1]) for line in _read("/proc/meminfo").splitlines() if "MemTotal" in line), 0)
    isa = "AVX-512" if "avx512f" in _read("/proc/cpuinfo") else "no AVX-512"
    return (
        f"{cpu} ({isa}), {os.cpu_count()} cores, {memory_kb / 2**20:.0f} GiB, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
