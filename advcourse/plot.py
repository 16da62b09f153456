"""One visual style: transparent ground and mid-grey ink, so that a figure reads on a light and on a dark page,
and colours that colour-blind readers can tell apart (Okabe and Ito's set, with a marker and a dash pattern each)."""
import io

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from torch import Tensor

INK = "#7b7b7b"
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#b4639a", "#4aa3d8"
COLOURS = [BLUE, ORANGE, GREEN, RED, PURPLE, SKY]
LOWER, EXACT, UPPER, CLEAN = BLUE, GREEN, RED, INK  # the bracket wears the same colours in every chapter
DASHES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1))]


def use_style() -> None:
    """Apply the course's style to matplotlib, for this process."""
    matplotlib.rcParams.update({
        "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "legend.facecolor": "none",
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "axes.titlecolor": INK,
        "xtick.color": INK, "ytick.color": INK, "grid.color": INK, "grid.alpha": 0.25, "axes.grid": True,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.size": 10.5,
        "axes.titlesize": 11, "lines.linewidth": 2, "figure.dpi": 100, "savefig.dpi": 120, "figure.figsize": (6.4, 3.4),
        "axes.prop_cycle": cycler(color=COLOURS) + cycler(linestyle=DASHES), "image.cmap": "gray",
    })


def show(fig, alt: str) -> None:
    """Display a figure with a text that says what it shows, and close it.

    The text travels as the output's plain-text form; the book turns it into the picture's alt text. ValueError when empty.
    """
    from IPython.display import display

    if not alt.strip():
        raise ValueError(f"alt={alt!r}: say in a sentence what the figure shows")
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None})
    plt.close(fig)
    display({"image/png": buffer.getvalue(), "text/plain": alt}, raw=True)


def image(ax, a: Tensor, title: str = "", *, signed: bool = False, limit: float | None = None) -> None:
    """Draw one image [1, h, w], [3, h, w] or [h, w]; `signed` draws a perturbation, zero in grey, up to +-limit."""
    pixels = np.asarray(a.detach().cpu()).squeeze()
    if pixels.ndim == 3:
        pixels = pixels.transpose(1, 2, 0)
    if signed:
        limit = limit or max(float(np.abs(pixels).max()), 1e-12)
        shown = ax.imshow(pixels, cmap="RdBu_r", vmin=-limit, vmax=limit) if pixels.ndim == 2 else \
            ax.imshow(0.5 + pixels / (2 * limit))
    else:
        shown = ax.imshow(pixels, vmin=0, vmax=1)
    shown.set_interpolation("nearest")
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    if title:
        ax.set_title(title, fontsize=9.5)


def images(rows, titles=None, *, signed_rows=(), size: float = 1.15):
    """A grid of images: `rows` is a list of batches [m, *shape]; `titles` a list of lists of the same shape. -> figure."""
    m = max(len(r) for r in rows)
    fig, axes = plt.subplots(len(rows), m, figsize=(size * m, size * len(rows) * (1.28 if titles else 1.05)), squeeze=False)
    for i, row in enumerate(rows):
        for j in range(m):
            if j < len(row):
                image(axes[i, j], row[j], titles[i][j] if titles else "", signed=i in signed_rows)
            else:
                axes[i, j].axis("off")
    fig.tight_layout(pad=0.4)
    return fig


def curve(ax, x, values, low=None, high=None, label: str | None = None, **style) -> None:
    """A line with, where given, its confidence band."""
    line, = ax.plot(x, values, label=label, **style)
    if low is not None:
        ax.fill_between(x, low, high, color=line.get_color(), alpha=0.18, linewidth=0)


def table(head, rows, caption: str) -> None:
    """Display a table as HTML that a screen reader can walk: a caption, one head a column, the first cell of a row its head.

    Cells are text, numbers already formatted. ValueError for an empty caption or a row of another length than the head.
    """
    from html import escape

    from IPython.display import HTML, display

    if not caption.strip():
        raise ValueError(f"caption={caption!r}: say what the table shows")
    for k, row in enumerate(rows):
        if len(row) != len(head):
            raise ValueError(f"row {k} has {len(row)} cells for {len(head)} columns")
    top = "".join(f'<th scope="col">{escape(str(cell))}</th>' for cell in head)
    body = "\n".join(f'<tr><th scope="row">{escape(str(first))}</th>' + "".join(f"<td>{escape(str(c))}</td>" for c in rest)
                     + "</tr>" for first, *rest in rows)
    display(HTML(f"<table>\n<caption>{escape(caption)}</caption>\n<thead><tr>{top}</tr></thead>\n"
                 f"<tbody>\n{body}\n</tbody>\n</table>"))
