"""Loggers that show training while it runs: TensorBoard, Weights & Biases, MLflow, DVCLive.

Each gets the curve row by row, and the samples, and writes into the run's folder unless its own environment variables
name another place. When a run continues, rows that a log lacks are written first, and none is written twice.
"""

from __future__ import annotations

import dataclasses
import html
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tinygpt.errors import UserError, printable, shown
from tinygpt.files import fenced
from tinygpt.model.config import GPTConfig, config_fields
from tinygpt.run.folder import read_name
from tinygpt.train.config import TrainParams
from tinygpt.train.trainer import Row, TrainState

PROJECT = "tinygpt"  # W&B's project and MLflow's experiment, for all runs


class Loggers:
    """The requested loggers, as a context manager; call it with the state at the start and after each step.

    A logger that fails prints a line of warning and is left out from then on; training continues.
    """

    def __init__(self, names: Iterable[str], folder: Path, config: GPTConfig, params: TrainParams) -> None:
        """`folder` is that of the run's checkpoints.  Raises UserError when a package is missing."""
        self._names, self._folder = tuple(names), folder
        for name in self._names:
            spec = importlib.util.find_spec(name)
            if spec is None or spec.origin is None:  # without an origin: a mere folder of that name
                raise UserError(f"runtime.log_to=[{name}] needs {name}: pip install {name}, or remove it from the list")
        self._params = _shown("model", config_fields(config)) | _shown("train", dataclasses.asdict(params))
        self._tokens_per_step = params.batch_size * config.block_size
        self._loggers: dict[str, Logger] = {}
        self._n_rows = 0  # of the curve, already handed on
        self._since: tuple[int, float] | None = None  # tokens and seconds at the last of them

    def __enter__(self) -> Loggers:
        for name in self._names:
            self._attempt(name, self._open, name)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        for name, logger in list(self._loggers.items()):
            self._attempt(name, logger.close, kind is None)

    def __call__(self, state: TrainState) -> None:
        """Write the new rows of the curve, with the speed since the last one, if measured since this start."""
        rows, self._n_rows = state.rows[self._n_rows :], len(state.rows)
        if self._since is not None and not rows:
            return
        speed, tokens = {}, state.step * self._tokens_per_step
        if self._since is not None and tokens > self._since[0]:
            speed = {"tokens_per_s": (tokens - self._since[0]) / (state.seconds - self._since[1])}
        self._since = tokens, state.seconds
        texts = {sample["step"]: sample["text"] for sample in state.samples}
        for name, logger in list(self._loggers.items()):
            self._attempt(name, _write, logger, rows, speed, texts)

    def _open(self, name: str) -> None:
        self._loggers[name] = LOGGERS[name](self._folder, self._params)

    def _attempt(self, name: str, action: Callable[..., None], *args: Any) -> None:
        try:
            action(*args)
        except Exception as error:  # any kind: a fault of the library must not end the training
            reason = (str(error) or repr(error)).splitlines()[0]
            tqdm.write(f"warning: {name} failed, training continues without it ({printable(reason)})", file=sys.stderr)
            self._loggers.pop(name, None)


def _write(logger: Logger, rows: list[Row], speed: dict[str, float], texts: dict[int, str]) -> None:
    for row in rows:
        numbers = {name: number for name, number in row.items() if number is not None}
        step = int(numbers.pop("step"))
        if step > logger.last_step:
            logger.write(step, numbers | speed, texts.get(step))


def _shown(group: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Numbers, strings and booleans as they are, the rest as params.yaml writes it."""
    return {f"{group}.{key}": v if isinstance(v, int | float | str) else shown(v) for key, v in fields.items()}


class TensorBoard:
    """Event files in runs/<fingerprint>/tensorboard, one per start: `tensorboard --logdir runs` shows them as one.

    Torch's SummaryWriter is not used: its thread prints a traceback when the disk is full, and it does not say which
    steps a log lacks.
    """

    def __init__(self, folder: Path, params: dict[str, Any]) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        trial = folder.name
        logs = folder / "tensorboard"
        before = next(logs.rglob("events.out.tfevents.*"), None)  # it may have had no name then
        folder = before.parent if before else logs / read_name(folder)  # TensorBoard names runs after their folders
        folder.mkdir(exist_ok=True, parents=True)
        log = EventAccumulator(str(folder)).Reload()
        self.last_step = max((log.Scalars(name)[-1].step for name in log.Tags()["scalars"]), default=-1)
        path = folder / f"events.out.tfevents.{time.time_ns()}"  # TensorBoard reads them in this order
        self._writer = RecordWriter(open(path, "wb", buffering=0))  # noqa: SIM115, close() does
        self._add(file_version="brain.Event:2")
        if self.last_step < 0:
            self._add(summary=hparams_pb(params, trial_id=trial))

    def write(self, step: int, numbers: dict[str, float], text: str | None) -> None:
        """Write the row as one event, so that it is in the file whole or not at all."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.text.summary_v2 import text_pb

        summary = Summary(value=[Summary.Value(tag=name, simple_value=number) for name, number in numbers.items()])
        if text is not None:
            summary.MergeFrom(text_pb("sample", fenced(text)))  # it shows Markdown
        self._add(step=step, summary=summary)

    def close(self, finished: bool) -> None:
        self._writer.close()

    def _add(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._writer.flush()


class WandB:
    """One Weights & Biases run per start, grouped by fingerprint, in runs/<fingerprint>/wandb; nothing is sent.

    WANDB_MODE=online sends it. An offline log cannot be appended to, so each start is a run with the whole curve.
    """

    last_step = -1

    def __init__(self, folder: Path, params: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=read_name(folder) or None,
            group=os.environ.get("WANDB_RUN_GROUP", folder.name),
            dir=os.environ.get("WANDB_DIR", str(folder)),
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=params,
            settings=wandb.Settings(console="off", quiet=True, finish_timeout=120),  # off: leave our output alone
        )

    def write(self, step: int, numbers: dict[str, float], text: str | None) -> None:
        import wandb

        self._run.log(numbers, step=step)
        if text is not None:  # in a call of its own: its file is named after the previous step
            self._run.log({"sample": wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)}, step=step)

    def close(self, finished: bool) -> None:
        """Online, this waits until all is sent."""
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """One MLflow run per fingerprint, in files in runs/<fingerprint>/mlflow or where MLFLOW_TRACKING_URI says."""

    def __init__(self, folder: Path, params: dict[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else MLflow refuses to write plain files
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # not 7, which hold up training for minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds, not 120
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        place = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlflow").absolute().as_uri()
        self._client = MlflowClient(tracking_uri=place)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        in_it = experiment.experiment_id if experiment else self._client.create_experiment(name)
        found = self._client.search_runs([in_it], f"tags.fingerprint = '{folder.name}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            run = self._client.create_run(
                in_it, tags={"fingerprint": folder.name}, run_name=read_name(folder) or folder.name
            )
            self._id = run.info.run_id
            self._client.log_batch(self._id, params=[Param(key, str(value)) for key, value in params.items()])
        names = ("train_loss", "val_loss")  # each row has at least one
        steps = [metric.step for name in names for metric in self._client.get_metric_history(self._id, name)]
        self.last_step = max(steps, default=-1)

    def write(self, step: int, numbers: dict[str, float], text: str | None) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)  # milliseconds since 1970
        self._client.log_batch(self._id, metrics=[Metric(name, number, now, step) for name, number in numbers.items()])
        if text is not None:
            self._client.log_text(self._id, text, f"samples/{step:07}.txt")

    def close(self, finished: bool) -> None:
        """Leave the run as FINISHED or KILLED."""
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


class DVCLive:
    """DVC's own log, which Studio shows, in runs/<fingerprint>/dvclive: evaluations only, because a row takes 30 ms."""

    def __init__(self, folder: Path, params: dict[str, Any]) -> None:
        from dvclive.live import Live

        place = folder / "dvclive"
        self._live = Live(str(place), resume=place.exists(), report=None, save_dvc_exp=False, dvcyaml=None)
        self.last_step = int(self._live.summary.get("step", -1))
        if self.last_step < 0:
            self._live.log_params(params)

    def write(self, step: int, numbers: dict[str, float], text: str | None) -> None:
        """Log evaluations only, without the text, for which DVCLive has no place."""
        if "val_loss" in numbers:
            self._live.step = step
            for name, number in numbers.items():
                self._live.log_metric(name, number)
            self._live.next_step()

    def close(self, finished: bool) -> None:
        """End without saving an experiment: `dvc exp run` does that."""
        self._live.end()


# Each is built from the run's folder, named after its fingerprint, and its params. `last_step` is the newest step that
# its log has from an earlier start, or -1.
Logger = TensorBoard | WandB | MLflow | DVCLive
LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow, "dvclive": DVCLive}
