"""Does the torch runtime hold on this GPU, and what do factored layers gain there?

The tests marked `gpu`, a whole study on the device, and a table: layers and networks, factored, against dense in the
same precision and mode, interleaved, timed by the device. Needs no OpenVINO. Target: the tests pass, the study ends
with a front, and no row fails. Whole: under 9 minutes; rows that do not fit are counted.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import ROOT, options, report, scratch

sys.path.insert(0, str(ROOT))  # where the package is not installed

SECONDS, QUICK_SECONDS = 510, 50
# How much of the time the tests may take at most; the study takes what it takes.
TEST_SHARE = 0.45
QUICK_TESTS = "cuda_graph and not contract"
N_TRIALS = 4


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--output", type=Path, help="a Markdown file for the table; nothing is written without it")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu: a tiny version of everything")
    parser.add_argument("--seconds", type=float, help=f"the time box; {SECONDS}, with --quick {QUICK_SECONDS}")
    arguments = parser.parse_args()
    seconds = arguments.seconds or (QUICK_SECONDS if arguments.quick else SECONDS)
    figures = check(arguments.device, seconds, arguments.quick)
    lines = markdown(figures)
    if arguments.output is not None:
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    report(arguments, lines, figures)


def check(device: str, seconds: float, quick: bool) -> dict[str, Any]:
    """Tests, study and table within about so many seconds."""
    deadline = time.monotonic() + seconds
    card = facts(device)
    tests = run_tests(TEST_SHARE * seconds, QUICK_TESTS if quick else "gpu") if device != "cpu" else None
    study = {} if quick and device != "cpu" else run_study(device)
    rows, n_left_out = run_table(device, deadline)
    broken = [row for row in rows if row["problem"] and not row["problem"].startswith("RuntimeUnavailable")]
    holds = (tests is None or tests["passed"]) and (not study or study["n_front"] > 0) and bool(rows) and not broken
    return {
        "card": card,
        "tests": tests,
        "study": study,
        "rows": rows,
        "n_left_out": n_left_out,
        "target": "tests pass, the study ends with a front, no row fails",
        "holds": holds,
        "scope": f"{device}{', quick' if quick else ''}: {len(rows)} rows in {seconds:.0f} s, {n_left_out} left out",
    }


def facts(device: str) -> dict[str, str]:
    """The card, its driver and the versions. Exits with 2 where the device cannot be used."""
    from ranksearch.errors import RuntimeUnavailableError
    from ranksearch.runtimes import get_runtime
    from ranksearch.spec import Target

    target = Target(runtime="torch", device=device)
    try:
        runtime = get_runtime("torch")
        runtime.check(target)
    except RuntimeUnavailableError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    return runtime.fingerprint(target)


def run_tests(max_seconds: float, chosen: str) -> dict[str, Any]:
    """The tests marked `gpu`, in a process of their own."""
    words = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-q", "--noconftest", "-p", "no:cacheprovider"]
    # A torch of another version than the tested one may warn; what it computes is what counts here.
    words += ["-o", "filterwarnings=default", "-o", "pythonpath=.", "-m", "gpu", "-k", chosen]
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=max_seconds)
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode(errors="replace").strip().splitlines()
        return {"passed": False, "said": f"not done within {max_seconds:.0f} s: {said[-1] if said else 'nothing'}"}
    lines = [line for line in (done.stdout + done.stderr).strip().splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))][:12]
    return {"passed": done.returncode == 0, "said": "; ".join([lines[-1] if lines else "nothing", *failed])}


def run_study(device: str) -> dict[str, Any]:
    """A whole study with made-up images: profile, trials with recovery on the device, front."""
    from gpu_study import make_study

    import ranksearch as rs

    started = time.monotonic()
    with scratch() as folder:
        os.environ["RANKSEARCH_CACHE"] = str(folder / "cache")
        result = rs.search(make_study(device), trials=N_TRIALS, home="home", tracking_uri="sqlite:///mlflow.db")
        front = result.front
    return {
        "seconds": time.monotonic() - started,
        "n_front": len(front),
        "fastest": str(front.sort_values("latency_ratio").iloc[0]["summary"]) if len(front) else "none",
    }


def run_table(device: str, deadline: float) -> tuple[list[dict[str, Any]], int]:
    """As many rows as the time allows, and how many are left out."""
    from gpu_rows import answer, questions
    from gpu_subjects import LAYERS, NETWORKS, TINY_LAYERS, TINY_NETWORKS

    kind = device.partition(":")[0]
    networks, layers = (TINY_NETWORKS, TINY_LAYERS) if kind == "cpu" else (NETWORKS, LAYERS)
    asked = list(questions(networks, layers, kind))
    rows: list[dict[str, Any]] = []
    for question in asked:
        if rows and time.monotonic() > deadline:
            break
        rows.append(asdict(answer(question, device, max_seconds=0.05 if kind == "cpu" else 0.3)))
    return rows, len(asked) - len(rows)


def markdown(figures: dict[str, Any]) -> list[str]:
    """The section for docs/benchmarks.md."""
    card, tests, study = figures["card"], figures["tests"], figures["study"]
    name = card.get("device", card["processor"])
    told = ", ".join(f"{key} {value}" for key, value in card.items() if key != "device")
    lines = [f"## {name}: `scripts/gpu_check`", "", f"{time.strftime('%Y-%m-%d')}, {figures['scope']}. {told}.", ""]
    if tests is not None:
        lines += [f"Tests marked `gpu`: {'passed' if tests['passed'] else 'FAILED'} ({tests['said']}).", ""]
    if study:
        lines += [
            f"A whole study on the device, {N_TRIALS} trials, took {study['seconds']:.0f} s; {study['n_front']} plans "
            f"on its front, the fastest: {study['fastest']}.",
            "",
        ]
    lines += [
        "Ratios are to dense in the same precision and mode, 0.5 = twice as fast; times are medians, p95 in brackets;",
        "cold: the cache is written over before each call.",
        "",
        "| what | choice | mode | precision | dense, ms | factored, ms | ratio | cold ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    return [*lines, *(_table_row(row) for row in figures["rows"])]


def _table_row(row: dict[str, Any]) -> str:
    cells: Sequence[str] = (row["subject"], row["choice"], row["mode"], row["precision"])
    if row["problem"]:
        return f"| {' | '.join(cells)} | {row['problem']} | | | |"
    cold = "" if row["cold_ratio"] is None else f"{row['cold_ratio']:.2f}"
    return (
        f"| {' | '.join(cells)} | {row['dense_ms']:.3f} ({row['dense_p95_ms']:.3f}) | "
        f"{row['latency_ms']:.3f} ({row['latency_p95_ms']:.3f}) | "
        f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f}) | {cold} |"
    )


if __name__ == "__main__":
    main()
