"""Logs of TensorBoard, Weights & Biases, MLflow and DVCLive, read back with their own readers."""

import dataclasses
import html
import resource
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
from conftest import RUNTIME, tiny_config, tiny_model
from ruamel.yaml import YAML
from test_train import PARAMS, fit, make_trainer, runs_in_tmp, same, train  # noqa: F401

from tinygpt.errors import UserError
from tinygpt.model.weights import model_tensors, save_model
from tinygpt.params import ParamsError, from_mapping
from tinygpt.run.folder import keep_name
from tinygpt.run.loggers import LOGGERS, Loggers
from tinygpt.run.run import Run
from tinygpt.runtime import RuntimeParams
from tinygpt.train.trainer import TrainState

RUN = "0123456789abcdef"
NUMBERS = ("train_loss", "val_loss", "lr", "grad_norm")
STEPS = list(range(1, PARAMS.max_steps + 1))


class Killed(Exception):
    """Raised to end a training between two checkpoints."""


@pytest.fixture(autouse=True)
def settings_of_nobody(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT", "WANDB_RUN_GROUP"):
        monkeypatch.delenv(name, raising=False)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "runs" / RUN


def logged(*names: str, killed_after: int | None = None):
    """Train as the stage does; returns the trainer's result."""
    trainer, original = make_trainer(runtime=dataclasses.replace(RUNTIME, log_to=names)), Run.report

    def report(run: Run, state: TrainState, *, evaluated: bool) -> None:
        original(run, state, evaluated=evaluated)
        if state.step == killed_after:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "report", report)
        return fit(trainer, RUN)


def logged_twice(name: str):
    """Train, get killed two steps after a checkpoint, and train again."""
    with pytest.raises(Killed):
        logged(name, killed_after=8)
    return logged(name)


def curve(rows, number: str) -> list[tuple[int, float]]:
    """Steps and values of one number in the rows of a curve."""
    return [(row["step"], pytest.approx(row[number])) for row in rows if row[number] is not None]


# ---- TensorBoard ----


def tensorboard_log(folder: Path):
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return module.EventAccumulator(str(folder / "tensorboard")).Reload()


def scalars(log, number: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in log.Scalars(number)]


def test_tensorboard_has_each_step_once_also_after_a_kill(folder):
    pytest.importorskip("tensorboard")
    trained = logged_twice("tensorboard")
    assert len(list((folder / "tensorboard").iterdir())) == 2
    log = tensorboard_log(folder)
    for number in NUMBERS:
        assert scalars(log, number) == curve(trained.state.rows, number)
    assert [step for step, speed in scalars(log, "tokens_per_s") if speed > 0] == STEPS


def test_tensorboard_has_each_step_once_though_the_run_got_its_name_later(folder):
    pytest.importorskip("tensorboard")
    trained = logged("tensorboard")
    keep_name(folder, "tulip-bird")
    with Loggers(["tensorboard"], folder, tiny_config(), PARAMS) as loggers:
        loggers(trained.state)
    assert scalars(tensorboard_log(folder), "val_loss") == curve(trained.state.rows, "val_loss")
    assert not (folder / "tensorboard/tulip-bird").exists()


def test_the_logged_speed_is_that_since_the_row_before(folder):
    pytest.importorskip("tensorboard")
    rows = [{"step": step, "train_loss": 1.0, "val_loss": None} for step in range(1, 7)]
    folder.mkdir(parents=True)
    with Loggers(["tensorboard"], folder, tiny_config(), PARAMS) as loggers:
        for step in range(7):
            loggers(TrainState(step=step, rows=rows[:step], seconds=step**2))
    speeds = [value for _, value in scalars(tensorboard_log(folder), "tokens_per_s")]
    assert speeds == [pytest.approx(4 * 64 / seconds) for seconds in (1, 3, 5, 7, 9, 11)]  # batches of four sequences


def test_tensorboard_has_the_params(folder):
    pytest.importorskip("tensorboard")
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    logged("tensorboard")
    (content,) = tensorboard_log(folder).PluginTagToContent("hparams").values()
    params = HParamsPluginData.FromString(content).session_start_info.hparams
    assert params["model.n_layer"].number_value == 2
    assert params["train.schedule"].string_value == "cosine"
    assert params["train.patience"].string_value == "null"
    assert params["train.betas"].string_value == "[0.9, 0.99]"


def test_a_full_disk_costs_one_line_and_the_next_start_writes_what_is_missing(folder, capsys):
    pytest.importorskip("tensorboard")
    rows = [{"step": step, "train_loss": float(step), "val_loss": None} for step in range(1, 7)]
    folder.mkdir(parents=True)
    loggers = Loggers(["tensorboard"], folder, tiny_config(), PARAMS)
    loggers(TrainState())
    with loggers:
        for step in range(1, 7):
            loggers(TrainState(step=step, rows=rows[:step], seconds=step))
            if step == 2:
                (file,) = (folder / "tensorboard").iterdir()
                limits = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 9, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: tensorboard failed, training continues without it ([Errno 27]")
    assert scalars(tensorboard_log(folder), "train_loss") == [(1, 1), (2, 2)]
    with Loggers(["tensorboard"], folder, tiny_config(), PARAMS) as loggers:
        loggers(TrainState(step=6, rows=rows, seconds=6))
    assert scalars(tensorboard_log(folder), "train_loss") == [(step, step) for step in range(1, 7)]


# ---- Weights & Biases ----


def wandb_records(path: Path):
    """The records of an offline run: 7 bytes, then blocks of 32 KiB in the format of LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if left < 7 or kind == 0:
            at += left  # no header fits, or padding
            continue
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(part)
            part = b""


def wandb_run(path: Path) -> tuple[object, list[dict[str, float]]]:
    """The run's record in the log, and its rows."""
    deadline, records = time.monotonic() + 30, []
    while not any(record.WhichOneof("record_type") == "exit" for record in records):  # written by W&B's own process
        assert time.monotonic() < deadline, path
        time.sleep(0.05)
        records = list(wandb_records(path))
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    rows = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return run, [
        {"".join([i.key, *i.nested_key]): float(i.value_json) for i in row if not i.nested_key or i.key != "sample"}
        for row in rows
    ]


def wandb_curve(rows, number: str) -> list[tuple[int, float]]:
    return [(int(row["_step"]), row[number]) for row in rows if number in row]


def test_each_start_is_an_offline_run_of_wandb_with_the_whole_curve(folder):
    pytest.importorskip("wandb")
    trained = logged_twice("wandb")
    first, second = (wandb_run(path) for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")))
    for (run, rows), n_steps in ((first, 8), (second, PARAMS.max_steps)):
        for number in NUMBERS:
            assert wandb_curve(rows, number) == curve(trained.state.rows[: 1 + n_steps], number)
        config = {item.key: item.value_json for item in run.config.update}
        assert (run.project, run.run_group) == ("tinygpt", RUN)
        assert (config["model.n_layer"], config["train.schedule"]) == ("2", '"cosine"')
    assert [step for step, _ in wandb_curve(second[1], "tokens_per_s")] == [7, 8, 9, 10]  # only steps since the restart


def test_wandb_goes_where_its_own_settings_say(folder, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    logged("wandb")
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert wandb_run(path)[0].project == "mine"
    assert not (folder / "wandb").exists()


# ---- MLflow ----


def mlflow_run(place: Path, experiment: str = "tinygpt"):
    """The only run in a file store, and a client of the store."""
    client = pytest.importorskip("mlflow.tracking").MlflowClient(tracking_uri=place.as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return run, client


def test_mlflow_continues_the_same_run_with_each_step_once(folder):
    pytest.importorskip("mlflow")
    with pytest.raises(Killed):
        logged("mlflow", killed_after=8)
    assert mlflow_run(folder / "mlflow")[0].info.status == "KILLED"
    trained = logged("mlflow")
    run, client = mlflow_run(folder / "mlflow")
    assert (run.info.status, run.info.run_name, run.data.params["model.n_layer"]) == ("FINISHED", RUN, "2")
    history = {name: client.get_metric_history(run.info.run_id, name) for name in (*NUMBERS, "tokens_per_s")}
    for number in NUMBERS:
        assert [(one.step, one.value) for one in history[number]] == curve(trained.state.rows, number)
    assert [one.step for one in history["tokens_per_s"]] == STEPS


def test_mlflow_goes_where_its_own_settings_say(folder, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    logged("mlflow")
    assert mlflow_run(tmp_path / "store", "mine")[0].info.status == "FINISHED"
    assert not (folder / "mlflow").exists()


# ---- DVCLive ----


def test_dvclive_has_each_evaluation_once_also_after_a_kill(folder):
    pytest.importorskip("dvclive")
    trained = logged_twice("dvclive")
    evaluated = [row for row in trained.state.rows if row["val_loss"] is not None]
    assert len(evaluated) < len(trained.state.rows)
    for number in NUMBERS:
        lines = (folder / f"dvclive/plots/metrics/{number}.tsv").read_text().splitlines()[1:]
        found = [(int(step), float(value)) for step, value in (line.split("\t") for line in lines)]
        assert found == curve(evaluated, number)
    assert YAML(typ="safe").load(folder / "dvclive/params.yaml")["model.n_layer"] == 2


def test_dvclive_has_the_first_evaluation_once_though_nothing_came_after_it(folder):
    pytest.importorskip("dvclive")
    folder.mkdir(parents=True)
    state = TrainState(step=0, rows=[{"step": 0, "train_loss": None, "val_loss": 2.0}])
    for _ in range(2):
        with Loggers(["dvclive"], folder, tiny_config(), PARAMS) as loggers:
            loggers(state)
    assert (folder / "dvclive/plots/metrics/val_loss.tsv").read_text().splitlines()[1:] == ["0\t2.0"]


# ---- all of them ----


TEXT = "<b>bold</b> & plain\n\n# once upon a time\n"
SAMPLES = {  # how to read the text of step 2 from each logger
    "tensorboard": lambda folder: tensorboard_log(folder).Tensors("sample")[-1].tensor_proto.string_val[0].decode(),
    "wandb": lambda folder: html.unescape(next(folder.glob("wandb/*/files/media/html/sample_2_*.html")).read_text()),
    "mlflow": lambda folder: next(folder.glob("mlflow/**/samples/0000002.txt")).read_text(),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_in_the_log(name, folder):
    pytest.importorskip(name)
    folder.mkdir(parents=True)
    rows = [{"step": step, "train_loss": 1.0, "val_loss": 2.0} for step in range(3)]
    samples = [{"step": 0, "text": "first"}, {"step": 2, "text": TEXT}]
    with Loggers([name], folder, tiny_config(), PARAMS) as loggers:
        loggers(TrainState(step=0, rows=rows[:1], samples=samples[:1]))
        loggers(TrainState(step=2, rows=rows, samples=samples, seconds=1.0))
    assert TEXT in SAMPLES[name](folder)
    with Loggers([name], folder, tiny_config(), PARAMS) as loggers:  # a restart does not write it twice
        loggers(TrainState(step=2, rows=rows, samples=samples))
    if name == "tensorboard":
        assert [event.step for event in tensorboard_log(folder).Tensors("sample")] == [0, 2]


def test_choices_are_the_keys_of_the_registry():
    (choice, _) = typing.get_args(typing.get_type_hints(RuntimeParams)["log_to"])
    assert set(typing.get_args(choice)) == set(LOGGERS)


def test_a_log_that_is_named_twice_is_refused():
    fields = dataclasses.asdict(RUNTIME) | {"log_to": ["wandb", "wandb"]}
    with pytest.raises(ParamsError, match=r'runtime.log_to=\["wandb", "wandb"\] has a duplicate'):
        from_mapping(RuntimeParams, fields)


def test_logs_change_no_weight_and_no_row():
    names = list(LOGGERS)
    for name in names:
        pytest.importorskip(name)
    plain, watched = train("plain"), logged(*names)
    assert same(plain.last, watched.last) and same(plain.best, watched.best)
    assert plain.state.rows == watched.state.rows


def test_a_finished_run_is_written_without_training(folder):
    pytest.importorskip("tensorboard")
    trained = train(RUN)
    logged("tensorboard")
    assert scalars(tensorboard_log(folder), "train_loss") == curve(trained.state.rows, "train_loss")


@pytest.mark.parametrize("name", LOGGERS)
def test_a_log_that_cannot_be_opened_costs_one_line(name, folder, monkeypatch, capsys):
    pytest.importorskip(name)
    folder.mkdir(parents=True)
    for place in ("tensorboard", "dvclive"):
        (folder / place).write_text("no folder")
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    assert logged(name).state.step == PARAMS.max_steps
    told = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(told) == 1
    assert told[0].startswith(f"warning: {name} failed, training continues without it (")


@pytest.mark.parametrize("name", LOGGERS)
def test_a_missing_package_is_reported_before_training(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"runtime.log_to=\[{name}\] needs {name}: pip install {name}.*, or remove it"):
        Loggers([name], tmp_path, tiny_config(), PARAMS)


def test_a_folder_with_the_name_of_a_package_is_not_one(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # as W&B itself makes it
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="needs wandb"):
        Loggers(["wandb"], tmp_path, tiny_config(), PARAMS)


def test_loggers_the_compiler_and_pandas_are_imported_only_on_request(tmp_path):
    """Importing the compiler, torch._dynamo, takes as long as the rest of torch; models open and train without it."""
    save_model(tmp_path, tiny_config(), model_tensors(tiny_model()))
    code = "import sys, torch, stages.evaluate, stages.export, stages.plot, stages.train\n"
    code += "from tinygpt.model.weights import load_model\nfrom tinygpt.params import load_params\n"
    code += "from tinygpt.runtime import RuntimeParams\nfrom tinygpt.train import learner\n"
    code += "params, model = load_params(learner.TrainParams, RuntimeParams), load_model(sys.argv[1])\n"
    code += "learner.Learner(model, *params, device=torch.device('cpu')).learn(0, torch.ones(8, 9).long())\n"
    code += "sys.exit(' '.join({*sys.argv[2:]} & {*sys.modules}) or None)"
    command = [sys.executable, "-c", code, tmp_path, *LOGGERS, "torch._dynamo", "pandas"]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True)
