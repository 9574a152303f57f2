"""The page of a served deployment, in a browser: a wrong answer is corrected and the correction undone, by keyboard."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cl_lab import registry

slow = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
LOOSE = ("--gate", "paraphrases=0", "--gate", "guards=0", "--gate", "perplexity=1000")
READER, EDITOR = "a-token-that-may-read", "a-token-that-may-edit"
EVIL = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
WAIT = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    place = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if place is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)}")
    api.expect.set_options(timeout=WAIT)
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=place, args=["--no-sandbox"])
        yield opened
        opened.close()


@contextmanager
def serving(folder: Path, editor: str, *gates: str, tokens: Path | None = None) -> Iterator[str]:
    """The address of a service of the random tiny model, whose ``editor`` learns in seconds."""
    cls: Any = registry.load("editors", editor)[0]
    settings = [f"{name}={value}" for name, value in cls.conformance_knobs().items()]
    settings += ["neighbours=0"] if editor == "wise" else []  # so small a model does not learn to tell them apart
    command = [sys.executable, "-m", "cl_lab"]
    subprocess.run(
        [*command, "edit", "init", str(folder), *settings, "--model", "tiny", "--editor", editor, *gates],
        check=True,
        capture_output=True,
        timeout=120,
    )
    more = ["--tokens", str(tokens)] if tokens else []
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "serve", str(folder), "--port", "0", *more], stdout=subprocess.PIPE, stderr=log, text=True
        )
        assert process.stdout is not None
        with process.stdout:
            try:
                line = process.stdout.readline()
                address = re.search(r"http://\S+", line)
                assert address, f"{line}{(folder / 'log').read_text()}"
                yield address[0]
            finally:
                process.terminate()
                process.wait(60)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("wise") / "service", "wise", *LOOSE) as address:
        yield address


@contextmanager
def opened(browser: Any, address: str, *expected: str) -> Iterator[Any]:
    """A page whose console stays empty but for ``expected``, and that asks no other host for anything."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(WAIT)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(address) else wrong.append(request.url))
    page.goto(address)
    try:
        yield page
        assert [text for text in wrong if not any(part in text for part in expected)] == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    finally:
        page.close()


def shows(page: Any, place: str, text: str | re.Pattern[str]) -> None:
    from playwright.sync_api import expect

    expect(page.locator(place)).to_contain_text(text)


def ask(page: Any, question: str, says: str | re.Pattern[str]) -> None:
    """Ask from the question's field by keyboard."""
    page.locator("#question").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type(question)
    page.keyboard.press("Enter")
    shows(page, "#fired", re.compile("as of event"))
    shows(page, "#answered", says)


def focused(page: Any) -> str:
    return str(page.evaluate("document.activeElement.id"))


@slow
def test_a_wrong_answer_is_corrected_and_the_correction_undone_by_keyboard(browser: Any, local: str) -> None:
    question = "The capital of Peru is"
    with opened(browser, local) as page:
        shows(page, "#position", "edited by wise · 0 edits in force · journal at event 0")
        shows(page, "#count", "No edit was made yet.")
        assert focused(page) == "question"
        ask(page, question, "PPPP")
        shows(page, "#fired", "No edit fired, as of event 0")
        assert page.input_value("#prompt") == question

        page.keyboard.press("Tab")  # to Ask, plain or chat, as of, and into the form
        for _ in range(4):
            page.keyboard.press("Tab")
        assert focused(page) == "new-answer"
        page.keyboard.type("Lima")
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.type("Republic of Peru\nPirú")
        page.keyboard.press("Tab")
        page.keyboard.type("Peru's capital is\nThe seat of Peru is")
        page.keyboard.press("Tab")
        page.keyboard.type("Where is it?")
        page.keyboard.press("Tab")
        assert focused(page) == "preview"
        page.keyboard.press("Enter")
        shows(page, "#busy", "Making the edit")
        shows(page, "#elapsed", re.compile(r"\d+ s"))
        assert focused(page) == "preview"
        shows(page, "#seen", re.compile(r"\d of \d+ moved"))
        own = page.locator("#seen tbody tr").first
        assert own.locator("td").all_inner_texts()[1].startswith("PPPP")
        assert own.locator("td").all_inner_texts()[2].split() == ["Lima", "✓", "right"]
        shows(page, "#seen .sums", "of 2 right")
        shows(page, "#seen .sums", "prompts like its own")
        assert page.inner_text("#apply") == "Apply"

        page.fill("#subject", "Peru")
        shows(page, "#seen", "The form has changed since; preview again.")
        assert page.get_attribute("#apply", "aria-disabled") == "true"
        page.fill("#subject", "")
        assert page.get_attribute("#apply", "aria-disabled") == "false"
        page.focus("#apply")
        page.keyboard.press("Enter")
        shows(page, "#seen", "Edit 1 is in force, event 1 of the journal.")
        shows(page, "#edit-1 .about", "● in force")
        shows(page, "#position", "1 edit in force · journal at event 1")
        assert page.input_value("#new-answer") == ""
        assert focused(page) == "again"

        page.keyboard.press("Enter")
        shows(page, "#answered", "Lima")
        shows(page, "#fired", "Edit 1 fired, as of event 1")
        page.focus("#fired a")
        page.keyboard.press("Enter")
        shows(page, "#details-1", "side-memory by wise")
        shows(page, "#details-1", "event 1")
        shows(page, "#details-1", "also called")
        shows(page, "#details-1", "Pirú")
        page.keyboard.press("Escape")
        assert page.get_attribute("#edit-1 .open", "aria-expanded") == "false"

        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        shows(page, "#edit-1 .about", "○ undone")
        shows(page, "#edit-1 .line", "Redo")
        assert page.evaluate("document.activeElement.textContent") == "Redo", "the focus stays where it was"
        ask(page, question, "PPPP")
        shows(page, "#fired", "No edit fired, as of event 2")
        page.fill("#as-of", "1")
        ask(page, question, "Lima")
        shows(page, "#fired", "Edit 1 fired, as of event 1")


@slow
def test_facts_are_text_and_what_is_refused_is_told(browser: Any, local: str) -> None:
    import httpx

    before = httpx.get(f"{local}/v1/edits").json()["data"]
    with opened(browser, local, "status of 409", "status of 400") as page:
        fact = {"prompt": f"Zebras have {EVIL}", "answer": f"stripes {EVIL}", "subject": "Zebras"}
        made = httpx.post(f"{local}/v1/edits", json={"facts": [fact], "force": True}, timeout=120).json()["id"]
        shows(page, f"#edit-{made}", EVIL)  # by itself: the page follows the journal
        page.locator(f"#edit-{made} .open").click()
        shows(page, f"#details-{made}", f"stripes {EVIL}")
        ask(page, f"Zebras have {EVIL}", re.compile("."))
        page.fill("#new-answer", "spots")
        page.press("#new-answer", "Enter")
        shows(page, "#correct-error", "with another answer: 'spots', not 'stripes")
        assert page.input_value("#new-answer") == "spots", "nothing that was typed is lost"
        assert page.input_value("#prompt") == f"Zebras have {EVIL}"
        page.fill("#as-of", "999")
        page.press("#question", "Enter")
        shows(page, "#ask-error", "edits_as_of: 999; the journal has events 0 to")

        page.fill("#search", "zEBRAS")
        shows(page, "#count", "1 edit found")
        page.fill("#search", "quagga")
        shows(page, "#count", "0 edits found")
        assert page.locator(".edit").count() == 0
        page.press("#search", "Escape")
        shows(page, "#count", f"{len(before) + 1} edit")
        assert page.locator("img, script:not([src])").count() == 0
        assert "run" not in page.title()

        page.set_viewport_size({"width": 390, "height": 800})


@slow
def test_what_breaks_gates_is_forced_and_weights_act_on_all(browser: Any, tmp_path: Path) -> None:
    with (
        serving(tmp_path / "service", "ft-m", "--gate", "guards=1") as address,
        opened(browser, address, "ERR_CONNECTION_REFUSED") as page,
    ):
        page.fill("#prompt", "The capital of Peru is")
        page.fill("#new-answer", "Lima")
        page.press("#new-answer", "Enter")
        shows(page, ".gates", re.compile(r"Breaks \d gates?.*guards 0\.\d\d, at least 1 wanted", re.DOTALL))
        shows(page, "#apply", "Apply nevertheless")
        page.click("#apply")
        shows(page, "#edit-1 .about", "! forced")
        page.click("#again")
        shows(page, "#answered", "Lima")
        shows(page, "#fired", "Its edits change weights and act on all prompts")
        page.fill("#as-of", "0")
        ask(page, "The capital of Peru is", "PPPP")
        shows(page, "#fired", "No edit fired, as of event 0, of the past")
        # A service that is gone is told where the action was, and at the top.
        page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
        page.press("#question", "Enter")
        shows(page, "#ask-error", "the service cannot be reached")


@slow
def test_a_token_is_asked_for(browser: Any, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"read {READER}\nedit {EDITOR}\n")
    with (
        serving(tmp_path / "service", "wise", *LOOSE, tokens=tokens) as address,
        opened(browser, address, "status of 401", "status of 403") as page,
    ):
        shows(page, "#token-why", "The service asks for a token.")
        for token, told in (("no-token-of-theirs", "This token is not one of the service’s."), (READER, "")):
            page.fill("#token", token)
            page.press("#token", "Enter")
            if told:
                shows(page, "#token-why", told)
        shows(page, "#model", "tiny")
        assert not page.is_visible("#token-form")
        ask(page, "Zebras have", re.compile("."))
        page.fill("#new-answer", "q")
        page.press("#new-answer", "Enter")
        shows(page, "#correct-error", "this token may read but not edit")
        page.fill("#token", EDITOR)
        page.press("#token", "Enter")
        page.press("#new-answer", "Enter")
        shows(page, "#seen", "What the edit would do")
        assert page.evaluate("[sessionStorage.length, localStorage.length]") == [1, 0]


@pytest.mark.checkout
def test_the_page_travels_in_the_wheel_and_stays_small() -> None:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "page.*" in document["tool"]["setuptools"]["package-data"]["cl_lab"]
    for name, most in (("page.html", 150), ("page.js", 550), ("page.css", 200), ("page.svg", 10)):
        text = (ROOT / "cl_lab" / name).read_text(encoding="utf-8")
        assert 0 < len(text.splitlines()) <= most
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|style=| on\w+=\"", text)
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), "nothing comes from another host"
