"""`python -m tinygpt generate`: prompts in, texts out, with every engine."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import prose, save_cycle, tiny_model
from project import ROOT

from tinygpt.cli.generate import rows_together, say
from tinygpt.export.folders import open_model
from tinygpt.export.gguf import export_gguf
from tinygpt.export.hf import export_hf
from tinygpt.export.llamacpp import LlamaCpp
from tinygpt.generate import Sampling, Search, generate_batch
from tinygpt.model.weights import load_model, model_tensors, save_model
from tinygpt.tokenizer.bpe import train_bpe
from tinygpt.tokenizer.kinds import learn_chars

GREEDY = ["--temperature", "0", "--ignore-eos"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer) -> Path:
    """A model of ours with its tokenizer, and both exports."""
    folder = tmp_path_factory.mktemp("generate")
    model = tiny_model(vocab_size=tiny_tokenizer.vocab_size, n_layer=1)
    save_model(folder / "model", model.config, model_tensors(model))
    tiny_tokenizer.save(folder / "tokenizer")
    export_hf(model, tiny_tokenizer, folder / "tokenizer", folder / "hf")
    export_gguf(model, tiny_tokenizer, folder / "model.gguf", "f32")
    return folder


@pytest.fixture
def generate(command, folder):
    """Run the command on the model, or on another file or folder of `folder`."""

    def run(*args, model="model", stdin=b""):
        return command("generate", "--model", folder / model, "--max-new-tokens", 8, *args, stdin=stdin)

    return run


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_output_has_what_the_library_returns(generate, folder, tiny_tokenizer):
    model = load_model(folder / "model")
    done = generate("--prompt", "the naïve", "--format", "json", "--logprobs", "3", "--top-k", "5", "--seed", "4")
    sampling = Sampling(temperature=0.8, top_p=0.95, top_k=5, seed=4)
    (answer,) = generate_batch(model, tiny_tokenizer, ["the naïve"], max_new_tokens=8, sampling=sampling)
    (found,) = json.loads(done.stdout)
    tokens = found.pop("logprobs")
    assert found == {"prompt": "the naïve", "text": answer.text, "ids": answer.ids, "finish_reason": "length"}
    prompt = [tiny_tokenizer.bos_id, *tiny_tokenizer.encode("the naïve")]
    with torch.inference_mode():
        logprobs = model(torch.tensor([prompt + answer.ids])).log_softmax(-1)[0, len(prompt) - 1 : -1]
    assert len(tokens) == 8
    for token, i, expected in zip(tokens, answer.ids, logprobs, strict=True):
        assert (token["id"], token["text"]) == (i, tiny_tokenizer.decode([i]))
        assert token["logprob"] == pytest.approx(float(expected[i]), abs=1e-4)
        assert [one["id"] for one in token["top"]] == expected.topk(3).indices.tolist()
        assert [one["logprob"] for one in token["top"]] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-4)


def test_prompts_come_from_files_and_the_standard_input(generate, tmp_path):
    prompts = ["the file", "", "über 中文", "a"]
    (tmp_path / "p.txt").write_bytes("\ufeffthe file\r\n\nüber 中文\na\n".encode())
    lines = "".join(json.dumps({"prompt": p, "id": 7}) + "\n" for p in prompts)
    for name in ("p.jsonl", "P.JSONL"):
        (tmp_path / name).write_text(lines)
    found = rows(generate("--prompts", tmp_path / "p.txt", "--format", "jsonl").stdout)
    assert [row["prompt"] for row in found] == prompts
    for other in (
        generate("--prompts", tmp_path / "p.jsonl", "--format", "jsonl", "--batch-size", "2"),
        generate("--prompts", tmp_path / "P.JSONL", "--format", "jsonl"),
        generate("--prompts", "-", "--format", "jsonl", stdin="the file\n\nüber 中文\na".encode()),
    ):
        assert rows(other.stdout) == found
    for row in found:
        args = ["--prompt", "-", "--format", "json"]
        assert json.loads(generate(*args, stdin=f"{row['prompt']}\n".encode()).stdout) == [row]
    named = generate("--prompt", "the file", "--prompt", "-", "--prompt", "über 中文", "--format", "jsonl", stdin=b"")
    assert rows(named.stdout) == found[:3]
    text = generate("--prompts", tmp_path / "p.txt").stdout
    assert text == "---\n".join(f"{row['prompt']}{row['text']}\n" for row in found)


def test_several_texts_of_a_prompt_have_a_seed_each(generate):
    found = rows(generate("--prompt", "the", "--n", "3", "--seed", "5", "--format", "jsonl").stdout)
    for i, row in enumerate(found):
        assert generate("--prompt", "the", "--seed", str(5 + i)).stdout == f"the{row['text']}\n"
    assert len({row["text"] for row in found}) == 3


def test_a_search_writes_its_best_and_its_log_probabilities_where_it_has_them(generate):
    (best,) = rows(generate("--best-of", "3", "--logprobs", "0", "--format", "jsonl").stdout)
    assert [token["id"] for token in best["logprobs"]] == best["ids"]
    assert all(token["top"] == [] for token in best["logprobs"])
    (beams,) = rows(generate("--n-beam", "3", "--format", "jsonl").stdout)
    assert set(beams) == {"prompt", "text", "ids", "finish_reason"}


@pytest.mark.parametrize(
    ("name", "content", "messages"),
    [
        ("p.txt", b"", ["p.txt has no prompts: write one per line"]),
        ("p.txt", b"ok\na\xff\xfe\n", ["p.txt:2: byte 2 is 0xff, which is not UTF-8"]),
        (
            "p.jsonl",
            b'{"prompt": "a"}\n{"promt": "b"}\n\n5\n{"prompt": 5}\n[[[',
            ['p.jsonl:2: must be {"prompt": …} with a text, found {"promt": "b"}\n'],
        ),
        (
            "p.jsonl",
            b'\n5\n{"prompt": 5}\n[[[',
            ['p.jsonl:1: must be {"prompt": …} with a text, found nothing\n', "p.jsonl:2", "p.jsonl:3", "p.jsonl:4"],
        ),
        ("p.jsonl", b'{"prompt": "a\\ud800"}', ["p.jsonl:1: prompt is not UTF-8 from character 1 on"]),
        ("p.jsonl", b"x\n" * 99, ["p.jsonl:10", "and 79 more"]),
        ("p.jsonl", b'{"prompt": ' + b"[" * 10**5, ['p.jsonl:1: must be {"prompt": …} with a text, found {"prompt": ']),
        (
            "p.jsonl",
            b'{"prompt": ' + b"9" * 5000 + b"}",
            ['p.jsonl:1: must be {"prompt": …} with a text, found {"prompt": '],
        ),
        ("p.txt", b"a" * 20_000_001, ["p.txt has more than 20.0 MB: split it"]),
        ("p.txt", b"ok\n" + b"the " * 99, ["p.txt:2: prompt of", "leaves no room in a context of 64"]),
    ],
)
def test_a_file_with_no_prompts_in_it_is_refused_and_the_place_is_named(name, content, messages, generate, tmp_path):
    (tmp_path / name).write_bytes(content)
    done = generate("--prompts", tmp_path / name, "--when-full", "stop")
    assert (done.returncode, done.stdout) == (1, "")
    for message in messages:
        assert message in done.stderr


def test_input_that_is_not_utf8_or_missing_is_refused(generate):
    told = generate("--prompt", "-", stdin=b"a\n\nb\xc3").stderr
    assert told == "error: standard input:3: byte 2 is 0xc3, which is not UTF-8: convert it to UTF-8\n"
    for path in ("none.txt", "."):
        assert "is not a file: give a file with a prompt in each line" in generate("--prompts", path).stderr


def test_all_contradictions_are_reported_at_once(generate):
    options = "--prompt a --prompts b --logprobs -1 --top-p 2 --temperature -1 --batch-size 0"
    told = generate(*options.split(), "--max-new-tokens", "0", "--engine", "llama.cpp").stderr
    for message in (
        "--top-p=2 must be above 0 and at most 1",
        "--temperature=-1 must be 0 or more",
        "--max-new-tokens=0 must be 1 or more",
        "--prompt and --prompts cannot be combined",
        "--batch-size=0 must be 1 or more",
        "--logprobs=-1 must be 0 or more",
        "--engine=llama.cpp reads .gguf files",
    ):
        assert message in told
    told = generate(*"--n 2 --n-beam 3 --logprobs 0 --draft x --prompt-lookup --format text".split()).stderr
    for message in (
        "--n=2 prints all texts, --n-beam and --best-of the best",
        "--logprobs are not shown in text",
        "--logprobs do not work with --n-beam",
        "--draft and --prompt-lookup: give only one of them",
        "--draft does not work with --n-beam or --best-of",
    ):
        assert message in told
    assert "--n=2 needs --temperature above 0" in generate("--n", "2", "--temperature", "0").stderr


def test_a_long_prompt_is_read_from_its_end_with_a_warning(generate):
    done = generate("--prompt", "the " * 99, "--max-new-tokens", "2")
    assert re.search(r"warning: prompt has \d+ tokens: only the last 64 are read, the model's context\n", done.stderr)
    assert done.returncode == 0


def test_characters_without_a_token_are_named_where_tokens_are_characters(command, folder, tmp_path, tiny_tokenizer):
    tokenizer = learn_chars({prose(50).encode(): 1, "éß".encode(): 1}, 300, special_tokens=("<|user|>",))
    tokenizer.save(tmp_path)
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    save_model(tmp_path, model.config, model_tensors(model))
    export_gguf(model, tokenizer, tmp_path / "chars.gguf", "f32")
    args = ["generate", "--max-new-tokens", "1", "--prompt"]
    for path in (tmp_path, tmp_path / "chars.gguf"):
        told = command(*args, "é→ß $漢→", "--model", path).stderr
        assert told == "warning: characters that the model has not learned and reads as bytes: → 漢\n"
        assert command(*args, "éß $", "--model", path).stderr == ""
    assert command(*args, "é→ß 漢", "--model", folder / "model").stderr == ""  # its tokens are not characters


@pytest.mark.parametrize("options", [GREEDY, ["--seed", "3", "--stop", "e", "--frequency-penalty", "0.3"]])
def test_every_engine_writes_the_same_also_past_the_end_of_the_context(options, generate):
    args = ["--prompts", "-", "--format", "jsonl", "--logprobs", "2", *options, "--max-new-tokens", "100"]
    ours, theirs, llama = (
        rows(generate(*args, model=model, stdin="the naïve\n\nfile 中文".encode()).stdout)
        for model in ("model", "hf", "model.gguf")
    )
    assert ours == theirs
    for row, other in zip(ours, llama, strict=True):
        logprobs = [[token["logprob"] for token in each.pop("logprobs")] for each in (row, other)]
        assert row == other
        assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-3)
    assert options != GREEDY or [len(row["ids"]) for row in ours] == [100] * 3


@pytest.mark.slow
def test_compiled_steps_write_the_same(generate):
    args = [*GREEDY, "--prompt", "the naïve", "--prompt", "a", "--batch-size", "1", "--max-new-tokens", "100"]
    done = generate(*args, "--compile")
    assert (done.stderr, done.stdout) == ("", generate(*args).stdout)


def test_only_texts_that_are_computed_together_are_compiled_together():
    assert [rows_together(Search(), n_text, 32) for n_text in (1, 5, 100)] == [1, 5, 32]
    assert [rows_together(search, 100, 32) for search in (Search(n_beam=4), Search(best_of=8))] == [4, 8]


def test_a_missing_compiler_is_one_line(folder, tmp_path):
    command = [sys.executable, "-m", "tinygpt", "generate", "--model", folder / "model", "--compile"]
    env = {**os.environ, "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    # in a child process, as inductor remembers that there is no compiler
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "error: the step cannot be compiled (No working C++ compiler found" in done.stderr
    assert "install g++, set CXX to your compiler, or leave out --compile" in done.stderr


def test_what_llama_cpp_cannot_do_is_refused_by_name(generate):
    options = "--quantize int8 --device cuda --tokenizer x --n-beam 2 --engine tinygpt --compile".split()
    told = generate(*options, model="model.gguf").stderr
    for name in ("--quantize", "--device", "--tokenizer", "--n-beam", "--compile"):
        assert f"{name} is not available with llama.cpp" in told
    assert "--engine=tinygpt does not read" in told
    assert generate("--engine", "llama.cpp", "--device", "cpu", model="model.gguf").returncode == 0


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (lambda path: None, "none", "none not found: give a folder with config.json"),
        (lambda path: None, "none.gguf", "none.gguf not found: give a .gguf file"),
        (lambda path: None, ".", "is not a model: give a folder with config.json"),
        (lambda path: None, "tokenizer/tokenizer.json", "is not a model: give a folder with config.json"),
        (
            lambda path: shutil.rmtree(path / "tokenizer"),
            "model",
            "tokenizer.json not found: give its folder with --tokenizer, or put it into",
        ),
        (
            lambda path: (path / "model/model.safetensors").unlink(),
            "model",
            "model.safetensors not found: give a folder",
        ),
        (lambda path: cut(path / "model.gguf"), "model.gguf", "llama.cpp cannot load"),
        (lambda path: cut(path / "hf/model.safetensors"), "hf", "cannot be read as safetensors"),
        (lambda path: cut(path / "model/model.safetensors"), "model", "cannot be read as safetensors"),
        (lambda path: cut(path / "model/config.json"), "model", "config.json is not valid JSON"),
        (lambda path: (path / "model/config.json").write_text("{}"), "model", "was written by another version"),
        (lambda path: (path / "hf/tokenizer.json").unlink(), "hf", "hf/tokenizer.json not found"),
        (
            lambda path: shutil.copy(path / "../other.json", path / "hf/tokenizer.json"),
            "hf",
            "tokens, but its tokenizer",
        ),
    ],
)
def test_what_is_not_a_model_is_refused_in_one_line(damage, name, message, command, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "all")
    learn_chars({b"a": 1}, 300).save(tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "other.json")
    damage(tmp_path / "all")
    done = command("generate", "--model", tmp_path / "all" / name)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_python_opens_the_same_folders(folder, tiny_tokenizer):
    ours, theirs = open_model(str(folder / "model")), open_model(folder / "hf")
    ids = torch.tensor([tiny_tokenizer.encode("the naïve")])
    for model, tokenizer in (ours, theirs):
        assert tokenizer.tokens == tiny_tokenizer.tokens
        assert not model.training
    with torch.inference_mode():
        assert torch.equal(ours[0](ids), theirs[0](ids))


def test_a_folder_of_transformers_has_its_own_tokenizer(generate):
    assert "hf is a transformers folder, which has its own" in generate("--tokenizer", "x", model="hf").stderr


def test_a_gguf_file_is_known_by_its_first_bytes(generate, folder):
    shutil.copy(folder / "model.gguf", folder / "renamed")
    assert generate("--prompt", "the", model="renamed").stdout == generate("--prompt", "the").stdout


def test_a_gguf_file_without_an_end_of_text_is_refused(generate, folder):
    def text(value: bytes) -> bytes:
        return len(value).to_bytes(8, "little") + value

    key = text(b"tokenizer.ggml.model") + (8).to_bytes(4, "little")  # 8 = a string
    raw = (folder / "model.gguf").read_bytes()
    assert raw.count(key + text(b"gpt2")) == 1
    raw = raw.replace(key + text(b"gpt2"), key + text(b"rwkv")).replace(b"ggml.eos_token_id", b"ggml.eos_token_ix")
    (folder / "endless.gguf").write_bytes(raw)
    done = generate("--ignore-eos", model="endless.gguf")
    assert (done.returncode, done.stdout) == (1, "")
    assert "endless.gguf has no token that ends a text" in done.stderr


def test_every_token_that_ends_a_text_in_llama_cpp_ends_it_here(generate, folder):
    tokenizer = train_bpe([prose(2000)], 300, special_tokens=("<|im_end|>",))
    end = tokenizer.special_tokens["<|im_end|>"]
    export_gguf(load_model(folder / "model"), tokenizer, folder / "two-ends.gguf", "f32")
    options = ["--format", "jsonl", "--logit-bias", f"{end}=1e6"]
    for more, reason in ([], "stop"), (["--ignore-eos"], "length"), (["--min-new-tokens", "8"], "length"):
        (row,) = rows(generate(*options, *more, model="two-ends.gguf").stdout)
        assert (row["finish_reason"], end in row["ids"]) == (reason, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_refused(generate):
    assert "error: --device=cuda is not available: set it to auto or cpu" in generate("--device", "cuda").stderr
    assert generate("--device", "cpu", "--quantize", "int8").returncode == 0


def test_llama_cpp_continues_token_by_token_and_never_past_its_context(folder):
    with LlamaCpp(folder / "model.gguf", n_ctx=6) as llama:
        found = [llama.read([5, 6, 7]), llama.append(8), llama.append(9), llama.append(10)]
        with pytest.raises(ValueError, match="7 tokens, but the context is 6"):
            llama.append(11)
        for logits, expected in zip(found, llama.logits([5, 6, 7, 8, 9, 10])[2:], strict=True):
            assert abs(logits - expected).max() < 1e-4


@pytest.fixture
def start():
    """Start the command, with its output in pipes."""
    started = []

    def run(*args):
        command = [sys.executable, "-m", "tinygpt", "generate", *map(str, args)]
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_a_pipe_gets_whole_characters_as_they_come_and_ctrl_c_leaves_what_was_written(start, tmp_path):
    text = save_cycle(tmp_path)
    args = ["--prompt", "x\n", *GREEDY, "--max-new-tokens", "1000000", "--model", tmp_path]
    process = start(*args)
    pieces = [os.read(process.stdout.fileno(), 1 << 16) for _ in range(50)]
    process.send_signal(signal.SIGINT)
    rest, told = process.communicate(timeout=60)
    assert all(piece.decode() for piece in pieces)  # no piece ends in half a character
    written = (b"".join(pieces) + rest).decode()
    assert written.startswith("x\n" + text)
    assert written.endswith("\n")
    assert set(written[2:-1]) == set(text)
    assert (process.returncode, told) == (130, b"interrupted\n")


def test_a_list_of_json_without_a_text_is_empty(generate):
    done = generate("--prompt", "the", "--format", "json", "--repetition-penalty", "1e-320")
    assert (done.returncode, done.stdout) == (1, "[]\n")


def test_a_list_of_json_ends_well_after_ctrl_c(start, tmp_path):
    save_cycle(tmp_path)
    (tmp_path / "p.txt").write_text("x\n" * 2000)
    args = ["--prompts", tmp_path / "p.txt", *GREEDY, "--format", "json", "--batch-size", "8", "--model", tmp_path]
    process = start(*args, "--max-new-tokens", "100")
    first = os.read(process.stdout.fileno(), 1 << 16)
    process.send_signal(signal.SIGINT)
    rest, told = process.communicate(timeout=60)
    assert 0 < len(json.loads(first + rest)) < 2000
    assert (process.returncode, told) == (130, b"interrupted\n")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="what is loaded can be seen on Linux alone")
def test_ctrl_c_ends_the_program_at_once_while_it_imports(start, tmp_path):
    process = start("--model", tmp_path)
    while b"libtorch" not in Path(f"/proc/{process.pid}/maps").read_bytes():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (130, b"interrupted\n")


ODD = "a\x1b]0;title\x07b\t\x9b2J\r\x7f 中\u3000é\n"


def test_a_terminal_shows_control_characters_and_a_pipe_gets_them_as_they_are(monkeypatch, capsysbinary):
    """Those from a prompt or a model could set a terminal's title or clear it."""
    say(ODD)
    assert capsysbinary.readouterr().out == ODD.encode()
    seen_by, terminal = pty.openpty()
    with open(terminal, "w", encoding="utf-8", newline="") as stream, open(seen_by, "rb", buffering=0) as screen:
        monkeypatch.setattr(sys, "stdout", stream)
        say(ODD)
        monkeypatch.undo()
        assert screen.read(200).decode() == "a\\x1b]0;title\\x07b\t\\x9b2J\\r\\x7f 中\u3000é\r\n"
