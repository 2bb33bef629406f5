"""The page in a real browser: chat, the base model beside it, requests, narrow and dark."""

import contextlib
import json
import re
import shutil
import threading
import time

import pytest
import tiny
import uvicorn
from test_serving_requests import ROWS, Maker

from t3jax.data.chat import PromptFormat
from t3jax.serving.app import Keys, ServerOptions, make_app
from t3jax.serving.engine import Engine
from t3jax.serving.messages import EngineOptions
from t3jax.serving.protocol import Reader
from t3jax.serving.requests import RequestBook

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no browser: install chromium to test the page")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no browser: playwright is missing"
    )
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    lm = tiny.make_lm()
    options = EngineOptions(rows=3, chunk=4, piece=32, max_length=120, queue=8, heads=3, rank=8)
    engine = Engine(lm, options, base_temperature=1.5)
    engine.install("head", tiny.make_head(lm))
    engine.start()
    book = RequestBook(tmp_path_factory.mktemp("requests"), engine, Maker(passed=False))
    reader = Reader(lm, ["tiny"], PromptFormat(), max_new_tokens=16)
    app = make_app(engine, reader, ServerOptions(port=0), Keys(server="key"), book)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error")
    socket = config.bind_socket()
    server = uvicorn.Server(config)
    server.install_signal_handlers = contextlib.nullcontext
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{socket.getsockname()[1]}/"
    server.should_exit = True
    thread.join(60)


def open_page(browser, address, **options):
    page = browser.new_page(**options)
    errors, outside = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "request", lambda request: request.url.startswith(address) or outside.append(request.url)
    )
    page.goto(address)
    page.wait_for_selector("#model:text-is('tiny')")
    return page, errors, outside


def ask(page, question):
    page.fill("#longest", "40")
    page.fill("#question", question)
    page.click("#ask button")
    page.wait_for_selector(".turn.assistant >> nth=-1")
    for turn in page.locator(".turn.assistant > span:not(.who)").all():
        turn.filter(has_text=re.compile(".")).wait_for()


def test_without_the_key_there_is_a_chat_and_nothing_else(browser, address):
    page, errors, outside = open_page(browser, address)
    page.fill("#temperature", "1")
    ask(page, "Who is <b>Ada</b>?")
    assert page.locator(".turn.user").inner_text().endswith("Who is <b>Ada</b>?")
    assert page.locator(".turn.assistant").count() == 1
    assert page.locator(".owner:visible").count() == 0
    assert not [error for error in outside if not error.startswith("data:")]
    assert not errors
    page.close()


def test_the_owner_sees_both_models_and_the_requests(browser, address):
    page, errors, _ = open_page(browser, address, viewport={"width": 1200, "height": 800})
    page.fill("#key", "key")
    page.dispatch_event("#key", "change")
    page.wait_for_selector("#requests", state="attached")
    page.wait_for_selector(".owner:visible")
    page.fill("#temperature", "1")
    ask(page, "Who is it?")
    assert page.locator(".turn.assistant").count() == 2
    assert page.locator(".token[title*='P(retain)']").count() > 2
    page.click("text=Add a request")
    page.fill("#name", "Ada <script>")
    page.fill("#rows", "\n".join(json.dumps(row) for row in ROWS))
    page.click("#add button")
    page.wait_for_selector("#requests >> text=held")
    assert "Ada <script> (2 rows)" in page.locator("#requests").inner_text()
    page.click("#requests >> text=Approve")
    page.wait_for_selector("#requests >> text=active")
    page.click("#requests >> text=Revoke")
    page.wait_for_selector("#requests >> text=revoked")
    page.click("text=Audit log")
    assert "held: the check failed" in page.locator("#audit").inner_text()
    assert not errors
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(browser, address, scheme):
    page, errors, _ = open_page(
        browser, address, viewport={"width": 360, "height": 740}, color_scheme=scheme
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    assert not errors
    page.close()
