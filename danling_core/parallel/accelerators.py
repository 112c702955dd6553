"""The accelerators of this machine, as torch names them: CUDA (ROCm is called so, too), XPU, MPS."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

KINDS = ("cuda", "xpu", "mps")


def kind_here() -> str | None:
    """Return the kind of this machine's accelerator, or None. CUDA is not initialized by it."""
    if torch.cuda.is_available():
        return "cuda"
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found is not None and found.type in KINDS else None


def count(kind: str) -> int:
    """Return how many devices of a kind this process sees."""
    return 1 if kind == "mps" else int(torch.get_device_module(kind).device_count())


def backend(kind: str) -> str:
    """Return what the collectives of a group on this kind of device run on, as `init_process_group` takes it."""
    if kind in ("cpu", "mps"):
        return "gloo"
    return f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"


def has_peers(kind: str) -> bool:
    """Return whether several ranks can use this kind of device together: not Apple's, of which there is one."""
    return kind != "mps"


def generator_states() -> dict[str, torch.Tensor]:
    """Return the state of the generator of each accelerator that is in use, by its kind."""
    found = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {}
    if torch.xpu.is_initialized():
        found["xpu"] = torch.xpu.get_rng_state()
    if torch.backends.mps.is_available():
        found["mps"] = torch.mps.get_rng_state()
    return found


def restore_generators(states: dict[str, Any]) -> None:
    """Put back what `generator_states` returned, of the kinds that are here."""
    for kind in KINDS:
        if kind in states and kind_here() == kind:
            torch.get_device_module(kind).set_rng_state(states[kind].cpu())


def memory(device: torch.device) -> dict[str, int]:
    """Return the bytes that are allocated on an accelerator, reserved, and were allocated at most, where it tells."""
    if device.type == "mps":
        return {
            "allocated": torch.mps.current_allocated_memory(),
            "reserved": torch.mps.driver_allocated_memory(),
        }
    module = torch.get_device_module(device.type)
    return {
        "allocated": module.memory_allocated(device),
        "reserved": module.memory_reserved(device),
        "peak": module.max_memory_allocated(device),
    }
