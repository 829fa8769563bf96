"""Figures, looked at before they are written."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def figure_of(monkeypatch, module, draw) -> Figure:
    """The figure that `draw`, a function of this module's, would write."""
    found = []
    with monkeypatch.context() as patched:
        patched.setattr(module, "save_figure", lambda figure, axes, file: found.append(figure))
        draw()
    return found[0]


def assert_readable(figure):
    """Every text lies within the picture, upright or not, at 7 points or more, and none overlaps another of its axes."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    whole = figure.bbox.padded(2)
    for axes in figure.axes:
        texts = [axes.xaxis.label, axes.yaxis.label, *tick_labels(axes.xaxis), *tick_labels(axes.yaxis), *axes.texts]
        texts += axes.get_legend().get_texts() if axes.get_legend() else []
        texts = [text for text in texts if text.get_visible() and text.get_text()]
        boxes = [text.get_window_extent(renderer) for text in texts]
        inside = [box for box, text in zip(boxes, texts, strict=True) if axes.axison or text in axes.texts]
        assert all(whole.fully_containsx(box.x0) and whole.fully_containsx(box.x1) for box in inside)
        assert all(whole.fully_containsy(box.y0) and whole.fully_containsy(box.y1) for box in inside)
        assert all(text.get_fontsize() >= 7 for text in texts)
        for i, box in enumerate(boxes):
            clashes = [texts[j].get_text() for j in range(i) if overlap(box, boxes[j])]
            assert not clashes, (texts[i].get_text(), clashes)
        if axes.get_legend():  # above the diagram: over no line
            assert axes.get_legend().get_window_extent(renderer).y0 >= axes.get_window_extent(renderer).y1 - 1


def tick_labels(axis):
    """Those that are drawn: at ticks within the limits."""
    low, high = sorted(axis.get_view_interval())
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    return [tick.label1 for tick in ticks if low <= tick.get_loc() <= high and tick.label1.get_visible()]


def overlap(one, other):
    """Whether two boxes share more than their edges."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    return width > 1 and min(one.y1, other.y1) - max(one.y0, other.y0) > 1
