"""Environment on which the bits of a training depend: versions, processor, threads, flags."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping

import numpy as np
import torch


def environment(device: torch.device) -> dict[str, str]:
    """Return everything of this process that may change a bit, by name. The same names everywhere."""
    found = {
        "torch": torch.__version__,
        "NumPy": np.__version__,
        "processor": platform.machine(),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "CPU threads": str(torch.get_num_threads()),
        "oneDNN": str(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled),
        "deterministic algorithms": str(torch.are_deterministic_algorithms_enabled()),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "default dtype": str(torch.get_default_dtype()),
    }
    if device.type == "xpu":
        found["GPU"] = torch.xpu.get_device_name(device)
    elif device.type == "cuda":
        found |= {
            "GPU": torch.cuda.get_device_name(device),
            "CUDA": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
            "cuDNN flags": f"deterministic={torch.backends.cudnn.deterministic}, benchmark="
            f"{torch.backends.cudnn.benchmark}, tf32={torch.backends.cudnn.allow_tf32}",
            "TF32": str(torch.backends.cuda.matmul.allow_tf32),
            "NCCL": ".".join(map(str, torch.cuda.nccl.version()))
            if torch.distributed.is_nccl_available()
            else "none",
            "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG", "unset"),
        }
    return found


def what_differs(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return `torch was 2.12 and is 2.13` for each name whose value is another one."""
    names = [name for name in before if name in now and before[name] != now[name]]
    return [f"{name} was {before[name]} and is {now[name]}" for name in names]
