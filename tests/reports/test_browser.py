"""Reports as a person opens them: in Chromium, with networking off."""

import shutil

import pytest

from fedlora import plugins
from fedlora.reports import dossier, page, single
from fedlora.reports.comparison import Comparison
from fedlora.run import Run
from fedlora.scenario import parse
from fedlora.simulation import simulate
from tests.contracts import samples

pytestmark = pytest.mark.browser

TASKS = [*plugins.names("tasks"), "causal_lm_of_chats"]
LOOKS = [(width, scheme) for width in (390, 768, 1280) for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium") or shutil.which("google-chrome")
    assert found, "no Chromium: install it, as .ci/run does"
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def file(ten, tmp_path_factory):
    return single.report(ten, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture
def visit(browser, file):
    """Opens a page and makes sure that it draws all and complains of nothing."""
    contexts = []

    def opened(width=1280, scheme="light", file=file, count=11):
        contexts.append(
            context := browser.new_context(
                viewport={"width": width, "height": 900},
                color_scheme=scheme,
                offline=True,
                permissions=["clipboard-read", "clipboard-write"],
            )
        )
        page, said = context.new_page(), []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if request.url != file.as_uri() else None)
        page.goto(file.as_uri())
        figures = page.locator("figure")
        page.wait_for_function("document.querySelectorAll('figure:not([data-drawn])').length === 0", timeout=20000)
        assert count in (None, figures.count()) and said == []
        return page

    yield opened
    for context in contexts:
        context.close()


@pytest.mark.parametrize("width, scheme", LOOKS)
def test_every_plot_is_drawn_and_nothing_overflows(visit, width, scheme):
    page = visit(width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for plot in page.locator(".plot svg").all():
        box = plot.bounding_box()
        assert 250 < box["width"] <= width and box["height"] >= 200
        assert plot.locator("path").count() > 2
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 22, 27)"
    assert dark is (scheme == "dark")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_barrier(visit, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page = visit(scheme=scheme)
    page.locator("summary").first.click()
    found = Axe().run(page).response["violations"]
    assert [(v["id"], [n["html"][:200] for n in v["nodes"]]) for v in found] == []


def test_a_comparison_is_drawn_and_has_no_barrier(visit, ten, copy, tmp_path):
    from axe_playwright_python.sync_playwright import Axe

    other = copy().folder
    text = (other / "scenario.yaml").read_text().replace("use: fedavg_lora", "use: ffa_lora")
    (other / "scenario.yaml").write_text(text)
    page.save(Comparison([ten, Run.open(other)]).html(), tmp_path / "comparison.html")
    for width in (390, 1280):
        shown = visit(width, file=tmp_path / "comparison.html", count=4)
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
    assert [v["id"] for v in Axe().run(shown).response["violations"]] == []


@pytest.mark.parametrize("name", ["sites", "iid"])
def test_a_dossier_fits_and_has_no_barrier(visit, name, tmp_path):
    from axe_playwright_python.sync_playwright import Axe

    file = dossier.dossier(name, tmp_path / "dossier.html")
    for width, scheme in LOOKS:
        shown = visit(width, scheme, file, count=None)
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        assert [v["id"] for v in Axe().run(shown).response["violations"]] == []


@pytest.mark.parametrize("task", TASKS)
def test_each_tasks_report_fits_and_has_no_barrier(visit, task, tmp_path, request):
    from axe_playwright_python.sync_playwright import Axe

    sample = getattr(samples, task)(tmp_path, request.getfixturevalue)
    run = simulate(parse(samples.run_of(task, sample, tmp_path), "every.yaml"), out=tmp_path / "run")
    file = single.report(run)
    for width, scheme in LOOKS:
        shown = visit(width, scheme, file, count=None)
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
    assert [v["id"] for v in Axe().run(shown).response["violations"]] == []
    words = shown.locator("main").inner_text()
    assert run.metric in words.lower() and "LABEL_" not in words


def test_colours_follow_the_scheme_and_paper(visit):
    ink = "getComputedStyle(document.querySelector('.plot svg .role-axis-label text')).fill"
    light, dark = visit().evaluate(ink), visit(scheme="dark").evaluate(ink)
    page = visit(scheme="dark")
    page.emulate_media(media="print")
    assert light == page.evaluate(ink) == "rgb(86, 94, 108)" and dark == "rgb(164, 172, 185)"
    assert not page.locator("button").first.is_visible()


def test_by_keyboard_alone_figures_are_copied_and_read_as_a_table(visit, ten):
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Copy as CSV"
    page.keyboard.press("Enter")
    page.get_by_text("Copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()").splitlines()
    assert copied[0] == "round,megabytes,accuracy,loss,commonest label" and len(copied) == 1 + len(ten.rounds)
    assert float(copied[-1].split(",")[2]) == ten.summary["accuracy"]
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("figure table").wait_for()
    assert page.locator("figure table tr").count() == 1 + len(ten.rounds)


def test_a_pointer_shows_the_figures(visit):
    page = visit()
    mark = page.locator("#figure-1 svg .mark-symbol.role-mark path").last  # and none of the legend
    mark.scroll_into_view_if_needed()
    mark.hover(force=True)
    shown = page.locator("#vg-tooltip-element")
    shown.wait_for(state="visible")
    assert "accuracy" in shown.inner_text() and "round" in shown.inner_text()


def test_it_prints_on_whole_pages(visit, tmp_path):
    visit().pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF") and (
        tmp_path / "report.pdf"
    ).stat().st_size > 20000
