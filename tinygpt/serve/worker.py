"""The thread that extends the answers of all requests together, one token at a time."""

import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from tinygpt.errors import UserError
from tinygpt.generate import Answer
from tinygpt.generate.answer import Running
from tinygpt.model.gpt import GPT
from tinygpt.options import Limits
from tinygpt.serve.request import Refusal


@dataclass(frozen=True)
class Update:
    """What a step added to one answer of a job."""

    index: int
    piece: str
    n_ids: int  # of the answer so far
    finish_reason: str | None


@dataclass(eq=False, frozen=True)
class Job:
    """The answers of a request, which start together; `report` is called in the worker's thread."""

    model: str
    answers: list[Answer]
    report: Callable[[list[Update] | Refusal], None]


class Worker(threading.Thread):
    """Runs jobs.  They wait, first come, first served, until there are enough free rows."""

    def __init__(self, models: Mapping[str, GPT], limits: Limits) -> None:
        super().__init__(name="worker")
        self._models, self._limits = models, limits
        self._running = {name: Running(model) for name, model in models.items()}
        self._places: dict[Answer, tuple[Job, int]] = {}  # of running answers: the job, and the index in it
        self._changed = threading.Condition()  # guards what follows
        self._waiting: deque[Job] = deque()
        self._gone: list[Job] = []
        self.is_stopped = False  # or asked to stop

    def submit(self, job: Job) -> None:
        """Accept a job.  Raises Refusal if too many wait, or the server is stopping."""
        with self._changed:
            if self.is_stopped:
                raise stopping()
            n_row = len(self._places) + sum(len(each.answers) for each in (*self._waiting, job))
            if len(self._waiting) >= self._limits.max_waiting and n_row > self._limits.max_rows:
                message = f"{len(self._waiting)} requests are already waiting: try again later"
                raise Refusal(429, message, code="too_many_requests")
            self._waiting.append(job)
            self._changed.notify()

    def drop(self, job: Job) -> None:
        """Free the rows of a job, if it still has some or waits for them."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
            else:
                self._gone.append(job)
                self._changed.notify()

    def stop(self) -> None:
        """End the thread after the current step; all jobs get a refusal."""
        with self._changed:
            self.is_stopped = True
            self._changed.notify()

    def counts(self) -> dict[str, int]:
        """How many answers are running, and how many requests wait."""
        with self._changed:
            return {"running": len(self._places), "waiting": len(self._waiting)}

    def run(self) -> None:
        """Run jobs until stop()."""
        while self._admit():
            for name, running in self._running.items():
                if running.answers:
                    self._guarded(name, partial(self._step, running))
        for job in {*self._waiting, *(job for job, _ in self._places.values())}:
            job.report(stopping())

    def _admit(self) -> bool:
        """Drop jobs of clients that left, start jobs that fit; wait while there is nothing to do.  False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_stopped or self._waiting or self._gone or self._places)
            if self.is_stopped:
                return False
            left = [answer for job in self._gone for answer in job.answers if self._places.pop(answer, None)]
            self._gone.clear()
            new, free = list[Job](), self._limits.max_rows - len(self._places)
            while self._waiting and len(self._waiting[0].answers) <= free:
                new.append(self._waiting.popleft())
                free -= len(new[-1].answers)
                self._places |= {answer: (new[-1], i) for i, answer in enumerate(new[-1].answers)}
        for name in self._running:  # without the lock: this copies the cache of the other answers
            self._guarded(name, partial(self._running[name].drop, left))
            begun = [each for job in new if job.model == name for each in job.answers if each in self._places]
            self._guarded(name, partial(self._running[name].add, begun))  # prompts are read together
        return True

    def _step(self, running: Running) -> None:
        """Extend each answer by a token, and report it to its job."""
        updates: dict[Job, list[Update]] = {}
        for answer in running.step():
            job, index = self._places.pop(answer) if answer.finish_reason else self._places[answer]
            update = Update(index, answer.piece, len(answer.ids), answer.finish_reason)
            updates.setdefault(job, []).append(update)
        for job, each in updates.items():
            job.report(each)

    def _guarded(self, name: str, work: Callable[[], None]) -> None:
        """Do some work of a model.  If it fails, such as for lack of memory, its jobs end, but not the server."""
        try:
            work()
        except Exception as error:
            if not isinstance(error, UserError):
                traceback.print_exc()
            self._running[name] = Running(self._models[name])
            failed = {answer: job for answer, (job, _) in self._places.items() if job.model == name}
            for answer in failed:
                del self._places[answer]
            for job in set(failed.values()):
                job.report(Refusal(500, f"the model failed: {error}", code="model_failed"))


def stopping() -> Refusal:
    """The refusal from a server that is stopping."""
    return Refusal(503, "the server is stopping", code="stopping")
