"""Opens report.html files in Chromium, from disk, and checks what a reader would see against report.json beside them."""

import argparse
import json
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

WIDTHS = [400, 1400]
# A browser that asks for nothing by itself.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
BAR_FILLS = ["#030303", "#040404", "#050505"]

# Every chart with its box and its number of bars.
CHARTS = """fills => [...document.querySelectorAll('svg[role=img]')].map(svg => {
  const box = svg.getBoundingClientRect();
  const bars = [...svg.querySelectorAll('rect')].filter(rect => fills.includes(rect.getAttribute('fill')));
  const drawn = bars.filter(bar => bar.getBoundingClientRect().height > 0.5 && bar.getBoundingClientRect().width > 0.5);
  const styles = bars.map(bar => getComputedStyle(bar).fill);
  return {id: svg.getAttribute('aria-labelledby').split('-t ')[0], title: svg.querySelector('title').textContent,
          width: box.width, height: box.height, bars: bars.length, drawn: drawn.length, styles: [...new Set(styles)]};
})"""

IMAGES = """() => [...document.images].map(image => {
  const box = image.getBoundingClientRect(), around = image.parentElement.getBoundingClientRect();
  return {alt: image.alt, natural: image.naturalWidth, width: box.width, height: box.height, heat: image.className == 'heat',
          inside: Math.abs(box.width - around.width) < 1 && Math.abs(box.height - around.height) < 1};
})"""

# Pictures are backgrounds, which load without a word and fail without one.
BACKGROUNDS = """async () => {
  const found = [...document.querySelectorAll('.picture')].map(element =>
    getComputedStyle(element, '::before').backgroundImage.match(/^url\\("(data:image\\/[a-z]+;base64,[^"]+)"\\)$/));
  return Promise.all(found.map(async match => {
    if (!match) return 0;
    const image = new Image();
    image.src = match[1];
    return image.decode().then(() => image.naturalWidth, () => 0);
  }));
}"""


def figures(report):
    """Key figures as the page words them, from the JSON alone."""
    errors = [layer["relative_error"] for layer in report["layers"]]

    def scientific(value):
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{mantissa}e{int(exponent)}"

    def size(count):
        for unit in ["B", "KiB", "MiB", "GiB", "TiB"]:
            if count < 1024 or unit == "TiB":
                return f"{count} B" if unit == "B" else f"{count:.2f} {unit}"
            count /= 1024

    found = sum(bool(layer["findings"]) for layer in report["layers"])
    expected = {
        "mean-error": scientific(sum(errors) / len(errors)),
        "worst-error": scientific(max(errors)),
        "findings-count": f"{found} of {len(errors)}",
        "size": f"{size(report['bytes_before'])} → {size(report['bytes_after'])}",
    }
    if report["evaluation"]:
        total = report["evaluation"]["total"]
        expected["score"] = f"{100 * total['score_float']:.2f}% → {100 * total['score_quantized']:.2f}%"
    return expected


def bars(report):
    """How many bars each chart must have."""
    expected = {}
    for layer in report["layers"]:
        name = layer["name"].rsplit(".", 1)[1]
        expected[f"error-{name}"] = expected.get(f"error-{name}", 0) + 1
        if layer["damp"] is not None:
            expected[f"damp-{name}"] = expected.get(f"damp-{name}", 0) + 1
        if layer["importance"] is not None:
            expected[f"mean-{name}"] = expected.get(f"mean-{name}", 0) + 2
    expected["block-seconds"] = len(report["blocks"])
    apart = sum(block["path_error"] is not None for block in report["blocks"])
    if apart:
        expected["path-error"] = apart
    for block in report["blocks"]:
        if block["importance"]:
            expected[f"histogram-{block['block']}"] = 2 * (len(report["importance_edges"]) + 1)
    return expected


def check(browser, path, shots):
    report = json.loads(path.with_name("report.json").read_text())
    wrong = []

    def expect(condition, message):
        if not condition:
            wrong.append(message)

    for scheme, width in [("light", width) for width in WIDTHS] + [("dark", WIDTHS[-1])]:
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        page = context.new_page()
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url[:100]}"))
        page.on(
            "request",
            lambda request: request.url.startswith("data:")
            or request.url == path.as_uri()
            or wrong.append(f"asks for {request.url[:100]}"),
        )
        page.goto(path.as_uri(), wait_until="load")
        at = f"at {width} pixels, {scheme}"

        over = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        expect(over <= 0, f"{at}: the page is {over} pixels too wide")
        expect(page.evaluate("document.scripts.length") == 0, "there is a script")
        expect(page.evaluate("document.compatMode") == "CSS1Compat", "quirks mode")

        charts = {chart["id"]: chart for chart in page.evaluate(CHARTS, BAR_FILLS)}
        for name, count in bars(report).items():
            chart = charts.pop(name, None)
            if chart is None:
                wrong.append(f"no chart {name}")
                continue
            expect(chart["width"] >= 200 and chart["height"] >= 60, f"{at}: {name} has the box {chart}")
            expect(chart["bars"] == count, f"{name}: {chart['bars']} bars for {count} values")
            least = 1 if name.startswith("histogram") else count
            expect(chart["drawn"] >= least, f"{at}: {name}: {chart['drawn']} of {count} bars can be seen")
            expect("rgb(3, 3, 3)" not in chart["styles"], f"{at}: {name}: the style sheet's colours do not reach the bars")
        expect(not [name for name in charts if "scale" not in name], f"charts of nothing: {list(charts)}")

        images = page.evaluate(IMAGES)
        shown = [block for block in report["blocks"] if block["importance"] and block["importance"]["samples"]]
        pictures = [picture for sample in report["samples"] for picture in sample["pictures"]]
        expected = len(shown) * sum(1 + picture["row_ends"] for picture in pictures)
        expect(len(images) == expected, f"{len(images)} images for {expected} in report.json")
        for image in images:
            seen = image["natural"] > 0 and image["width"] >= 4 and image["height"] >= 4 and image["alt"]
            expect(seen, f"{at}: an image cannot be seen: {image}")
            expect(image["inside"] or not image["heat"], f"{at}: a heat map does not cover its picture: {image}")
        backgrounds = page.evaluate(BACKGROUNDS)
        plain = len(pictures) if shown else 0
        expect(len(backgrounds) == len(shown) * len(pictures) + plain, f"{len(backgrounds)} pictures")
        expect(all(backgrounds), f"{at}: pictures are missing")

        for name, text in figures(report).items():
            on_page = page.inner_text(f"#figure-{name}")
            expect(on_page == text, f"{name} is {on_page!r}, report.json says {text!r}")
        for sample in report["samples"] if shown else []:
            titles = [title.strip() for title in page.locator(".sample h3").all_inner_texts()]
            expect(sample["id"].strip() in titles, f"{sample['id']!r} is not among the samples' titles {titles}")
        # The control works without a script.
        if pictures and shown:
            opacity = "getComputedStyle(document.querySelector('.heat')).opacity"
            before = page.evaluate(opacity)
            page.check("#show-heat")
            expect((float(before), page.evaluate(opacity)) == (0.6, "1"), "the control of the heat maps does nothing")
            page.check("#show-both")
        if shots:
            page.screenshot(path=shots / f"{path.parent.name}-{scheme}-{width}.png", full_page=True)
        context.close()
    return list(dict.fromkeys(wrong)), len(bars(report)), len(pictures)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", nargs="+", type=Path, help="report.html files")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--shots", type=Path, help="folder for pictures of the pages")
    options = parser.parse_args()
    if options.shots:
        options.shots.mkdir(parents=True, exist_ok=True)
    failed = False
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.chromium, args=FLAGS)
        for path in options.reports:
            wrong, charts, pictures = check(browser, path.resolve(), options.shots)
            for message in wrong:
                print(f"{path}: {message}", file=sys.stderr)
            failed |= bool(wrong)
            print(f"{path.parent.name}: {charts} charts, {pictures} pictures, {len(wrong)} faults")
        browser.close()
    sys.exit(failed)


main()
