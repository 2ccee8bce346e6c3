"""The thread that extends the answers of all requests together, a token at a time."""

from __future__ import annotations

import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tinygpt.errors import UserError
from tinygpt.generate import Answer
from tinygpt.generate.answer import Running
from tinygpt.model.gpt import GPT
from tinygpt.serve.limits import Limits, Refusal


@dataclass(frozen=True)
class Update:
    """What a step gave to one answer of a job."""

    index: int
    piece: str
    n_ids: int  # of the answer so far
    finish_reason: str | None


@dataclass(eq=False, frozen=True)
class Job:
    """The answers of a request, which begin together; `report` is called in the worker's thread."""

    model: str
    answers: list[Answer]
    report: Callable[[list[Update] | Refusal], None]


class Worker(threading.Thread):
    """Jobs wait in the order in which they came until their rows are free."""

    def __init__(self, models: Mapping[str, GPT], limits: Limits) -> None:
        super().__init__(name="worker")
        self._limits = limits
        self._lanes = {name: Lane(model) for name, model in models.items()}
        self._changed = threading.Condition()  # guards what follows
        self._waiting: deque[Job] = deque()
        self._gone: list[Job] = []
        self._stopped = False

    def submit(self, job: Job) -> None:
        """Take a job.  Raises Refusal when too many wait, or the server ends."""
        with self._changed:
            if self._stopped:
                raise stopping()
            if len(self._waiting) >= self._limits.max_waiting:
                raise Refusal(
                    429, f"{len(self._waiting)} requests wait already: try again later", code="too_many_requests"
                )
            self._waiting.append(job)
            self._changed.notify()

    def drop(self, job: Job) -> None:
        """Free the rows of a job, where it still has some or waits for them."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
            else:
                self._gone.append(job)
                self._changed.notify()

    def stop(self) -> None:
        """End the thread after its step; all jobs get a refusal."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    @property
    def is_stopped(self) -> bool:
        """Whether it was asked to end."""
        return self._stopped

    def counts(self) -> dict[str, int]:
        """Answers that run and requests that wait."""
        with self._changed:
            return {"running": sum(lane.n_row for lane in self._lanes.values()), "waiting": len(self._waiting)}

    def run(self) -> None:
        """The thread."""
        while self._admit():
            for lane in self._lanes.values():
                lane.step()
        for job in [*self._waiting, *(job for lane in self._lanes.values() for job in lane.jobs())]:
            job.report(stopping())

    def _admit(self) -> bool:
        """Let go who went away and take in who fits; wait where there is nothing to do.  False at the end."""
        with self._changed:
            while not (
                self._stopped or self._waiting or self._gone or any(lane.n_row for lane in self._lanes.values())
            ):
                self._changed.wait()
            gone, self._gone = self._gone, []
        for name, lane in self._lanes.items():  # without the lock: it copies what the others have in the cache
            lane.drop([job for job in gone if job.model == name])
        new: list[Job] = []
        with self._changed:
            free = self._limits.max_rows - sum(lane.n_row for lane in self._lanes.values())
            while self._waiting and len(self._waiting[0].answers) <= free:
                new.append(self._waiting.popleft())
                free -= len(new[-1].answers)
            if self._stopped:
                self._waiting.extendleft(reversed(new))
                return False
        for name, lane in self._lanes.items():
            lane.add([job for job in new if job.model == name])
        return True


class Lane:
    """What runs on one model."""

    def __init__(self, model: GPT) -> None:
        self._model, self._running = model, Running(model)
        self._places: dict[Answer, tuple[Job, int]] = {}

    @property
    def n_row(self) -> int:
        """Answers that run."""
        return len(self._places)

    def jobs(self) -> list[Job]:
        """Those with answers that run."""
        return list(dict.fromkeys(job for job, _ in self._places.values()))

    def add(self, jobs: list[Job]) -> None:
        """Begin some jobs; their prompts are read together."""
        self._places |= {answer: (job, i) for job in jobs for i, answer in enumerate(job.answers)}
        self._guarded(lambda: self._running.add([answer for job in jobs for answer in job.answers]))

    def drop(self, jobs: list[Job]) -> None:
        """Go on without some jobs."""
        left = [answer for job in jobs for answer in job.answers if self._places.pop(answer, None)]
        self._guarded(lambda: self._running.drop(left))

    def step(self) -> None:
        """Give each answer a token and report it to its job."""
        if self._places:
            self._guarded(self._step)

    def _step(self) -> None:
        updates: dict[Job, list[Update]] = {}
        for answer in self._running.step():
            job, index = self._places.pop(answer) if answer.finish_reason else self._places[answer]
            update = Update(index, answer.piece, len(answer.ids), answer.finish_reason)
            updates.setdefault(job, []).append(update)
        for job, each in updates.items():
            job.report(each)

    def _guarded(self, work: Callable[[], None]) -> None:
        """A model that fails, such as one without memory for another row, ends its jobs and not the server."""
        try:
            work()
        except Exception as error:
            if not isinstance(error, UserError):
                traceback.print_exc(file=sys.stderr)
            failed, self._places, self._running = self.jobs(), {}, Running(self._model)
            for job in failed:
                job.report(Refusal(500, f"the model failed: {error}", code="model_failed"))


def stopping() -> Refusal:
    """The refusal of a server that ends."""
    return Refusal(503, "the server is stopping", code="stopping")
