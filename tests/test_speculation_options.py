"""`generate --draft` and `--prompt-lookup`: the same text, the printed gain, and options that exclude each other."""

import pytest
from conftest import prose, tiny_model

from tinygpt.cli.main import main
from tinygpt.model.weights import model_tensors, save_model
from tinygpt.tokenizer.bpe import train_bpe


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer):
    base = tmp_path_factory.mktemp("speculation")
    for name, tokenizer, changes in (
        ("model", tiny_tokenizer, {}),
        ("draft", tiny_tokenizer, {"seed": 5}),  # of the same sizes, so compiled once for both
        ("other", train_bpe([prose(500, seed=9)], 300, special_tokens=("<|user|>",)), {}),
        ("smaller", train_bpe([prose(500)], 290), {"vocab_size": 290}),
    ):
        model = tiny_model(n_layer=1, **changes)
        save_model(base / name, model.config, model_tensors(model))
        tokenizer.save(base / name)
    return base


@pytest.fixture
def generate(folders, monkeypatch, capsys):
    """Run the command in this process -> its output, and its one line of errors."""

    def run(*args):
        options = ["--model", str(folders / "model"), "--prompt", "the file the", "--max-new-tokens", "40"]
        monkeypatch.setattr("sys.argv", ["tinygpt", "generate", *options, *map(str, args)])
        problems = ""
        try:
            main()
        except SystemExit as left:
            problems = str(left.code or "")
        done = capsys.readouterr()
        return done.out, problems + done.err

    return run


@pytest.mark.parametrize(
    "options",
    [
        ["--draft", "draft", "--n-draft", 3],
        ["--draft", "draft", "--n-draft", 3, "--compile"],
        ["--prompt-lookup", "--ngram", 2],
        ["--prompt-lookup", "--ngram", 2, "--compile"],
    ],
)
def test_the_likeliest_text_is_the_same_and_the_last_line_shows_the_gain(options, folders, generate):
    options = [folders / each if each == "draft" else each for each in options]
    plain, quiet = generate("--temperature", 0)
    found, told = generate("--temperature", 0, *options)
    assert found == plain
    assert "a pass of the model" not in quiet
    assert told.count("\n") == quiet.count("\n") + 1
    assert " tokens a pass of the model, " in told
    several = generate("--temperature", 0.7, "--n", 3, "--format", "jsonl", "--logprobs", 1, *options)[0]
    assert len(several.splitlines()) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--draft other", "has different tokens from the model's: use a draft trained with its tokenizer"),
        ("--draft smaller", "has different tokens from the model's"),
        ("--draft nowhere", "nowhere"),
        ("--draft draft --prompt-lookup", "--draft and --prompt-lookup: give only one of them"),
        ("--n-draft 3", "--n-draft needs --draft or --prompt-lookup"),
        ("--draft draft --ngram 3", "--ngram needs --prompt-lookup"),
        ("--prompt-lookup --n-draft 0", "--n-draft=0 must be"),
        ("--prompt-lookup --n-beam 2", "--prompt-lookup does not work with --n-beam or --best-of"),
        ("--draft draft --best-of 2", "--draft does not work with --n-beam or --best-of"),
        ("--prompt-lookup --model x.gguf", "--prompt-lookup is not available with llama.cpp"),
    ],
)
def test_options_that_contradict_each_other_are_reported_by_name(options, message, folders, generate):
    names = {"draft", "other", "smaller", "nowhere"}
    printed, problems = generate(*(folders / each if each in names else each for each in options.split()))
    assert message in problems
    assert "Traceback" not in problems
    assert printed == ""
