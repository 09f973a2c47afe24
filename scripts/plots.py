"""Pictures of a calibration: energy spectra, chosen ranks and widths, perplexity against bytes."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path

import numpy as np
from matplotlib import pyplot
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle


def _save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def method(path: Path) -> None:
    """Picture of the README: keys and values become packed latents, and a step reads them."""
    shades = {8: "#08519c", 4: "#3182bd", 3: "#6baed6", 2: "#9ecae1", 1: "#deebf7", 0: "#ffffff"}  # by bits
    figure, axes = pyplot.subplots(figsize=(11, 4.6))
    axes.set(xlim=(0, 110), ylim=(0, 46))
    axes.axis("off")

    edge = {"edgecolor": "#404040", "linewidth": 0.8}

    def box(x, y, width, height, text, color="#f0f0f0", size=9, **style):
        axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.3", **(edge | {"facecolor": color})))
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, **style)

    def cell(x, y, width, height, color, text="", size=8, **style):
        axes.add_patch(Rectangle((x, y), width, height, facecolor=color, **edge, **style))
        white = color in (shades[8], shades[4])
        label = axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)
        label.set(color="white" if white else "black")

    def arrow(start, end, **style):
        axes.add_patch(
            FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color="#404040", lw=1.1, **style)
        )

    exact = "#fdd0a2"
    # Writing: from the hidden states to the latent.
    box(1, 36, 13, 6, "new token\nhidden state $x$")
    arrow((14.7, 39), (19.3, 39))
    box(20, 36, 11, 6, "BLinear\n$c = B\\,x$", "#e5f5e0")
    arrow((31.7, 39), (36.3, 39))
    shares = [(8, 2), (4, 4), (3, 4), (2, 6), (1, 5), (0, 6)]
    x = 37
    for bits, width in shares:
        cell(
            x,
            37,
            width,
            4,
            shades[bits],
            "dropped" if bits == 0 else f"{bits}",
            7.5,
            linestyle="--" if bits == 0 else "-",
        )
        x += width
    axes.text(37, 42.3, "latent channels by falling energy, bits chosen by the budget", fontsize=8.5)
    # The cache of a row.
    y = 21
    arrow((64.7, 39), (79.8, 29.6), connectionstyle="angle,angleA=0,angleB=90,rad=4")
    axes.text(
        81,
        36.3,
        "enters the window exact;\npacked with its block once\n$R$ newer tokens exist",
        fontsize=8.5,
        va="center",
    )
    x = 1
    for width, text, color in [
        (9, "4 sinks\nexact", exact),
        *[(12, f"block {i}", shades[3]) for i in range(3)],
        (8, "…", "white"),
        (12, "block $n$", shades[3]),
        (17, "window: newest\ntokens, exact", exact),
        (6, "new", "#f0f0f0"),
    ]:
        cell(x, y, width, 8, color, text)
        x += width
    axes.text(1, 30, "KIVILatentCache, one row of one layer", fontsize=9, weight="bold")
    axes.text(91, 27.2, "blocks are immutable:", fontsize=8.5)
    axes.text(91, 24.4, "rows, beams and forks", fontsize=8.5)
    axes.text(91, 21.6, "share them by a table", fontsize=8.5)
    # Reading.
    for start in (28, 40, 60, 74):
        arrow((start, 20.6), (start, 16.3))
    box(1, 4, 13, 6, "its query $q$")
    box(
        20,
        9.5,
        56,
        6,
        "scores $q \\cdot \\mathrm{RoPE}(A_k c)$: packed codes are read, keys rebuilt tile by tile",
        "#e5f5e0",
    )
    box(20, 1, 56, 6, "$\\sum p\\,c$: values are summed up as codes, in the latent", "#e5f5e0")
    arrow((14.7, 7.6), (19.3, 12))
    arrow((48, 9.2), (48, 7.4))
    arrow((76.7, 4), (80.3, 4))
    box(81, 1, 11, 6, "ALinear\n$A_v \\sum p\\,c$", "#e5f5e0")
    arrow((92.7, 4), (96.3, 4))
    box(97, 1, 11, 6, "attention\noutput")
    _save(figure, path)


#: Titles of what a latent holds, by the side in its name.
_TITLES = {"k": "keys", "v": "values", "kv": "keys and values together"}


def _by_side(names) -> dict[str, list[str]]:
    """Names of projections or of blocks, by side."""
    sides = {}
    for name in names:
        sides.setdefault(name.rpartition(".")[2].partition("_")[0], []).append(name)
    return sides


def _layer(name: str) -> str:
    """Layer of a projection, or the first one of a block."""
    return name.split(".")[2]


def spectra(report: dict, path: Path) -> None:
    """Energy of the latent channels of every layer, in the unit of the objective times the layer's measured rate."""
    sides = _by_side(report["energies"])
    figure, panels = pyplot.subplots(1, len(sides), figsize=(11, 4.2), sharey=True, squeeze=False)
    panels = panels[0]
    colours = pyplot.get_cmap("viridis")(np.linspace(0, 0.95, max(map(len, sides.values()))))
    for panel, (side, mine) in zip(panels, sides.items()):
        for name, colour in zip(mine, colours):
            energy = np.sort(np.concatenate(report["energies"][name]))[::-1] * report["rates"].get(name, 1.0)
            rank = sum(report["truncation_ranks"][name])
            energy = np.maximum(energy, energy[0] * 1e-9)
            panel.semilogy(np.arange(1, len(energy) + 1), energy, color=colour, label=_layer(name), linewidth=1)
            panel.plot(rank, energy[min(rank, len(energy)) - 1], "o", color=colour, markersize=4)
        panel.set(title=f"{_TITLES[side]}: energy by channel, the dot is the rank", xlabel="channel")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"energy ({report['config']['objective']})")
    if len(colours) <= 12:
        panels[-1].legend(fontsize=7, title="layer")
    _save(figure, path)


def widths(report: dict, path: Path) -> None:
    """Bits of each channel, a row per layer or block: a heat map of ranks and widths."""
    sides, rows = _by_side(report["truncation_ranks"]), {}
    for side, names in sides.items():
        for name in names:
            ranks, bits_of_channels = report["truncation_ranks"][name], []
            uniform = report["config"][f"{side[0]}_bits"]  # a latent of both is stored as keys
            for group in report["width_tiers"].get(name) or [[[r, uniform]] for r in ranks]:
                for channels, bits in group:
                    bits_of_channels += [bits] * channels
            rows[name] = sorted(bits_of_channels, reverse=True)
    levels = sorted({0}.union(*rows.values()))
    longest = max(map(len, rows.values()))
    height = max(3.4, 1.6 + 0.32 * max(map(len, sides.values())))
    figure, panels = pyplot.subplots(1, len(sides), figsize=(11, height), sharey=True, squeeze=False)
    panels = panels[0]
    colours = ListedColormap([(1, 1, 1, 1), *pyplot.get_cmap("magma_r")(np.linspace(0.15, 0.95, len(levels) - 1))])
    for panel, (side, mine) in zip(panels, sides.items()):
        image = np.zeros((len(mine), longest), dtype=int)
        for line, name in zip(image, mine):
            line[: len(rows[name])] = np.searchsorted(levels, rows[name])
        norm = BoundaryNorm(np.arange(len(levels) + 1) - 0.5, len(levels))
        drawn = panel.imshow(image, aspect="auto", interpolation="nearest", cmap=colours, norm=norm)
        panel.set(title=_TITLES[side], xlabel="channel, widest first")
        panel.set_yticks(range(len(mine)), list(map(_layer, mine)))
    panels[0].set_ylabel("first layer" if report["config"].get("keep_dense") else "layer")
    bar = figure.colorbar(drawn, ax=panels, ticks=range(len(levels)), label="bits")
    bar.set_ticklabels([f"{b:g}" for b in levels])
    figure.suptitle(
        f"Widths at {report['share_of_dense']:.2%} of the dense cache" if report["budget"] else "Ranks", x=0.45
    )
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def curve(series: dict[str, dict], path: Path, limit: float = 0.5) -> None:
    """Increase of the perplexity against the share of the dense cache's bytes at 4,096 tokens.

    Args:
        series: By label, results of `eval_perplexity.measure` by name; the one called "dense" is left out.
        path: PNG to write.
        limit: Largest increase on the axis; points above it stand on its edge.
    """
    figure, axes = pyplot.subplots(figsize=(10, 5))
    markers = iter("osD^vP*X<>ph")
    for label, results in series.items():
        points = sorted(
            (100 / r["ratio"]["4096"], 100 * r["perplexity_increase"]) for n, r in results.items() if n != "dense"
        )
        points = [(x, min(y, 100 * limit)) for x, y in points]
        if points:
            ours = label == "ours"
            style = {"linewidth": 2.2, "zorder": 3} if ours else {"linewidth": 1, "alpha": 0.8}
            axes.plot(*zip(*points), marker=next(markers), markersize=6 if ours else 4, label=label, **style)
    axes.axhline(0, color="black", linewidth=0.7, linestyle=":")
    axes.set_xscale("log")
    ticks = [2, 3, 4, 5, 6.25, 8, 12.5, 25, 50, 100]
    axes.set_xticks(ticks, [f"{t:g}%" for t in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_yticks([0, 0.5, 1, 2, 5, 10, 20, 50], ["0", "0.5%", "1%", "2%", "5%", "10%", "20%", "50% or more"])
    axes.set_ylim(bottom=-0.5)
    axes.set(xlabel="bytes of the cache, share of the dense one in 16 bits (4,096 tokens, everything counted)")
    axes.set(ylabel="increase of the perplexity", title="Perplexity against bytes")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    _save(figure, path)


def long_documents(summary: dict, path: Path) -> None:
    """Perplexity over the dense model's by position in a document, and the bytes that each cache holds there.

    Args:
        summary: Of `eval_long_documents.summary`.
        path: PNG to write.
    """
    figure, (increase, held) = pyplot.subplots(1, 2, figsize=(11, 4.4))
    ends = np.array(summary["ends"])
    middles = ends - ends[0] / 2
    for marker, (name, cache) in zip("osD^vP*X<>ph", summary["caches"].items()):
        if name == "dense":
            held.plot(ends, np.array(cache["bytes_held"]) / 2**20, "k:", label="dense")
            continue
        label = f"{name} ({100 / cache['ratio']['4096']:.3g}% of dense at 4k)"
        (line,) = increase.plot(middles, 100 * np.array(cache["increase"][:-1]), marker=marker, ms=4, label=label)
        if "low" in cache:
            low, high = (100 * np.array(cache[end][:-1]) for end in ("low", "high"))
            increase.fill_between(middles, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        held.plot(ends, np.array(cache["bytes_held"]) / 2**20, marker=marker, ms=4, color=line.get_color(), label=name)
    increase.axhline(0, color="black", linewidth=0.7, linestyle=":")
    increase.set(xlabel="position in the document, tokens", ylabel="perplexity over the dense model's, %")
    increase.set_yscale("symlog", linthresh=1)
    increase.yaxis.set_major_formatter("{x:g}")
    increase.set_title("Loss by position (bands: 95%, over documents)")
    held.set(xlabel="tokens held", ylabel="bytes of one row, MiB", yscale="log", title="Bytes held")
    for axes in (increase, held):
        axes.grid(alpha=0.3)
    held.yaxis.set_major_formatter("{x:g}")
    increase.legend(fontsize=7)
    held.legend(fontsize=7)
    _save(figure, path)


def retrieval(record: dict, path: Path) -> None:
    """Scores of `eval_retrieval`: by distance a line per cache; by length and depth or task a heat map per cache."""
    results, c = record["results"], record["config"]
    if c["task"] == "copying":
        figure, (right, loss) = pyplot.subplots(1, 2, figsize=(12, 4.2))
        keys = [f"{distance:g}" for distance in c["distances"]]
        dense = results["dense"]["cells"]
        for marker, (name, found) in zip("osD^vP*X<>ph", results.items()):
            style = {"marker": marker, "ms": 5, "linewidth": 1.2}
            if name == "dense":
                style |= {"color": "black", "linewidth": 3, "alpha": 0.4}
            label = name if name == "dense" else f"{name} ({100 / found['ratio']['4096']:.3g}% of dense)"
            right.plot(c["distances"], [found["cells"][k]["score"] for k in keys], **style)
            over = [found["cells"][k]["loss_per_word"] - dense[k]["loss_per_word"] for k in keys]
            loss.plot(c["distances"], over, label=label, **style)
        right.axhline(1 / c["choices"], color="black", linewidth=0.7, linestyle=":")
        right.text(c["distances"][0], 1 / c["choices"] + 0.01, "guessing", fontsize=8)
        right.set(ylabel="right answers", ylim=(0, 1.03))
        right.set_title(f"Which of {c['choices']} orders of {c['words']} words was listed?")
        loss.set(ylabel="nats per word over the dense model", title="Loss of the listed order")
        for axes in (right, loss):
            axes.set_xlabel("tokens between listing and question")
            axes.grid(alpha=0.3)
        loss.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), title="bytes at 4,096 tokens")
        _save(figure, path)
        return
    figure, panels = pyplot.subplots(
        1, len(results), figsize=(2.6 * len(results) + 1, 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    rows = c["variants"] if c["task"] == "ruler" else [f"{depth:g}" for depth in c["depths"]]
    for panel, (name, found) in zip(panels[0], results.items()):
        image = [[found["cells"][f"{n:g} {row}"]["score"] for n in c["lengths"]] for row in rows]
        drawn = panel.imshow(image, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        panel.set_xticks(range(len(c["lengths"])), [f"{n:,}" for n in c["lengths"]], rotation=45)
        panel.set_yticks(range(len(rows)), rows if c["task"] == "ruler" else [f"{depth:.0%}" for depth in c["depths"]])
        panel.set(title=name, xlabel="tokens")
    panels[0][0].set_ylabel("task of RULER" if c["task"] == "ruler" else "depth of the needle")
    figure.colorbar(drawn, ax=panels[0], label="right answers")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
