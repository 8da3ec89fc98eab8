"""report.html: one file, well-formed, with every figure, in which nothing from a run is more than text."""

import base64
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from laep_jax.report import page_sections
from laep_jax.report.page import page
from laep_jax.report.run_data import read_run

VOID = {"meta", "br", "wbr"}
HOSTILE = "<img src=http://x.y/ onerror=alert(1)>\"'&amp;$\\frac{$--></svg><script>alert(2)</script>"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """Reads a page and fails where tags are not closed in order. texts: by the name of their element."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        assert len({name for name, _ in attrs}) == len(attrs), attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, tag):
        return [text for name, text in self.texts if name == tag]

    def values(self, name):
        return [value for _, attribute, value in self.attributes if attribute == name]


@pytest.fixture(scope="module")
def run(run_dir):
    return read_run(run_dir)


@pytest.fixture(scope="module")
def text(run):
    return page([run])


def hostile_run(make, folder):
    """A run in which every text that it can choose is an attack."""
    run_dir = make(
        folder / f"<b>{HOSTILE[:12]}".replace("/", ""), num_layers=2, num_experts=8, num_steps=60, cut_step=50
    )
    path = run_dir / "metrics.jsonl"
    hostile = json.dumps(HOSTILE)
    lines = [
        line.replace('"forms"', hostile).replace('"reason": "stable"', f'"reason": {hostile}')
        for line in path.read_text().splitlines()
    ]
    start = {"kind": "start", "step": 0, "corpus": HOSTILE, "devices": HOSTILE, "machine": HOSTILE, "time": HOSTILE}
    changed = {"kind": "settings", "step": 60, "changed": [HOSTILE]}
    path.write_text("\n".join([json.dumps(start), *lines, json.dumps(changed)]) + "\n")
    config = json.loads((run_dir / "config.json").read_text())
    config |= {"data": {"path": HOSTILE, HOSTILE: [HOSTILE]}, HOSTILE: {HOSTILE: HOSTILE}}
    (run_dir / "config.json").write_text(json.dumps(config))
    (run_dir / "summary.json").write_text(json.dumps({"init_from": HOSTILE}))
    return run_dir


def assert_one_safe_file(text):
    """No address but within the page, no script but its own, and no name twice."""
    read = Page(text)
    assert {"img", "iframe", "link", "object", "form", "a", "foreignobject"}.isdisjoint(read.tags)
    assert read.tags.count("script") == 1
    assert not [name for _, name, _ in read.attributes if name.startswith("on")]
    for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
        assert all(value.startswith(("#", "data:image/png;base64,")) for value in read.values(name)), name
    styles = [*read.values("style"), *read.values("clip-path"), *read.of("style")]
    assert all(address.startswith("#") for style in styles for address in re.findall(r"url\((.*?)\)", style))
    assert not any("@import" in style for style in styles)
    ids = read.values("id")
    assert len(set(ids)) == len(ids)
    named = {value[1:] for name in ("href", "xlink:href") for value in read.values(name) if value.startswith("#")}
    named |= {name for style in styles for name in re.findall(r"url\(#(.*?)\)", style)}
    assert named <= {*ids}
    return read


def test_the_page_is_well_formed_and_has_every_section_and_figure(text, run):
    read = assert_one_safe_file(text)
    assert read.of("h2") == [*page_sections.SECTIONS]
    labels = [label for tag, name, label in read.attributes if (tag, name) == ("svg", "aria-label")]
    shown = ["tokens of each expert of layer", *["tokens of each expert over", "load of each device"] * 4]
    shown += ["which experts went", "imbalance of the devices", "imbalance of the devices in the layer"]
    shown += ["change of the validation loss", "tokens per second", "peak memory"]
    assert len(labels) == len(shown)
    for label, start in zip(labels, shown, strict=True):
        assert label.startswith(f"small: {start}")
    captions = [data for name, data in read.texts if name == "b"]
    assert captions == ["small"] * len(labels)
    assert text.count("<path") > 100


def test_what_the_run_was_and_did_stands_in_words(text):
    cells = Page(text.replace("<wbr>", "")).of("td")
    for known in ("text files: 3 documents", "cpu (Linux x86_64, 2 CPU cores)", "LaepConfig.alpha", "hybrid"):
        assert known in cells, known
    assert "started on 8 cpu devices: data 1, fsdp 2, expert 4" in cells
    assert "loads stable" in cells
    assert {"forms", "40", "40.0%"} <= {*cells}  # what a domain stood to lose
    assert "The loads were stable after step 180. The plan of step 180 was applied after step 180" in text


def test_colours_are_the_pages_in_light_dark_and_print(text):
    read = Page(text)
    [style] = read.of("style")
    in_use = set(re.findall(r"var\(--(\w+)\)", text))
    assert {"ink", "faint", "blue", "vermillion"} <= in_use
    roots = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(roots) == 3
    for root in roots:
        assert in_use - {"c"} <= set(re.findall(r"--(\w+):", root))
    assert "@media (prefers-color-scheme: dark)" in style
    assert "@media print" in style
    assert not [value for tag, name, value in read.attributes if name == "style" and re.search(r"#[0-9a-f]{6}", value)]


def test_the_policy_lets_the_pages_own_script_run_and_nothing_else(text):
    read = Page(text)
    [script] = read.of("script")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    [policy] = [value for value in read.values("content") if "default-src" in value]
    assert policy.split("; ") == [
        "default-src 'none'",
        "style-src 'unsafe-inline'",
        "img-src data:",
        f"script-src 'sha256-{digest}'",
    ]


def test_a_hostile_text_is_shown_and_does_nothing(make, tmp_path):
    run = read_run(hostile_run(make, tmp_path))
    text = page([run, run])
    read = assert_one_safe_file(text)
    assert read.of("title") == [f"{run.name} and {run.name}"]
    cells = [cell for _, cell in Page(text.replace("<wbr>", "")).texts]
    assert cells.count(HOSTILE) >= 8  # corpus, machine, domain, setting and its value, ...
    assert any(HOSTILE[:19] in label for label in read.of("text"))  # the domain's name in a figure


def test_a_name_that_is_no_unicode_is_escaped(run):
    assert "caf\\udce9" in page([dataclasses.replace(run, name="caf\udce9")]).encode().decode()


def test_a_run_without_a_prune_and_one_that_measured_nothing(unpruned_dir, tmp_path):
    text = page([read_run(unpruned_dir)])
    assert "Nothing is pruned" in text
    assert "pruned expert" not in text
    bare = shutil.copytree(unpruned_dir, tmp_path / "bare")
    lines = (bare / "metrics.jsonl").read_text().splitlines()
    kept = [{name: json.loads(line)[name] for name in ("kind", "step", "loss")} for line in lines if '"train"' in line]
    (bare / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    text = page([read_run(bare)])
    assert_one_safe_file(text)
    for missing in (
        "no plan was applied",
        "not recorded by the version",
        "no validation loss by domain yet",
        "peak memory (GiB) is not recorded",
        "none are recorded",
    ):
        assert missing in text


def test_two_runs_stand_side_by_side_with_what_differs(run, unpruned_dir):
    other = read_run(unpruned_dir)
    read = assert_one_safe_file(page([run, other]))
    assert read.of("h1") == ["small and unpruned"]
    assert {"small", "unpruned"} == {*read.of("b")} - {"small and unpruned"}
    cells = read.of("td")
    at = cells.index("TrainConfig.")  # num_steps is broken behind a wbr
    assert cells[at : at + 4] == ["TrainConfig.", "num_", "steps", "300"]
    assert cells[at + 4] == "60"


def test_a_page_of_many_layers_and_experts_stays_small(make, tmp_path):
    run = read_run(make(tmp_path / "wide", num_layers=40, num_experts=256, num_steps=120, cut_step=90, devices=8))
    text = page([run])
    assert len(text) < 3_000_000
    options = [value for tag, name, value in Page(text).attributes if (tag, name) == ("option", "value")]
    assert 8 <= len(options) <= 9
    assert "are in this file" in text


def test_a_long_list_of_events_ends_and_says_so(run):
    event = {"kind": "skipped", "step": 7, "loss": None, "grad_norm": 2.0}
    cells = Page(page([dataclasses.replace(run, events=(event,) * 100)]))
    assert cells.of("td").count("step skipped, not finite: loss –, gradient norm 2") == 40
    assert "60 more are in metrics.jsonl." in cells.of("p")


def test_the_page_renews_itself_only_where_it_is_followed(run, text):
    assert 'http-equiv="refresh"' not in text
    assert 'http-equiv="refresh"' in page([run], refresh=True)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH")
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_one_layer_and_draws_it(text, tmp_path, width):
    (tmp_path / "report.html").write_text(text)
    address = (tmp_path / "report.html").as_uri()
    browser = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    done = subprocess.run([*browser, "--dump-dom", f"{address}#layer-2"], capture_output=True, text=True, timeout=120)
    figures = re.findall(r'<figure data-layer="(\d+)"( hidden="")?>', done.stdout)
    assert {(layer, bool(hidden)) for layer, hidden in figures} == {(str(i), i != 2) for i in range(4)}
    picture = tmp_path / "report.png"
    subprocess.run([*browser, f"--screenshot={picture}", address], capture_output=True, timeout=120, check=True)
    assert picture.read_bytes().startswith(b"\x89PNG")
