"""What the machine is doing while it is timed on: what else runs, what the process may use, and what slows it down.

Only reads. What a machine does not tell is left out, so that no figure is made up.
"""

import csv
import os
import re
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ranksearch.spec import Target

Facts = dict[str, float | str]
Ask = Callable[[Sequence[str]], str | None]

# Instructions that choose the kernels of the runtimes, as /proc/cpuinfo names them (x86, then Arm).
ISA_FLAGS = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme",
)  # fmt: skip

# The bits of clocks_throttle_reasons.active (NVML API reference, NvmlClocksEventReasons).
THROTTLE_REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
    0x100: "display clocks",
}
# The older name of clocks_event_reasons.active, which drivers since 535 still answer to.
GPU_FIELDS = (
    "index", "name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw",
    "clocks_throttle_reasons.active",
)  # fmt: skip


def ask_nvidia_smi(arguments: Sequence[str]) -> str | None:
    """What nvidia-smi answers, or None where it is not there, or fails, or does not answer within 10 s."""
    try:
        answer = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout


def machine_state(
    target: Target,
    proc: Path = Path("/proc"),
    sys: Path = Path("/sys"),
    ask: Ask = ask_nvidia_smi,
) -> Facts:
    """What the machine was doing, for the record beside a latency measured on `target`.

    Load averages, cores (of the machine, allowed to this process, left by the cgroup's quota), periods in which the
    cgroup was throttled so far, clocks of the cores in MHz, their governor, how often heat slowed them so far; for a
    target other than the CPU the clocks of NVIDIA's GPUs, what holds these down, and how many other processes compute
    there. `warning` is there where the target's threads exceed the cores that the process may use.
    """
    limits = cgroup_limits(proc / "self" / "cgroup", sys / "fs" / "cgroup")
    allowed = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    effective = min(allowed, float(limits.get("quota_cores", allowed)))
    facts: Facts = {"cores": float(os.cpu_count() or 1), "allowed_cores": allowed, "effective_cores": effective}
    facts |= limits | load_averages(proc / "loadavg") | core_clocks(sys / "devices" / "system" / "cpu")
    if target.device != "cpu":
        facts |= gpu_clocks(ask) | foreign_gpu_processes(ask, os.getpid())
    elif target.threads is not None and target.threads > effective:
        facts["warning"] = (
            f"the target has {target.threads} threads, and this process may use {effective:g} cores: they wait for "
            "each other, and latencies are longer than on a device with a core for each"
        )
    return facts


def slowed_down(before: Mapping[str, float | str], after: Mapping[str, float | str]) -> Facts:
    """By how much throttled periods and slowdowns by heat grew between two states of the machine, where they did."""
    counters = ("throttled_periods", "core_thermal_throttles", "package_thermal_throttles")
    grown = {name: float(after[name]) - float(before[name]) for name in counters if name in before and name in after}
    return {name: by for name, by in grown.items() if by > 0}


def machine_warnings(before: Mapping[str, float | str], after: Mapping[str, float | str]) -> list[str]:
    """What makes latencies longer than they need be, as two states of the machine around a measurement tell."""
    held_back = ", ".join(f"{name} {by:+g}" for name, by in slowed_down(before, after).items())
    warnings = [str(after["warning"])] if "warning" in after else []
    return warnings + ([f"the machine was held back while it was timed: {held_back}"] if held_back else [])


def load_averages(path: Path) -> Facts:
    """How many processes ran or waited for a core, over 1, 5 and 15 minutes, out of /proc/loadavg."""
    names = ("load_1min", "load_5min", "load_15min")
    return dict(zip(names, (float(word) for word in _read(path).split()[:3]), strict=False))


def cgroup_limits(membership: Path, mount: Path) -> Facts:
    """The cores that the quotas of the process's cgroups allow, and how many periods were throttled so far.

    `membership` is /proc/self/cgroup, `mount` /sys/fs/cgroup; versions 1 and 2. Without a quota there is no
    `quota_cores`. (Linux: Documentation/admin-guide/cgroup-v2.rst, Documentation/scheduler/sched-bwc.rst.)
    """
    folders = list(_cgroup_folders(_read(membership), mount))
    quotas = [quota for folder in folders if (quota := _quota(folder)) is not None]
    told = "".join(_read(folder / "cpu.stat") for folder in folders)
    throttled = [float(n) for n in re.findall(r"^nr_throttled (\d+)$", told, re.MULTILINE)]
    facts: Facts = {}
    if quotas:
        facts["quota_cores"] = min(quotas)
    if throttled:
        facts["throttled_periods"] = max(throttled)
    return facts


def core_clocks(cpus: Path) -> Facts:
    """Clocks of the cores in MHz, their governors, and how often heat slowed one; from /sys/devices/system/cpu."""
    facts: Facts = {}
    cores = [path for path in sorted(cpus.glob("cpu[0-9]*")) if path.is_dir()]
    for name, file, summary in (
        ("core_mhz", "scaling_cur_freq", statistics.median),
        ("core_min_mhz", "scaling_min_freq", min),
        ("core_max_mhz", "scaling_max_freq", max),
    ):
        if values := _numbers(core / "cpufreq" / file for core in cores):
            facts[name] = summary(values) / 1000
    if governors := {text for core in cores if (text := _read(core / "cpufreq" / "scaling_governor").strip())}:
        facts["governor"] = " ".join(sorted(governors))
    for place in ("core", "package"):
        if counts := _numbers(core / "thermal_throttle" / f"{place}_throttle_count" for core in cores):
            facts[f"{place}_thermal_throttles"] = max(counts)
    return facts


def gpu_clocks(ask: Ask) -> Facts:
    """By GPU its name and driver, clocks in MHz, temperature, power, and what holds its clocks down."""
    facts: Facts = {}
    answer = ask([f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"])
    for row in _rows(answer):
        index, name, driver, clock, largest, memory_clock, temperature, power, reasons = row
        told = {"name": name, "driver": driver, "mhz": clock, "max_mhz": largest, "memory_mhz": memory_clock}
        told |= {"celsius": temperature, "watts": power, "held_down_by": throttle_reasons(reasons)}
        facts |= {f"gpu{index}_{key}": _as_told(value) for key, value in told.items() if _is_told(value)}
    return facts


def throttle_reasons(mask: str) -> str:
    """`0x0000000000000044` as `power cap, hardware thermal slowdown`; empty for none, as it was where it is no mask."""
    if not re.fullmatch(r"0x[0-9a-fA-F]+", mask):
        return mask
    return ", ".join(reason for bit, reason in THROTTLE_REASONS.items() if int(mask, 16) & bit)


def foreign_gpu_processes(ask: Ask, own: int) -> Facts:
    """How many processes other than `own` compute on a GPU."""
    answer = ask(["--query-compute-apps=pid", "--format=csv,noheader,nounits"])
    if answer is None:
        return {}
    return {"foreign_gpu_processes": float(sum(row != [str(own)] for row in _rows(answer)))}


def isa_flags(cpuinfo: str) -> str:
    """Those of a processor's instruction sets that choose kernels, out of the text of /proc/cpuinfo."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    present = set(found[1].split()) if found else set()
    return " ".join(flag for flag in ISA_FLAGS if flag in present)


def _cgroup_folders(membership: str, mount: Path) -> Iterator[Path]:
    """The folders that bound the process's CPU time: its own cgroup's and those above, of either version."""
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            hierarchies = [mount, mount / "unified"]
        elif "cpu" in controllers.split(","):
            hierarchies = [mount / controllers, mount / "cpu"]
        else:
            continue
        # In a container the path may be that of the host: then only the root of what is mounted is there.
        own = Path(path.lstrip("/"))
        places = [hierarchy / part for hierarchy in hierarchies for part in (own, *own.parents)]
        yield from (place for place in dict.fromkeys(places) if (place / "cpu.stat").is_file())


def _quota(folder: Path) -> float | None:
    """Cores' worth of time per period; None where it is not bounded."""
    quota, period = (_read(folder / "cpu.max").split() + ["max", "max"])[:2]
    if quota == "max":
        quota, period = (_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _rows(answer: str | None) -> list[list[str]]:
    lines = csv.reader((answer or "").splitlines(), skipinitialspace=True)
    return [[cell.strip() for cell in row] for row in lines if row]


def _is_told(value: str) -> bool:
    return bool(value) and not value.startswith("[")  # [N/A], [Not Supported]


def _as_told(value: str) -> float | str:
    return float(value) if re.fullmatch(r"\d+(\.\d+)?", value) else value


def _numbers(paths: Iterator[Path]) -> list[float]:
    return [float(text) for path in paths if (text := _read(path).strip()).isdigit()]


def _read(path: Path) -> str:
    """The file's text; empty where it is not there or not to be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
