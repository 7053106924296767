"""The report: what the page says and draws, in a headless Chromium where there is one; nothing from outside."""

import base64
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from lplb import Placement, scenes
from lplb.simulate import Setting, Simulation, simulate

pytest.importorskip("plotly", reason="needs plotly: pip install lplb[report]")

from lplb.simulate import report, results

BATCHES, LAYERS = 40, 3
HOSTILE = """</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">'"&amp;%%DATA%%<b>"""
HOSTILE_PHASE = '<a href="https://example.com/x">here</a><b>'


@pytest.fixture(scope="module")
def simulations():
    counts = scenes.trace(2).counts[:BATCHES, :LAYERS]
    configurations = [(8, "none", "lp"), (8, "eplb", "even"), (8, "eplb", "lp"), (32, "none", "lp"), (32, "eplb", "lp")]
    return [
        simulate(counts, n_ranks=n, policy=policy, split=split, n_nodes=2, expert_bytes=1000, refresh=8)
        for n, policy, split in configurations
    ]


@pytest.fixture(scope="module")
def phase():
    return ["first"] * 20 + [HOSTILE_PHASE] * 20


class Text(HTMLParser):
    """Text of elements by id, and the tags of the page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], {}, []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [value for _, value in attrs if value]
        self._open.append((tag, dict(attrs).get("id")))

    def handle_endtag(self, tag):
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        for tag, name in self._open:
            for key in (tag, name):
                self.text[key] = self.text.get(key, "") + data


# ---- without a browser


def test_headline_and_table_say_the_numbers(simulations, phase):
    page = Text(report.page(simulations, phase, "loads", "a model"))
    none, best = simulations[3].summary, simulations[4].summary
    headline = page.text["headline"]
    assert f"{none.imbalance_mean:.2f}×" in headline
    assert f"eplb / lp {best.imbalance_mean:.2f}×" in headline
    assert f"below {best.bound_mean:.2f}×" in headline
    for s in simulations:
        assert s.setting.name + "".join(results.cells(s)) in page.text["tbody"]


def seconds(of):
    return lambda quota, _: np.full(len(quota), of)


@pytest.fixture(scope="module")
def slower():
    """A pair of which the balanced one is the slower."""
    counts = scenes.trace(2).counts[:BATCHES, :LAYERS]
    options = {"n_ranks": 8, "n_nodes": 2, "refresh": 8, "expert_bytes": 1000}
    return [
        simulate(counts, policy="none", layer_seconds=seconds(62e-6), **options),
        simulate(counts, policy="eplb", layer_seconds=seconds(162e-6), **options),
    ]


def test_best_of_each_column_is_marked(slower, phase):
    page = report.page(slower, phase, "loads", "a model", remark="Not <the> fastest.")
    rows = re.findall(r"<tr data-row=.*?</tr>", page)
    best = [re.findall(r"<td class=best>(.*?)</td>", row) for row in rows]
    assert best == [["62 µs"], [f"{slower[1].summary.imbalance_mean:.3f}"]]
    assert Text(page).text["headline"].endswith("Not <the> fastest.")


def test_names_are_data(simulations, phase):
    plain, hostile = (Text(report.page(simulations, phase, name, name)) for name in ("loads", HOSTILE))
    assert hostile.tags == plain.tags  # no element more, none less
    assert hostile.text["h1"].startswith(HOSTILE)
    assert hostile.text["title"].endswith(HOSTILE)
    assert "example.com" not in " ".join(hostile.attributes)


def test_nothing_is_fetched(simulations, phase):
    page = report.page(simulations, phase, "loads", "a model")
    assert "default-src 'none'" in page
    head = page[: page.index("<script>")]
    assert not re.findall(r"(?:src|href)=\"(?!data:)", head)
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"'](?!data:)", page)


def fake(n_batches, n_layers, n_ranks, seed, n_refreshes=60, policy="eplb"):
    """A simulation of random loads that nobody solved."""
    rng = np.random.default_rng(seed)
    load = rng.integers(1, 1000, (n_batches, n_layers, n_ranks))
    setting = Setting(policy, "lp", n_ranks, n_ranks, 3 * n_ranks, 64, 1, 16, 32, "ipm")
    shape = n_batches, n_layers
    slots = (np.arange(n_ranks)[:, None] + np.arange(3)) % n_ranks
    placement = Placement(slots.ravel(), n_ranks)
    placed_at = np.linspace(5, 5 + n_batches - 1, n_refreshes).astype(int).tolist()
    zeros = np.zeros((n_refreshes, n_layers), dtype=np.int64)
    some = rng.integers(1, 8, shape).astype(np.int32), rng.random(shape) * 1e-4, np.ones(shape, dtype=bool)
    placements = [[placement] * n_layers] * n_refreshes
    return Simulation(setting, 5, load, load.mean(-1), *some, None, None, placed_at, zeros, 0, placements)


def unpacked(text):
    return np.frombuffer(base64.b64decode(text), "<u2")


def test_columns_are_means_of_batches():
    s = fake(500, 2, 6, 1)
    data = report._data([s], ["x"] * 505, s)
    step = data["step"]
    assert len(data["columns"]) <= report.MOST_COLUMNS < 500 <= len(data["columns"]) * step
    ratio = s.rank_load / s.rank_load.mean(-1, keepdims=True)
    for i, layer in enumerate(data["layers"]):
        got = data["simulations"][0]
        heat = unpacked(got["heat"][i]).reshape(-1, 6) / report.CELL_SCALE
        for c in range(len(heat)):
            batches = slice(c * step, (c + 1) * step)
            assert np.allclose(heat[c], ratio[batches, layer].mean(0), atol=0.6 / report.CELL_SCALE)
            assert got["mean"][i][c] == pytest.approx(ratio[batches, layer].max(-1).mean(), abs=1e-4)
            assert got["worst"][i][c] == pytest.approx(ratio[batches, layer].max(), abs=1e-4)
            assert data["columns"][c] == 5 + np.arange(500)[batches].mean()
    assert f"the mean of {step} batches" in data["sampling"]


def test_short_runs_are_not_sampled():
    s = fake(100, 2, 6, 1, n_refreshes=4)
    data = report._data([s], ["x"] * 105, s)
    assert (data["step"], data["columns"]) == (1, list(range(5, 105)))
    assert data["sampling"] == "Numbers in text and table are of all batches and layers."


@pytest.mark.parametrize(("n_layers", "n_simulations"), [(4, 10), (60, 8)])
def test_pages_are_bounded(n_layers, n_simulations):
    one = fake(1000, n_layers, 320, 2)
    page = report.page([one] * n_simulations, ["x"] * 1005, "big", "none")
    assert len(page) - len(report.get_plotlyjs()) < 8e6
    data = report._data([one] * n_simulations, ["x"] * 1005, one)
    assert len(data["columns"]) >= report.FEWEST_COLUMNS
    assert ("layers the" in data["sampling"]) == (n_layers == 60)
    worst = one.imbalance.mean(0)
    left_out = set(range(n_layers)) - set(data["layers"])
    assert all(worst[layer] <= worst[data["layers"]].min() for layer in left_out)


def test_one_simulation_is_enough(simulations, phase):
    page = Text(report.page(simulations[:1], phase, "loads", "a model"))
    assert f"{simulations[0].summary.imbalance_mean:.2f}×" in page.text["headline"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, p: ([], p), "simulations is empty, allowed is one or more"),
        (lambda s, p: (s, p[:-1]), "phase has 39 entries, allowed is one per batch, 40"),
        (lambda s, p: ([s[0], replace(s[1], first=9)], p), r"simulations\[1\] has \(9, \(32, 3\)\)"),
        (
            lambda s, p: ([s[0], replace(s[1], rank_load=s[1].rank_load[:5])], p),
            r"simulations\[1\] has \(8, \(5, 3\)\)",
        ),
    ],
)
def test_refuses_by_value(simulations, phase, change, message):
    with pytest.raises(ValueError, match=message):
        report.page(*change(simulations, phase), "loads", "a model")


# ---- in a browser

NAMES = os.environ.get("LPLB_CHROMIUM", "chromium"), "chromium", "chromium-browser", "google-chrome"
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-first-run",
]


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install lplb[test]")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: neither $LPLB_CHROMIUM nor chromium, chromium-browser, google-chrome is there")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def path(simulations, phase, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    report.write(path, simulations, phase, HOSTILE, HOSTILE)
    return path


@pytest.fixture
def opened(browser, path):
    """Opens the page; afterwards nothing may have been logged, asked for from elsewhere, or popped up."""
    contexts, heard = [], []

    def open_page(scheme="light", width=1440, height=900):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: heard.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.on("dialog", lambda dialog: heard.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: request.url == path.as_uri() or heard.append(f"request: {request.url}"))
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-ready]", timeout=60_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert heard == []


def plotted(page, name):
    """The traces of a plot."""
    return page.evaluate(f"document.getElementById('{name}').data")


def ratio(s, layer):
    """Load over mean as the page has it: [ranks, batches]."""
    return (s.rank_load[:, layer] / s.rank_load[:, layer].mean(-1, keepdims=True)).T


def test_every_plot_is_drawn(opened):
    page = opened()
    for name in ("heat", "rank-lines", "placement", "steps", "gaps"):
        assert page.locator(f"#{name} svg.main-svg").count() > 0
        assert plotted(page, name)
    assert page.locator("#heat .heatmaplayer image").count() == 2
    assert page.evaluate("window.hacked") is None
    assert page.locator("h1").inner_text().startswith(HOSTILE)
    assert page.locator("#heat a").count() == 0
    assert HOSTILE_PHASE[:17] in page.locator("#heat").inner_text()


def test_the_layer_decides_what_is_drawn(opened, simulations):
    page = opened()
    none, best = simulations[3], simulations[4]
    seen = []
    for layer in range(LAYERS):
        page.select_option("#layer", label=str(layer))
        before, after = plotted(page, "heat")[:2]
        assert np.allclose(before["z"], ratio(none, layer), atol=1e-3)
        assert np.allclose(after["z"], ratio(best, layer), atol=1e-3)
        assert (before["zmin"], before["zmax"]) == (after["zmin"], after["zmax"])
        steps = plotted(page, "steps")[1]
        assert steps["y"] == np.bincount(best.iterations[:, layer]).tolist()
        gaps = [gap or 0 for gap in plotted(page, "gaps")[1]["y"]]
        assert np.allclose(gaps, best.gap[:, layer])
        lines = [trace["y"] for trace in plotted(page, "heat")[2:]]
        for got, expected in zip(lines, (none.imbalance, best.imbalance, best.bound_imbalance), strict=True):
            assert np.allclose(got, expected[:, layer], atol=1e-4)
        assert page.locator("#layer-says").inner_text() == f"layer {layer}"
        seen.append(before["z"])
    assert seen[0] != seen[1] != seen[2]


def cards(page, which):
    found = page.locator(f"#cards .{which}").all()
    return {card.get_attribute("data-key"): float(card.get_attribute("data-value")) for card in found}


def test_numbers_are_the_simulations(opened, simulations):
    page = opened()
    for before, after in ((3, 4), (4, 3)):
        page.select_option("#before", str(before))
        page.select_option("#after", str(after))
        for which, i in (("was", before), ("is", after)):
            summary = simulations[i].summary
            assert cards(page, which) == {
                key: getattr(summary, key)
                for key in (
                    "imbalance_mean",
                    "imbalance_p99",
                    "bound_mean",
                    "balancedness",
                    "cross_node_share",
                    "moved_bytes",
                )
            }
            assert f"{summary.imbalance_mean:.3f}" in page.locator("#cards").inner_text()
    for i, s in enumerate(simulations):
        assert page.locator(f"tr[data-row='{i}'] td").all_inner_texts() == results.cells(s)


def test_a_tile_that_got_worse_says_so(browser, slower, phase, tmp_path):
    report.write(tmp_path / "a.html", slower, phase, "loads", "a model")
    page = browser.new_page()
    page.goto((tmp_path / "a.html").as_uri())
    page.wait_for_selector("body[data-ready]", timeout=60_000)
    colours = page.locator("#cards .is").evaluate_all(
        "all => Object.fromEntries(all.map((e) => [e.dataset.key, getComputedStyle(e).color]))"
    )
    page.close()
    better, worse = slower[1].summary, slower[0].summary
    assert better.imbalance_mean < worse.imbalance_mean
    assert better.balancedness > worse.balancedness
    assert better.slots_moved > 0
    assert colours["layer_seconds_mean"] == colours["moved_bytes"] != colours["imbalance_mean"]
    assert colours["imbalance_mean"] == colours["balancedness"]


@pytest.mark.parametrize("width", [1280, 1440])
def test_no_row_of_the_table_is_hidden(opened, width):
    page = opened(width=width)
    shown = page.evaluate(
        "(({scrollHeight, clientHeight}) => [scrollHeight, clientHeight])(document.querySelector('.scroll'))"
    )
    assert shown[0] <= shown[1]


def test_a_row_of_the_table_chooses(opened, simulations):
    page = opened()
    page.locator("tr[data-row='1'] button").click()
    assert page.input_value("#ranks") == "8 ranks in 2 nodes"
    assert (page.input_value("#before"), page.input_value("#after")) == ("0", "1")
    layer = int(page.locator("#layer option:checked").inner_text())
    assert np.allclose(plotted(page, "heat")[1]["z"], ratio(simulations[1], layer), atol=1e-3)
    assert page.locator("tr.after").get_attribute("data-row") == "1"
    page.select_option("#ranks", "32 ranks in 2 nodes")
    assert page.input_value("#after") == "4"


def test_the_placement_is_shown(opened, simulations):
    page = opened()
    s = simulations[4]
    layer = int(page.locator("#layer option:checked").inner_text())
    for which in (0, len(s.placed_at) - 1):
        page.locator("#placement-at").fill(str(which))
        placement = s.placements[which][layer]
        assert page.locator("#placed-at").inner_text() == str(s.placed_at[which])
        trace = plotted(page, "placement")[0]
        copies = placement.logcnt[placement.phy2log.long()].view(32, -1)
        assert (np.sort(np.array(trace["z"]).T, 1) == np.sort(copies.numpy(), 1)).all()
        for rank, texts in enumerate(np.array(trace["customdata"]).T):
            experts = [int(re.match(r"expert (\d+)<br>", text)[1]) for text in texts]
            assert sorted(experts) == sorted(placement.phy2log.view(32, -1)[rank].tolist())
    page.locator("#expert").fill("5")
    slots = np.flatnonzero(s.placements[-1][layer].phy2log.numpy() == 5)
    assert plotted(page, "placement")[1]["x"] == (slots // 4).tolist()


def test_a_rank_is_followed(opened, simulations):
    page = opened()
    layer = int(page.locator("#layer option:checked").inner_text())
    page.locator("#follow").fill("17")
    assert np.allclose(plotted(page, "rank-lines")[-1]["y"], ratio(simulations[4], layer)[17], atol=1e-3)
    page.locator("tr[data-row='2'] button").click()  # 8 ranks: each has a line, and 17 is none of them
    traces = plotted(page, "rank-lines")
    assert [trace["name"] for trace in traces] == [*(f"rank {r}" for r in range(8)), "rank 7"]


def luminance(colour):
    red, green, blue = map(int, re.findall(r"\d+", colour)[:3])
    return (red + green + blue) / 765


def test_dark_mode_is_dark_in_plots_too(opened):
    page = opened("light")
    script = (
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,"
        " document.getElementById('heat').layout.font.color, document.getElementById('heat').data[0].colorscale[1][1]]"
    )
    background, ink, font, even = page.evaluate(script)
    assert luminance(background) > 0.8
    assert luminance(ink) < 0.3
    page.emulate_media(color_scheme="dark")
    page.wait_for_selector("body[data-drawn='dark']")
    dark_background, dark_ink, dark_font, dark_even = page.evaluate(script)
    assert luminance(dark_background) < 0.2
    assert luminance(dark_ink) > 0.7
    assert int(dark_font[1:3], 16) > 128 > int(font[1:3], 16)
    assert int(dark_even[1:3], 16) < 128 < int(even[1:3], 16)
    assert opened("dark").evaluate(script)[0] == dark_background


@pytest.mark.parametrize("width", [800, 1280, 1440, 1920])
def test_nothing_is_wider_than_the_screen(opened, width):
    page = opened(width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wider = page.evaluate(
        "[...document.querySelectorAll('body *')].filter((e) => !e.closest('svg') && "
        "e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert wider == []


def test_the_heat_maps_fit_the_first_screen(opened):
    page = opened(width=1440, height=900)
    box = page.locator("#heat").bounding_box()
    assert box["y"] + box["height"] <= 900
