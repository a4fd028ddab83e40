"""JupyterLab and formgrader, driven as a student and an instructor drive them. Screenshots are kept, to be looked at."""

import re
import shutil
from collections.abc import Iterator

import nbformat
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from autograder.building.build import ROOT, write_instructor_notebook
from autograder.checks.why_peft import EXERCISES
from autograder.sandbox.enclosure import sandbox_problem
from browser import CHROMIUM, SECONDS, NotebookPage, jupyterlab
from test_autograde import look_at

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: make browser"),
    pytest.mark.xdist_group("browser"),  # one server for all
]
UNIT = "01_why_peft"
EXERCISE = EXERCISES["check_count_parameters"]
MISTAKE = "a tied head is counted: it is the embedding's own matrix, not another one"
SCREENSHOTS = ROOT / "report" / "screenshots"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=SECONDS * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium) -> Iterator[Page]:
    """A window as wide as a laptop's; errors that the browser's console shows fail the test.

    What a page asks of the internet is refused, and is an error too.
    """
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(SECONDS * 1000)
    page.route(re.compile(r"^https?://(?!127\.0\.0\.1[:/])"), lambda route: route.abort())
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    yield page
    page.close()
    assert not errors


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """The address of a student's JupyterLab, on a copy of the unit."""
    root, home = tmp_path_factory.mktemp("course"), tmp_path_factory.mktemp("home")
    (root / UNIT).mkdir()
    shutil.copy(ROOT / "course" / UNIT / f"{UNIT}.ipynb", root / UNIT)
    shutil.copy(ROOT / "nbgrader_config.py", root)  # `make lab` starts JupyterLab where it lies
    with jupyterlab(root, home) as address:
        yield address


def test_a_student_fails_reads_why_mends_it_and_passes(page, course):
    notebook = NotebookPage(page, course, f"{UNIT}/{UNIT}.ipynb")
    notebook.run("setup")
    notebook.run("count-parameters")
    expect(notebook.run("check-count-parameters")).to_contain_text("not written yet")

    notebook.write("count-parameters", EXERCISE.source(EXERCISE.mistakes[MISTAKE]))
    notebook.run("count-parameters")
    check = notebook.run("check-count-parameters")
    expect(check.locator(".jp-OutputArea")).to_contain_text(MISTAKE)
    assert "Traceback" not in check.inner_text()
    page.screenshot(path=SCREENSHOTS / "failed_check.png")

    notebook.write("count-parameters", EXERCISE.source({}))
    notebook.run("count-parameters")
    expect(notebook.run("check-count-parameters").locator(".jp-OutputArea")).to_contain_text("passed")
    page.screenshot(path=SCREENSHOTS / "passed_check.png")


def test_a_student_sees_pictures_and_turns_the_calculators_knobs(page, course):
    notebook = NotebookPage(page, course, f"{UNIT}/{UNIT}.ipynb")
    notebook.run("setup")
    families = notebook.run("families = {").locator("img")
    expect(families).to_be_visible()
    assert len(families.get_attribute("alt")) > 40
    page.screenshot(path=SCREENSHOTS / "picture.png")

    calculator = notebook.run("calculator()").locator(".jp-OutputArea").first
    picture = calculator.locator("img")
    expect(picture).to_have_attribute("alt", re.compile("LLaMA-7B, LoRA, .* fits on RTX 4090"))
    calculator.locator("select").first.select_option("LLaMA-65B")
    expect(picture).to_have_attribute("alt", re.compile("LLaMA-65B, LoRA, .* does not fit on RTX 4090"))
    calculator.locator("select").nth(1).select_option("QLoRA")
    calculator.locator("select").last.select_option("H100, 80 GB")
    expect(picture).to_have_attribute("alt", re.compile("LLaMA-65B, QLoRA, .* fits on H100"))
    picture.scroll_into_view_if_needed()
    page.screenshot(path=SCREENSHOTS / "calculator.png")
    page.evaluate("() => window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    expect(page.locator("body[data-jp-theme-light=false]")).to_be_attached()
    page.screenshot(path=SCREENSHOTS / "calculator_dark.png")


def test_a_student_validates_the_notebook(page, course):
    NotebookPage(page, course, f"{UNIT}/{UNIT}.ipynb")
    page.get_by_role("button", name="Validate").click()
    dialog = page.locator(".jp-Dialog")
    expect(dialog).to_contain_text("not written yet")
    page.screenshot(path=SCREENSHOTS / "validate.png")


@pytest.fixture(scope="module")
def office(tmp_path_factory):
    """An instructor's copy of the project, as far as nbgrader sees it: the address of their JupyterLab, and the folder."""
    root, home = tmp_path_factory.mktemp("office"), tmp_path_factory.mktemp("home")
    write_instructor_notebook(UNIT, root / "solutions")
    (root / "exchange").mkdir(mode=0o777)
    own = [f"c.Exchange.root = {str(root / 'exchange')!r}", f"c.ExecuteInSandbox.without_sandbox = {bool(sandbox_problem())}"]
    (root / "nbgrader_config.py").write_text("\n".join([(ROOT / "nbgrader_config.py").read_text(), *own]))
    with jupyterlab(root, home) as address:
        yield address, root


def press(page: Page, icon: str, said: str) -> None:
    """Press one of formgrader's icons, and close the message that it answers with."""
    page.locator(f"tbody .glyphicon-{icon}").click()
    expect(page.locator(".modal.in")).to_contain_text(said)
    page.locator(".modal.in .btn-primary").click()
    expect(page.locator(".modal-backdrop")).to_have_count(0)


def fill(page: Page, field: str, content: str) -> None:
    """Fill in one of formgrader's fields, and wait until it is saved."""
    with page.expect_response(lambda response: "/formgrader/api/" in response.url and response.request.method == "PUT"):
        page.locator(field).fill(content)
        page.locator(field).blur()


def test_an_instructor_generates_grades_overrides_marks_by_rubric_and_gives_feedback(page, office):
    address, root = office
    page.goto(f"{address}/formgrader/manage_assignments")
    press(page, "education", "Successfully created the student version")
    page.screenshot(path=SCREENSHOTS / "formgrader_units.png")

    notebook = nbformat.read(root / "course" / UNIT / f"{UNIT}.ipynb", as_version=4)
    unit = look_at(UNIT)
    (question,) = unit.by_hand
    wrong = {"count-parameters": EXERCISE.source(EXERCISE.mistakes[MISTAKE]), question: "LoRA: 26 GB of weights stay."}
    for cell in notebook.cells:
        cell.source = (unit.solution | wrong).get(cell["id"], cell.source)
    folder = root / "submitted" / "ada" / UNIT
    folder.mkdir(parents=True)
    nbformat.write(notebook, folder / f"{UNIT}.ipynb")
    # Collecting leaves these, and feedback is released by them.
    (folder / "timestamp.txt").write_text("2026-11-25 12:00:00.000000 UTC")
    (folder / "submission_secret.txt").write_text("ada's own")

    page.goto(f"{address}/formgrader/manage_submissions/{UNIT}")
    press(page, "flash", "Successfully autograded")
    full, by_hand = sum(unit.points.values()), unit.by_hand[question]
    lost = unit.points["check-count-parameters"]
    expect(page.locator("tbody .score")).to_have_text(f"{full - lost:g} / {full + by_hand:g}")
    page.screenshot(path=SCREENSHOTS / "formgrader_submissions.png")

    page.goto(f"{address}/formgrader/gradebook/{UNIT}/{UNIT}/")
    page.locator("tbody a").first.click()
    for text in (MISTAKE, "Rubric.", "26 GB of weights stay"):
        expect(page.get_by_role("main")).to_contain_text(text)
    expect(page.locator("input.score#check-count-parameters")).to_have_attribute("placeholder", "0")  # the marks have arrived
    fill(page, "input.score#check-count-parameters", "1")
    fill(page, f"input.score#{question}", "1.5")
    fill(page, f"#{question}-comment", "What of the activations?")
    page.screenshot(path=SCREENSHOTS / "formgrader_marking.png")

    page.goto(f"{address}/formgrader/manage_submissions/{UNIT}")
    expect(page.locator("tbody .score")).to_have_text(f"{full - lost + 2.5:g} / {full + by_hand:g}")
    press(page, "comment", "Successfully generated feedback")
    press(page, "envelope", "Successfully released feedback")

    (released,) = (root / "exchange" / "peft" / "feedback").glob("*.html")
    page.route("**/mathjax/**", lambda route: route.fulfill(body=""))  # a page of feedback asks the internet for it
    page.goto(released.as_uri())
    for text in (MISTAKE, "What of the activations?", f"{full - lost + 2.5:g}"):
        expect(page.locator("body")).to_contain_text(text)
    assert "Rubric." not in page.content()
    # nbgrader's style sheet takes the spaces from tables.
    assert page.locator("th").first.evaluate("cell => parseFloat(getComputedStyle(cell).paddingRight)") > 5
    page.screenshot(path=SCREENSHOTS / "feedback.png")
