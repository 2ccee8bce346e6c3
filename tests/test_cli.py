"""The command line as users see it."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import prose, tiny_model

from tinygpt.cli.flags import DeviceOptions, TextOptions
from tinygpt.cli.generate import FORMATS
from tinygpt.cli.main import COMMANDS
from tinygpt.corpus.folders import text_line
from tinygpt.export.folders import tokenizer_of, write_base
from tinygpt.export.hf import export_hf
from tinygpt.generate import Sampling, Search, generate
from tinygpt.model.quantize import QUANTIZED
from tinygpt.model.weights import load_model, model_tensors, save_model
from tinygpt.options import options_of
from tinygpt.tokenizer import Tokenizer, load_tokenizer
from tinygpt.tokenizer.bpe import train_bpe

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer) -> list[str]:
    folder = tmp_path_factory.mktemp("cli")
    model = tiny_model()
    save_model(folder / "model", model.config, model_tensors(model))
    tiny_tokenizer.save(folder / "tokenizer")
    return ["--model", str(folder / "model"), "--tokenizer", str(folder / "tokenizer")]


def run(*args: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tinygpt", *args]
    return subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True, timeout=120, check=False)


def test_generate_prints_the_prompt_and_continues_it_and_a_seed_repeats_the_text(folders, command):
    args = ["generate", "--prompt", "the", "--max-new-tokens", "20", *folders]
    first = run(*args)
    second = command(
        "generate", "-p", "the", "--max-new-tokens=20", "--temperature", "0.8", *folders
    )  # other spellings
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("the")
    assert len(first.stdout) > 5
    assert first.stdout == second.stdout


@pytest.mark.parametrize(
    ("args", "stdin", "message"),
    [
        (
            ["encode"],
            b"a\n\na\xefve",
            "error: standard input:3: byte 2 is 0xef, which is not UTF-8: convert it to UTF-8",
        ),
        (["encode", "a\udcff"], b"", "error: prompt is not UTF-8 from character 1 on: give it as UTF-8"),
        (["encode"], b"a" * 20_000_001, "error: standard input has more than 20.0 MB: split it"),
        (["decode"], b"72 \xff", "error: standard input:1: byte 4 is 0xff, which is not UTF-8"),
        (["decode", "9" * 5000], b"", "is not an id: give whole numbers"),
        (["decode", str(2**63)], b"", "is not an id: give whole numbers"),
    ],
)
def test_impossible_texts_and_ids_are_reported_in_one_line(args, stdin, message, folders, command):
    done = command(*args, *folders[2:], stdin=stdin)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_every_way_to_choose_tokens_has_its_flag(folders, tiny_tokenizer, command):
    told = command("generate", "--help").stdout
    for cls in (Sampling, Search):
        for field in dataclasses.fields(cls):
            assert f"--{field.name.replace('_', '-')} " in told
    model = load_model(folders[1])
    e, t = tiny_tokenizer.encode("et")
    options = f"--n-beam 3 --early-stopping true --length-penalty -0.5 --banned-ids {e} {t} --logit-bias {t + 1}=-2.5"
    options += f" --logit-bias {t + 2}=1 --min-new-tokens 3 --stop q --stop x --stop-ids {t + 3} --when-full stop"
    done = command("generate", "--prompt", "the", "--max-new-tokens", "12", *options.split(), *folders)
    assert done.returncode == 0, done.stderr
    asked = Sampling(
        temperature=0,
        banned_ids=(e, t),
        logit_bias=((t + 1, -2.5), (t + 2, 1.0)),
        min_new_tokens=3,
        stop=("q", "x"),
        stop_ids=(t + 3,),
        when_full="stop",
    )
    search = Search(n_beam=3, early_stopping="true", length_penalty=-0.5)
    text = generate(model, tiny_tokenizer, "the", max_new_tokens=12, sampling=asked, search=search)
    assert done.stdout == f"the{text}\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["encode", "x", "--tokenizer", "nowhere"], "nowhere not found: give an existing folder"),
        (["promote", "--model", "nowhere"], "nowhere not found: give an existing folder"),
        (["generate", "--model", "nowhere"], "nowhere not found: give a folder with config.json"),
        (["generate", "--model", "data/nowhere"], "data/nowhere not found: give a folder with config.json"),
        (["generate", "--model", "data/base"], "data/base not found: give a folder with config.json"),
        (["generate", "--model", "data/model/last"], "data/model/last not found: run `dvc repro train`"),
        (["generate", "--model", "data/export/hf"], "data/export/hf not found: run `dvc repro export`"),
        (["generate", "--model", "data/export/x.gguf"], "data/export/x.gguf not found: run `dvc repro export`"),
        (["generate", "--model", "data/nowhere.gguf"], "data/nowhere.gguf not found: give a .gguf file"),
        (["generate", "--max-new-tokens", "0"], "--max-new-tokens=0 must be 1 or more"),
        (["generate", "--max-new-tokens", "x"], "error: --max-new-tokens=x must be a whole number\n"),
        (["generate", "--n-beam", "0"], "--n-beam=0 must be from 1 to 256"),
        (["generate", "--n-beam", "2", "--temperature", "0.5"], "--n-beam=2 does not sample: it needs --temperature=0"),
        (["generate", "--best-of", "2", "--temperature", "0"], "--best-of=2 needs temperature above 0"),
        (["generate", "--length-penalty", "2"], "--length-penalty is for beam search: it needs --n-beam above 1"),
        (["generate", "--stop", ""], '--stop="" would end every text at once'),
        (["generate", "--logit-bias", "5"], "--logit-bias=5 must be ID=BIAS, such as 17=-2.5"),
        (["generate", "--promt", "x"], "unknown argument --promt (did you mean --prompt?)"),
        (["generate", "--tempreature=0.5"], "unknown argument --tempreature=0.5 (did you mean --temperature?)"),
        (["generate", "--top_p=0.5"], "unknown argument --top_p=0.5 (did you mean --top-p?)"),
        (["generate", "hello"], "unknown argument hello: see python -m tinygpt generate --help"),
        (["sing"], "unknown command sing: see"),
        (["genrate"], "unknown command genrate (did you mean generate?): see python -m tinygpt --help"),
    ],
)
def test_a_mistake_is_reported_without_a_traceback(args, message, command):
    done = command(*args)
    assert done.returncode != 0
    assert message in done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_without_a_command_all_commands_are_listed(command):
    done = command()
    assert done.returncode == 0
    assert [name for name in COMMANDS if f"\n    {name}" not in done.stdout] == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--banned-ids", "5", "300"], "--banned-ids has 300, but the model's ids are 0 to 299"),
        (["--min-new-tokens", "9", "--max-new-tokens", "5"], "--min-new-tokens=9 is more than --max-new-tokens=5"),
        (
            ["--prompt", "the " * 99, "--when-full", "stop"],
            "no room in a context of 64: shorten it, or set --when",
        ),
        (["--prompt", "a\udcff"], "prompt is not UTF-8 from character 1 on"),
    ],
)
def test_what_does_not_fit_the_model_is_reported_before_anything_is_written(folders, args, message, command):
    done = command("generate", *args, *folders)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_type_of_gguf_that_was_not_made_is_reported_with_those_that_were(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/export/gguf").mkdir(parents=True)
    (tmp_path / "data/export/gguf/tinygpt-f32.gguf").touch()
    said = command("generate", "--model", "data/export/gguf/tinygpt-q4_0.gguf").stderr
    assert said.endswith("not found: there is tinygpt-f32.gguf, and export.gguf names the types that are made\n")


def test_what_belongs_to_a_project_is_refused_elsewhere(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    for words in (["import-hf", "x"], ["promote", "--model", "."], ["preset"], ["preset", "tiny"]):
        assert "run this from the project's top folder" in command(*words).stderr
    assert not any(tmp_path.iterdir())


def test_a_model_is_read_with_the_tokenizer_next_to_it_or_as_a_transformers_folder(tiny_tokenizer, tmp_path, command):
    model = tiny_model()
    write_base(tmp_path / "model", model.config, model_tensors(model), tiny_tokenizer)
    shutil.move(tmp_path / "model/tokenizer.json", tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer").mkdir()
    shutil.move(tmp_path / "tokenizer.json", tmp_path / "tokenizer")
    assert command("promote", "--model", tmp_path / "model", "--to", tmp_path / "to").returncode == 0
    export_hf(model, tiny_tokenizer, tmp_path / "tokenizer", tmp_path / "hf")
    for name in ("model", "hf"):
        picture = tmp_path / f"{name}.svg"
        assert command("attention", "-p", "the", "--model", tmp_path / name, "--plot", picture).returncode == 0
    assert (tmp_path / "model.html").read_bytes() == (tmp_path / "hf.html").read_bytes()


@pytest.mark.parametrize("name", [".", "../model", "model/..", ".."])
def test_the_tokenizer_is_next_to_a_model_under_any_name(name, tmp_path, monkeypatch):
    inner = tmp_path / "model" / "model"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner if name == ".." else inner.parent)
    assert tokenizer_of(Path(name)).resolve() == tmp_path / "tokenizer"


def test_a_tokenizer_of_another_run_is_refused(folders, tmp_path, command):
    path = Path(folders[3]) / "tokenizer.json"
    document = json.loads(path.read_text())
    *merges, last = document["model"]["merges"]
    document["model"]["merges"] = merges
    del document["model"]["vocab"]["".join(last)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    done = command("generate", *folders[:2], "--tokenizer", tmp_path)
    assert done.returncode == 1
    assert "or give a model and a tokenizer from the same run" in done.stderr


@pytest.mark.parametrize("name", ["generate", "chat", "attention", "promote"])
def test_a_tokenizer_of_another_text_with_the_same_number_of_tokens_is_refused(name, tiny_tokenizer, tmp_path, command):
    model = tiny_model()
    write_base(tmp_path / "model", model.config, model_tensors(model), tiny_tokenizer)
    train_bpe([prose(2000, seed=1)[::-1]], 300).save(tmp_path / "other")
    options = {"attention": ["--prompt", "x", "--plot", f"{tmp_path}/a.png"], "promote": ["--to", f"{tmp_path}/to"]}
    args = [name, *options.get(name, []), "--model", tmp_path / "model", "--tokenizer"]
    message = f"{tmp_path}/model was not trained with the tokenizer in {tmp_path}/other"
    assert message in command(*args, tmp_path / "other").stderr
    assert not (tmp_path / "to").exists()
    assert command(*args, tmp_path / "model").returncode == 0


def test_a_reader_that_goes_away_is_not_an_error(folders):
    command = f"{sys.executable} -m tinygpt generate --max-new-tokens 2000 {' '.join(folders)} | head -c 10"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, timeout=120, check=False)
    assert done.stderr == b""


def test_a_model_imported_into_another_folder_works_with_the_command_that_is_printed(folders, tmp_path, command):
    model = load_model(folders[1])
    export_hf(model, load_tokenizer(folders[3]), folders[3], tmp_path / "hf")
    for args in (
        ["import-hf", tmp_path / "hf", "--to", tmp_path / "imported"],
        ["promote", *folders, "--to", tmp_path / "promoted"],
    ):
        (named,) = re.findall("`python -m tinygpt (.*)`", command(*args).stdout)
        assert named == f"generate --model {args[-1]} --tokenizer {args[-1]}"
        assert command(*named.split(), "--prompt", "the", "--quantize", "int8").stdout.startswith("the")


def test_encode_shows_ids_and_pieces_and_decode_reads_them(folders, tiny_tokenizer, command):
    text = "the naïve\n file"
    shown = run("encode", text, *folders[2:])
    assert shown.returncode == 0, shown.stderr
    ids, pieces, sizes = shown.stdout.splitlines()
    assert [int(i) for i in ids.split()] == tiny_tokenizer.encode(text)
    assert pieces.count("|") == len(ids.split()) + 1
    assert pieces.replace("|", "") in (r"the·na\xc3\xafve\n·file", r"the·naïve\n·file")
    assert sizes == f"{len(tiny_tokenizer.encode(text))} tokens, 16 bytes"
    assert command("encode", "--ids", *folders[2:], stdin=text.encode()).stdout == ids + "\n"
    assert command("decode", *ids.split(), *folders[2:]).stdout == text
    assert run("decode", *folders[2:], text=ids.replace(" ", ", ")).stdout == text


@pytest.mark.parametrize(
    ("args", "message"),
    [(["decode", "12", "x"], "x is not an id"), (["decode", "99999"], "ids must be from 0 to 299, found 99999")],
)
def test_what_is_not_an_id_is_reported(folders, args, message, command):
    done = command(*args, *folders[2:])
    assert done.returncode == 1
    assert message in done.stderr


def test_help_and_a_typo_import_neither_torch_nor_pandas():
    code = """
import sys
from tinygpt.cli.main import COMMANDS, main
for name in COMMANDS:
    for argument in ("--help", "--hlep"):
        sys.argv = ["tinygpt", name, argument]
        try:
            main()
        except SystemExit as left:
            assert left.code == (0 if argument == "--help" else 2), (name, left.code)
sys.exit(" ".join({"torch", "pandas"} & set(sys.modules)) or None)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == done.stderr.count("\n") == len(COMMANDS)


NEW_FIELD = '    only_ids: Annotated[tuple[int, ...], "nothing but these tokens"] = ()\n'
NEW_FUNCTION = """
def keep_ids(logits, ids, past):
    kept = torch.full_like(logits, -math.inf)
    kept[:, list(ids)] = logits[:, list(ids)]
    return kept


PENALTIES["only_ids"] = keep_ids
"""

ONE_AFTER_THE_OTHER = """
import contextlib, json, sys
from tinygpt.cli.main import main
for i, arguments in enumerate(json.loads(sys.argv[1])):
    sys.argv = ["tinygpt", *arguments]
    print(end="\f" if i else "")
    with contextlib.suppress(SystemExit):
        main()
"""


def test_a_new_option_is_a_field_and_a_function_and_then_a_flag_and_a_setting(folders, tiny_tokenizer, tmp_path):
    shutil.copytree(ROOT / "tinygpt", tmp_path / "tinygpt")
    options, sampling = tmp_path / "tinygpt/options.py", tmp_path / "tinygpt/generate/sampling.py"
    before, after = options.read_text().split("    seed: Annotated[")
    options.write_text(f"{before}{NEW_FIELD}    seed: Annotated[{after}")
    sampling.write_text(sampling.read_text() + NEW_FUNCTION)

    a, b = tiny_tokenizer.encode("ab")
    write = ["generate", "--only-ids", str(a), str(b), "--seed", "1", "--format", "jsonl", *folders]
    command = [
        sys.executable,
        "-c",
        ONE_AFTER_THE_OTHER,
        json.dumps([["generate", "--help"], write, ["chat", *folders]]),
    ]
    text = f"/set only-ids={a} max_new_tokens=5\nx\n/set only_ids=[{a}, {b}]\n/show\n"
    done = subprocess.run(command, cwd=tmp_path, input=text, capture_output=True, text=True, check=True).stdout
    told, written, said = done.split("\f")
    assert re.search(r"--only-ids ID \[ID \.\.\.\]\s+nothing but these tokens\n", told)
    assert set(json.loads(written)["ids"]) == {a, b}
    assert said.startswith("aaaaa\n")
    assert f"only_ids=[{a}, {b}]" in said.splitlines()


def test_choices_of_flags_are_the_keys_of_their_registry():
    for cls, name, registry in ((DeviceOptions, "quantize", QUANTIZED), (TextOptions, "format", FORMATS)):
        (option,) = (option for option in options_of(cls) if option.name == name)
        assert option.choices == tuple(registry)


def test_commands_without_a_model_do_not_import_torch():
    names = ", ".join(f"tinygpt.cli.{name}" for name in ("main", "texts", "project", "runs"))
    code = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_help_lists_every_command(command):
    told = run("--help")
    assert told.returncode == 0
    for name in COMMANDS:
        assert name in told.stdout
        assert command(name, "--help").returncode == 0


def test_the_report_compares_the_tokenizer_with_another(folders, tiny_tokenizer, tmp_path, command):
    texts = {"train": [prose(200), "déjà vu"], "val": [prose(20)], "test": []}
    for split, some in texts.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(map(text_line, some)))
    Tokenizer.from_merges([]).save(tmp_path / "bytes")
    against = ["--against", str(tmp_path / "bytes"), "--text", str(tmp_path), "--plot", str(tmp_path / "plot.png")]
    done = command("tokenizer-report", *folders[2:], *against)
    assert done.returncode == 0, done.stderr
    rows = {(r[0], r[1]): r[2:] for r in (line.split() for line in done.stdout.splitlines()) if len(r) == 5}
    n_tokens = sum(len(tiny_tokenizer.encode(text)) for text in texts["train"])
    n_bytes = sum(len(text.encode()) for text in texts["train"])
    n_words = sum(len(text.split()) for text in texts["train"])
    found = rows[folders[3], "train"]
    assert [float(x) for x in found[:2]] == [round(n_bytes / n_tokens, 3), round(n_tokens / n_words, 3)]
    assert rows[str(tmp_path / "bytes"), "val"][0] == "1.000"
    assert (folders[3], "test") not in rows  # it has no text
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
