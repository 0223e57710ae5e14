"""What a stranger wrote can at worst be refused, and what only its owner may know is never shown."""

import shlex
from pathlib import Path

import pytest

from ranksearch.cli.options import typed
from ranksearch.errors import StudyError
from ranksearch.masking import masked, public_address
from ranksearch.optimization import check_storage
from ranksearch.tracking import find_study, page_url, pages
from ranksearch.tracking.store import explained, first_line

SECRET = "p@ss/w0rd"
STORAGE = f"postgresql://me:{SECRET}@host/studies"
SERVER = "https://me:p%40ss%2Fw0rd@127.0.0.1:9"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:pw@host/db", "postgresql://***@host/db"),
        ("cannot open 'mysql://me:p/w@x@host/db?charset=utf8'", "cannot open 'mysql://***@host/db?charset=utf8'"),
        ("https://token@host, then http://host/a", "https://***@host, then http://host/a"),
        (
            "postgresql://host/db?user=me&password=pw&sslmode=off",
            "postgresql://host/db?user=me&password=***&sslmode=off",
        ),
        ("https://host/x?api_token=t'", "https://host/x?api_token=***'"),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
        ("mail me@host about a plan", "mail me@host about a plan"),
    ],
)
def test_passwords_are_masked_wherever_an_address_stands(text: str, shown: str) -> None:
    assert masked(text) == shown
    assert masked(shown) == shown


def test_a_storage_that_cannot_be_opened_is_named_without_its_password() -> None:
    with pytest.raises(StudyError, match="cannot open the Optuna storage") as caught:
        check_storage(STORAGE.replace("postgresql", "nodialect"))
    assert "host/studies" in str(caught.value) and "w0rd" not in str(caught.value)


def test_a_tracking_server_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(StudyError, match="127.0.0.1:9") as caught:
        find_study(SERVER, None, "digits")
    assert "w0rd" not in str(caught.value)
    assert caught.value.__cause__ is None or "w0rd" not in str(caught.value.__cause__)


def test_no_traceback_and_no_log_tells_what_mlflow_says_of_an_address() -> None:
    failure = OSError(f"API request to {SERVER}/api/2.0/mlflow failed")
    with pytest.raises(StudyError) as caught, explained(SERVER):
        raise failure
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert first_line(failure) == "API request to https://***@127.0.0.1:9/api/2.0/mlflow failed"


def test_the_page_of_a_server_is_opened_without_who_logs_in() -> None:
    assert public_address(SERVER) == "https://127.0.0.1:9"
    assert page_url(SERVER, "1", "r").startswith("https://127.0.0.1:9/#/experiments/1")


def test_commands_to_copy_hold_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPTUNA_STORAGE", raising=False)
    words = shlex.split(typed(study="digits", storage=STORAGE))
    assert words == ["--study", "digits", "--storage", "postgresql://***@host/studies"]
    monkeypatch.setenv("OPTUNA_STORAGE", STORAGE)
    assert typed(storage=STORAGE) == ""


def test_the_store_of_the_ui_stands_in_no_list_of_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = {}

    def popen(command: list[str], **options: object) -> None:
        started.update(options, command=command)

    monkeypatch.setattr(pages.subprocess, "Popen", popen)
    pages._start(STORAGE, 5000, None)
    assert SECRET not in " ".join(started["command"])
    assert started["env"]["MLFLOW_BACKEND_STORE_URI"] == STORAGE
    assert started["command"][started["command"].index("--host") + 1] == "127.0.0.1"
