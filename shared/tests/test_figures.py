import sys

import pytest

matplotlib = pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex  # noqa: E402
from shared.figures import (  # noqa: E402
    BLUE,
    GREEN,
    INK,
    NIGHT,
    PINK,
    VERMILION,
    WHITE,
    contrast,
    made_with,
    panels,
    publish,
    save,
    style,
    text_on,
    tiles,
)


@pytest.fixture(scope="module")
def wave_svg(tmp_path_factory):
    path = tmp_path_factory.mktemp("figures") / "wave.svg"
    with style():
        figure = wave()
    save(figure, path)
    return path


def wave():
    figure, [left, right] = panels(2, height=2.0, ratios=(2, 1))
    left.plot([0, 1, 2], [0, 1, 0])
    left.fill_between([0, 1, 2], [0, 1, 0], alpha=0.2)
    left.set(xlabel="$d_k$", title="a wave")
    right.plot([1, 2], [1, 2])
    return figure


def line():
    figure, [axes] = panels(width=1.0, height=1.0)
    axes.plot([0, 1], [0, 1])
    axes.set(xticks=[], yticks=[])
    return figure


def test_contrast_is_the_ratio_of_the_guidelines():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast(BLUE, BLUE) == 1
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)  # the guidelines' well-known grey


@pytest.mark.parametrize("page", [WHITE, NIGHT])
@pytest.mark.parametrize(
    ("colour", "least"), [(INK, 4.3), (BLUE, 3.8), (VERMILION, 3.8), (GREEN, 3.8), (PINK, 3.8)]
)
def test_colours_stand_out_from_light_and_dark_pages(colour, least, page):
    assert contrast(colour, page) >= least


@pytest.mark.parametrize("colour", [BLUE, VERMILION, GREEN, PINK])
def test_text_on_a_coloured_square_is_readable(colour):
    assert contrast(text_on(colour), colour) >= 4.4


def test_the_same_figure_gives_the_same_bytes(tmp_path, wave_svg):
    with style():
        figure = wave()
    save(figure, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == wave_svg.read_bytes()
    assert b"<dc:date>" not in wave_svg.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.svg"], "a partial file was left"


def test_a_figure_has_no_background_no_fonts_and_no_bitmaps(wave_svg):
    text = wave_svg.read_text(encoding="utf-8")
    assert "<text" not in text
    assert "<image" not in text
    assert "fill: #ffffff" not in text
    assert not any(line.endswith(" ") for line in text.splitlines())


def test_a_figure_says_which_matplotlib_made_it(tmp_path, wave_svg):
    assert made_with(wave_svg) == matplotlib.__version__
    (tmp_path / "other.svg").write_text("<svg></svg>", encoding="utf-8")
    assert made_with(tmp_path / "other.svg") is None


def test_publish_writes_beside_the_script_or_into_the_folder_it_is_given(tmp_path, monkeypatch):
    beside, elsewhere = tmp_path / "figures", tmp_path / "elsewhere"
    beside.mkdir()
    elsewhere.mkdir()
    script = str(beside / "line.py")
    before = dict(matplotlib.rcParams)
    monkeypatch.setattr(sys, "argv", [script])
    publish(line, script)
    monkeypatch.setattr(sys, "argv", [script, str(elsewhere)])
    publish(line, script)
    assert (beside / "line.svg").read_bytes() == (elsewhere / "line.svg").read_bytes()
    assert BLUE in (beside / "line.svg").read_text(encoding="utf-8"), "drawn in the lectures' style"
    assert dict(matplotlib.rcParams) == before, "the style ends with the figure"


def test_tiles_puts_the_first_row_on_top_and_writes_readable_labels():
    with style():
        _, [axes] = panels()
        tiles(axes, [[BLUE, "none", GREEN], ["none", PINK, BLUE]], [["a", "b", "c"], ["d", "e", "f"]])
    squares = {(round(p.get_x() + 0.46), round(p.get_y() + 0.46)): p for p in axes.patches}
    assert to_hex(squares[2, 0].get_facecolor()) == GREEN
    assert squares[0, 1].get_facecolor()[3] == 0, '"none" is see-through'
    top, bottom = axes.get_ylim()[::-1]
    assert top < bottom, "row 0 must be on top"
    labels = {text.get_text(): text for text in axes.texts}
    assert labels["f"].get_position() == (2, 1)
    assert labels["c"].get_color() == text_on(GREEN)
    assert labels["b"].get_color() == INK


def test_panels_returns_axes_from_left_to_right():
    figure, axes = panels(3, width=6.0, height=2.0, ratios=(1, 2, 1))
    assert figure.get_size_inches().tolist() == [6.0, 2.0]
    assert len(axes) == 3
    assert [a.get_subplotspec().colspan.start for a in axes] == [0, 1, 2]
