"""MLflow's model registry: a chosen plan's model as a torch program (pt2) that loads without this package."""

import importlib.metadata
import io
import warnings
from collections.abc import Mapping
from contextlib import redirect_stderr
from typing import Any

from ranksearch.errors import StudyError
from ranksearch.tracking.store import connect, explained, resolve_tracking_uri


def register_model(model: Any, example: Any, name: str, run_id: str, tracking_uri: str | None = None) -> str:
    """Registers the model under `name` as the outcome of a run, and gives its URI, `models:/NAME/VERSION`.

    `model` is a module that torch.export takes, `example` its inputs: a tensor, or a mapping of them.
    Raises StudyError for inputs of other kinds, where the store cannot be used, and where MLflow cannot export it.
    """
    uri = resolve_tracking_uri(tracking_uri)
    inputs = _as_mlflow_takes(example)
    connect(uri)
    # MLflow prints what it registers.
    with warnings.catch_warnings(action="ignore"), redirect_stderr(io.StringIO()), explained(uri):
        import mlflow
        import mlflow.pytorch

        before = mlflow.get_tracking_uri()
        mlflow.set_tracking_uri(uri)
        try:
            with mlflow.start_run(run_id=run_id):
                logged = mlflow.pytorch.log_model(
                    model,
                    name="model",
                    registered_model_name=name,
                    input_example=inputs,
                    serialization_format="pt2",
                    pip_requirements=[f"torch=={importlib.metadata.version('torch')}"],
                )
        finally:
            mlflow.set_tracking_uri(before)
    return f"models:/{name}/{logged.registered_model_version}"


def _as_mlflow_takes(example: Any) -> Any:
    if hasattr(example, "numpy"):
        return example.numpy()
    if isinstance(example, Mapping):
        return {key: value.numpy() for key, value in example.items()}
    raise StudyError(
        "MLflow registers models of one input or of named ones; export with --pt2 and keep the file instead"
    )
