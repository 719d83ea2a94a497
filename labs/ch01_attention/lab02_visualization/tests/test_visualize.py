"""Tests of ch01/lab02.

Pictures are read as a reader would: which number stands in the cell above this key's tick and beside that
query's tick? Numbers are compared with closed forms, torch, and heads made by hand.
"""

import contextlib
import io
import math

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.backend_bases import MouseEvent
from matplotlib.figure import Figure
from matplotlib.text import Text
from shared.compare import assert_close
from visualize import (
    attention_distance,
    attention_entropy,
    classify_head,
    induction_score,
    plot_attention,
    plot_heads,
    previous_token_score,
)


@pytest.fixture(autouse=True)
def _headless():
    matplotlib.use("Agg")
    with matplotlib.rc_context():  # a setting that one test's code changes must not reach the next test
        yield
    plt.close("all")


# --- weights -------------------------------------------------------------------------------


def random_weights(rng, *shape, causal=False):
    """Rows that sum to 1; with `causal`, the queries are the last T_q positions and see no later key."""
    scores = torch.from_numpy(rng.standard_normal(shape))
    if causal:
        t_q, t_k = shape[-2:]
        scores = scores.masked_fill(torch.ones(t_q, t_k).triu(t_k - t_q + 1).bool(), -torch.inf)
    return scores.softmax(-1).numpy()


def looks_at(*keys, t_k=None):
    """The head whose query i puts all its weight on position keys[i]."""
    return np.eye(t_k or len(keys))[list(keys)]


def uniform(t_q, t_k=None):
    """The causal head whose queries, the last t_q of t_k positions, weigh all they see equally."""
    t_k = t_k or t_q
    rows = np.tril(np.ones((t_q, t_k)), t_k - t_q)
    return rows / rows.sum(-1, keepdims=True)


# --- reading a figure ------------------------------------------------------------------------


def ticks_of(axis):
    """The (location, text) of the labelled ticks inside the axis, from the left or from the top."""
    low, high = sorted(axis.get_view_interval())
    axis.get_ticklabels()  # brings the ticks up to date
    pairs = []
    for tick in axis.get_major_ticks():
        texts = [label.get_text() for label in (tick.label1, tick.label2) if label.get_visible()]
        if low <= tick.get_loc() <= high and any(texts):
            pairs.append((tick.get_loc(), next(filter(None, texts))))
    # Locations grow to the right and upwards, unless the axis is inverted.
    return sorted(pairs, reverse=bool(axis.get_inverted()) == (axis.axis_name == "x"))


def labels(axis):
    return [text for _, text in ticks_of(axis)]


def heatmap_of(ax):
    """The one colour-mapped artist of the Axes: imshow's image or pcolormesh's mesh."""
    found = [a for a in (*ax.images, *ax.collections) if a.get_array() is not None]
    assert len(found) == 1, f"expected one heatmap (imshow or pcolormesh) on the Axes, found {len(found)}"
    assert found[0] not in ax.images or found[0].get_array().ndim == 2, "the image holds colours, not weights"
    return found[0]


def value_at(ax, x, y):
    """The weight whose cell covers the pixel (x, y), NaN where nothing is drawn."""
    artist, event = heatmap_of(ax), MouseEvent("motion_notify_event", ax.figure.canvas, x, y)
    if artist in ax.images:
        value = artist.get_cursor_data(event)
        value = np.nan if value is None else value
    else:
        inside, info = artist.contains(event)
        value = np.ma.ravel(artist.get_array())[info["ind"][0]] if inside else np.nan
    return float(np.ma.filled(np.ma.asarray(value, dtype=np.float64), np.nan))


def read_cells(ax, dx=0.0, dy=0.0):
    """The weights at the crossings of the labelled ticks, as the eye sees them: (from top, from left).

    dx and dy move away from the ticks, in widths and heights of a cell.
    """
    xs, ys = (np.array([at for at, _ in ticks_of(axis)]) for axis in (ax.xaxis, ax.yaxis))
    assert len(xs), "no labelled ticks on the x axis"
    assert len(ys), "no labelled ticks on the y axis"
    xs = ax.transData.transform(np.stack([xs, np.full_like(xs, ys[0])], -1))[:, 0]
    ys = ax.transData.transform(np.stack([np.full_like(ys, ax.get_xlim()[0]), ys], -1))[:, 1]
    xs = xs + dx * (np.diff(xs).mean() if len(xs) > 1 else 1.0)
    ys = ys + dy * (np.diff(ys).mean() if len(ys) > 1 else 1.0)
    return np.array([[value_at(ax, x, y) for x in xs] for y in ys])


def colour_positions(artist, values):
    """Where each value falls between the first (0) and the last (1) colour of the artist's map."""
    return np.ma.getdata(artist.norm(np.array(values)))


def is_colour_bar(ax):
    return hasattr(ax, "_colorbar") or ax.get_label() == "<colorbar>"


def is_drawn_on(ax):
    return bool(ax.images or ax.collections)


def rows_of_panels(fig):
    """The panels of a grid as the eye sees them: rows from top to bottom, each from left to right."""
    panels = [
        (ax.bbox.frozen(), ax)  # in pixels: a position is relative to the subfigure, if there is one
        for ax in fig.axes
        if ax.get_visible() and not is_colour_bar(ax) and is_drawn_on(ax)
    ]
    rows = []
    for box, ax in sorted(panels, key=lambda panel: -(panel[0].y0 + panel[0].y1)):
        if rows and (box.y0 + box.y1) / 2 > rows[-1][0][0].y0:
            rows[-1].append((box, ax))
        else:
            rows.append([(box, ax)])
    return [[ax for box, ax in sorted(row, key=lambda panel: panel[0].x0)] for row in rows]


def panels_of(fig):
    """The panels in reading order."""
    return [ax for row in rows_of_panels(fig) for ax in row]


def title_of(ax):
    return "".join(ax.get_title(loc) for loc in ("left", "center", "right"))


@contextlib.contextmanager
def one_open_figure():
    """Afterwards the same figures must be open as before."""
    plt.figure()
    try:
        before = plt.get_fignums()
        yield
        assert plt.get_fignums() == before
    finally:
        plt.close("all")


def texts_of(figure):
    return [t.get_text() for t in figure.findobj(Text) if t.get_visible() and t.get_text()]


# --- Part 1: the heatmap ---------------------------------------------------------------------

QUERIES, KEYS = ["le", "chat", "dort"], ["the", "old", "cat", "sleeps", "well"]


@pytest.mark.parametrize("keys", [KEYS, ["the", "cat", "sleeps"]], ids=["more keys", "as many keys"])
def test_heatmap_labels_the_x_axis_with_the_keys(rng, keys):
    found = labels(plot_attention(random_weights(rng, 3, len(keys)), QUERIES, keys).xaxis)
    assert sorted(found) == sorted(keys), f"ticks of the x axis: {found}, expected the keys {keys}"


def test_heatmap_labels_the_y_axis_with_the_queries(rng):
    found = labels(plot_attention(random_weights(rng, 3, 5), QUERIES, KEYS).yaxis)
    assert sorted(found) == sorted(QUERIES), f"ticks of the y axis: {found}, expected the queries {QUERIES}"


def test_heatmap_names_its_axes_key_and_query(rng):
    ax = plot_attention(random_weights(rng, 3, 5), QUERIES, KEYS)
    names = ax.get_xlabel(), ax.get_ylabel()
    assert names == ("key", "query"), f"axis labels {names}, expected ('key', 'query')"


def in_label_order(ax, queries):
    """`read_cells` with its rows in the order of `queries`, wherever the picture has put them."""
    cells, found = read_cells(ax), labels(ax.yaxis)
    assert sorted(found) == sorted(queries), f"ticks of the y axis: {found}, expected {queries}"
    return cells[[found.index(query) for query in queries]]


@pytest.mark.parametrize(("t_q", "t_k"), [(4, 4), (3, 5), (5, 2)])
def test_heatmap_shows_each_weight_where_its_query_and_its_key_cross(rng, t_q, t_k):
    weights = random_weights(rng, t_q, t_k)
    queries, keys = [f"q{i}" for i in range(t_q)], [f"k{j}" for j in range(t_k)]
    cells = in_label_order(plot_attention(weights, queries, keys), queries)
    assert_close(
        cells,
        weights,
        atol=1e-12,
        name="the heatmap at (query, key)",
        hint="the cell at a query's and a key's tick shows another weight: rows are queries, columns keys",
    )


def test_heatmap_has_the_first_query_at_the_top_and_the_first_key_on_the_left(rng):
    ax = plot_attention(random_weights(rng, 3, 5), QUERIES, KEYS)
    down, across = labels(ax.yaxis), labels(ax.xaxis)
    assert down == QUERIES, f"queries from the top: {down}, expected {QUERIES} (origin='upper')"
    assert across == KEYS, f"keys from the left: {across}, expected {KEYS}"


@pytest.mark.parametrize(("dx", "dy"), [(-0.4, 0.0), (0.4, 0.0), (0.0, -0.4), (0.0, 0.4)])
def test_heatmap_ticks_sit_in_the_middle_of_their_cells(rng, dx, dy):
    weights = random_weights(rng, 3, 4)
    queries, keys = ["a", "b", "c"], ["d", "e", "f", "g"]
    ax = plot_attention(weights, queries, keys)
    at_ticks, beside = read_cells(ax), read_cells(ax, dx, dy)
    order = [labels(ax.yaxis).index(query) for query in queries]
    hint = "0.4 of a cell away from its tick, the picture should still show the same weight"
    assert_close(beside[order], at_ticks[order], atol=0, name="the heatmap beside the ticks", hint=hint)
    assert_close(beside[order], weights, atol=1e-12, name="the heatmap beside the ticks", hint=hint)


def test_heatmap_keeps_a_tick_for_every_occurrence_of_a_token(rng):
    tokens = ["the", "cat", "and", "the", "dog", "and", "the"]
    weights = random_weights(rng, 7, 7, causal=True)
    ax = plot_attention(weights, tokens)
    for name, axis in (("x", ax.xaxis), ("y", ax.yaxis)):
        assert labels(axis) == tokens, f"ticks of the {name} axis: {labels(axis)}, expected {tokens}"
    assert_close(read_cells(ax), weights, atol=1e-12, name="the heatmap")


def test_heatmap_takes_the_queries_as_keys_when_none_are_given(rng):
    tokens = ["one", "two", "three", "four"]
    weights = random_weights(rng, 4, 4)
    ax = plot_attention(weights, tokens)
    assert labels(ax.xaxis) == tokens, f"ticks of the x axis: {labels(ax.xaxis)}, expected {tokens}"
    assert_close(in_label_order(ax, tokens), weights, atol=1e-12, name="the heatmap")


@pytest.mark.parametrize("low_and_high", [(0.2, 0.3), (0.0, 0.02), (0.2, 1.0), (0.5, 0.5)])
def test_heatmap_colours_always_run_from_0_to_1(low_and_high):
    weights = np.linspace(*low_and_high, 6).reshape(2, 3)
    artist = heatmap_of(plot_attention(weights, ["a", "b"], ["c", "d", "e"]))
    levels = [0.0, 0.25, 0.5, 0.9, 1.0]
    assert_close(
        colour_positions(artist, levels),
        np.array(levels),
        atol=1e-12,
        name="the place in the colour map of the weights 0, 0.25, 0.5, 0.9 and 1",
        hint="the same weight must have the same colour in every heatmap: fix vmin and vmax",
    )


def test_heatmap_cells_are_not_blurred(rng):
    weights = random_weights(rng, 3, 5)
    ax = plot_attention(weights, QUERIES, KEYS)
    artist = heatmap_of(ax)
    if artist in ax.images:
        kind = artist.get_interpolation()
        assert kind in ("none", "nearest", "auto", "antialiased"), f"interpolation={kind!r} mixes the cells"
    else:
        assert getattr(artist, "_shading", "flat") != "gouraud", "gouraud shading mixes the cells"
    assert_close(in_label_order(ax, QUERIES), weights, atol=1e-12, name="the heatmap")


def test_heatmap_draws_on_the_axes_it_is_given(rng):
    fig = Figure()
    left, right = fig.subplots(1, 2)
    weights = random_weights(rng, 3, 5)
    returned = plot_attention(weights, QUERIES, KEYS, ax=left)
    assert returned is left, "return the Axes that was given"
    assert not is_drawn_on(right), "the heatmap is on another Axes than the one given"
    assert len(fig.axes) == 2, "plot_attention added Axes to the figure (a colour bar is up to the caller)"
    assert_close(in_label_order(left, QUERIES), weights, atol=1e-12, name="the heatmap")


def test_heatmap_draws_on_its_own_axes_not_on_pyplots_current_ones(rng):
    fig, ax = plt.subplots()
    first = plot_attention(random_weights(rng, 3, 5), QUERIES, KEYS)
    weights = random_weights(rng, 3, 5)
    second = plot_attention(weights, QUERIES, KEYS)
    assert isinstance(first, Axes), f"plot_attention returned {type(first).__name__}, expected the Axes"
    assert isinstance(second, Axes), f"plot_attention returned {type(second).__name__}, expected the Axes"
    assert len({first.figure, second.figure, fig}) == 3, "without ax, each heatmap gets a new Figure"
    assert len(second.figure.axes) == 1, "the new Figure should hold the heatmap and nothing else"
    assert not is_drawn_on(ax), "drew on the current figure of pyplot"
    assert_close(in_label_order(second, QUERIES), weights, atol=1e-12, name="the heatmap")


@pytest.mark.parametrize("given", [False, True], ids=["own figure", "given ax"])
def test_heatmap_leaves_pyplot_and_settings_alone(rng, given):
    ax = Figure().subplots() if given else None
    open_figures, settings = plt.get_fignums(), dict(matplotlib.rcParams)
    weights = random_weights(rng, 3, 5)
    ax = plot_attention(weights, QUERIES, KEYS, ax=ax)
    assert plt.get_fignums() == open_figures, "a figure stays open in pyplot: use matplotlib.figure.Figure"
    changed = [name for name, value in settings.items() if matplotlib.rcParams[name] != value]
    assert not changed, f"rcParams changed: {changed}"
    assert_close(in_label_order(ax, QUERIES), weights, atol=1e-12, name="the heatmap")


@pytest.mark.parametrize(
    ("t_q", "t_k", "keys"), [(4, 5, KEYS), (3, 4, KEYS), (5, 3, KEYS), (3, 5, None), (2, 5, KEYS)]
)
def test_heatmap_refuses_tokens_that_do_not_fit_the_weights(rng, t_q, t_k, keys):
    weights = random_weights(rng, 3, 5)
    ax = plot_attention(weights, QUERIES, KEYS)
    assert_close(in_label_order(ax, QUERIES), weights, atol=1e-12, name="the heatmap")
    try:
        plot_attention(random_weights(rng, t_q, t_k), QUERIES, keys)
    except ValueError:
        return
    n_keys = len(QUERIES if keys is None else keys)
    pytest.fail(
        f"weights ({t_q}, {t_k}) with 3 query and {n_keys} key tokens: raise ValueError", pytrace=False
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_heatmap_takes_strided_weights_and_does_not_modify_them(rng, dtype):
    wide = np.repeat(np.repeat(random_weights(rng, 3, 5).astype(dtype), 2, 0), 3, 1)
    before, queries, keys = wide.copy(), list(QUERIES), list(KEYS)
    ax = plot_attention(wide[::2, ::3], queries, keys)
    cells = in_label_order(ax, QUERIES)
    assert_close(cells, before[::2, ::3].astype(np.float64), atol=1e-6, name="the heatmap")
    assert np.array_equal(wide, before), "weights were modified"
    assert (queries, keys) == (QUERIES, KEYS), "a list of tokens was modified"


@pytest.mark.parametrize("case", ["no keys", "colours"])
def test_heatmap_refuses_weights_of_other_shapes(case):
    weights, keys = (np.eye(3), []) if case == "no keys" else (np.full((3, 5, 3), 0.5), list("abcde"))
    with pytest.raises(ValueError):  # noqa: PT011 (the text is free)
        plot_attention(weights, ["a", "b", "c"], keys)


def test_heatmap_leaves_open_figures_open():
    with one_open_figure():
        plot_attention(np.eye(3), ["a", "b", "c"])


def test_heatmap_writes_tokens_as_they_are():
    tokens = [" the", "the", "The ", "extraordinarily"]
    ax = plot_attention(np.eye(4), tokens)
    for axis in (ax.xaxis, ax.yaxis):
        assert [t.get_text() for t in axis.get_ticklabels()] == tokens


def test_heatmap_labels_every_token_of_a_long_text():
    tokens = [f"t{i}" for i in range(40)]
    ax = plot_attention(np.eye(40), tokens)
    for axis in (ax.xaxis, ax.yaxis):
        assert [t.get_text() for t in axis.get_ticklabels()] == tokens


# --- Part 1: the grid of heads -----------------------------------------------------------------

TOKENS = ["to", "be", "or", "be"]


@pytest.mark.parametrize(("H", "ncols"), [(5, 3), (1, 1), (2, 2), (2, 1)])
def test_grid_shows_the_heads_in_reading_order(rng, H, ncols):
    weights = random_weights(rng, H, 4, 4)
    panels = panels_of(plot_heads(weights, TOKENS, ncols=ncols))
    assert len(panels) == H, f"{len(panels)} heatmaps for {H} heads"
    for h, ax in enumerate(panels):
        assert_close(
            read_cells(ax),
            weights[h],
            atol=1e-12,
            name=f"panel {h}",
            hint="panels go left to right, then down; each is head h with queries as rows",
        )


@pytest.mark.parametrize(
    ("H", "options", "rows"),
    [
        (4, {"ncols": 3}, [3, 1]),
        (4, {"ncols": 2}, [2, 2]),
        (1, {"ncols": 2}, [1]),
        (5, {}, [4, 1]),
    ],
)
def test_grid_has_ncols_panels_to_a_row(rng, H, options, rows):
    found = [
        len(row) for row in rows_of_panels(plot_heads(random_weights(rng, H, 2, 2), ["a", "b"], **options))
    ]
    assert found == rows, f"rows of {found} panels for {H} heads and {options or 'the default of 4 columns'}"


def test_grid_titles_name_the_heads_from_0(rng):
    titles = [title_of(ax) for ax in panels_of(plot_heads(random_weights(rng, 5, 3, 3), ["a", "b", "c"], 3))]
    assert titles == [f"head {h}" for h in range(5)], f"titles are {titles}"


@pytest.mark.parametrize(("H", "ncols"), [(4, 3), (2, 3)])
def test_grid_cells_without_a_head_show_nothing(rng, H, ncols):
    fig = plot_heads(random_weights(rng, H, 2, 2), ["a", "b"], ncols=ncols)
    panels = panels_of(fig)
    assert len(panels) == H, f"{len(panels)} heatmaps for {H} heads"
    others = [ax for ax in fig.axes if ax not in panels and not is_colour_bar(ax)]
    frames = [ax for ax in others if ax.get_visible() and ax.axison and shows_a_frame(ax)]
    assert not frames, f"{len(frames)} empty frames: switch off the Axes that are left over"


def shows_a_frame(ax):
    spines = ax.get_frame_on() and any(spine.get_visible() for spine in ax.spines.values())
    return spines or len(ax.get_xticks()) or len(ax.get_yticks())


def test_grid_has_one_colour_scale_for_all_heads():
    weights = np.stack([np.eye(3), np.full((3, 3), 1 / 3), uniform(3), np.zeros((3, 3))])
    levels = [0.0, 0.1, 0.5, 1.0]
    for h, ax in enumerate(panels_of(plot_heads(weights, ["a", "b", "c"], ncols=2))):
        assert_close(
            colour_positions(heatmap_of(ax), levels),
            np.array(levels),
            atol=1e-12,
            name=f"head {h}: the place in the colour map of the weights 0, 0.1, 0.5 and 1",
            hint="the same weight must have the same colour in every panel: 0 and 1 are the ends of the scale",
        )


def test_grid_has_one_colour_bar_for_the_whole_figure(rng):
    fig = plot_heads(random_weights(rng, 3, 4, 4) * 0.3, TOKENS, ncols=2)
    bars = [ax for ax in fig.axes if is_colour_bar(ax)]
    assert len(bars) == 1, f"{len(bars)} colour bars, expected one for the whole figure"
    panels = panels_of(fig)
    maps = {heatmap_of(ax).get_cmap().name for ax in panels}
    bar = getattr(bars[0], "_colorbar", None)
    if bar is not None:
        maps.add(bar.cmap.name)
        assert_close(
            [float(bar.vmin), float(bar.vmax)], [0.0, 1.0], atol=1e-12, name="ends of the colour bar"
        )
    assert len(maps) == 1, f"panels and colour bar use different colour maps: {sorted(maps)}"
    assert len(panels) == 3, f"{len(panels)} heatmaps for 3 heads"


def test_grid_labels_every_panel(rng):
    for h, ax in enumerate(panels_of(plot_heads(random_weights(rng, 5, 4, 4), TOKENS, ncols=3))):
        across, down = labels(ax.xaxis), labels(ax.yaxis)
        assert across == TOKENS, f"head {h}: ticks of the x axis: {across}, expected {TOKENS}"
        assert down == TOKENS, f"head {h}: ticks of the y axis from the top: {down}, expected {TOKENS}"
        names = ax.get_xlabel(), ax.get_ylabel()
        assert names == ("key", "query"), f"head {h}: axis labels {names}, expected ('key', 'query')"


def test_grid_is_a_new_figure_that_pyplot_does_not_keep(rng):
    fig, _ = plt.subplots()
    open_figures, settings = plt.get_fignums(), dict(matplotlib.rcParams)
    first, second = (plot_heads(random_weights(rng, 2, 2, 2), ["a", "b"], ncols=2) for _ in range(2))
    assert isinstance(first, Figure), f"plot_heads returned {type(first).__name__}, expected a Figure"
    assert len({first, second, fig}) == 3, "every call makes a new Figure"
    assert [len(panels_of(f)) for f in (first, second)] == [2, 2], "one heatmap per head"
    assert plt.get_fignums() == open_figures, "a figure stays open in pyplot: use matplotlib.figure.Figure"
    changed = [name for name, value in settings.items() if matplotlib.rcParams[name] != value]
    assert not changed, f"rcParams changed: {changed}"


@pytest.mark.parametrize("n", [3, 5])
def test_grid_refuses_another_number_of_tokens(rng, n):
    weights = random_weights(rng, 1, 4, 4)
    assert_close(read_cells(panels_of(plot_heads(weights, TOKENS, 1))[0]), weights[0], atol=1e-12)
    try:
        plot_heads(weights, ["a", "b", "c", "d", "e"][:n], 1)
    except ValueError:
        return
    pytest.fail(f"{n} tokens for heads of 4 x 4: raise ValueError", pytrace=False)


def test_grid_can_be_saved_to_a_file(rng):
    weights, file = random_weights(rng, 3, 4, 4), io.BytesIO()
    fig = plot_heads(weights, TOKENS, ncols=2)
    fig.savefig(file, format="png", dpi=30)
    assert file.getvalue()[1:4] == b"PNG"
    for h, ax in enumerate(panels_of(fig)):
        assert_close(read_cells(ax), weights[h], atol=1e-12, name=f"head {h}")


def test_grid_does_not_modify_strided_weights(rng):
    stored = random_weights(rng, 4, 4, 3).astype(np.float32)
    before = stored.copy()
    fig = plot_heads(stored.transpose(2, 0, 1), TOKENS, ncols=2)  # 3 heads along the last axis
    for h, ax in enumerate(panels_of(fig)):
        assert_close(read_cells(ax), before[:, :, h].astype(np.float64), atol=1e-6, name=f"head {h}")
    assert len(panels_of(fig)) == 3
    assert np.array_equal(stored, before), "weights were modified"


def test_grid_leaves_open_figures_open():
    with one_open_figure():
        plot_heads(np.eye(3)[None], ["a", "b", "c"])


def test_grid_writes_nothing_over_an_empty_cell():
    figure = plot_heads(np.stack([np.eye(2)] * 4), ["a", "b"], ncols=3)
    titles = sorted(text for text in texts_of(figure) if text.startswith("head"))
    assert titles == [f"head {h}" for h in range(4)]


# --- Part 2: entropy -----------------------------------------------------------------------------


def as_array(value):
    """A score or an array of scores as an ndarray (one head's score may be any kind of number)."""
    assert value is not None, "returned None"
    return np.asarray(value)


def entropy(weights):
    with np.errstate(divide="ignore", invalid="ignore"):
        return as_array(attention_entropy(weights))


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_entropy_of_n_equal_weights_is_ln_n(n):
    assert_close(
        entropy(np.full((3, n), 1 / n)),
        np.full(3, math.log(n)),
        atol=1e-12,
        hint="-sum of w ln w over the keys",
    )


def test_entropy_is_in_nats():
    # 1/2, 1/4, 1/8, 1/8: 7/4 bits, and a bit is ln 2 nats.
    weights = np.array([[0.5, 0.25, 0.125, 0.125]])
    assert_close(
        entropy(weights), np.array([1.75 * math.log(2)]), atol=1e-12, hint="nats: the natural logarithm"
    )


def test_entropy_of_a_one_hot_query_is_exactly_0():
    assert_close(
        entropy(looks_at(2, 0, 4, 4, 1)),
        np.zeros(5),
        atol=1e-15,
        hint="0 ln 0 counts as exactly 0: no NaN, no epsilon",
    )


def test_entropy_ignores_keys_of_weight_0():
    p = 0.3
    expected = -p * math.log(p) - (1 - p) * math.log(1 - p)
    weights = np.zeros((2, 1001))
    weights[0, [5, 990]] = weights[1, [1000, 0]] = p, 1 - p
    assert_close(entropy(weights), np.full(2, expected), atol=1e-13, hint="0 ln 0 counts as exactly 0")


def test_entropy_of_a_query_that_sees_no_key_is_0(rng):
    weights = random_weights(rng, 2, 3, 5)
    weights[0, 1] = weights[1, 2] = 0.0
    expected = torch.special.entr(torch.from_numpy(weights)).sum(-1).numpy()
    assert expected[0, 1] == 0
    assert_close(entropy(weights), expected, atol=1e-12, hint="a row of zeros has entropy 0, not NaN")


@pytest.mark.parametrize("tiny", [1e-300, 5e-324, 1e-12, 1e-9])
def test_entropy_of_very_small_weights(tiny):
    expected = -tiny * math.log(tiny) - (1 - tiny) * math.log1p(-tiny)
    assert_close(entropy(np.array([[tiny, 1 - tiny]])), np.array([expected]), atol=1e-14)


@pytest.mark.parametrize("shape", [(3, 5), (7, 4), (6, 6), (2, 3, 5, 7), (3, 1, 9)])
def test_entropy_matches_torch_for_every_query(rng, shape):
    weights = random_weights(rng, *shape)
    expected = torch.special.entr(torch.from_numpy(weights)).sum(-1).numpy()
    assert_close(
        entropy(weights),
        expected,
        atol=1e-12,
        name="entropy",
        hint="one number per query, summed over the keys",
    )


def test_entropy_of_strided_float32_is_right_and_modifies_nothing(rng):
    stored = random_weights(rng, 3, 10, 12, causal=True).astype(np.float32)
    before = stored.copy()
    expected = torch.special.entr(torch.from_numpy(before[:, ::2]).double()).sum(-1).numpy()
    assert_close(entropy(stored[:, ::2]).astype(np.float64), expected, atol=1e-5, name="entropy")
    assert np.array_equal(stored, before), "weights were modified"


# --- Part 2: distance ------------------------------------------------------------------------------


def distance(weights):
    return as_array(attention_distance(weights))


def slow_distance(weights):
    t_q, t_k = weights.shape[-2:]
    out = np.zeros(weights.shape[:-1])
    for *head, i, j in np.ndindex(*weights.shape):
        out[(*head, i)] += weights[(*head, i, j)] * abs(t_k - t_q + i - j)
    return out


def test_distance_of_one_hot_queries():
    assert_close(
        distance(looks_at(0, 0, 1, 3, 0)),
        np.array([0.0, 1.0, 1.0, 0.0, 4.0]),
        atol=1e-12,
        hint="a query that looks at one key is |i - j| positions away from it",
    )


def test_distance_counts_keys_after_the_query_as_positive():
    # Query 1 looks one step back and one step ahead: a mean distance of 1, not 0.
    weights = np.array([[0.0, 0.0, 1.0], [0.5, 0.0, 0.5], [1.0, 0.0, 0.0]])
    assert_close(distance(weights), np.array([2.0, 1.0, 2.0]), atol=1e-12, hint="the absolute value of i - j")


def test_distance_of_equal_causal_weights_is_half_the_position():
    assert_close(distance(uniform(7)), np.arange(7) / 2, atol=1e-12, hint="the mean of 0, 1, ..., p is p / 2")


@pytest.mark.parametrize(("t_q", "t_k"), [(1, 6), (3, 8)])
def test_distance_places_the_queries_at_the_end_of_the_text(t_q, t_k):
    assert_close(
        distance(uniform(t_q, t_k)),
        np.arange(t_k - t_q, t_k) / 2,
        atol=1e-12,
        hint="with fewer queries than keys, the queries are the last T_q positions",
    )


@pytest.mark.parametrize("shape", [(6, 6), (3, 7), (2, 3, 5, 5), (3, 2, 4, 9)])
def test_distance_matches_a_slow_loop(rng, shape):
    weights = random_weights(rng, *shape)
    assert_close(
        distance(weights),
        slow_distance(weights),
        atol=1e-12,
        name="distance",
        hint="sum over keys of w |p_i - j|",
    )


def test_distance_of_a_query_that_sees_no_key_is_0(rng):
    weights = random_weights(rng, 2, 3, 5)
    weights[0, 1] = weights[1, 2] = 0.0
    assert_close(
        distance(weights), slow_distance(weights), atol=1e-12, hint="a row of zeros: distance 0, not NaN"
    )


def test_distance_of_strided_float32_is_right_and_modifies_nothing(rng):
    stored = random_weights(rng, 3, 10, 6).astype(np.float32)
    before = stored.copy()
    assert_close(
        distance(stored[:, ::2]).astype(np.float64),
        slow_distance(before[:, ::2].astype(np.float64)),
        atol=1e-5,
    )
    assert np.array_equal(stored, before), "weights were modified"


# --- Part 3: the previous token ----------------------------------------------------------------------


def test_previous_token_score_of_a_previous_token_head_is_1():
    # Query 0 has no previous token and looks at itself; it does not count.
    assert_close(
        as_array(previous_token_score(looks_at(0, 0, 1, 2, 3))),
        np.array(1.0),
        atol=1e-12,
        hint="every query that has a previous token looks at it: the mean over T - 1 queries is 1",
    )


@pytest.mark.parametrize(
    "keys",
    [(0, 1, 2, 3, 4), (1, 2, 3, 4, 4), (0, 0, 0, 1, 2), (4, 4, 4, 4, 4)],
    ids=["itself", "next", "two back", "last"],
)
def test_previous_token_score_of_heads_that_look_elsewhere(keys):
    expected = sum(key == i - 1 for i, key in enumerate(keys) if i) / 4
    assert_close(as_array(previous_token_score(looks_at(*keys))), np.array(expected), atol=1e-12)


def test_previous_token_score_does_not_count_the_first_token():
    # A weight on the *last* key (index -1) is no previous token of the first query.
    weights = np.array([[0.0, 0.0, 1.0], [0.25, 0.75, 0.0], [0.0, 0.5, 0.5]])
    assert_close(
        as_array(previous_token_score(weights)),
        np.array((0.25 + 0.5) / 2),
        atol=1e-12,
        hint="the mean over the queries at positions 1 and 2; position 0 has no previous token",
    )


@pytest.mark.parametrize(("t_q", "t_k"), [(1, 5), (3, 7), (4, 5)])
def test_previous_token_score_places_the_queries_at_the_end_of_the_text(rng, t_q, t_k):
    weights = random_weights(rng, t_q, t_k)
    expected = sum(weights[i, t_k - t_q + i - 1] for i in range(t_q)) / t_q
    assert_close(
        as_array(previous_token_score(weights)),
        np.array(expected),
        atol=1e-12,
        hint="the queries are the last T_q positions, and all of them have a previous token here",
    )


@pytest.mark.parametrize("shape", [(3, 5, 5), (2, 3, 6, 6), (2, 3, 4, 7)])
def test_previous_token_score_is_one_number_per_head(rng, shape):
    weights = random_weights(rng, *shape)
    offset = shape[-1] - shape[-2] - 1
    expected = torch.from_numpy(weights).diagonal(offset, -2, -1).mean(-1).numpy()
    assert_close(
        as_array(previous_token_score(weights)), expected, atol=1e-12, hint="the mean is over queries only"
    )


@pytest.mark.parametrize("batch", [(), (3,)])
def test_previous_token_score_of_a_single_token_is_0(batch):
    two = np.broadcast_to(np.array([[1.0, 0.0], [0.75, 0.25]]), (*batch, 2, 2))
    assert_close(as_array(previous_token_score(two)), np.full(batch, 0.75), atol=1e-12)
    score = as_array(previous_token_score(np.ones((*batch, 1, 1))))
    assert_close(score, np.zeros(batch), atol=0, hint="no query has a previous token: 0, not NaN")


def test_previous_token_score_counts_queries_that_see_no_key():
    weights = np.array([[1.0, 0, 0, 0], [1.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0.5, 0.5]])
    assert_close(as_array(previous_token_score(weights)), np.array(1.5 / 3), atol=1e-12)


def test_previous_token_score_of_strided_float32_modifies_nothing(rng):
    stored = random_weights(rng, 3, 10, 5).astype(np.float32)
    before = stored.copy()
    expected = before[:, ::2].astype(np.float64).diagonal(-1, -2, -1).mean(-1)
    assert_close(as_array(previous_token_score(stored[:, ::2])).astype(np.float64), expected, atol=1e-6)
    assert np.array_equal(stored, before), "weights were modified"


# --- Part 3: induction -----------------------------------------------------------------------------


def induction(weights, tokens):
    return as_array(induction_score(weights, tokens))


def slow_induction(weights, tokens):
    """Every pair of a query and an earlier occurrence of its token, one at a time."""
    t_q, t_k = weights.shape[-2:]
    total, seen = np.zeros(weights.shape[:-2]), set()
    for i in range(t_q):
        for target in range(1, t_k):
            if target <= t_k - t_q + i and tokens[target - 1] == tokens[t_k - t_q + i]:
                total = total + weights[..., i, target]
                seen.add(i)
    return np.asarray(total / max(len(seen), 1))


def test_induction_score_is_the_mean_weight_after_the_previous_occurrence():
    #                    the   cat   sat   the   cat
    weights = np.array(
        [
            [1.0, 0.0, 0.0, 0.0, 0.0],
            [0.3, 0.7, 0.0, 0.0, 0.0],
            [0.2, 0.2, 0.6, 0.0, 0.0],
            [0.1, 0.6, 0.1, 0.2, 0.0],  # "the" was at 0: its weight on 1 counts
            [0.1, 0.1, 0.3, 0.1, 0.4],  # "cat" was at 1: its weight on 2 counts
        ]
    )
    assert_close(
        induction(weights, ["the", "cat", "sat", "the", "cat"]),
        np.array((0.6 + 0.3) / 2),
        atol=1e-12,
        hint="positions 3 and 4 repeat a token: their weights on the position after it are 0.6 and 0.3",
    )


def test_induction_score_is_one_for_an_induction_head():
    tokens = ["a", "b", "c", "d", "a", "b", "c"]
    assert_close(
        induction(looks_at(0, 0, 0, 0, 1, 2, 3), tokens),
        np.array(1.0),
        atol=1e-12,
        hint="the tokens a, b, c, d occur for the first time and do not count",
    )


def test_induction_score_is_0_for_a_head_that_looks_at_the_earlier_occurrence_itself():
    tokens = ["a", "b", "c", "d", "a", "b", "c"]
    both = np.stack([looks_at(0, 1, 2, 3, 0, 1, 2), looks_at(0, 1, 2, 3, 1, 2, 3)])
    assert_close(
        induction(both, tokens),
        np.array([0.0, 1.0]),
        atol=1e-12,
        hint="the position *after* the earlier occurrence",
    )


def test_induction_score_adds_up_several_earlier_occurrences():
    #   a  b  a  c  a       position 4: "a" was at 0 and 2, so the weights on 1 and 3 count, 0.25 + 0.5
    weights = np.array(
        [
            [1.0, 0, 0, 0, 0],
            [0, 1.0, 0, 0, 0],
            [0, 1.0, 0, 0, 0],
            [0, 0, 0, 1.0, 0],
            [0.125, 0.25, 0.125, 0.5, 0],
        ]
    )
    assert_close(
        induction(weights, ["a", "b", "a", "c", "a"]),
        np.array((1.0 + 0.75) / 2),
        atol=1e-12,
        hint="position 4 repeats a token seen twice: add its weights after both",
    )


@pytest.mark.parametrize("target", [1, 3], ids=["the earliest", "the latest"])
def test_induction_score_is_1_for_a_head_that_picks_one_of_several_occurrences(target):
    #        a  b  a  c  a
    weights = looks_at(0, 0, 1, 0, target)
    assert_close(
        induction(weights, ["a", "b", "a", "c", "a"]),
        np.array(1.0),
        atol=1e-12,
        hint=f"position 4 looks at {target}, after an occurrence of its token: that is all it can do",
    )


def test_induction_score_of_a_token_repeated_at_once_is_its_weight_on_itself():
    weights = np.array([[1.0, 0.0, 0.0], [0.375, 0.625, 0.0], [0.25, 0.5, 0.25]])
    assert_close(
        induction(weights, ["no", "no", "yes"]),
        np.array(0.625),
        atol=1e-12,
        hint="position 1 repeats position 0: the position after that is 1 itself",
    )


def test_induction_score_does_not_count_later_occurrences(rng):
    # Not causal. Only positions 3 and 4 have an earlier occurrence.
    weights = random_weights(rng, 5, 5)
    expected = (weights[3, 1] + weights[4, 2]) / 2
    assert_close(
        induction(weights, ["x", "y", "z", "x", "y"]),
        np.array(expected),
        atol=1e-12,
        hint="only m < p counts",
    )


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_induction_score_of_a_text_without_repetition_is_0(rng, batch):
    weights = random_weights(rng, *batch, 4, 4, causal=True)
    assert_close(induction(weights, ["a", "b", "b", "c"]), weights[..., 2, 2], atol=1e-12)
    assert_close(
        induction(weights, ["a", "b", "c", "d"]),
        np.zeros(batch),
        atol=0,
        hint="no token has occurred before: 0, not NaN",
    )


@pytest.mark.parametrize(
    ("t_q", "text"), [(1, "abcab"), (3, "abcdab"), (2, "aabbaab"), (4, "abacada"), (2, "abcdef")]
)
def test_induction_score_looks_for_occurrences_in_the_whole_text(rng, t_q, text):
    weights = random_weights(rng, 3, t_q, len(text))
    assert_close(
        induction(weights, list(text)),
        slow_induction(weights, text),
        atol=1e-12,
        hint="the queries are the last T_q positions, but a token may have occurred before the first of them",
    )


@pytest.mark.parametrize("text", ["abcabc", "aaaaa", "abababa", "abcbdbacb", "aabbccabc"])
def test_induction_score_is_one_number_per_head(rng, text):
    weights = random_weights(rng, 2, 3, len(text), len(text))
    assert_close(
        induction(weights, list(text)),
        slow_induction(weights, text),
        atol=1e-12,
        name=f"the score on {' '.join(text)}",
        hint="per query the sum over earlier occurrences, then the mean over queries that have one",
    )


def test_induction_score_counts_queries_that_see_no_key():
    weights = looks_at(0, 1, 1, 2)
    weights[2] = 0.0
    assert_close(induction(weights, ["a", "b", "a", "b"]), np.array(0.5), atol=1e-12)


@pytest.mark.parametrize(("t_q", "n"), [(5, 4), (5, 6), (3, 3)])
def test_induction_score_refuses_another_number_of_tokens(rng, t_q, n):
    weights = random_weights(rng, t_q, 5)
    tokens = ["a", "b", "a", "b", "a"]
    assert_close(induction(weights, tokens), slow_induction(weights, tokens), atol=1e-12)
    try:
        result = induction_score(weights, (tokens * 2)[:n])
    except ValueError:
        return
    pytest.fail(f"{n} tokens for 5 keys gave {result}: raise ValueError", pytrace=False)


def test_induction_score_of_strided_float32_modifies_nothing(rng):
    stored, tokens = random_weights(rng, 3, 10, 5).astype(np.float32), ["a", "b", "a", "b", "a"]
    before = stored.copy()
    expected = slow_induction(before[:, ::2].astype(np.float64), tokens)
    assert_close(induction(stored[:, ::2], tokens).astype(np.float64), expected, atol=1e-6)
    assert np.array_equal(stored, before), "weights were modified"
    assert tokens == ["a", "b", "a", "b", "a"], "the list of tokens was modified"


def test_induction_score_tells_tokens_apart_by_case():
    weights = np.zeros((3, 3))
    weights[:, 0] = 0.25
    weights[2, 1] = 0.75
    assert_close(np.asarray(induction_score(weights, ["The", "cat", "the"])), np.array(0.0), atol=0)


# --- Part 3: which kind of head? ---------------------------------------------------------------------


def kind_of(weights, text, expected, why):
    found = classify_head(weights, list(text))
    assert found == expected, f"on the text {' '.join(text)}: {found!r}, expected {expected!r} ({why})"


# A text, a previous-token head and an induction head on it. Before there is anything to copy, induction
# heads rest on the first token, on themselves or even on the previous token.
PAIRS = [
    ("abcabc", (0, 0, 1, 2, 3, 4), (0, 0, 0, 1, 2, 3)),
    ("abcdabcd", (0, 0, 1, 2, 3, 4, 5, 6), (0, 1, 2, 3, 1, 2, 3, 4)),
    ("abcdabcd", (0, 0, 1, 2, 3, 4, 5, 6), (0, 0, 1, 2, 1, 2, 3, 4)),
    ("abcdefb", (0, 0, 1, 2, 3, 4, 5), (0, 0, 0, 0, 0, 0, 2)),
    ("xaybzxc", (0, 0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 1, 6)),
]


@pytest.mark.parametrize("share", [1.0, 0.8], ids=["pure", "with noise"])
@pytest.mark.parametrize(("text", "previous", "_induction"), PAIRS)
def test_classify_recognises_a_previous_token_head(text, previous, _induction, share):
    weights = share * looks_at(*previous) + (1 - share) * uniform(len(text))
    kind_of(weights, text, "previous-token", "every query looks one position back")


@pytest.mark.parametrize("share", [1.0, 0.8], ids=["pure", "with noise"])
@pytest.mark.parametrize(("text", "_previous", "induction"), PAIRS)
def test_classify_recognises_an_induction_head(text, _previous, induction, share):
    weights = share * looks_at(*induction) + (1 - share) * uniform(len(text))
    kind_of(weights, text, "induction", "repeated tokens look at what came after them the last time")


@pytest.mark.parametrize(("t_q", "t_k"), [(6, 6), (9, 9), (4, 12), (1, 7)])
def test_classify_calls_equal_weights_diffuse(rng, t_q, t_k):
    text = "abcdefghijkl"[:t_k]
    kind_of(uniform(t_q, t_k), text, "diffuse", "every query weighs all keys it sees equally")
    # Scores that hardly differ.
    noisy = uniform(t_q, t_k) * (1 + 0.2 * rng.random((t_q, t_k)))
    kind_of(noisy / noisy.sum(-1, keepdims=True), text, "diffuse", "the weights are almost equal")


@pytest.mark.parametrize(
    ("text", "keys", "why"),
    [
        (
            "abcdabcd",
            (0, 1, 2, 3, 0, 1, 2, 3),
            "repeated tokens look at the earlier occurrence, not after it",
        ),
        ("abcdabcd", (0, 1, 2, 3, 4, 5, 6, 7), "every query looks at itself"),
        ("abcdabcd", (0, 0, 0, 0, 0, 0, 0, 0), "every query looks at the first token"),
        ("abcdabcd", (0, 0, 0, 1, 2, 3, 4, 5), "every query looks two positions back"),
        ("abcdefgh", (0, 0, 0, 0, 1, 2, 3, 4), "three back, on a text without repetition"),
    ],
)
def test_classify_calls_the_rest_other(text, keys, why):
    kind_of(looks_at(*keys), text, "other", why)


def test_classify_takes_the_last_positions_as_queries():
    text = "abcdabcdab"
    kind_of(looks_at(6, 7, 8, t_k=10), text, "previous-token", "queries 7, 8, 9 look at 6, 7, 8")
    kind_of(looks_at(4, 5, 6, t_k=10), "abcdxyzwvu", "other", "queries 7, 8, 9 look at 4, 5, 6")
    kind_of(looks_at(4, 1, 2, t_k=10), "abcdefgdab", "induction", "d was at 3, a at 0, b at 1")


def test_classify_judges_late_queries_by_all_the_keys_they_see():
    # Four queries that see 9 to 12 keys and share their weight among three: 0.47 of the largest entropy.
    weights = np.zeros((4, 12))
    weights[:, [0, 2, 4]] = 1 / 3
    kind_of(weights, "abcdefghijkl", "other", "the entropies add up to 4 ln 3, of at most ln 9 + ... + ln 12")
    kind_of(uniform(4, 12), "abcdefghijkl", "diffuse", "the same queries with equal weights on all keys")


def test_classify_needs_half_of_the_weight_on_the_previous_token():
    weights = 0.5 * looks_at(0, 0, 1, 2, 3, 4) + 0.5 * np.eye(6)
    kind_of(weights, "abcdef", "previous-token", "the score is exactly 0.5")
    weights[5, 4:] = 0.5 - 1 / 64, 0.5 + 1 / 64
    kind_of(weights, "abcdef", "other", "the score is just below 0.5")


def test_classify_needs_half_of_the_weight_for_induction():
    weights = 0.5 * looks_at(0, 1, 2, 1, 2, 3) + 0.5 * looks_at(0, 1, 2, 0, 0, 0)
    kind_of(weights, "abcabc", "induction", "the score is exactly 0.5")
    weights[5, [0, 3]] = 0.5 + 1 / 64, 0.5 - 1 / 64
    kind_of(weights, "abcabc", "other", "the score is just below 0.5")


def test_classify_needs_nine_tenths_of_the_largest_disorder_for_diffuse():
    # ln 1 + ln 2 + ... + ln 12 = 19.99. A query at p that looks only at itself loses ln(p + 1) of it.
    text = "abcdefghijkl"
    weights = uniform(12)
    weights[6] = np.eye(12)[6]
    kind_of(weights, text, "diffuse", "the entropies add up to 0.903 of the most they can be")
    weights = uniform(12)
    weights[7] = np.eye(12)[7]
    kind_of(weights, text, "other", "the entropies add up to 0.896 of the most they can be")


def test_classify_asks_its_questions_in_order():
    kind_of(
        looks_at(0, 0, 1, 2, 3, 4),
        "ababab",
        "previous-token",
        "both scores are 1; the previous token comes first",
    )
    kind_of(uniform(6), "aaaaaa", "induction", "on one token repeated, induction comes before diffuse")


def test_classify_modifies_nothing(rng):
    stored, tokens = np.repeat(0.9 * looks_at(0, 0, 0, 1, 2, 3) + 0.1 * uniform(6), 2, axis=1), list("abcabc")
    before = stored.copy()
    kind_of(stored[:, ::2].astype(np.float32), tokens, "induction", "an induction head in float32")
    kind_of(stored[:, ::2], tokens, "induction", "an induction head in a strided array")
    assert np.array_equal(stored, before), "weights were modified"
    assert tokens == list("abcabc"), "the list of tokens was modified"
