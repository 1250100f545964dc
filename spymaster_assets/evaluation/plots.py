"""Pictures people look at first: PNG bytes, equal for equal input."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.dates import DateFormatter
from matplotlib.figure import Figure

from spymaster_assets.market.calendar import NEW_YORK, Session
from spymaster_assets.settings import NS

INK, FAINT, GRID = "#1d2733", "#8a94a3", "#e6e9ee"
BLUE, ORANGE, GREEN, RED, GREY = "#2f6fb2", "#d9822b", "#3a8f5c", "#c2453d", "#a9b1bd"
OUTCOME_COLOURS = {"BREAK": ORANGE, "BOUNCE": BLUE, "CHOP": GREY, "UNDEFINED": "#d8dce2"}
LEVEL_COLOURS = {"PM": "#7b5ea7", "OR": GREEN, "SE": RED, "SM": "#b58900", "VW": "#008b8b"}
_MARK = "SIMULATED MARKET"


def png_markdown(png: bytes) -> str:
    """Markdown image with the PNG inside, as Dagster metadata shows it."""
    return f"![chart]({data_uri(png)})"


def data_uri(png: bytes) -> str:
    """The PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def session_chart(
    bars_1m: pl.DataFrame,
    signals: pl.DataFrame | None,
    levels: pl.DataFrame | None,
    session: Session,
    title: str,
    simulated: bool,
) -> bytes:
    """One-minute closes with their range, the levels as they were known, and touches coloured by their outcome after 4 minutes."""
    figure, axes = _figure(9.6, 4.2, simulated, (0.55, 0.85, 0.35, 0.35))
    shown = bars_1m
    if signals is not None:
        margin = 45 * 60 * NS
        shown = bars_1m.filter(
            pl.col("start_ns").is_between(session.regular_open_ns - margin, session.regular_close_ns)
        )
    when = _local(shown["start_ns"].to_list())
    low, high, close = (shown[c].to_numpy() / 1e9 for c in ("low_e9", "high_e9", "close_e9"))
    axes.fill_between(when, low, high, color=BLUE, alpha=0.18, linewidth=0, step="post")  # type: ignore[arg-type]
    axes.plot(when, close, color=INK, linewidth=0.8)  # type: ignore[arg-type]
    axes.axvspan(
        *_local([session.regular_open_ns, session.regular_close_ns]),  # type: ignore[arg-type]
        color="#000000",
        alpha=0.025,
        linewidth=0,
    )
    if len(close):
        room = max(0.15 * float(high.max() - low.min()), 1e-9)
        axes.set_ylim(float(low.min()) - room, float(high.max()) + 1.5 * room)  # walls may lie far away
    if levels is not None:
        for (kind,), part in levels.filter(~pl.col("level_kind_name").is_in(["ROUND", "STRIKE"])).group_by(
            "level_kind_name", maintain_order=True
        ):
            part = part.sort("start_ns")
            axes.plot(
                _local(part["start_ns"].to_list()),  # type: ignore[arg-type]
                part["level_price_e9"].to_numpy() / 1e9,
                linewidth=0.9,
                alpha=0.8,
                color=LEVEL_COLOURS.get(str(kind)[:2], FAINT),
                # a wall jumps from strike to strike: a line would draw prices that it never had
                linestyle="" if "WALL" in str(kind) else "-" if str(kind).endswith(("HIGH", "200", "VWAP")) else "--",
                marker="." if "WALL" in str(kind) else "",
                markersize=1.6,
            )
            axes.annotate(
                str(kind).replace("_", " ").lower(),
                (_local([part["start_ns"][-1]])[0], part["level_price_e9"][-1] / 1e9),
                xytext=(4, 0), textcoords="offset points", fontsize=6.5, color=LEVEL_COLOURS.get(str(kind)[:2], FAINT), va="center",
                annotation_clip=True,
            )  # fmt: skip
    if signals is not None and signals.height:
        for outcome, colour in OUTCOME_COLOURS.items():
            for side, marker in (("UP", "^"), ("DOWN", "v")):
                rows = signals.filter((pl.col("outcome_4min") == outcome) & (pl.col("direction") == side))
                axes.scatter(
                    _local(rows["ts_ns"].to_list()),  # type: ignore[arg-type]
                    rows["level_price_e9"].to_numpy() / 1e9,
                    marker=marker, s=26, color=colour, edgecolors="white", linewidths=0.5, zorder=5,
                    label=outcome.lower() if side == "UP" else None,
                )  # fmt: skip
        axes.legend(loc="upper left", fontsize=7, ncols=4, frameon=False, handletextpad=0.1)
        axes.margins(x=0.08)
    axes.xaxis.set_major_formatter(DateFormatter("%H:%M", tz=NEW_YORK))
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_ylabel("points", fontsize=8)
    return _png(figure)


def label_balance(counts: Mapping[str, Mapping[str, int]], simulated: bool) -> bytes:
    """Share of each outcome per confirmation delay, with counts. counts: {delay: {outcome: rows}}."""
    figure, axes = _figure(6.4, 0.55 * max(len(counts), 1) + 1.1, simulated, (0.9, 0.2, 0.3, 0.4))
    for y, (_delay, parts) in enumerate(counts.items()):
        total, left = max(sum(parts.values()), 1), 0.0
        for outcome, colour in OUTCOME_COLOURS.items():
            share = parts.get(outcome, 0) / total
            axes.barh(y, share, left=left, color=colour, height=0.62)
            if share > 0.05:
                axes.text(left + share / 2, y, f"{outcome.lower()} {parts[outcome]}", ha="center", va="center", fontsize=7.5,
                          color=INK if outcome == "UNDEFINED" else "white")  # fmt: skip
            left += share
    axes.set_yticks(range(len(counts)), [f"{d} delay" for d in counts], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    axes.set_title("Outcomes within 8 minutes of confirmation", fontsize=10, loc="left", color=INK)
    return _png(figure)


def loss_curves(history: Mapping[str, Sequence[float]], best_epoch: int, simulated: bool) -> bytes:
    """Training and validation loss by epoch; the epoch that was kept is marked."""
    figure, axes = _figure(6.4, 3.2, simulated)
    for name, colour in (("train_loss", GREY), ("validation_loss", BLUE)):
        values = history.get(name, [])
        axes.plot(range(1, len(values) + 1), values, color=colour, label=name.replace("_loss", ""), linewidth=1.5)
    axes.axvline(best_epoch + 1, color=ORANGE, linewidth=1, linestyle=":")
    axes.annotate(f"kept: epoch {best_epoch + 1}", (best_epoch + 1, axes.get_ylim()[1]), xytext=(4, -10), textcoords="offset points",
                  fontsize=7.5, color=ORANGE)  # fmt: skip
    axes.legend(fontsize=8, frameon=False)
    axes.set_xlabel("epoch", fontsize=8)
    axes.set_title("Loss", fontsize=10, loc="left", color=INK)
    return _png(figure)


def reliability_curves(bins: Mapping[str, Sequence[Mapping[str, float]]], simulated: bool) -> bytes:
    """Predicted against observed rates with 95 % intervals for each head, and how many rows each bin holds."""
    names = list(bins)
    columns = min(3, max(len(names), 1))
    rows = (len(names) + columns - 1) // columns or 1
    figure = Figure(figsize=(3.2 * columns, 3.3 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for n, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, n + 1)
        _style(axes)
        x = np.array([b["mean_predicted"] for b in bins[name]])
        y = np.array([b["observed_rate"] for b in bins[name]])
        spread = np.array([[b["observed_rate"] - b["low"], b["high"] - b["observed_rate"]] for b in bins[name]]).T
        counts = np.array([b["count"] for b in bins[name]])
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8, linestyle="--")
        if len(x):
            axes.bar(x, 0.12 * counts / counts.max(), width=0.025, color=GRID, zorder=1)
            axes.errorbar(
                x, y, yerr=np.maximum(spread, 0), fmt="o-", color=BLUE, markersize=4, linewidth=1.1, capsize=2, zorder=3
            )
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_title(f"{name}  n={int(counts.sum()) if len(x) else 0}", fontsize=8.5, loc="left", color=INK)
        axes.set_xlabel("predicted", fontsize=7.5)
        axes.set_ylabel("observed", fontsize=7.5)
    if simulated:
        figure.suptitle(_MARK, x=0.995, ha="right", fontsize=7, color=RED, weight="bold")
    return _png(figure)


def fold_strip(manifests: Sequence[Mapping[str, Any]], sessions: Sequence[str], simulated: bool) -> bytes:
    """One row a fold: which sessions train, are embargoed, validate and test."""
    used = [s for m in manifests for part in ("train", "validation", "test") for s in m[part]]
    shown = [s for s in sessions if min(used) <= s <= max(used)] if used else []
    at = {s: n for n, s in enumerate(shown)}
    figure, axes = _figure(9.6, 0.42 * max(len(manifests), 1) + 1.3, simulated)
    for y, manifest in enumerate(manifests):
        for part, colour in (("train", BLUE), ("validation", GREEN), ("test", ORANGE), ("embargoed", "#e9d8d6")):
            x = [at[s] for s in manifest[part] if s in at]
            axes.barh([y] * len(x), 0.92, left=x, color=colour, height=0.66, label=part if y == 0 else None)
    axes.set_yticks(range(len(manifests)), [f"as of {m['asof']}" for m in manifests], fontsize=8)
    axes.invert_yaxis()
    step = max(1, len(shown) // 9)
    axes.set_xticks(
        [n + 0.46 for n in range(0, len(shown), step)], [shown[n] for n in range(0, len(shown), step)], fontsize=7
    )
    axes.set_title("Walk-forward folds, one cell a session", fontsize=10, loc="left", color=INK, pad=20)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, fontsize=7, frameon=False)
    return _png(figure)


def gains(names: Sequence[str], values: Sequence[float], title: str, simulated: bool) -> bytes:
    """Total gain of the features that a tree model uses most."""
    figure, axes = _figure(6.4, 0.22 * max(len(names), 1) + 0.9, simulated)
    axes.barh(range(len(names)), values, color=BLUE, height=0.7)
    axes.set_yticks(range(len(names)), list(names), fontsize=7.5)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    return _png(figure)


def canaries(entries: Sequence[Mapping[str, Any]], asof: str, simulated: bool) -> bytes:
    """Canaries of a fold against their limits: AUC left, skill right; grey where a canary could not be assessed."""
    panels = [[e for e in entries if e["statistic"] == s] for s in ("AUC", "skill")]
    height = 0.3 * max(len(p) for p in panels) + 1.15
    figure = Figure(figsize=(11.5, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    colours = {"holds": GREEN, "failed": RED, "not assessable": GREY}
    for n, (part, label, chance) in enumerate(zip(panels, ("AUC", "skill"), (0.5, 0.0), strict=True)):
        axes = figure.add_subplot(1, 2, n + 1)
        _style(axes)
        axes.axvline(chance, color=INK, linewidth=0.9)
        for y, e in enumerate(part):
            colour = colours[e["verdict"]]
            if e["value"] is None:
                axes.text(chance, y, f"  not assessable: {e['reason']}", fontsize=7, color=FAINT, va="center")
                continue
            if e["low"] is None:
                bound = ">" if e["canary"].startswith("planted") else "<"
                axes.plot([e["limit"]] * 2, [y - 0.36, y + 0.36], color=INK, linewidth=1.4, linestyle=":")
                axes.annotate(
                    f"{bound} {e['limit']:g}", (e["limit"], y - 0.36), fontsize=6, color=FAINT, ha="center", va="bottom"
                )
            else:
                axes.plot([e["low"], e["high"]], [y, y], color=colour, linewidth=2.2, solid_capstyle="butt")
            axes.plot(e["value"], y, "o", color=colour, markersize=5)
        axes.set_yticks(range(len(part)), [f"{e['what']}  n={e['n']}" for e in part], fontsize=7.5)
        axes.set_ylim(len(part) - 0.4, -0.7)
        level = next((e["level"] for e in part if e["level"] is not None), None)
        axes.set_xlabel(label + (f", intervals of {level:.3%}" if level else ""), fontsize=8)
        title = f"Canaries as of {asof}" if n == 0 else "Noise against the base rate"
        axes.set_title(title, fontsize=10, loc="left", color=INK)
        if label == "AUC":
            axes.set_xlim(min([0.38, *(e["low"] - 0.02 for e in part if e["low"] is not None)]), 1.02)
    if simulated:
        figure.suptitle(_MARK, x=0.995, ha="right", fontsize=7, color=RED, weight="bold")
    return _png(figure)


def _figure(
    width: float, height: float, simulated: bool, margins: tuple[float, float, float, float] | None = None
) -> tuple[Figure, Axes]:
    """margins: left, right, bottom, top in inches, for charts that backfills draw by the hundred: solving a layout doubles their time."""
    figure = Figure(figsize=(width, height), dpi=110, layout=None if margins else "constrained")
    FigureCanvasAgg(figure)
    if margins:
        left, right, bottom, top = margins
        axes = figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))
    else:
        axes = figure.add_subplot()
    _style(axes)
    if simulated:
        figure.text(0.995, 0.992, _MARK, ha="right", va="top", fontsize=7, color=RED, weight="bold")
    return figure, axes


def _style(axes: Axes) -> None:
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=7.5, colors=INK, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _local(times_ns: Sequence[int]) -> list[datetime]:
    return [datetime.fromtimestamp(t / NS, UTC).astimezone(NEW_YORK) for t in times_ns]
