"""The page: well-formed, self-contained, safe against hostile names, and saying what the report says."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from gguf_bytes import gguf, kv_str, tensor
from gguf_edit import Edit

import dsv4tools as dt
from dsv4tools.engines import EngineFinding, Verdict
from dsv4tools.formats.measure import ErrorSums
from dsv4tools.gguf.reader import Finding
from dsv4tools.verify import Behaviour, Fault, Report, TensorCheck
from dsv4tools.verify.charts import safe
from dsv4tools.verify.histograms import error_histogram
from dsv4tools.verify.page import make_page
from dsv4tools.verify.roles import FAMILIES, family_of, place_of

UP, DOWN = "blk.1.ffn_up_exps.weight", "blk.2.ffn_down_exps.weight"
HTML = "{http://www.w3.org/1999/xhtml}"
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = '</title><script>alert(1)</script>"\'&\x00\x1b[31m\u202e\udc80\u2028'


@pytest.fixture(scope="module")
def model(_written, tmp_path_factory):
    """A checkpoint, its GGUF, and one with two swapped experts and a NaN scale. Not to be changed."""
    from conftest import SMALL  # noqa: PLC0415  - the suite's own module

    source = _written(shape=SMALL, seed=0, shards=2, merges_form="strings")
    directory = tmp_path_factory.mktemp("report")
    right = directory / "right.gguf"
    dt.convert(dt.plan(dt.open_checkpoint(source)), right)
    wrong = Edit(right).swap_experts(UP, 1, 3).put(DOWN, b"\x00\x7e", 144).write(directory / "wrong.gguf")
    return source, right, wrong


@pytest.fixture(scope="module")
def wrong_report(model):
    source, _, wrong = model
    return dt.verify(wrong, source=source, deep=True, engines=["llama.cpp"])


@pytest.fixture(scope="module")
def wrong_page(wrong_report):
    return make_page(wrong_report)


def parse(page):
    """The page as XML: a browser forgives what this does not."""
    head, _, rest = page.partition("\n")
    assert head == "<!DOCTYPE html>"
    return ET.fromstring(rest)


def text_of(element):
    return "".join(element.itertext())


def check_harmless(page):
    """Nothing runs, nothing is loaded, whoever wrote the names."""
    root = parse(page)
    names = {e.tag.rpartition("}")[2] for e in root.iter()}
    assert names <= {
        "html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "p", "div", "dl", "dt", "dd", "b",
        "br", "code", "span", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "footer",
        "svg", "g", "rect", "text", "path",
    }  # fmt: skip
    attributes = {name for e in root.iter() for name in e.attrib}
    assert attributes <= {
        "lang", "charset", "name", "content", "http-equiv", "class", "width", "height", "viewBox", "role", "x", "y",
        "rx", "d", "text-anchor", "preserveAspectRatio",
    }  # fmt: skip
    without = page.replace("http://www.w3.org/1999/xhtml", "").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//|url\(|@import|javascript:", without.replace("</", "").replace(" />", ""))
    (policy,) = [e.get("content") for e in root.iter(f"{HTML}meta") if e.get("http-equiv")]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert all(c.isprintable() or c == "\n" for c in page)
    page.encode("utf-8")
    return root


def section(root, title):
    """The elements between one h2 and the next."""
    (main,) = root.iter(f"{HTML}main")
    found, inside = [], False
    for element in main:
        if element.tag in (f"{HTML}h2", f"{HTML}footer"):
            inside = element.text == title
        elif inside:
            found.append(element)
    return found


def test_the_page_of_a_wrong_file(wrong_report, wrong_page):
    root = check_harmless(wrong_page)
    assert not wrong_report.ok
    (title,) = [e.text for e in root.iter(f"{HTML}title") if e.tag == f"{HTML}title"]
    assert title == "wrong.gguf: NOT right"
    (verdict,) = [e for e in root.iter(f"{HTML}div") if "verdict" in e.get("class", "")]
    assert (text_of(verdict), verdict.get("class")) == ("NOT right: 3 errors", "verdict wrong")
    (problems,) = section(root, "What is wrong or odd")
    texts = [text_of(e) for e in problems if e.tag == f"{HTML}li"]
    assert len(texts) == 3
    assert texts[0].startswith(f"{UP} (Q4_K): expert 1: its relative RMSE is 1.4")
    assert "experts 1 and 3: are swapped: each holds the other's data" in texts[0]
    assert texts[1].startswith(f"{DOWN} (Q4_K): expert 0: 256 values are NaN or infinite")
    assert texts[2] == f"{DOWN}: block 1 (expert 0 row 1 column 0): d is NaN"


def test_the_map_has_every_tensor_once(wrong_report, wrong_page):
    _, div, _ = section(parse(wrong_page), "Error map")
    labels, (svg,) = div   # a map of its own for the labels, and one that is scrolled
    assert [text_of(e) for e in labels][:2] == ["token_embd", "output"]
    titles = [t.text for g in svg.iter(f"{SVG}g") for t in g.iter(f"{SVG}title")]
    assert sorted(t.split(" ")[0] for t in titles) == sorted(t.name for t in wrong_report.tensors)
    by_name = {t.split(" ")[0]: t for t in titles}
    check = next(t for t in wrong_report.tensors if t.name == "blk.0.attn_kv.weight")
    assert by_name[check.name] == \
        f"{check.name} (Q8_0): identical, relative RMSE {check.error.relative_rmse:.3g}"
    wrong = [g for g in svg.iter(f"{SVG}g") if any(r.get("class") == "wrongcell" for r in g)]
    assert sorted(next(g.iter(f"{SVG}title")).text.split(" ")[0] for g in wrong) == [UP, DOWN]
    places = [(r.get("x"), r.get("y")) for g in svg.iter(f"{SVG}g") for r in g.iter(f"{SVG}rect")]
    assert len(set(places)) == len(wrong_report.tensors)
    column = {x for x, _ in places}
    assert len(column) == 4      # the model, and three layers


def test_the_tables_have_the_reports_numbers(wrong_report, wrong_page):
    root = parse(wrong_page)
    (details,) = section(root, "Tensors, worst first")
    rows = [[text_of(c) for c in row] for row in details.iter(f"{HTML}tr")][1:]
    assert [r[0] for r in rows] == [t.name for t in wrong_report.worst_first()]
    assert {r[0] for r in rows[:2]} == {UP, DOWN}
    for row, t in zip(rows, wrong_report.worst_first(), strict=True):
        expected = [t.name, t.format, t.judgement, f"{t.bits_per_weight:.4g}"]
        expected += [f"{t.error.relative_rmse:.3g}", f"{t.own.relative_rmse:.3g}"] if t.error else ["", ""]
        assert row[:6] == expected
    (details,) = section(root, "Blocks and values")
    rows = [[text_of(c) for c in row] for row in details.iter(f"{HTML}tr")][1:]
    assert [(r[0], r[1]) for r in rows] == [(d.name, d.format) for d in wrong_report.depth]
    assert [r[3] for r in rows] == [f"{d.values.highest:.4g}" if d.values else "" for d in wrong_report.depth]


def test_sizes(wrong_page):
    div, legend = section(parse(wrong_page), "Sizes by role")
    titles = [t.text for t in div.iter(f"{SVG}title")]
    assert any(t.startswith("routed experts, Q4_K: 1.33 MB (1.27 MiB)") for t in titles)
    assert {t.split(", ")[0] for t in titles} == set(FAMILIES) - {"other"}
    assert {text_of(e) for e in legend} == {"F16", "Q8_0", "Q4_K", "F32", "I32"}


def test_engines(wrong_report, wrong_page):
    (div,) = section(parse(wrong_page), "Engines")
    rows = [[text_of(c) for c in row] for row in div.iter(f"{HTML}tr")][1:]
    assert [r[0] for r in rows] == [v.engine for v in wrong_report.engines]
    assert dict((r[0], r[2]) for r in rows)["llama.cpp"] == "loads and computes"  # noqa: C402  - reads as it is
    assert "refuses" in {r[2] for r in rows}


def test_histograms(wrong_page, wrong_report):
    root = parse(wrong_page)
    (charts,) = section(root, "Relative RMSE by type")
    titles = [e.text for e in charts.iter(f"{HTML}h3")]
    assert "Q4_K: 36 experts and matrices" in titles
    chart = charts[titles.index("Q4_K: 36 experts and matrices")]
    counts = [int(t.text.split(" ")[0]) for t in chart.iter(f"{SVG}title")]
    assert sum(counts) == 35      # the expert with NaN has no error to count
    assert len(section(root, "Magnitudes by type")) == 2


def test_bars_of_a_histogram():
    assert error_histogram([]) is None
    assert error_histogram([0.0, float("inf")]) is None
    bars = error_histogram([0.01] * 5)
    assert sum(bars.counts) == 5
    bars = error_histogram([0.001, 0.1, 0.1, 0.0])
    assert (bars.counts[0], bars.counts[-1], sum(bars.counts)) == (1, 2, 3)
    assert len(bars.labels) == len(bars.titles) == len(bars.counts) == 40


# -------------------------------------------------------------------------------------------------- other reports


def test_the_page_of_a_right_file(model):
    source, right, _ = model
    report = dt.verify(right, source=source)
    root = check_harmless(make_page(report))
    (verdict,) = [e for e in root.iter(f"{HTML}div") if "verdict" in e.get("class", "")]
    assert (text_of(verdict), verdict.get("class")) == ("right", "verdict right")
    assert section(root, "What is wrong or odd") == []
    facts = dict(zip((text_of(e) for e in root.iter(f"{HTML}dt")), (text_of(e) for e in root.iter(f"{HTML}dd")),
                     strict=True))  # fmt: skip
    assert facts["Source"] == "92 tensors compared: 92 byte-identical"
    assert (facts["Structure"], facts["Blocks"], facts["Manifest"]) == ("in order", "not scanned", "not checked")
    assert make_page(report) == make_page(dt.verify(right, source=source, threads=7))


def test_pages_of_less_and_of_more(model, tmp_path):
    source, right, wrong = model
    header = check_harmless(make_page(dt.verify(right)))
    assert section(header, "Error map") == section(header, "Magnitudes") == []
    assert section(header, "Sizes by role")
    deep = check_harmless(make_page(dt.verify(wrong, deep=True)))
    _, div, _ = section(deep, "Magnitudes")
    assert sum(r.get("class") == "wrongcell" for r in div.iter(f"{SVG}rect")) == 1
    broken = tmp_path / "x.gguf"
    broken.write_bytes(b"GGUF")
    assert "NOT right" in text_of(check_harmless(make_page(dt.verify(broken, source=source))))
    check_harmless(make_page(Report(Path("nothing"))))
    sampled = check_harmless(make_page(dt.verify(right, source=source, sample=2)))
    assert "(a sample of 2 % of each)" in text_of(sampled)


def test_predictions_on_the_page():
    behaviour = Behaviour(4, 90, 0.25, 1.5, 0.875, 12.0, 13.0, 3, 0.1)
    root = check_harmless(make_page(Report(Path("x"), behaviour=behaviour)))
    text = text_of(section(root, "Predictions beside the source")[0])
    assert "0.25 nats; above the 0.1 allowed" in text
    assert "87.5% of 90 positions in 4 prompts" in text
    assert "layer 3 is the first" in text
    assert "the mean KL divergence is 0.25 nats, allowed are 0.1" in text_of(root)


# ---------------------------------------------------------------------------------------------------- hostile names


def test_hostile_names_everywhere():
    finding = EngineFinding("refuse", HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    error = ErrorSums(1, 1, 1, 1, 1, 1, 0)
    check = TensorCheck(HOSTILE, HOSTILE, 1, 1, 1, "wrong", HOSTILE, 1, 1, 1, HOSTILE, error, error, 1, (1.0,),
                        (Fault(HOSTILE, HOSTILE),))
    report = Report(Path(HOSTILE.replace("/", "_").replace("\x00", "")), findings=[
        Finding("error", HOSTILE, HOSTILE, HOSTILE, 7), Finding("warning", HOSTILE, HOSTILE, HOSTILE, None)],
        tensors=[check, replace(check, name=f"blk.1.{HOSTILE}"), replace(check, name="blk.999999999.x")],
        engines=[Verdict(HOSTILE, HOSTILE, HOSTILE, (finding,))], deciding=(HOSTILE,))  # fmt: skip
    check_harmless(make_page(report))


def test_a_hostile_file(tmp_path, dsv4tools):
    path = tmp_path / "hostile.gguf"
    name = b"blk.3.</svg><img src=x onerror=alert(1)>.weight"
    path.write_bytes(gguf([kv_str("general.architecture", "<b>")], [tensor(name, (8,))], bytes(32)))
    page = tmp_path / "page.html"
    assert dsv4tools("verify", path, "--deep", "--report", page).code == 0
    text = page.read_text("utf-8")
    check_harmless(text)
    assert "&lt;img src=x onerror=alert(1)&gt;" in text


def test_what_is_safe():
    assert safe('<a href="x">&\'') == "&lt;a href=&quot;x&quot;&gt;&amp;&#x27;"
    assert safe("a\nb\x00\u202e\udcff") == "a\\x0ab\\x00\\u202e\\udcff"
    assert safe("日本 é") == "日本 é"


# -------------------------------------------------------------------------------------------------------- the option


def test_the_option_writes_the_page(model, tmp_path, dsv4tools):
    source, right, wrong = model
    page = tmp_path / "r.html"
    ended = dsv4tools("verify", wrong, "--source", source, "--report", page, "--engine", "none")
    assert ended.code == 5      # a page is written of wrong files above all
    assert f"wrote {page}\n" in ended.out
    check_harmless(page.read_text("utf-8"))
    assert "exists; --overwrite replaces it" in dsv4tools("verify", right, "--report", page).failed(2)
    assert dsv4tools("verify", right, "--report", page, "--overwrite", "--json").data["ok"]
    assert "NOT right" not in page.read_text("utf-8").split("</title>")[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html"]


def test_a_page_never_replaces_what_is_read(model, tmp_path, dsv4tools):
    source, right, _ = model
    manifest = tmp_path / "m"
    manifest.write_text("x")
    shard = next(source.glob("*.safetensors"))
    for page in (right, shard, manifest):
        before = page.read_bytes()
        ended = dsv4tools("verify", right, "--source", source, "--manifest", manifest, "--report", page, "--overwrite")
        assert ended.code == 2
        assert page.read_bytes() == before
    assert "lies in the source directory" in dsv4tools(
        "verify", right, "--source", source, "--report", source / "r.html").failed(2)
    assert "is no directory" in dsv4tools("verify", right, "--report", tmp_path / "no" / "r.html").failed(4)


# ------------------------------------------------------------------------------------------------------------- roles


@pytest.mark.parametrize(("name", "place", "family"), [
    ("blk.12.ffn_up_exps.weight", (12, "ffn_up_exps"), "routed experts"),
    ("blk.0.ffn_down_shexp.weight", (0, "ffn_down_shexp"), "shared expert"),
    ("blk.0.exp_probs_b.bias", (0, "exp_probs_b.bias"), "router"),
    ("blk.0.ffn_gate_tid2eid.weight", (0, "ffn_gate_tid2eid"), "router"),
    ("token_embd.weight", (None, "token_embd"), "embedding and output"),
    ("output.weight", (None, "output"), "embedding and output"),
    ("output_norm.weight", (None, "output_norm"), "norms"),
    ("output_hc_fn.weight", (None, "output_hc_fn"), "hyper-connections"),
    ("blk.2.hc_attn_base.weight", (2, "hc_attn_base"), "hyper-connections"),
    ("blk.2.indexer_compressor_norm.weight", (2, "indexer_compressor_norm"), "indexer"),
    ("blk.2.attn_compressor_norm.weight", (2, "attn_compressor_norm"), "norms"),
    ("blk.2.attn_output_a.weight", (2, "attn_output_a"), "attention"),
    ("blk.x.attn", (None, "blk.x.attn"), "other"),
    ("", (None, ""), "other"),
])  # fmt: skip
def test_roles(name, place, family):
    assert place_of(name) == place
    assert family_of(name) == family
