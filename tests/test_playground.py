"""The playground in a real browser, against a real server and models that have learned a little."""

import re
import shutil

import pytest
from serving import running, trained, wait_until

from tinygpt.generate import Sampling, generate

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
pytestmark = pytest.mark.skipif(not BROWSER, reason="needs chromium: apt-get install chromium")
SAMPLING = Sampling(temperature=0.8, top_p=0.95, seed=1)  # what the page begins with
TOKEN = ".pane .token"
WRITTEN = f"{TOKEN}:not(.read)"


@pytest.fixture(scope="module")
def served(tiny_tokenizer):
    models = {"small": trained(tiny_tokenizer, 40), "wide": trained(tiny_tokenizer, 40, n_embd=64, n_layer=1)}
    with running(tiny_tokenizer, models) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def page(served, browser):
    """The page; at its end nothing has gone wrong in it and nothing was asked of elsewhere."""
    page, problems = browser.new_page(), []
    page.set_default_timeout(20_000)
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url) if not request.url.startswith(served[0]) else None)
    page.goto(served[0])
    yield page
    page.close()
    assert problems == []


def write(page, prompt: str) -> None:
    page.fill("#prompt", prompt)
    page.keyboard.press("Control+Enter")
    for pane in page.locator(".pane:visible").all():
        pane.get_by_text(re.compile("as long as asked|at its end")).wait_for()


def texts(page, selector: str = ".token") -> list[str]:
    """The text of each pane."""
    panes = page.locator(".pane:visible").all()
    return ["".join(pane.locator(selector).all_text_contents()) for pane in panes]


def test_two_models_write_side_by_side_what_each_writes_alone(page, served, tiny_tokenizer):
    assert page.locator(".pane:visible").count() == 2
    write(page, "naïve 中")
    models = served[1].models
    for text, name in zip(texts(page), ("small", "wide"), strict=True):
        expected = generate(models[name].model, tiny_tokenizer, "naïve 中", max_new_tokens=120, sampling=SAMPLING)
        assert text == ("naïve 中" + expected)
    page.uncheck("#compare")
    assert page.locator(".pane:visible").count() == 1


def test_tokens_are_seen_as_they_come_and_escape_stops_them(page, served):
    page.fill("#max_tokens", "4000")
    page.click("#write")
    tokens = page.locator(".pane").first.locator(".token:not(.read)")
    page.locator(f"{WRITTEN} >> nth=5").wait_for(state="attached")
    first = tokens.count()
    wait_until(lambda: tokens.count() > first + 5)
    assert page.locator("#write").is_enabled()
    page.keyboard.press("Escape")
    page.get_by_text("stopped").first.wait_for()
    wait_until(lambda: served[1].worker.counts()["running"] == 0)
    assert 0 < tokens.count() < 4000
    assert page.locator("#stop").is_disabled()


def test_a_new_run_takes_the_place_of_one_that_still_writes(page, served, tiny_tokenizer):
    page.uncheck("#compare")
    page.evaluate(
        """() => {
          window.told = [];
          const status = document.querySelector(".pane .status");
          new MutationObserver(() => told.push(status.textContent)).observe(status, { childList: true });
        }"""
    )
    page.fill("#prompt", "the file")
    page.keyboard.press("Control+Enter")
    page.locator(f"{WRITTEN} >> nth=5").wait_for(state="attached")
    write(page, "naïve 中")
    model = served[1].models["small"].model
    assert texts(page) == [
        "naïve 中" + generate(model, tiny_tokenizer, "naïve 中", max_new_tokens=120, sampling=SAMPLING)
    ]
    told = page.evaluate("told")
    assert told.count("waiting") == 2
    assert not [text for text in told if "stopped" in text]


def test_a_token_shows_its_alternatives_and_what_was_looked_at(page, served, tiny_tokenizer):
    page.uncheck("#compare")
    write(page, "the file")
    page.locator(WRITTEN).nth(4).click()
    page.locator("#look").wait_for()
    shares = [float(text.rstrip(" %")) for text in page.locator("#alternatives .share").all_text_contents()]
    assert len(shares) >= 20
    assert shares[:20] == sorted(shares[:20], reverse=True)
    n_read = 1 + len(tiny_tokenizer.encode("the file"))
    assert page.locator("#attention .token").count() == n_read + 4
    assert page.locator("#alternatives .taken").count() == 1
    chosen = page.locator("#chosen").text_content()
    assert chosen.startswith(page.locator("#alternatives .taken .name").text_content())
    assert page.locator(f"{TOKEN}.chosen").text_content().replace(" ", "␣").replace("\n", "↵") in chosen
    assert page.locator("#heads button").count() == 8
    mean = page.locator("#most").text_content()
    page.locator("#heads button").nth(6).click()
    assert (page.locator("#layer").input_value(), page.locator("#head").input_value()) == ("1", "2")
    assert page.locator("#most").text_content() != mean
    page.select_option("#layer", "")
    page.select_option("#head", "")
    assert page.locator("#most").text_content() == mean


def test_arrow_keys_go_from_token_to_token(page):
    page.uncheck("#compare")
    write(page, "the file")
    page.locator(TOKEN).nth(0).press("ArrowRight")
    page.locator("#look").wait_for()
    assert page.locator(f"{TOKEN}.chosen").count() == 1
    assert page.locator(TOKEN).nth(1).get_attribute("class").endswith("chosen")
    page.keyboard.press("End")
    page.locator(f"{TOKEN}.chosen >> nth=0").wait_for()
    assert page.locator(TOKEN).last.get_attribute("tabindex") == "0"
    assert page.locator(f"{TOKEN}[tabindex='0']").count() == 1


def test_another_token_is_taken_and_the_text_goes_on_from_it(page):
    page.uncheck("#compare")
    write(page, "the file")
    before = texts(page, ".token.read")[0] + "".join(page.locator(WRITTEN).all_text_contents()[:5])
    page.locator(WRITTEN).nth(5).click()
    other = page.locator("#alternatives button:not(.taken)").first
    name = other.locator(".name").text_content()
    other.click()
    page.get_by_text(re.compile("as long as asked|at its end")).wait_for()
    assert texts(page)[0].startswith(before + name.replace("␣", " ").replace("↵", "\n"))
    assert page.locator("#look").is_hidden()
    length = page.locator(TOKEN).count()
    page.click("#onward")
    page.get_by_text(re.compile("as long as asked|at its end")).wait_for()
    assert page.locator(TOKEN).count() > length


def test_what_looks_like_html_stays_text(page):
    text = "<img src=x onerror=alert(1)><b>&amp;</b>"
    write(page, text)
    assert all(found.startswith(text) for found in texts(page))
    assert page.locator("main img, main b").count() == 0


def test_what_the_server_refuses_is_told(served, browser):
    page = browser.new_page()
    page.goto(served[0])
    page.fill("#top_p", "2")
    page.click("#write")
    page.get_by_text("top_p=2.0 must be within (0, 1]").first.wait_for()
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_telephone_in_light_and_dark(scheme, served, browser):
    page = browser.new_page(color_scheme=scheme, viewport={"width": 360, "height": 700})
    page.goto(served[0])
    write(page, "the file")
    page.locator(WRITTEN).nth(3).click()
    page.locator("#look").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    ink, paper = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    bright = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert (bright[0] < bright[1]) == (scheme == "light")
    assert abs(bright[0] - bright[1]) > 450
    page.close()
