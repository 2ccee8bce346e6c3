"""The page of a run: its content, that it loads nothing else, and how it works in a real browser."""

import base64
import json
import math
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from project import commit, refused, run_stages, set_params, succeed
from test_compare import made
from test_evaluate import PARAMS
from test_playground import BROWSER, browser  # noqa: F401  a fixture

from tinygpt.report.compare import write_comparison
from tinygpt.report.details import Sample, attention, details, held_out, make_samples, score
from tinygpt.report.page import numbers, verdict
from tinygpt.report.reports import Earlier, find_earlier
from tinygpt.tokens import SplitMeta, TokensMeta

PAGE = "reports/index.html"
HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">{{ 7 * 7 }}<!--"
)
in_chromium = pytest.mark.skipif(not BROWSER, reason="needs chromium: apt-get install chromium")


class Tags(HTMLParser):
    """The names of all elements, and the text of those that hold no script or style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data if self.names[-1:] not in (["script"], ["style"]) else ""


@pytest.fixture(scope="module")
def hostile(done, tmp_path_factory) -> Path:
    """A project whose text, prompts and names are all HTML."""
    folder = tmp_path_factory.mktemp("hostile") / "project"
    shutil.copytree(done, folder, symlinks=True)
    evaluation = folder / "reports/eval.json"
    evaluation.write_text(json.dumps(json.loads(evaluation.read_text()) | {"prompt": HOSTILE}))
    path = folder / "reports/details.json"
    found = json.loads(path.read_text())
    for sample in found["samples"]:
        sample["prompt"] = HOSTILE
        for token in [*sample["read"], *sample["written"], *(sample["followed"] or [])]:
            token.update(text=HOSTILE, likeliest=[[HOSTILE, 0.5]])
    found["tokenizer"] |= {"longest": [HOSTILE], "paragraph": [HOSTILE]}
    found["attention"]["tokens"] = [HOSTILE] * len(found["attention"]["tokens"])
    for split in found["documents"].values():
        split["longest"] = [{"tokens": 1, "text": HOSTILE}]
    path.unlink()
    path.write_text(json.dumps(found))
    samples = folder / "reports/train_samples.md"
    text = samples.read_text()
    samples.unlink()
    samples.write_text(re.sub(r"```text\n.*?\n```", lambda _: f"```text\n{HOSTILE}\n```", text, flags=re.DOTALL))
    set_params(folder, {"download.source": HOSTILE})
    run_stages("report", folder)
    return folder


def opened(browser, path: Path, problems: list[str], **options):  # noqa: F811
    """The page in a browser, from disk; errors and requests are added to the problems."""
    page = browser.new_page(**options)
    page.set_default_timeout(20_000)
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())
    page.locator("[data-chart] svg").last.wait_for(state="attached")
    return page


@pytest.fixture
def page(done, browser):  # noqa: F811
    problems: list[str] = []
    found = opened(browser, done / PAGE, problems)
    yield found
    found.close()
    assert problems == []


def test_the_same_reports_give_the_same_page_which_needs_no_other_file(project):
    before = (project / PAGE).read_bytes()
    said = run_stages("report", project)
    assert (project / PAGE).read_bytes() == before
    assert len(before) < 3_000_000
    assert said.startswith("report: reports/index.html, ")
    assert [link for link in Tags(before.decode()).links if not link.startswith("#")] == ["data:,"]


def test_the_page_depends_on_no_time_and_no_speed(project):
    before, path = (project / PAGE).read_bytes(), project / "reports/train.json"
    train = json.loads(path.read_text())
    path.write_text(json.dumps(train | {"seconds": 12345.6, "tokens_per_s": 7.25, "peak_mem_gib": 99.0}))
    run_stages("report", project)
    assert (project / PAGE).read_bytes() == before
    assert f"{train['val_loss']:.4f}" in Tags(before.decode()).text


def test_what_looks_like_html_stays_text(hostile):
    tags = Tags((hostile / PAGE).read_text())
    assert tags.names.count("script") == 3 and "img" not in tags.names
    assert HOSTILE in tags.text  # the HTML's source, as text
    assert "49" not in tags.text.split("trained on")[1][:300]


@in_chromium
def test_a_browser_runs_nothing_of_a_hostile_text(hostile, browser):  # noqa: F811
    problems: list[str] = []
    page = opened(browser, hostile / PAGE, problems)
    page.locator("#samples .token").first.click()
    page.locator("#token li").first.wait_for()
    assert page.title().startswith("tinygpt: ") and page.title().endswith(HOSTILE)
    assert page.locator("#evaluationtext").text_content() == HOSTILE
    assert page.locator("main img, main script").count() == 0
    page.close()
    assert problems == []


@in_chromium
def test_the_slider_shows_what_was_written_at_each_evaluation(page, done):
    written = re.findall(
        r"## Step (\d+)\n\n```text\n(.*?)\n```", (done / "reports/train_samples.md").read_text(), re.DOTALL
    )
    slider = page.locator("#evaluation")
    slider.press("Home")
    for step, text in written:
        assert page.locator("#evaluationstep").text_content().startswith(f"step {step}, validation loss ")
        assert page.locator("#evaluationtext").text_content() == text
        slider.press("ArrowRight")


@in_chromium
def test_the_loss_chart_shows_its_values_under_the_pointer_for_each_axis(page, done):
    chart = page.locator("[data-chart=loss]")
    box = chart.bounding_box()
    rows = (done / "reports/train.csv").read_text().splitlines()[1:]

    def told(share: float) -> dict[str, str]:
        page.mouse.move(box["x"] + 3, box["y"] + 3)
        page.mouse.move(box["x"] + box["width"] * share, box["y"] + 150)
        page.locator("#vg-tooltip-element.visible").wait_for()
        cells = page.locator("#vg-tooltip-element td").all_text_contents()
        return dict(zip(cells[::2], cells[1::2], strict=True))

    found = told(0.5)
    row = next(row for row in rows if row.split(",")[0] == found["step"])
    assert found["train loss"] == f"{float(row.split(',')[1]):.4f}"
    page.select_option("#x", "epochs")
    page.check("#logx")
    page.check("#logy")
    page.locator("[data-chart=loss] svg >> text=epochs").wait_for()
    assert int(told(0.5)["step"]) < int(found["step"])  # a logarithmic axis gives the first steps more room


@in_chromium
def test_smoothing_brings_neighbouring_steps_together(page):
    def roughness() -> float:
        view = page.evaluate(
            "document.querySelector('[data-chart=loss]').view.view.data('curve').map((row) => row.smooth)"
        )
        losses = [loss for loss in view if loss is not None]
        return sum(abs(a - b) for a, b in pairwise(losses))

    before = roughness()
    page.locator("#smooth").fill("7")
    page.wait_for_function(
        "document.querySelector('[data-chart=loss]').view.view.data('curve').some((row) => row.smooth !== row.train)"
    )
    assert roughness() < 0.9 * before


@in_chromium
def test_a_token_shows_its_alternatives_to_pointer_and_keyboard(page, done):
    sample = json.loads((done / "reports/details.json").read_text())["samples"][-1]  # surely long enough
    tokens = page.locator("#samples .sample").last.locator("p.text").first.locator(".token")
    tokens.nth(3).hover()
    first = page.locator("#token li").all_text_contents()
    shares = [share for _, share in (sample["read"] + sample["written"])[3]["likeliest"]]
    assert [float(text.split()[-2]) for text in first] == pytest.approx([100 * share for share in shares], abs=0.06)
    tokens.nth(3).click()
    page.keyboard.press("ArrowRight")
    assert tokens.nth(4).evaluate("(token) => token === document.activeElement")
    assert page.locator("#samples .sample").last.locator(".chosen").count() == 1


@in_chromium
def test_heads_can_be_chosen_and_a_token_attends_only_to_earlier_ones(page, done):
    found = json.loads((done / "reports/details.json").read_text())["attention"]
    shape = found["shape"]
    assert page.locator("#heads button").count() == shape[0] * shape[1]
    page.locator("#heads button").nth(1).click()
    page.locator("#attended .token").nth(1).click()
    assert page.locator("#headname").text_content().startswith("Layer 0, head 1: ")
    shares = page.locator("#attended .token").evaluate_all(
        "(all) => all.map((t) => +t.style.getPropertyValue('--share'))"
    )
    assert sum(shares[:2]) == pytest.approx(1, abs=0.01) and sum(shares[2:]) == 0
    picture, n = page.locator("#heads canvas").nth(0), shape[3]
    box = picture.bounding_box()
    picture.hover(position={"x": box["width"] * 0.5 / n, "y": box["height"] * 1.5 / n})  # the second token at the first
    text = page.locator("#headname").text_content()
    maps = np.frombuffer(base64.b64decode(found["maps"]), np.uint8).reshape(shape) / 255
    assert text.startswith("Layer 0, head 0: ")
    assert float(text.split()[-2]) == pytest.approx(100 * maps[0, 0, 1, 0], abs=0.06)


@in_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_of_a_run_fits_the_screen_in_light_and_dark(done, browser, width, scheme):  # noqa: F811
    problems: list[str] = []
    page = opened(browser, done / PAGE, problems, color_scheme=scheme, viewport={"width": width, "height": 800})
    for folded in page.locator("details").all():
        folded.evaluate("(found) => { found.open = true; }")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("[data-chart=loss] svg").bounding_box()["width"] <= width
    ink, paper = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    bright = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert (bright[0] < bright[1]) == (scheme == "light") and abs(bright[0] - bright[1]) > 450
    page.close()
    assert problems == []


@in_chromium
def test_the_page_of_several_draws_each_and_a_name_picks_one_out(browser, tmp_path):  # noqa: F811
    names = [HOSTILE, *"bcdefgh"]
    found = [made(name, 3 + at / 10, 0.01) for at, name in enumerate(names)]
    write_comparison(found, tmp_path / "page.html")
    problems: list[str] = []
    page = opened(browser, tmp_path / "page.html", problems, viewport={"width": 390, "height": 800})
    lines = page.locator("[data-chart=loss] .mark-line path")
    assert lines.count() == 2 * len(names)
    page.locator("#names button").nth(2).press("Enter")
    page.locator(".mark-line path[opacity='1'] >> nth=1").wait_for(state="attached")
    page.locator(".mark-line path[opacity='1'] >> nth=2").wait_for(state="detached")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.title() == "tinygpt: 8 experiments"
    page.close()
    assert problems == []


def test_the_earlier_run_is_named_and_stays_the_same_when_this_one_is_committed(project):
    path = project / "reports/eval.json"
    report = json.loads(path.read_text())
    assert find_earlier(project, report) is None  # the last commit has this very run
    better = report | {"bpb": report["bpb"] - 10 * report["bpb_error"], "loss": report["loss"] - 1}
    path.write_text(json.dumps(better))
    set_params(project, {"train.lr": 0.004})
    run_stages("report", project)
    text = Tags((project / PAGE).read_text()).text
    head = succeed("git rev-parse HEAD", project)[:9]
    assert f"the newest commit of another run, {head}, which had other params." in text
    assert f"commit {head} has" in text
    assert "better, by 7 times the error" in text  # 10 / √2, as the error of the difference is √2 times larger
    assert re.search(r"train\.lr\s*0\.008\s*0\.004", text)
    before = (project / PAGE).read_bytes()
    commit(project, "second run")
    run_stages("report", project)
    assert (project / PAGE).read_bytes() == before


@pytest.mark.parametrize(
    ("name", "compared"),
    [("train.lr", True), ("train.eval_tokens", False), ("clean.val_fraction", False), ("tokenizer.kind", False)],
)
def test_validation_losses_of_other_tokens_are_not_compared(name, compared):
    result = {"split": "test", "bytes": 9, "tokens": 3, "bpb": 1.0, "ppl": 2.0}
    result |= {"loss_error": 0.1, "bpb_error": 0.1, "ppl_error": 0.1, "val_loss": 3.0}
    earlier = Earlier("a1b2", result, {name: "1"})
    reports = {"eval": result, "train": {"val_loss": 2.0}, "params": {name: "2"}}
    assert ["verdict" in row for row in numbers(reports, earlier)] == [compared, True, True]


def test_a_difference_counts_from_two_errors_on():
    def verdict_of(value, before, form):
        return verdict(value, before, 0.1, form, commit="a1b2")

    assert verdict_of(3.0, 3.1, ".4f") == {"kind": "same", "text": "commit a1b2 has 3.1000: -0.1000, within the error"}
    assert verdict_of(3.0, 3.5, ".1f")["text"] == "commit a1b2 has 3.5: -0.5, better, by 5 times the error"
    assert verdict_of(3.5, 3.0, ".1f")["kind"] == "worse"


@pytest.mark.parametrize(
    "name", ["clean.json", "train.csv", "train_norms.csv", "train.json", "eval.json", "details.json", "export.json"]
)
def test_a_report_that_is_missing_or_cut_is_one_line_that_says_what_to_run(project, name):
    path = project / "reports" / name
    whole = path.read_bytes()
    path.unlink()
    assert re.fullmatch(
        rf"reports/{re.escape(name)} not found: run `dvc repro \w+` to make it", refused("report", project)
    )
    for damaged in (whole[: len(whole) // 2], b"[1]", b"\xff\x00", b"a,b\n1\n"):
        path.write_bytes(damaged)
        said = refused("report", project)
        assert "\n" not in said and "run `dvc repro" in said
    path.write_bytes(whole)
    run_stages("report", project)


def test_a_sample_says_how_surprised_the_model_was(tiny_tokenizer):
    model, ids = tiny_model(), tiny_tokenizer.encode("the file naïve中 is other")
    found = score(model, tiny_tokenizer, [tiny_tokenizer.bos_id], ids)
    with torch.inference_mode():
        logprobs = model(torch.tensor([[tiny_tokenizer.bos_id, *ids[:-1]]]))[0].log_softmax(-1)
    expected = [-logprobs[at, id].item() for at, id in enumerate(ids)]
    assert [token.nats for token in found] == pytest.approx(expected, abs=2e-3)
    assert "".join(token.text for token in found) == "the file naïve中 is other"
    for at, token in enumerate(found):
        assert [share for _, share in token.likeliest] == pytest.approx(
            logprobs[at].exp().topk(5).values.tolist(), abs=1e-3
        )


def documents(tokenizer, *texts: str) -> np.ndarray:
    return np.array([id for text in texts for id in (tokenizer.eos_id, *tokenizer.encode(text))], np.uint16)


def test_prompts_of_the_held_out_text_end_before_a_space_and_continue_as_it_does(tiny_tokenizer):
    texts = ["the file this other return " * 10, "error " * 60 + "naïve", "list file model\n" * 12, "中" * 90, "short"]
    tokens = documents(tiny_tokenizer, *texts)
    params = PARAMS.__class__(**{**vars(PARAMS), "held_out_prompts": 4, "max_new_tokens": 20})
    found = list(held_out(tokens, tiny_tokenizer, params, 64))
    assert len(found) == 4
    for prompt, followed in found:
        assert prompt and not prompt[-1].isspace() and "\ufffd" not in prompt + followed
        assert any(text.startswith(prompt + followed) for text in texts) and followed
    assert all(followed[0].isspace() for _, followed in found[:3])  # prompts end at a word's end, if there are words
    more = PARAMS.__class__(**{**vars(params), "held_out_prompts": 10})
    assert list(held_out(tokens, tiny_tokenizer, more, 64)) == found  # each document once


def test_with_a_context_of_one_token_nothing_is_attended_to(tiny_tokenizer):
    sample = Sample("The file", " is", [], [], None)
    assert attention(tiny_model(block_size=1), tiny_tokenizer, [sample]) is None
    assert attention(tiny_model(block_size=2), tiny_tokenizer, [sample])["shape"] == [2, 4, 2, 2]


def test_the_page_stays_small_whatever_the_text_and_the_model(tiny_tokenizer):
    model = tiny_model(n_layer=6, n_head=8)
    tokens = documents(tiny_tokenizer, *["the naïve file\n" * 400] * 30)
    params = PARAMS.__class__(**{**vars(PARAMS), "prompts": ("the file " * 90,) * 9, "max_new_tokens": 40})
    split = SplitMeta(tokens=len(tokens), documents=30, bytes=100_000, sha256="")
    meta = TokensMeta(dtype="<u2", vocab_size=300, eos_id=0, tokenizer_sha256="", train=split, val=split, test=split)
    samples = make_samples(model, tiny_tokenizer, tokens, params)
    found = details(model, tiny_tokenizer, meta, {"train": tokens}, samples)
    assert math.prod(found["attention"]["shape"]) <= 200_000
    assert len(json.dumps(found)) < 700_000
    assert found["documents"]["train"]["median"] == len(tiny_tokenizer.encode("the naïve file\n" * 400))
    assert sum(row["share"] for row in found["tokenizer"]["lengths"]) == pytest.approx(1, abs=1e-3)
