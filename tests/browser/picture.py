"""Makes the picture of a report that README shows, out of its report.html.

    python tests/browser/picture.py target/tiny-w3/report.html docs/report.png
"""

import argparse
import io
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH = 1200
# Left of the page are the key figures but time, the errors of four projections, and one picture with the importance in two blocks.
# Nothing is moved.
HIDDEN = """
nav, footer, main > section:not(#layers, #samples), .figures > div:has(#figure-seconds),
#layers > .charts ~ *, #layers .chart:nth-child(n + 5),
#samples > p, #samples > .show, #samples > article ~ article, #samples .block:not(:nth-of-type(1), :nth-of-type(2), :nth-of-type(4)) {
  display: none;
}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="a report.html")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    options = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 100}, color_scheme="light")
        page.goto(options.report.resolve().as_uri(), wait_until="load")
        page.add_style_tag(content=HIDDEN)
        shot = page.screenshot(full_page=True)
        browser.close()
    # A third of the bytes, for some bands in the picture's ground. Of Pillow's methods this one keeps the ends of the scale.
    colours = Image.open(io.BytesIO(shot)).convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=10)
    colours.save(options.picture, "PNG", optimize=True)


main()
