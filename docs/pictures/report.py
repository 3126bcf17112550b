"""The picture of a report, as a browser without a network shows it: python docs/pictures/report.py RUN [PNG]."""

import argparse
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from fedlora.reports import single
from fedlora.run import Run


def main() -> None:
    """Write the report of a run, open it without a network, and keep what is seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("png", nargs="?", default=str(Path(__file__).with_name("report.png")))
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=860, help="0: all of it")
    parser.add_argument("--dark", action="store_true")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = single.write(Run.open(told.run), Path(folder) / "report.html")
        found = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": told.width, "height": told.height or 860},
            color_scheme="dark" if told.dark else "light",
            offline=True,
        )
        page.goto(file.as_uri())
        page.wait_for_function("document.querySelectorAll('figure:not([data-drawn])').length === 0")
        page.screenshot(path=told.png, full_page=not told.height)
        browser.close()


if __name__ == "__main__":
    main()
