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
SAMPLING = Sampling(temperature=0.8, top_p=0.95, seed=1)  # the page's defaults, except for the seed
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


@pytest.fixture(scope="module")
def tab(served, browser):
    """A tab, and a list of what goes wrong in it.  Most tests share it, as the page stores nothing in the browser."""
    page, problems = browser.new_page(), []
    page.set_default_timeout(20_000)
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url) if not request.url.startswith(served[0]) else None)
    yield page, problems
    page.close()


@pytest.fixture
def page(served, tab):
    """The page; after the test it must have had no errors, and no requests to other places."""
    page, problems = tab
    problems.clear()
    page.goto(served[0])
    page.fill("#seed", "1")
    yield page
    page.goto("about:blank")  # errors while leaving the page count, too
    assert problems == []


def write(page, prompt: str) -> None:
    page.fill("#prompt", prompt)
    page.keyboard.press("Control+Enter")
    for pane in page.locator(".pane:visible").all():
        pane.get_by_text(re.compile("at its full length|at its end")).wait_for()


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


# This runs in the page: on a busy machine, an answer may end before we look from outside.
ESCAPE_ONCE_IT_GROWS = """() => {
  const seen = document.querySelectorAll(".pane .token:not(.read)").length;
  const grows = window.first && seen > first + 5 && !document.querySelector("#write").disabled;
  window.first ||= seen;
  if (grows) document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
  return grows;
}"""


def test_tokens_are_seen_as_they_come_and_escape_stops_them(page, served):
    page.fill("#max_tokens", "1500")
    page.click("#write")
    page.wait_for_function(ESCAPE_ONCE_IT_GROWS)
    page.get_by_text("stopped").first.wait_for()
    wait_until(lambda: served[1].worker.counts()["running"] == 0)
    assert 0 < page.locator(".pane").first.locator(".token:not(.read)").count() < 1500
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


def test_a_token_shows_its_alternatives_and_what_the_heads_attended_to(page, served, tiny_tokenizer):
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


def test_an_alternative_token_is_taken_and_the_text_continues_from_it(page):
    page.uncheck("#compare")
    write(page, "the file")
    before = texts(page, ".token.read")[0] + "".join(page.locator(WRITTEN).all_text_contents()[:5])
    page.locator(WRITTEN).nth(5).click()
    other = page.locator("#alternatives button:not(.taken)").first
    name = other.locator(".name").text_content()
    other.click()
    page.get_by_text(re.compile("at its full length|at its end")).wait_for()
    assert texts(page)[0].startswith(before + name.replace("␣", " ").replace("↵", "\n"))
    assert page.locator("#look").is_hidden()
    length = page.locator(TOKEN).count()
    page.click("#onward")
    page.get_by_text(re.compile("at its full length|at its end")).wait_for()
    assert page.locator(TOKEN).count() > length


def test_another_model_continues_the_text_and_not_the_ids(page):
    page.uncheck("#compare")
    write(page, "the file")
    (written,) = texts(page)
    for change, is_text in ((lambda: None, False), (lambda: page.locator(".model").first.select_option(index=1), True)):
        change()
        with page.expect_request("**/v1/completions") as asked:
            page.click("#onward")
        prompt = asked.value.post_data_json["prompt"]
        assert isinstance(prompt, str) is is_text
        page.click("#stop", force=True)
    assert prompt.startswith(written)


def test_what_looks_like_html_stays_text(page):
    text = "<img src=x onerror=alert(1)><b>&amp;</b>"
    write(page, text)
    assert all(found.startswith(text) for found in texts(page))
    assert page.locator("main img, main b").count() == 0


def test_nothing_can_be_asked_before_the_models_are_known(served, browser):
    page, held = browser.new_page(), []
    page.route("**/v1/models", lambda route: held.append(route))  # Playwright marks its handlers
    page.goto(served[0])
    for name in ("#prompt", "#write", "#compare", "#line", "#send"):
        assert page.locator(name).is_disabled(), name
    wait_until(lambda: page.evaluate("1") and held)  # evaluate lets Playwright call the route
    held[0].continue_()
    page.uncheck("#compare")
    write(page, "the file")
    assert len(texts(page)) == 1
    page.close()


def test_what_the_server_refuses_is_shown_and_leaves_what_was_written(served, browser):
    page = browser.new_page()
    page.goto(served[0])
    page.uncheck("#compare")
    write(page, "the file")
    before = texts(page)
    page.fill("#top_p", "2")
    page.click("#write")
    page.get_by_text("top_p=2 must be from 0 to 1").first.wait_for()
    assert texts(page) == before
    page.locator(TOKEN).nth(3).click()  # and details of the old text can be shown
    page.locator("#look").wait_for()
    page.route("**/v1/completions", lambda route: route.fulfill(status=502, body="<h1>no</h1>"))
    page.click("#write")
    page.get_by_text("the server says 502").first.wait_for()
    page.route("**/v1/completions", lambda route: route.abort())
    page.click("#onward")
    page.get_by_text("Failed to fetch").first.wait_for()
    assert texts(page) == before
    page.close()


def test_each_text_has_a_seed_of_its_own_until_it_is_kept(page):
    page.uncheck("#compare")
    page.uncheck("#keep")
    found = []
    for _ in range(2):
        write(page, "the file")
        found.append((page.input_value("#seed"), texts(page)))
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]
    page.check("#keep")
    write(page, "the file")
    assert (page.input_value("#seed"), texts(page)) == found[1]
    page.fill("#seed", found[0][0])
    write(page, "the file")
    assert texts(page) == found[0][1]


def test_a_text_ends_before_a_stop_text(page, served, tiny_tokenizer):
    page.uncheck("#compare")
    page.fill("#stops", "e \n\\n")
    write(page, "the file")
    model = served[1].models["small"].model
    sampling = Sampling(temperature=0.8, top_p=0.95, seed=1, stop=("e ", "\n"))
    expected = generate(model, tiny_tokenizer, "the file", max_new_tokens=120, sampling=sampling)
    assert texts(page) == ["the file" + expected]
    page.get_by_text("at its end").wait_for()


@pytest.mark.parametrize("has_clipboard", [True, False])
def test_a_text_is_copied(has_clipboard, served, browser):
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    if not has_clipboard:  # as on a page from another machine without https
        page.add_init_script("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.goto(served[0])
    page.uncheck("#compare")
    write(page, "naïve\n中")
    page.locator(".copy:visible").click()
    page.get_by_text("Copied").wait_for()
    page.fill("#prompt", "")
    page.focus("#prompt")
    page.keyboard.press("Control+v")
    assert page.input_value("#prompt") == texts(page)[0]
    context.close()


STOP_ONCE_IT_WRITES = """() => {
  const said = document.querySelectorAll("#talk li p");
  const writes = said.length === 4 && said[3].textContent.length > 20;
  if (writes) document.querySelector("#silence").click();
  return writes;
}"""


def said(page) -> list[str]:
    return page.locator("#talk li p").all_text_contents()


def test_a_chat_has_answers_stops_and_keeps_what_was_said(page, served, tiny_tokenizer):
    page.click("text=Chat")
    page.fill("#system", "Be good.")
    page.fill("#line", "<b>hi</b>")
    page.keyboard.press("Enter")
    page.get_by_text("tokens after").wait_for()
    prompt = "Be good.\nUser: <b>hi</b>\nAssistant:"
    sampling = Sampling(temperature=0.8, top_p=0.95, seed=1, stop=("\nUser:",))
    model = served[1].models["small"].model
    answer = generate(model, tiny_tokenizer, prompt, max_new_tokens=120, sampling=sampling).lstrip()
    assert said(page) == ["<b>hi</b>", answer]
    page.fill("#seed", "2")
    page.click("#again")
    page.locator("#send:enabled").wait_for()
    page.get_by_text("tokens after").wait_for()
    assert len(said(page)) == 2
    assert said(page)[1] != answer
    page.fill("#max_tokens", "1500")
    page.fill("#line", "and?")
    page.click("#send")
    page.wait_for_function(STOP_ONCE_IT_WRITES)  # in the page: the answer may end before we look
    page.get_by_text("stopped").wait_for()
    wait_until(lambda: served[1].worker.counts()["running"] == 0)
    assert len(said(page)) == 4
    page.click("#fresh")
    assert said(page) == []
    page.click("text=Write")
    page.locator("#prompt").wait_for()  # a tab opens after the click, at the event for the new address


def test_an_error_leaves_what_was_said_in_a_chat(served, browser):
    page = browser.new_page()
    page.goto(served[0] + "#chat")
    page.fill("#line", "hi")
    page.click("#sampling summary")
    page.click("#sampling summary")
    page.fill("#top_p", "2")
    page.click("#send")
    page.get_by_text("top_p=2 must be").wait_for()
    assert said(page) == ["hi"]
    page.fill("#top_p", "1")
    page.click("#again")
    page.get_by_text("tokens after").wait_for()
    assert said(page)[0] == "hi"
    assert len(said(page)) == 2
    page.close()


def test_a_new_message_takes_the_place_of_one_without_an_answer_and_empty_options_are_the_servers(served, browser):
    page = browser.new_page()
    page.goto(served[0] + "#chat")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    for line in ("hi", "ho"):
        page.fill("#line", line)
        page.click("#send")
        page.locator("#chat-status.wrong").wait_for()
        assert said(page) == [line]
    page.unroute("**/v1/chat/completions")
    page.click("#sampling summary")
    page.click("#sampling summary")
    page.fill("#max_tokens", "")
    with page.expect_request("**/v1/chat/completions") as asked:
        page.click("#again")
    assert "max_tokens" not in asked.value.post_data_json and asked.value.post_data_json["top_k"] == 0
    page.get_by_text("tokens after").wait_for()
    page.close()


def test_on_a_phone_the_text_is_visible_at_once(served, browser):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(served[0])
    assert not page.locator("#options").is_visible()
    assert page.locator("#panes").bounding_box()["y"] < 500
    page.locator("#sampling summary").click()
    assert page.locator("#stops").is_visible()
    page.goto(served[0] + "#chat")
    page.locator("#line").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_in_light_and_dark(scheme, served, browser):
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
