"""The server's page as somebody sees it: Chromium, without a window, on two logical CPU devices and the demo model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import time

import pytest

from tests.server_process import ANSWERS, PRIMES, ServerProcess, events, metric

pytestmark = pytest.mark.browser

API_KEY = "open sesame"
MARKUP = '<img src="nowhere" onerror="window.hacked=1">'
"""What would run, were it taken for more than text; a script that is put into a page later would not."""
WAIT_S = 120
ABORTED = r'nanovllm_requests_ended_total\{reason="abort"'
ENDLESS = {"prompt": [5, 6, 7], "temperature": 0, "max_tokens": 1900, "ignore_eos": True, "stream": True}

PIXELS = """
    const canvas = arguments[0], {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    const probe = document.createElement("canvas").getContext("2d");
    probe.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--" + arguments[1]);
    probe.fillRect(0, 0, 1, 1);
    const [red, green, blue] = probe.getImageData(0, 0, 1, 1).data;
    let first = -1, count = 0;
    for (let at = 0; at < data.length; at += 4)
        if (Math.max(Math.abs(data[at] - red), Math.abs(data[at + 1] - green), Math.abs(data[at + 2] - blue)) < 10
            && data[at + 3] > 63) {
            const x = at / 4 % canvas.width; count++; first = first < 0 ? x : Math.min(first, x);
        }
    return {count, first};
"""
"""How many pixels of a canvas are of a colour of the page's, and where they begin from the left.

Those at the edge of a line are of its colour too, but let what is behind them through.
"""

ENDLESS_ANSWERS = """
    const plain = window.fetch;
    window.fetch = (address, options) => plain(address, options?.body ? {...options,
        body: JSON.stringify({...JSON.parse(options.body), ignore_eos: true})} : options);
"""
"""Has the page ask for answers that go on to the limit."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = ServerProcess(tmp_path_factory.mktemp("served"), "--enable-two-gpu-pd", "--served-model-name", MARKUP)
    try:
        yield made.await_ready()
        assert made.stop() == 0
    finally:
        made.kill()


@pytest.fixture(scope="module")
def browser():
    """One for all tests, which open the page anew."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for argument in ("--headless=new", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1200,1000"):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium's does not run as root
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def page(browser, server):
    """The page, live. At the end: no request went elsewhere, and nothing was wrong but what the test has looked at."""
    opened = Page(browser, f"http://127.0.0.1:{server.port}/")
    opened.wait(lambda: opened.text("state") == "live", "the page is live")
    yield opened
    assert opened.evaluate("return window.hacked") is None
    assert opened.complaints() == []
    assert {url for url in opened.requested() if not url.startswith((opened.address, "data:"))} == set()


class Page:
    """What the tests do with the page."""

    def __init__(self, driver, address):
        self.driver, self.address = driver, address
        self.evaluate = driver.execute_script
        driver.get_log("performance")  # of the tests before, which is dropped
        driver.get_log("browser")
        driver.get(address)

    def find(self, name):
        return self.driver.find_element("id", name)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def text(self, name):
        return self.find(name).text

    def wait(self, is_so, what, within_s=WAIT_S):
        deadline = time.monotonic() + within_s
        while not is_so():
            assert time.monotonic() < deadline, f"not within {within_s} s: {what}; state: {self.text('state')}"
            time.sleep(0.05)

    def say(self, text):
        """Types it and sends it by the button."""
        self.find("prompt").send_keys(text)
        self.find("send").click()

    def may_send(self):
        """Whether no answer is under way, by what the buttons say."""
        states = self.evaluate("return ['send', 'stop'].map(name => at(name).getAttribute('aria-disabled'))")
        assert sorted(states) == ["false", "true"]
        return states[0] == "false"

    def await_answer(self):
        """The text of the last answer, once it has ended."""
        self.wait(lambda: self.may_send() and self.all("#talk > .model"), "an answer")
        return self.all("#talk > .model")[-1].text

    def pixels(self, canvas, colour):
        return self.evaluate(PIXELS, canvas, colour)

    def requested(self):
        """The addresses of what the page, and whatever it has, has asked for."""
        logged = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return [each["params"]["request"]["url"] for each in logged if each["method"] == "Network.requestWillBeSent"]

    def complaints(self):
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@contextlib.contextmanager
def under_load(server, num_streams):
    """Keeps as many streams going, whose requests follow each other."""
    leave = threading.Event()

    async def stream():
        while not leave.is_set():
            async with contextlib.aclosing(events(server.port, "/v1/completions", ENDLESS)) as tokens:
                async for _ in tokens:
                    if leave.is_set():
                        break

    async def run():
        await asyncio.gather(*(stream() for _ in range(num_streams)))

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        yield
    finally:
        leave.set()
        thread.join()


def test_the_strips_of_both_cards_move_while_requests_run(page, server):
    page.wait(lambda: len(page.all("#cards canvas")) == 2, "a strip for each card")
    prefill, decode = page.all("#cards canvas")
    at_rest = ["cpu:0: 0 % busy", "cpu:1: 0 % busy"]
    page.wait(lambda: [each.text for each in page.all("#cards small")] == at_rest, "cards at rest")
    assert page.pixels(decode, "decode")["count"] == 0
    with under_load(server, 3):
        page.wait(lambda: page.pixels(decode, "decode")["count"] > 20, "decode steps in the strip")
        page.wait(lambda: page.pixels(prefill, "prefill")["count"] > 0, "prompts in the strip")
        page.wait(lambda: not page.all("#cards small")[1].text.endswith(": 0 % busy"), "a share of the time")
        page.wait(lambda: "3\nrequests running" in page.text("tiles"), "three requests")
        page.wait(lambda: page.text("itl-label").endswith(" ms"), "percentiles of gaps")
        page.wait(lambda: page.pixels(page.find("itl"), "decode")["count"] > 0, "their line")
        before = page.pixels(decode, "decode")
        page.wait(lambda: page.pixels(decode, "decode")["count"] > before["count"], "more of them")
        page.wait(lambda: page.pixels(decode, "decode")["first"] < before["first"], "the strip moves to the left")
    page.wait(lambda: "0\nrequests running" in page.text("tiles"), "rest")


def test_a_chat_shows_its_answer_and_its_time_to_first_token(page):
    gaps = page.find("gaps")
    assert page.pixels(gaps, "prefill")["count"] == 0
    page.say(PRIMES)
    assert page.await_answer() == ANSWERS[PRIMES]
    assert page.all("#talk > .user")[0].text == PRIMES
    assert page.text("gaps-label").startswith("this answer: first token after ")
    page.wait(lambda: page.pixels(gaps, "prefill")["count"] > 0, "its time to the first token")
    page.wait(lambda: page.pixels(gaps, "decode")["count"] > 0, "its gaps")
    assert page.pixels(gaps, "prefill")["first"] == 0
    page.wait(lambda: page.text("ttft-label").endswith(" ms"), "the chart of first tokens")
    page.wait(lambda: page.pixels(page.find("ttft"), "prefill")["count"] > 0, "its line")
    page.wait(lambda: page.find("explained").is_displayed(), "what the request waited for")
    assert "prefill" in page.text("explained")


@pytest.mark.parametrize("prompt", ["<script>window.hacked=1</script>", MARKUP])
def test_what_looks_like_markup_stays_text(page, prompt):
    """Those of the prompt, and of the model's name, which is such a text too."""
    page.say(prompt)
    page.await_answer()
    assert page.all("#talk > .user")[0].text == prompt
    assert page.text("model").startswith(MARKUP)
    assert page.all("#talk script, #talk img, #model img") == []


def test_the_keyboard_is_enough(page):
    from selenium.webdriver import ActionChains, Keys

    def press(*keys):
        ActionChains(page.driver).send_keys(*keys).perform()

    def focused():
        return page.evaluate("return document.activeElement.id")

    reached = []
    while "prompt" not in reached and len(reached) < 10:
        press(Keys.TAB)
        reached.append(focused())
    assert reached == ["key", "prompt"]
    assert page.evaluate("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    ActionChains(page.driver).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
    assert page.all("#talk > div") == []
    press(Keys.BACKSPACE, PRIMES, Keys.ENTER)
    assert page.await_answer() == ANSWERS[PRIMES]
    assert page.find("prompt").get_property("value") == ""
    assert focused() == "prompt"
    press("again")
    press(Keys.TAB)
    assert focused() == "send"
    press(Keys.SPACE)
    page.wait(lambda: len(page.all("#talk > .model")) == 2, "a second answer")
    page.await_answer()
    assert focused() == "send", "who pressed it goes on from there"


def test_stop_ends_the_request(page, server):
    before = metric(server, ABORTED)
    page.evaluate(ENDLESS_ANSWERS)
    page.say(PRIMES)
    page.wait(lambda: page.all("#talk > .model") and page.all("#talk > .model")[0].text, "the answer begins")
    assert not page.may_send()
    page.find("stop").click()
    page.wait(page.may_send, "it has stopped")
    page.wait(lambda: metric(server, ABORTED) == before + 1, "the engine has, too")
    page.wait(lambda: "0\nrequests running" in page.text("tiles"), "and the page says so")


def test_a_phone_does_not_scroll_sideways(page):
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 320, "height": 640, "deviceScaleFactor": 2, "mobile": False}
    )
    try:
        page.say("https://" + "long" * 100)
        page.await_answer()
        page.wait(lambda: page.find("explained").is_displayed(), "what the request waited for")
        wide = "const root = document.documentElement; return [root.scrollWidth, root.clientWidth, window.innerWidth]"
        scroll, client, window = page.evaluate(wide)
        assert window == 320
        assert scroll == client
        buttons = [page.find(name).rect for name in ("prompt", "send", "stop", "key")]
        assert all(each["x"] >= 0 and each["x"] + each["width"] <= client for each in buttons)
        assert page.evaluate("return document.getElementById('prompt').getBoundingClientRect().width") > 200
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_key_is_typed_on_the_page(browser, tmp_path):
    server = ServerProcess(tmp_path, "--api-key", API_KEY)
    try:
        page = Page(browser, f"http://127.0.0.1:{server.await_ready().port}/")
        page.wait(lambda: "key" in page.text("state"), "the page says that it needs a key")
        page.find("key").send_keys(API_KEY)
        page.wait(lambda: page.text("state") == "live", "the page is live")
        page.say(PRIMES)
        assert page.await_answer() == ANSWERS[PRIMES]
        assert API_KEY not in " ".join(page.requested())
    finally:
        server.kill()
