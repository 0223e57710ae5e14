"""Who computes on what: a GPU, or a share of the cores, for each worker."""

import os
from dataclasses import dataclass, field

from ranksearch.errors import StudyError
from ranksearch.spec import StudySpec, Target

CORES_EACH = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """A worker's threads, and what its environment says beside this process's.

    Those of one `device` take turns on it, since one that works there would disturb one that times; None takes none.
    """

    threads: int
    environment: dict[str, str] = field(default_factory=dict)
    device: str | None = None


def placements(spec: StudySpec, n_workers: int | None) -> list[Placement]:
    """Where each of the workers computes: one per GPU unless told, else one for every four cores.

    Raises StudyError for GPUs that are not there, or where the study names one by its number.
    """
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = _gpus(spec) if uses_gpu(spec) else []
    n_all = n_workers or len(gpus) or max(1, n_cores // CORES_EACH)
    threads = max(1, n_cores // n_all)
    found = []
    for i in range(n_all):
        environment, gpu = {"OMP_NUM_THREADS": str(threads)}, None
        if gpus:
            gpu = environment["CUDA_VISIBLE_DEVICES"] = gpus[i % len(gpus)]
        device = _shared_device(spec.target, gpu, n_all, len(gpus))
        found.append(Placement(threads=threads, environment=environment, device=device))
    return found


def uses_gpu(spec: StudySpec) -> bool:
    """Whether plans are trained or timed on one."""
    return any(device.startswith("cuda") for device in (spec.target.device, spec.recovery.device))


def _shared_device(target: Target, gpu: str | None, n_workers: int, n_gpus: int) -> str | None:
    """The device that is timed on, where others of these workers compute on it too."""
    if n_workers == 1 or target.cores is not None:
        return None
    if target.device.startswith("cuda"):
        return f"gpu-{gpu}" if n_workers > n_gpus else None
    return target.device


def _gpus(spec: StudySpec) -> list[str]:
    for what, device in (("Target", spec.target.device), ("Recovery", spec.recovery.device)):
        if device.startswith("cuda") and device not in ("cuda", "cuda:0"):
            raise StudyError(
                f"{what}.device is {device!r}, but each worker is given a GPU of its own, which it knows as 'cuda': "
                "write that, and choose among GPUs by CUDA_VISIBLE_DEVICES"
            )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        found = [name.strip() for name in visible.split(",") if name.strip()]
    else:
        import torch

        found = [str(i) for i in range(torch.cuda.device_count())]
    if not found:
        raise StudyError("the study trains or times on a GPU, and there is none here that this process may use")
    return found
