"""What the machine says of itself, out of files and answers as machines give them."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ranksearch.machine import (
    cgroup_limits,
    core_clocks,
    foreign_gpu_processes,
    gpu_clocks,
    isa_flags,
    load_averages,
    machine_state,
    machine_warnings,
    slowed_down,
    throttle_reasons,
)
from ranksearch.spec import Target

# /proc/self/cgroup under systemd with version 2 alone, in a Docker container with version 1, and with both.
VERSION_2 = "0::/user.slice/user-1000.slice/session-3.scope\n"
VERSION_1 = """11:memory:/docker/4f0c1b
4:cpu,cpuacct:/docker/4f0c1b
3:cpuset:/docker/4f0c1b
1:name=systemd:/docker/4f0c1b
"""
BOTH = "3:cpuset:/\n2:cpuacct:/\n1:cpu:/\n0::/\n"
STAT_2 = "usage_usec 71402\nuser_usec 51101\nsystem_usec 20301\nnr_periods 420\nnr_throttled {}\nthrottled_usec 99120\n"
STAT_1 = "nr_periods 94\nnr_throttled {}\nthrottled_time 4102938112\n"
H100 = """0, NVIDIA H100 80GB HBM3, 550.54.15, 1695, 1980, 2619, 41, 118.32, 0x0000000000000000
1, NVIDIA H100 80GB HBM3, 550.54.15, 1155, 1980, 2619, 86, [N/A], 0x0000000000000044
"""
CPUINFO = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu vme sse4_2 avx f16c fma avx2 avx512f avx512bw avx512_vnni amx_bf16 avx512_fp16 amx_tile amx_int8
bugs\t\t: spectre_v1

processor\t: 1
flags\t\t: fpu
"""


def write(files: dict[Path, str]) -> None:
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def answering(text: str | None) -> Callable[[Sequence[str]], str | None]:
    return lambda _arguments: text


def test_load_averages(tmp_path: Path) -> None:
    write({tmp_path / "loadavg": "1.51 0.31 0.18 2/312 6664\n"})
    assert load_averages(tmp_path / "loadavg") == {"load_1min": 1.51, "load_5min": 0.31, "load_15min": 0.18}


def test_the_tightest_quota_of_version_2_counts_wherever_it_is_set(tmp_path: Path) -> None:
    slice_ = tmp_path / "user.slice"
    write({
        tmp_path / "self": VERSION_2,
        tmp_path / "cpu.stat": STAT_2.format(0),
        slice_ / "cpu.max": "150000 100000\n",
        slice_ / "cpu.stat": STAT_2.format(17),
        slice_ / "user-1000.slice" / "session-3.scope" / "cpu.max": "max 100000\n",
        slice_ / "user-1000.slice" / "session-3.scope" / "cpu.stat": STAT_2.format(0),
    })  # fmt: skip
    assert cgroup_limits(tmp_path / "self", tmp_path) == {"quota_cores": 1.5, "throttled_periods": 17.0}


@pytest.mark.parametrize("place", ["cpu,cpuacct/docker/4f0c1b", "cpu,cpuacct", "cpu"])
def test_version_1_has_its_quota_in_its_own_folder_or_at_the_root_of_a_container(tmp_path: Path, place: str) -> None:
    write({
        tmp_path / "self": VERSION_1,
        tmp_path / place / "cpu.cfs_quota_us": "50000\n",
        tmp_path / place / "cpu.cfs_period_us": "100000\n",
        tmp_path / place / "cpu.stat": STAT_1.format(9),
    })  # fmt: skip
    assert cgroup_limits(tmp_path / "self", tmp_path) == {"quota_cores": 0.5, "throttled_periods": 9.0}


def test_no_quota_is_told_as_none(tmp_path: Path) -> None:
    write({
        tmp_path / "self": BOTH,
        tmp_path / "cpu" / "cpu.cfs_quota_us": "-1\n",
        tmp_path / "cpu" / "cpu.cfs_period_us": "100000\n",
        tmp_path / "cpu" / "cpu.stat": STAT_1.format(0),
        tmp_path / "unified" / "cpu.stat": "usage_usec 71402\n",
    })  # fmt: skip
    assert cgroup_limits(tmp_path / "self", tmp_path) == {"throttled_periods": 0.0}
    assert cgroup_limits(tmp_path / "nowhere", tmp_path) == {}


def test_core_clocks_are_in_mhz(tmp_path: Path) -> None:
    for core, mhz in (("cpu0", 2400), ("cpu1", 3100), ("cpu10", 3200)):
        write({
            tmp_path / core / "cpufreq" / "scaling_cur_freq": f"{mhz}000\n",
            tmp_path / core / "cpufreq" / "scaling_min_freq": "800000\n",
            tmp_path / core / "cpufreq" / "scaling_max_freq": "3600000\n",
            tmp_path / core / "cpufreq" / "scaling_governor": "powersave\n",
            tmp_path / core / "thermal_throttle" / "core_throttle_count": f"{mhz // 1000}\n",
            tmp_path / core / "thermal_throttle" / "package_throttle_count": "7\n",
        })  # fmt: skip
    write({tmp_path / "cpufreq" / "boost": "1\n"})
    assert core_clocks(tmp_path) == {
        "core_mhz": 3100.0,
        "core_min_mhz": 800.0,
        "core_max_mhz": 3600.0,
        "governor": "powersave",
        "core_thermal_throttles": 3.0,
        "package_thermal_throttles": 7.0,
    }
    assert core_clocks(tmp_path / "cpufreq") == {}, "a virtual machine tells none"


def test_gpus_tell_their_clocks_and_what_holds_them_down() -> None:
    facts = gpu_clocks(answering(H100))
    assert (facts["gpu0_name"], facts["gpu0_driver"]) == ("NVIDIA H100 80GB HBM3", "550.54.15")
    assert (facts["gpu0_mhz"], facts["gpu1_mhz"], facts["gpu1_max_mhz"], facts["gpu0_watts"]) == (
        1695.0, 1155.0, 1980.0, 118.32,
    )  # fmt: skip
    assert facts["gpu1_held_down_by"] == "power cap, hardware thermal slowdown"
    assert "gpu0_held_down_by" not in facts and "gpu1_watts" not in facts, "nothing does; and it does not tell"
    assert gpu_clocks(answering(None)) == {}, "without a driver nothing is made up"


def test_throttle_reasons_are_named() -> None:
    assert throttle_reasons("0x0000000000000001") == "idle"
    assert throttle_reasons("0x00000000000000e8") == (
        "hardware slowdown, software thermal slowdown, hardware thermal slowdown, power brake"
    )
    assert throttle_reasons("[N/A]") == "[N/A]"


def test_other_processes_on_the_gpu_are_counted() -> None:
    assert foreign_gpu_processes(answering("4711\n815\n"), own=815) == {"foreign_gpu_processes": 1.0}
    assert foreign_gpu_processes(answering(""), own=815) == {"foreign_gpu_processes": 0.0}
    assert foreign_gpu_processes(answering(None), own=815) == {}


def test_instruction_sets_are_those_that_choose_kernels() -> None:
    assert isa_flags(CPUINFO) == (
        "sse4_2 avx f16c fma avx2 avx512f avx512bw avx512_vnni avx512_fp16 amx_tile amx_int8 amx_bf16"
    )
    assert isa_flags("processor : 0\nFeatures\t: fp asimd asimddp i8mm bf16 sve\n") == "asimd asimddp i8mm bf16 sve"
    assert isa_flags("") == ""


def make_machine(directory: Path, quota: str) -> dict[str, Path]:
    write({
        directory / "proc" / "self" / "cgroup": "0::/\n",
        directory / "sys" / "fs" / "cgroup" / "cpu.max": f"{quota} 100000\n",
        directory / "sys" / "fs" / "cgroup" / "cpu.stat": STAT_2.format(3),
    })  # fmt: skip
    return {"proc": directory / "proc", "sys": directory / "sys"}


def test_more_threads_than_the_quota_leaves_are_warned_of(tmp_path: Path) -> None:
    machine = make_machine(tmp_path, "50000")
    state = machine_state(Target(threads=1), **machine)
    assert state["effective_cores"] == 0.5
    assert "has 1 threads, and this process may use 0.5 cores" in str(state["warning"])
    assert "warning" not in machine_state(Target(), **machine), "all cores are as many as there are"
    assert "warning" not in machine_state(Target(threads=1), **make_machine(tmp_path, "100000"))


def test_gpus_are_asked_only_where_the_target_is_one(tmp_path: Path) -> None:
    machine = make_machine(tmp_path, "max")
    asked: list[str] = []

    def ask(arguments: Sequence[str]) -> str:
        asked.extend(arguments)
        return "1\n" if "--query-compute-apps=pid" in arguments else H100

    assert "gpu0_mhz" not in machine_state(Target(), **machine, ask=ask) and not asked
    state = machine_state(Target(device="cuda"), **machine, ask=ask)
    assert state["gpu0_mhz"] == 1695.0 and state["foreign_gpu_processes"] == 1.0
    assert not [word for word in asked if not word.startswith(("--query-", "--format="))], "it only asks"


def test_what_slowed_a_measurement_down_is_the_difference_of_two_states() -> None:
    before = {"throttled_periods": 3.0, "core_thermal_throttles": 2.0, "load_1min": 0.1, "governor": "powersave"}
    after = {"throttled_periods": 10.0, "core_thermal_throttles": 2.0, "load_1min": 4.0, "governor": "performance"}
    assert slowed_down(before, after) == {"throttled_periods": 7.0}
    assert slowed_down({}, after) == {}
    assert machine_warnings(before, after) == ["the machine was held back while it was timed: throttled_periods +7"]
    assert machine_warnings({}, {"warning": "the target has 9 threads"}) == ["the target has 9 threads"]
    assert machine_warnings(after, after) == []


def test_this_machine_tells_its_cores_and_load() -> None:
    state = machine_state(Target())
    assert state["cores"] == os.cpu_count()
    assert 0 < float(state["effective_cores"]) <= float(state["allowed_cores"]) <= float(state["cores"])
