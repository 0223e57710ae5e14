"""The saved Pareto page of a study, and the MLflow UI that shows it on 127.0.0.1."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, final

from ranksearch.errors import StudyError
from ranksearch.masking import masked, public_address
from ranksearch.tracking.store import PARENT_TAG, PREFIX, is_remote, resolve_tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

HOST = "127.0.0.1"
SECTION = "front"
COLUMNS = (
    "metrics.`accuracy_drop`",
    "metrics.`latency_ratio`",
    "metrics.`model_bytes`",
    "metrics.`macs`",
    f"tags.`{PREFIX}feasible`",
    f"tags.`{PREFIX}pareto`",
)


def page_key(parent_run_id: str) -> str:
    """The name under which an experiment keeps a study's page: studies may share an experiment."""
    return f"ranksearch-{parent_run_id}"


def page_url(server: str, experiment_id: str, parent_run_id: str, mode: str = "CHART") -> str:
    """The address of the study's page; `mode` is CHART (scatters beside the names) or TABLE (all columns)."""
    view = f"viewStateShareKey={page_key(parent_run_id)}&compareRunsMode={mode}&workflowType=machine_learning"
    return f"{public_address(server).rstrip('/')}/#/experiments/{experiment_id}/runs?{view}"


def save_page(client: "MlflowClient", experiment_id: str, parent_run_id: str) -> None:
    """Keeps the study's page as a tag of the experiment, from where `page_url` opens it.

    The JSON is MLflow's own undocumented state, right for 3.17; a UI that does not know it shows its usual page.
    """
    client.set_experiment_tag(
        experiment_id, f"mlflow.sharedViewState.{page_key(parent_run_id)}", json.dumps(page_state(parent_run_id))
    )


def page_state(parent_run_id: str) -> dict[str, Any]:
    """The page: the study's trials and controls, fastest first, with two scatters and parallel coordinates."""
    return {
        "searchFilter": f"tags.`{PARENT_TAG}` = '{parent_run_id}'",
        "orderByKey": "metrics.`latency_ratio`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": list(COLUMNS),
        "runsExpanded": {parent_run_id: True},
        "runsPinned": [],
        "runsHidden": [],
        "runsHiddenMode": "SHOWALL",
        "runsVisibilityMap": {},
        "viewMaximized": False,
        "runListHidden": False,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "autoRefreshEnabled": True,
        "globalLineChartConfig": {},
        "isAccordionReordered": True,
        "compareRunSections": [
            _section(SECTION, "Pareto front (orange)", columns=2, cardHeight=420),
            # MLflow adds a bar chart per metric: folded away, since nobody came for them.
            _section("metrics", "Model metrics", display=False),
        ],
        "compareRunCharts": [
            _scatter("latency", "Drop against latency ratio", "latency_ratio"),
            _scatter("size", "Drop against size", "model_bytes"),
            _chart(
                "parallel",
                "PARALLEL",
                displayName="Size, latency, drop",
                showAllRuns=True,
                selectedParams=[],
                selectedMetrics=["model_bytes", "latency_ratio", "accuracy_drop"],
            ),
        ],
    }


def _section(uuid: str, name: str, **fields: object) -> dict[str, Any]:
    shared = {"display": True, "isReordered": True, "deleted": False, "isGenerated": False}
    return {"uuid": uuid, "name": name, **shared, **fields}


def _scatter(uuid: str, name: str, x: str) -> dict[str, Any]:
    xaxis, yaxis = ({"key": key, "type": "METRIC"} for key in (x, "accuracy_drop"))
    return _chart(uuid, "SCATTER", displayName=name, xaxis=xaxis, yaxis=yaxis)


def _chart(uuid: str, chart_type: str, **fields: object) -> dict[str, Any]:
    shared = {"metricSectionId": SECTION, "deleted": False, "isGenerated": False, "runsCountToCompare": 1000}
    return {"uuid": uuid, "type": chart_type, **shared, **fields}


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """An MLflow UI: its address, and its process where it is ours. Leaving the `with` block ends it."""

    url: str
    process: subprocess.Popen[bytes] | None = None

    def close(self) -> None:
        """Ends the server and its workers; a server that is not ours is left alone."""
        if self.process is None or self.process.poll() is not None:
            return
        for ending in (signal.SIGTERM, signal.SIGKILL):
            os.killpg(self.process.pid, ending)
            try:
                self.process.wait(timeout=5)
                return
            except subprocess.TimeoutExpired:
                continue

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def serve(
    tracking_uri: str | None = None,
    port: int = 5000,
    *,
    timeout_s: float = 120.0,
    clock: Callable[[], float] = time.monotonic,
) -> Server:
    """A UI of the store that is ready to answer; nothing is started where the store is a server already.

    Where `port` is taken another one is. Raises StudyError with the end of its log where it does not start in time.
    """
    uri = resolve_tracking_uri(tracking_uri)
    if is_remote(uri):
        return Server(url=uri.rstrip("/"))
    chosen = free_port(port)
    with tempfile.TemporaryFile() as log:
        server = Server(url=f"http://{HOST}:{chosen}", process=_start(uri, chosen, log))
        try:
            if _wait_ready(server, clock() + timeout_s, clock):
                return server
        except BaseException:
            server.close()
            raise
        server.close()
        log.seek(0)
        tail = "\n".join(log.read().decode(errors="replace").splitlines()[-15:])
    told = f"the MLflow UI of {uri} did not start on port {chosen} within {timeout_s:.0f} s:\n{tail}"
    raise StudyError(masked(told))


def free_port(port: int) -> int:
    """`port` where nobody listens there, else one that the system gives."""
    for candidate in (port, 0):
        with socket.socket() as listener:
            # As servers do: a port whose last connections are still closing counts as free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((HOST, candidate))
            except OSError:
                continue
            return int(listener.getsockname()[1])
    raise StudyError(f"no free port on {HOST}")


def _start(uri: str, port: int, log: Any) -> subprocess.Popen[bytes]:
    """The server's process, leader of its own group so that its workers end with it."""
    command = [sys.executable, "-m", "mlflow", "ui", "--host", HOST, "--port", str(port), "--workers", "1"]
    environment = {
        # Not among the words of the command, which everybody on the machine can list: a URI may hold a password.
        "MLFLOW_BACKEND_STORE_URI": uri,
        # The jobs of MLflow's own evaluations are not ours; without them it starts two processes fewer.
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | environment, start_new_session=True
    )


def _wait_ready(server: Server, deadline: float, clock: Callable[[], float]) -> bool:
    """Whether the server answered before the deadline; False as well where it has ended."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # 127.0.0.1 is never behind a proxy
    while clock() < deadline and server.process is not None and server.process.poll() is None:
        try:
            with opener.open(f"{server.url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    return False
