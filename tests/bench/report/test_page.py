"""The report's page: what it says, that submitted text stays text, and how it behaves in a real browser."""

import dataclasses
import html
import itertools
import json
import re

import pytest

from bench.errors import UserError
from bench.report import page, plots
from bench.report.page import Exhibits, Landscape, Picture
from bench.report.record import SCENARIO, Header, Record, Run
from bench.report.utility import Utility

EVIL = "<script>window.pwned=1</script><img src=x onerror='window.pwned=2'>\"'&--></script>"
FOUND = {"success": True, "label_error": 1e-7, "label_l1": 1e-7, "top1": 1.0, "private_top1": 1.0}
MISSED = {"success": False, "label_error": 0.4, "label_l1": 0.8, "top1": 0.0, "private_top1": 0.0}
AXES = {"dataset": "mnist5k", "model": "fcn(bias=False)", "weights": "untrained", "weight_seed": 0,
        "batch_norm": "eval", "members": "held_out", "batch_size": 1, "classes": "turns",
        "protocol": "fedsgd", "defense": "none"}  # fmt: skip
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a4944415478da63680000008200817b"
    "bd2e8d0000000049454e44ae426082"
)


def rows(attack, answers, **given):
    axes = AXES | {name: given.pop(name) for name in list(given) if name in AXES}
    scenario = "/".join(map(str, axes.values())).replace(" ", "")
    shared = {"grid": "tiny", "scenario": scenario, "knowledge": "", "defense_revision": "1",
              "attack_revision": "1", "reason": "", "weights_sha256": "w", "isolated": True}  # fmt: skip
    made = []
    for sample, answer in enumerate(answers):
        named = {"outcome": answer} if isinstance(answer, str) else {"outcome": "ok"} | answer
        values = shared | axes | {"attack": attack, "sample": sample} | named | given
        made.append(Record(trial=f"{abs(hash((attack, scenario, sample))):024x}"[:24], **values))
    return made


def run_of(*cells, title="What is asked?", asked=None) -> Run:
    every = [row for cell in cells for row in cell]
    counts, scenarios = {}, {}
    for row in every:
        counts.setdefault(f"{row.scenario} {row.attack}", set()).add(row.sample)
        scenarios[row.scenario] = {name: getattr(row, name) for name in SCENARIO}
    expected = {name: len(samples) for name, samples in counts.items()} | (asked or {})
    return Run((Header("tiny", "a" * 24, title, expected, scenarios),), tuple(map(vars, every)))


def noisy(std, answers):
    return rows("lambda_recovery(search='exact')", answers, defense=f"gradient_noise(std={std})")


@pytest.fixture(scope="module")
def whole() -> str:
    """A page with something in every section."""
    first = rows("lambda_recovery(search='exact')", [FOUND] * 8 + ["crashed"] * 2, knowledge="label_format")
    image = {"mse": 0.001, "psnr": 30.0, "ssim": 0.9}
    run = run_of(
        first,
        rows("idlg", [FOUND] * 3 + [MISSED] * 7),
        rows("bias_closed_form", ["skipped"] * 10, reason="needs a last layer with a bias"),
        rows("random_labels", [MISSED] * 10),
        *(
            noisy(std, [FOUND] * good + [MISSED] * (10 - good))
            for std, good in ((1e-3, 10), (1e-2, 6), (1e-1, 0))
        ),
        rows("fcn_analytic", [FOUND | image] * 4),
        rows(f"evil.py:{EVIL}", [FOUND | {"reason": EVIL}] * 2, dataset=EVIL),
        title=f"Who wins? {EVIL}",
    )
    exhibits = Exhibits(
        (Picture(vars(rows("fcn_analytic", [FOUND | image])[0]), PIXEL, PIXEL, PIXEL),),
        Landscape(
            vars(first[0]), [-9.0, -3.0, -1.0, 1.0, 3.0, 9.0], [3.0, 1.0, 2.0, 3.0, 0.1, 2.0], [-3.0, 3.0],
            3.0, 3.0, 5.0,
        ),
        (f"No images of {EVIL}.",),
    )  # fmt: skip
    accuracies = {"none": 0.95, "gradient_noise(std=0.1)": 0.5, "gradient_noise(std=0.01)": 0.9}
    costs = [
        vars(
            Utility(
                d, "mnist5k", "fcn(bias=False)", 0, d, "1", 300, 32, a, 0.01, 1000, None, 1e-5, 0.01, "2.5"
            )
        )
        for d, a in accuracies.items()
    ]
    manifests = [
        {"attack": f"evil.py:{EVIL}", "title": EVIL, "threat_model": EVIL, "paper": "javascript:alert(1)"}
    ]
    return page.render([run], "runs/tiny", exhibits, costs, None, manifests)


def text_of(shown: str) -> str:
    shown = shown.replace("<wbr>", "")
    body = re.sub(r"<(script|style).*?</\1>", "", shown[shown.index("<body>") :], flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", body)))


def test_every_section_is_there(whole):
    for section in (
        "board-label",
        "board-image",
        "board-defense",
        "heat",
        "pictures",
        "noise",
        "frontier",
        "landscape",
        "threats",
    ):
        assert f'<section id="{section}"' in whole
    text = text_of(whole)
    assert "skipped: needs a last layer with a bias" in text
    assert "lambda_recovery, told label_format" in text
    assert "[49% to 94%]" in text  # Wilson's interval of 8 of 10
    assert "leakbench rerun runs/tiny " in text
    assert "A: eavesdropper" in text
    assert "the true λ is 3, lambda_recovery found 3" in text


def test_a_row_shows_its_n_what_failed_and_what_is_missing():
    run = run_of(rows("idlg", [FOUND, "timeout"]), asked={})
    cell = f"{run.rows[0]['scenario']} idlg"
    run = dataclasses.replace(run, headers=(dataclasses.replace(run.headers[0], cells={cell: 5}),))
    text = text_of(page.render([run], "r", Exhibits()))
    assert "2 of 5" in text
    assert re.search(r"idlg — none \(hard labels\) 2 of 5", text)


def test_submitted_text_stays_text(whole):
    assert "<img src=x" not in whole
    assert "<script>window" not in whole
    assert whole.count("<script") == 2
    assert "javascript:" not in whole
    assert json.loads(re.search(r'data-place="[^"]*">(.*?)</script>', whole, re.DOTALL)[1])["cells"]


def test_the_page_needs_no_network(whole):
    assert not re.search(
        r"""(src|href)=["'](?!data:|#|https://(arxiv|doi|www|github|openreview|eprint))""", whole
    )
    assert "@import" not in whole
    assert "url(" not in whole


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(whole, scheme):
    found = re.findall(r":root \{(.*?)\}", whole, re.DOTALL)[["light", "dark"].index(scheme)]
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]+);", found))

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        low, high = sorted(luminance(colours[name]) for name in (one, other))
        return (high + 0.05) / (low + 0.05)

    for words in ("ink", "soft", "link"):
        assert contrast(words, "paper") >= 4.5  # WCAG 2.1, AA
        assert contrast(words, "panel") >= 4.5
    for series in range(plots.SERIES):
        assert contrast(f"s{series}", "panel") >= 3.0


def test_speed_is_drawn_from_asvs_results(tmp_path):
    (tmp_path / "box").mkdir()
    (tmp_path / "box" / "machine.json").write_text("{}")
    for at, factor in enumerate((1.0, 0.5)):
        said = {"commit_hash": f"{at}bcdef0123", "date": 1000 + at,
                "results": {"solver.Solver.time_solve": [[2.0 * factor, None, 8.0 * factor]],
                            "solver.Solver.track_label_error": [[1e-7]]}}  # fmt: skip
        (tmp_path / "box" / f"{at}-env.json").write_text(json.dumps(said))
    shown = page.render([run_of(rows("idlg", [FOUND]))], "r", Exhibits(), speed=tmp_path)
    assert '<section id="speed"' in shown
    assert "time_solve: 0.50 of the first commit" in shown


def test_a_run_without_records_is_said_in_one_line():
    with pytest.raises(UserError, match="has no records yet"):
        page.render([Run((Header("tiny", "h", "", {}, {}),), ())], "runs/tiny", Exhibits())


def test_an_axis_has_round_ticks():
    assert [name for _, name in plots.Axis("x", 0.0, 1.0, percent=True).ticks()] == [
        "0%", "20%", "40%", "60%", "80%", "100%",
    ]  # fmt: skip
    assert [name for _, name in plots.Axis("x", 1e-4, 10.0, log=True).ticks()] == [
        "10⁻⁴", "0.001", "0.01", "0.1", "1", "10",
    ]  # fmt: skip
    assert plots.Axis("x", 1.0, 100.0, log=True).place(10.0) == pytest.approx(0.5)


def test_the_command_makes_the_page_with_images_and_the_loss(leakbench, tmp_path):
    (tmp_path / "g.toml").write_text(
        'name = "g"\n[[blocks]]\ndataset = "mnist5k"\nmodel = "fcn(depth=2, width=24, bias=False)"\n'
        'defense = ["none", "mixup(low=0.1, high=0.9)"]\nattacks = ["fcn_analytic", "lambda_recovery"]\n'
        "samples = 2\n"
    )
    leakbench("run", "g.toml", "--workers", 0, "--quiet", "--out", "r")
    code, out, _ = leakbench("report", "r")
    assert code == 0
    assert out.startswith("r/report.html: open it in a browser")
    shown = (tmp_path / "r" / "report.html").read_text()
    assert shown.count('<img src="data:image/png;base64,') == 2 * (2 + 3)  # mixup's has the client's own, too
    assert '<section id="landscape"' in shown
    code, out, _ = leakbench("report", "r", "--out", "elsewhere/p.html")
    assert (tmp_path / "elsewhere" / "p.html").exists()
    code, _, err = leakbench("report", "nowhere")
    assert code == 1
    assert "nowhere holds no records.jsonl" in err


# --- in a browser -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(browser, whole, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(whole, encoding="utf-8")
    with browser(path.as_uri()) as opened:
        yield opened


def test_it_loads_without_an_error_a_request_or_a_foreign_script(seen):
    assert seen.run("document.title") == "LeakBench: tiny"
    assert seen.run("window.pwned") is None
    assert seen.complaints == []
    assert [url for url in seen.requests if not url.startswith(("file:", "data:"))] == []


def test_a_foreign_script_would_not_run(seen):
    seen.run("document.body.insertAdjacentHTML('beforeend', `<img src=x onerror='window.pwned = 1'>`)")
    seen.run(
        "const s = document.createElement('script'); s.textContent = 'window.pwned = 2';"
        "document.body.append(s)"
    )
    assert seen.run("new Promise(r => setTimeout(() => r(1), 200)) && window.pwned") is None
    seen.run("document.querySelectorAll('img[src=x], body > script:last-of-type').forEach(e => e.remove())")
    seen.complaints.clear()


def test_columns_sort_by_number_both_ways(seen):
    column = """(() => {
      const table = document.getElementById('table-label');
      const at = [...table.tHead.rows[0].cells].findIndex(head => head.textContent.startsWith('labels'));
      table.tHead.rows[0].cells[at].querySelector('button').click();
      return [table.tHead.rows[0].cells[at].getAttribute('aria-sort'),
              [...table.tBodies[0].rows].map(row => Number(row.cells[at].dataset.sort))];
    })()"""
    way, values = seen.run(column)
    assert way == "ascending"
    assert values == sorted(values)
    way, values = seen.run(column)
    assert way == "descending"
    assert values == sorted(values, reverse=True)


def test_rows_are_filtered_by_words(seen):
    filtered = """(words => {
      const field = document.querySelector('input[type=search]');
      field.value = words;
      field.dispatchEvent(new Event('input'));
      return [...document.getElementById('table-label').tBodies[0].rows].filter(row => !row.hidden)
        .map(row => row.cells[0].textContent);
    })"""
    everything = seen.run(f"{filtered}('')")
    some = seen.run(f"{filtered}('LAMBDA 0.01')")
    assert 0 < len(some) < len(everything)
    assert all("lambda" in name for name in some)
    seen.run(f"{filtered}('')")


def test_a_rows_trials_open_with_the_command_that_runs_them_again(seen):
    seen.run(
        "[...document.querySelectorAll('#table-label tr')].find(r => r.textContent.includes('told'))"
        ".querySelector('button.open').click()"
    )
    assert seen.run("document.getElementById('trials').open")
    lines = seen.run("[...document.querySelectorAll('#trials tbody tr')].map(row => row.textContent)")
    assert len(lines) == 10
    assert "crashed" in lines[0]  # those that failed come first
    assert all(re.search(r"leakbench rerun runs/tiny \w{24}", line) for line in lines)
    seen.run("document.getElementById('close').click()")
    assert not seen.run("document.getElementById('trials').open")


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_itself_never_scrolls_sideways(seen, width):
    seen.resize(width, 800)
    assert seen.run("document.documentElement.scrollWidth") <= width
    seen.resize(1280, 900)


def test_it_is_dark_where_the_reader_wants_it_dark(seen):
    def ground():
        return seen.run("getComputedStyle(document.body).backgroundColor")

    assert ground() == "rgb(255, 255, 255)"
    seen.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert ground() == "rgb(18, 22, 28)"
    seen.call("Emulation.setEmulatedMedia", media="print")
    assert ground() == "rgb(255, 255, 255)"
    seen.call("Emulation.setEmulatedMedia", media="", features=[])


def test_it_can_be_printed(seen):
    assert len(seen.call("Page.printToPDF", printBackground=False)["data"]) > 10_000


def test_everything_that_can_be_used_has_a_name(seen):
    tree = seen.call("Accessibility.getFullAXTree")["nodes"]
    named = {"button", "link", "img", "image", "searchbox", "table", "region", "dialog", "textbox"} - {
        "table"
    }
    nameless = [
        node["role"]["value"]
        for node in tree
        if not node["ignored"] and node["role"]["value"] in named and not node.get("name", {}).get("value")
    ]
    assert nameless == []
    headings = seen.run("[...document.querySelectorAll('h1, h2, h3')].map(h => Number(h.tagName[1]))")
    assert headings[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(headings))
    assert seen.run("document.documentElement.lang") == "en"
    ids = seen.run("[...document.querySelectorAll('[id]')].map(element => element.id)")
    assert len(ids) == len(set(ids))
