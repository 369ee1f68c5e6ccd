"""The page of results, in a browser where there is one: tables, pictures, order; what files hold does no harm."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from result_files import LAYERS, rival, row, write

from benchmarks.report.load import load
from benchmarks.report.page import page

pytest.importorskip("matplotlib")
NAMES = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser")
BROWSER = next((path for path in map(shutil.which, NAMES) if path), None)
in_a_browser = pytest.mark.skipif(BROWSER is None, reason=f"no browser on the path: {', '.join(NAMES)}")
EVIL = "</td><script>document.title='harm'</script><img src=x onerror=\"document.title='harm'\"> gelu float32"
SUITES = {
    "layers": LAYERS,
    "edges": [row("layer 1×8→8 gelu float32", rivals={"fastbp": 4.0}, left_out={EVIL: EVIL}), row(EVIL)],
    "novel & strange": [{"what": EVIL, "kg": 3}],
}
TABLE = "wonder/layers"


class Dom(HTMLParser):
    """The ids, the tables by id as lists of their shown rows' cells, and how their columns are sorted."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.tables, self.sorted, self.text, self.pictures = [], {}, {}, "", {}
        self.rows, self.section, self.column, self.hidden = None, None, 0, False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        if tag == "section":
            self.section, self.hidden = found["id"], "hidden" in found
        elif tag == "svg":
            self.pictures[self.section] = self.pictures.get(self.section, 0) + 1
        elif tag == "table":
            self.rows = self.tables[found["id"]] = []
            self.column = 0
        elif tag == "th":
            self.column += 1
            if "aria-sort" in found:
                self.sorted[self.column] = found["aria-sort"]
        elif tag == "tr" and self.rows is not None:
            self.rows.append([])
            if "hidden" in found:
                self.rows.pop()
                self.rows.append(None)
        elif tag == "td" and self.rows[-1] is not None:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag == "table":
            self.rows[:] = [found for found in self.rows if found]
            self.rows = None

    def handle_data(self, text):
        self.text += text
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += text


def browse(path, *arguments):
    """What the browser prints when it has loaded a page."""
    profile = f"--user-data-dir={path.parent / 'profile'}"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage", profile]
    done = subprocess.run([BROWSER, *flags, *arguments], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    path = folder / "report.html"
    path.write_text(page(load(write(folder / "results", **SUITES))), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def dom(path):
    return Dom(browse(path, "--dump-dom", f"{path.as_uri()}#sort={TABLE}:4:desc&filter=float32"))


@in_a_browser
def test_each_suite_has_its_table_and_its_picture(dom):
    assert list(dom.tables) == [TABLE, "wonder/edges", "wonder/novel-strange"]
    assert dom.pictures == {"wonder/layers/suite": 1, "wonder/edges/suite": 1}
    assert "No roofline: the file lacks flops" in dom.text


@in_a_browser
def test_an_address_sorts_and_filters(dom):
    times = [float(cells[3]) if cells[3] else None for cells in dom.tables[TABLE]]
    known = [time for time in times if time is not None]
    assert known == sorted(known, reverse=True) and known[0] == 20 and known[-1] == 4
    assert times[len(known) :] == [None]  # who was left out has no figure, and stays below
    assert dom.sorted == {4: "descending"}
    assert all("float32" in cells[0] for cells in dom.tables[TABLE]) and len(dom.tables[TABLE]) == 20
    assert re.search(r"\d+ of \d+ rows", dom.text)


@in_a_browser
def test_a_click_on_a_head_sorts_and_a_second_one_turns_the_order(path):
    """A copy clicks by itself: the page lets no other script run."""
    clicks = f"for (const i of [1, 2]) document.getElementById('{TABLE}').querySelectorAll('th button')[4].click();"
    text = re.sub("<meta http-equiv=.*>", "", path.read_text(encoding="utf-8"), count=1)
    copy = path.with_name("clicked.html")
    copy.write_text(text.replace("</body>", f"<script>{clicks} document.title = location.hash</script></body>"))
    found = Dom(browse(copy, "--dump-dom", copy.as_uri()))
    ratios = [float(cells[4]) for cells in found.tables[TABLE] if cells[4]]
    assert ratios == sorted(ratios, reverse=True) and found.sorted == {5: "descending"}
    assert f"#sort={TABLE}:5:desc" in found.text  # the address says it too


@in_a_browser
def test_what_is_drawn_is_not_blank_and_has_its_dark_form(path):
    from matplotlib import image

    for scheme, least, most in ((1, 0.9, 1.0), (0, 0.0, 0.2)):  # Chromium's numbers of light and dark
        picture = path.with_name(f"{scheme}.png")
        shot = (f"--blink-settings=preferredColorScheme={scheme}", "--window-size=600,900", f"--screenshot={picture}")
        browse(path, *shot, path.as_uri())
        pixels = image.imread(picture)[:, :, :3]
        assert least <= pixels[2, 2].mean() <= most and pixels.std() > 0.05


def test_what_files_hold_is_text(path):
    text = path.read_text(encoding="utf-8")
    assert "<script>document" not in text and "<img" not in text and "&lt;img src=x" in text
    assert text.count("<script>") == 1


def test_the_page_needs_nothing_else(path):
    text = path.read_text(encoding="utf-8")
    outside = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert (
        not re.findall(r"(?:src|href)=\"(?!#)[^\"]*", outside)
        and "url(http" not in outside
        and "@import" not in outside
    )
    assert "default-src 'none'" in text


def test_ids_are_there_once_and_every_link_leads_to_one(path):
    text = path.read_text(encoding="utf-8")
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)


def test_every_row_has_its_command(path):
    text = path.read_text(encoding="utf-8")
    command = "python -m benchmarks.run --suite layers --case &#x27;layer 512×8→8 gelu float32&#x27; --mode fwd_bwd"
    assert f'<li id="{TABLE}/2"><code>{command}</code></li>' in text and f'<a href="#{TABLE}/2">' in text


def test_a_figure_that_is_none_is_shown_and_sorts_as_one(tmp_path):
    rows = [row("layer 1×8→8 gelu float32", rivals={"fastbp": rival(4.0, error=float("nan"))})]
    text = page(load(write(tmp_path, layers=rows)))
    assert '<td class="n">NaN</td>' in text
