"""report.html in a real Chromium, where there is one and playwright: it can be clicked, sorted and read, and runs no name."""

import shutil

import pytest

from finetune.page.write import write_page
from pages import HOSTILE, images_named, predictions_of, write_finished_run

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=["few classes", "many classes", "several labels"])
def page_file(request, tmp_path_factory):
    """A page with hostile names of classes and files."""
    folder = tmp_path_factory.mktemp("page")
    classes, changes = 30 if request.param == "many classes" else 8, {}
    logits, labels = predictions_of(classes, 240)
    if request.param == "several labels":
        labels = (predictions_of(classes, 240, seed=1)[0] > 1).float()
        changes = {"loss": "multi_label", "metric": "mean_average_precision"}
    names = [HOSTILE[i % 8] + " " * (i // 8) for i in range(classes)]
    run = write_finished_run(folder / "run", logits, labels, names, changes)
    files = images_named([f"{HOSTILE[i % 8]}/{i}{HOSTILE[(i + 3) % 8]}.jpg" for i in range(240)])
    return write_page(run, files, [("use", HOSTILE[1])])


@pytest.fixture
def page(browser, page_file):
    """The page, opened; nothing may have been said on the console or asked of anyone in the end, and no name may have run."""
    page, said = browser.new_page(viewport={"width": 1400, "height": 900}), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith(("data:", "file:")) else None)
    page.goto(page_file.as_uri())
    title = page.title()
    yield page
    assert not said and page.title() == title and title.startswith("mine on photos")
    page.close()


def test_a_click_shows_the_images(page):
    """The dialog names the cell or the class and has as many images as it says; Escape closes it, focus goes back."""
    for button in (page.locator("[data-group]"), page.locator("[data-class]")):
        if not button.count():  # several labels have no confusion matrix
            continue
        button.first.focus()
        page.keyboard.press("Enter")
        assert page.locator("dialog").is_visible()
        number = button.first.get_attribute("data-class")
        if number:  # of a cell: the test below
            mistakes = f"data.groups.filter(([a, b]) => a !== b && (a === {number} || b === {number}))"
            assert page.locator("dialog figure").count() == page.evaluate(f"{mistakes}.flatMap((group) => group[3]).length")
        sections = page.locator("dialog h2 small, dialog h3 small").all_inner_texts()
        assert sum(int(text.split()[0].replace(",", "")) for text in sections) == page.locator("dialog figure").count() > 0
        assert page.evaluate("[...document.querySelectorAll('dialog img')].every(one => one.naturalWidth > 0)")
        assert page.locator("dialog img").count() == page.locator("dialog figure").count()
        assert page.evaluate("document.querySelector('dialog').scrollWidth <= document.querySelector('dialog').clientWidth")
        page.keyboard.press("Escape")
        assert not page.locator("dialog").is_visible()
        assert page.evaluate("document.activeElement.matches('[data-group], [data-class]')")


def test_a_cell_shows_its_own_images(page):
    """Each figure of a cell's dialog is in the group that the cell names, in its order."""
    button = page.locator("[data-group]").first
    if not button.count():
        pytest.skip("several labels have no confusion matrix")
    number = int(button.get_attribute("data-group"))
    button.click()
    expected = page.evaluate(f"data.groups[{number}][3].map(([image]) => data.images[image][0])")
    assert page.locator("dialog .file").all_text_contents() == expected
    page.mouse.click(5, 5)  # beside it
    assert not page.locator("dialog").is_visible()


def test_tables_sort_by_click_and_by_keyboard(page):
    """A heading sorts its column, a second time the other way round, and aria-sort says how."""
    headings = page.locator("#class-table thead th")
    for column in range(headings.count()):
        heading = headings.nth(column)
        heading.locator("button").click()
        orders = [heading.get_attribute("aria-sort")]
        cells = page.locator(f"#class-table tbody tr > :nth-child({column + 1})")
        values = [cells.evaluate_all("all => all.map(one => one.dataset.value ?? one.textContent)")]
        page.keyboard.press("Enter")
        orders.append(heading.get_attribute("aria-sort"))
        values.append(cells.evaluate_all("all => all.map(one => one.dataset.value ?? one.textContent)"))
        assert set(orders) == {"ascending", "descending"} and page.locator("#class-table [aria-sort]").count() == 1
        if column:
            numbers = {order: list(map(float, found)) for order, found in zip(orders, values, strict=True)}
            assert numbers["ascending"] == sorted(numbers["ascending"])
            assert numbers["descending"] == sorted(numbers["descending"], reverse=True)
        else:
            assert sorted(values[0]) == sorted(values[1]) and (values[0] != values[1])


@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_every_screen(page, width, scheme):
    """Nothing goes beyond the window's width, and text stands out from what is behind it (WCAG AA, 4.5 to 1)."""
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    contrast = """() => {
        const light = (text) => {
            const part = text.match(/[\\d.]+/g).slice(0, 3).map((one) => one / 255);
            const [r, g, b] = part.map((one) => one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const paper = light(getComputedStyle(document.body).backgroundColor);
        const of = (selector) => light(getComputedStyle(document.querySelector(selector)).color);
        return ["body", ".about", ".note", "a", ".wrong bdi", ".right bdi", ".file"]
            .filter((selector) => document.querySelector(selector))
            .map((selector) => (Math.max(of(selector), paper) + 0.05) / (Math.min(of(selector), paper) + 0.05));
    }"""
    assert min(page.evaluate(contrast)) >= 4.5


def test_it_prints_on_white(page):
    """On paper it is light, whatever the screen is, all of a table is there, and it is no wider than A4 between its margins."""
    page.set_viewport_size({"width": 700, "height": 900})
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("document.documentElement.scrollWidth") <= 700 and not page.locator("nav").is_visible()
    assert page.evaluate("[...document.querySelectorAll('.tall')].every(one => one.scrollHeight <= one.clientHeight + 1)")


def test_a_class_is_found_by_its_name(page):
    """What is typed leaves the rows whose name has it; the field is there for many classes alone."""
    field = page.locator("input[type=search]")
    if not field.count():
        assert page.locator("#class-table tbody tr").count() <= 20
        return
    field.fill("ONERROR")
    shown = page.locator("#class-table tbody tr:visible")
    assert shown.count() == 4 and all("onerror" in text for text in shown.all_inner_texts())
