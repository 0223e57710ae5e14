"""The versions that a result depends on."""

import importlib.metadata
import platform
from contextlib import suppress

PACKAGES = ("ranksearch", "torch", "openvino", "onnxruntime", "nncf", "optuna", "mlflow", "numpy", "tensorly")


def package_versions() -> dict[str, str]:
    """Python's and those of the packages that are installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
