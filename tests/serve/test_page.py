"""The page, as a browser gets it and as a person uses it in headless Chromium."""

import importlib.util
import json
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest

from localmimo.engine import Engine
from tests.serve.running import Running, Scripted, wait_for
from tests.serve.samples import CALL, CUT_OFF, WEATHER

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
in_a_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER and importlib.util.find_spec("selenium")),
    reason="chromium, chromedriver and selenium (extra clients) are needed",
)


def test_the_files_bring_nothing_from_elsewhere(server: Running) -> None:
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/style.css", "text/css")):
        answer = server.http.get(path)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "://" not in answer.text.replace("http://www.w3.org", "") and "innerHTML" not in answer.text
        assert " style=" not in answer.text and "onclick" not in answer.text


class Browser:
    """Chromium with the page open."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        driver.get(url)
        wait_for(lambda: "context" in self.text("model") or self.text("model").endswith("."))

    def find(self, name: str) -> Any:
        return self.driver.find_element("id", name)

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements("css selector", selector))

    def text(self, name: str) -> str:
        return str(self.find(name).text)

    def say(self, text: str) -> None:
        self.find("prompt").send_keys(text + "\n")

    def complaints(self) -> list[Any]:
        return [entry for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=900,900",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@in_a_browser
def test_a_conversation(driver: Any, server: Running, script: Scripted) -> None:
    script.say("<think>Two rivers.</think>Here is <b>code</b>:\n```\nx = 1\n```\nDone.")
    script.delay_s = 0.02
    page = Browser(driver, server.url)
    page.say("Tell me about rivers.")
    wait_for(lambda: page.text("state") == "Answer complete.")
    assert [turn.text.split("\n")[0] for turn in page.all("article")] == ["You", "Model"]
    assert page.driver.switch_to.active_element.get_attribute("id") == "prompt"
    answer = page.all("article.assistant")[0]
    assert "Here is <b>code</b>:" in answer.text  # text, not markup
    assert [box.text for box in page.all("article pre")] == ["x = 1"]
    thinking = page.all("details.thinking")[0]
    assert thinking.get_attribute("open") is None and "Thought for" in thinking.text
    thinking.find_element("tag name", "summary").click()
    assert "Two rivers." in thinking.text
    assert "tokens/s" in page.text("speed") and "of 4,096" in page.text("context")
    wait_for(lambda: "ram" in page.text("tiers"))
    assert page.complaints() == []


@in_a_browser
def test_a_call_is_shown_and_its_result_goes_back(driver: Any, server: Running, script: Scripted) -> None:
    script.say(CALL, "Rain.")
    page = Browser(driver, server.url)
    page.find("settings").find_element("tag name", "summary").click()
    page.driver.execute_script("arguments[0].value = arguments[1]", page.find("tools"), json.dumps([WEATHER]))
    page.say("Weather in Oslo?")
    wait_for(lambda: page.text("state") == "The model waits for results.")
    call = page.all(".call")[0]
    assert "get_weather" in call.text and '"city": "Oslo"' in call.text
    page.driver.switch_to.active_element.send_keys("rain")
    page.find("send").click()
    wait_for(lambda: page.text("state") == "Answer complete.")
    assert page.all("article.assistant")[-1].text.endswith("Rain.")
    assert page.complaints() == []


@in_a_browser
def test_a_call_that_is_cut_off_becomes_text(driver: Any, server: Running, script: Scripted) -> None:
    script.say(CUT_OFF, "Sorry.")
    script.delay_s = 0.02
    page = Browser(driver, server.url)
    page.find("settings").find_element("tag name", "summary").click()
    page.driver.execute_script("arguments[0].value = arguments[1]", page.find("tools"), json.dumps([WEATHER]))
    page.say("Weather in Oslo?")
    wait_for(lambda: page.text("state") == "Answer complete.")
    assert not page.all(".call") and CUT_OFF in page.all("article.assistant")[0].text
    page.say("Well?")  # the server takes the conversation as it is
    wait_for(lambda: "Sorry." in page.all("article.assistant")[-1].text)


@in_a_browser
def test_stopping_and_starting_over(driver: Any, server: Running, script: Scripted) -> None:
    script.say("word " * 500, "Yes.")
    script.delay_s = 0.02
    page = Browser(driver, server.url)
    page.say("Go on.")
    wait_for(lambda: page.text("state") == "writing")
    assert page.find("send").get_attribute("disabled") and page.find("stop").is_displayed()
    page.find("prompt").send_keys("\ue00c")  # Esc
    wait_for(lambda: page.text("state") == "Stopped.")
    server.wait_idle()
    script._tokens.clear()
    page.find("new").click()
    assert page.all("article") == [] and page.find("hint").is_displayed()
    page.say("Are you there?")
    wait_for(lambda: page.text("state") == "Answer complete.")
    assert len(page.all("article")) == 2


@in_a_browser
def test_errors_are_shown(driver: Any, server: Running) -> None:
    page = Browser(driver, server.url)
    page.driver.execute_script("arguments[0].value = 'word '.repeat(6000)", page.find("prompt"))
    page.find("send").click()
    wait_for(lambda: page.all("article .wrong"))
    assert "4096 tokens" in page.all("article .wrong")[0].text
    page.find("settings").find_element("tag name", "summary").click()
    page.find("tools").send_keys("{")
    page.find("prompt").send_keys("x\n")
    assert "no JSON" in page.text("tools-wrong")


@in_a_browser
def test_everything_has_a_name_and_can_be_reached_by_key(driver: Any, server: Running) -> None:
    page = Browser(driver, server.url)
    page.find("settings").find_element("tag name", "summary").click()
    for field in page.all("textarea, input, select, button"):
        assert field.accessible_name or not field.is_displayed(), field.get_attribute("outerHTML")
    reached = set()
    page.find("prompt").click()
    for _ in range(25):
        page.driver.switch_to.active_element.send_keys("\ue004")  # Tab
        reached.add(page.driver.switch_to.active_element.get_attribute("id"))
    assert {"send", "system", "think", "temperature", "tokens", "tools", "key", "new", "talk"} <= reached


@in_a_browser
@pytest.mark.parametrize("width", [320, 1200])
def test_nothing_sticks_out(driver: Any, server: Running, script: Scripted, width: int) -> None:
    script.say("long" * 60 + "\n```\n" + "wide" * 60 + "\n```")
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    page = Browser(driver, server.url)
    page.say("x" * 300)
    wait_for(lambda: page.text("state") == "Answer complete.")
    time.sleep(0.1)
    assert driver.execute_script("return document.documentElement.scrollWidth - innerWidth") <= 0


def test_a_page_asks_for_the_key(engine: Engine) -> None:
    from localmimo.serve.http.auth import AccessCheck

    with Running(engine, guard=AccessCheck(api_key="k")) as server:
        assert server.http.get("/").status_code == 200
        assert server.http.get("/v1/models").status_code == 401
