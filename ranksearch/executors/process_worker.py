"""`python -m ranksearch.executors.process_worker DESCRIPTOR`: a worker at the end of a socket from the coordinator."""

import os
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import final

from pydantic import BaseModel, ConfigDict

from ranksearch.executors.base import Job, Outcome, run_job, told
from ranksearch.executors.worker import Assignment, now_and_then, open_worker
from ranksearch.recovery import Step

PARENT_EVERY_S = 0.5


class Message(BaseModel):
    """What a worker says: that it is `ready`, why it cannot be (`broken`), how far it is, or what came of a job."""

    model_config = ConfigDict(frozen=True)

    ready: bool = False
    broken: str | None = None
    step: Step | None = None
    outcome: Outcome | None = None


@final
class _Line:
    """The worker's end of the socket."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def say(self, message: Message) -> None:
        self._connection.send_bytes(message.model_dump_json(by_alias=True).encode())

    def hear(self) -> bytes:
        """What the coordinator says next. Raises EOFError where it is gone."""
        return self._connection.recv_bytes()


def serve(connection: Connection) -> None:
    """Opens the study that it is told of, then does jobs until the coordinator hangs up."""
    line = _Line(connection)
    on_step = now_and_then(lambda step: line.say(Message(step=step)))
    try:
        worker = open_worker(Assignment.model_validate_json(line.hear()), on_step)
    except Exception as error:
        line.say(Message(broken=told(error)))
        return
    line.say(Message(ready=True))
    while True:
        job = Job.model_validate_json(line.hear())
        line.say(Message(outcome=run_job(worker.evaluate, job)))


def _end_with(parent: int) -> None:
    """Ends this process at once when its parent is gone: nobody would take what it makes, and it would disturb."""
    while os.getppid() == parent:
        time.sleep(PARENT_EVERY_S)
    os._exit(1)


def main() -> None:
    """Serves on the socket whose descriptor the coordinator passed."""
    descriptor = int(sys.argv[1])
    # What the study starts must not hold the line open.
    os.set_inheritable(descriptor, False)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        serve(Connection(descriptor))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


if __name__ == "__main__":
    main()
