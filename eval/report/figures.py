"""The report's figures. Inline in a page they take their colours from the page's copy of `svg.STYLE`."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

from latefusion.eval.report import svg
from latefusion.eval.report.svg import ROW, WIDTH
from latefusion.eval.report.tables import percent, prefix, shares

ALL = "all questions"
Series = list[tuple[int, dict[str, Any]]]


def series_of(results: dict[str, Any], *, controls: bool) -> Series:
    """The systems with the number of their colour, the same in every figure."""
    systems = enumerate(results["systems"].values())
    return [(i, system) for i, system in systems if controls or not system.get("control", False)]


def tokens_per_layer(results: dict[str, Any]) -> str:
    """Vision tokens that each layer computes, as steps, one line a system; the candidate's area is filled."""
    series = series_of(results, controls=False)
    candidate = results["systems"][results["roles"]["candidate"]]
    layers = results["model"]["layers"]
    most = max(max(system["vision_tokens"]["per_layer"]) for _, system in series) or 1
    top, left, right, height = ROW * len(series) + 14, 42, 10, 170
    bottom = top + height
    x = svg.scale(0, layers, left, WIDTH - right)
    y = svg.scale(0, most, bottom, top)
    solid = [(i, {**s, "solid": s is candidate}) for i, s in series]
    body = svg.legend(solid, lambda s: f"{s['vision_tokens']['mean']:.1f} a layer on average", lines=True)
    for share in (0, 0.25, 0.5, 0.75, 1):
        body += svg.horizontal(left, WIDTH - right, y(most * share), f"{most * share:.0f}")
    for layer in range(0, layers, ceil(layers / 8)):
        body += svg.text(x(layer + 0.5), bottom + 16, str(layer), anchor="middle", muted=True)
    body += svg.text((left + WIDTH - right) / 2, bottom + 34, "decoder layer", anchor="middle")
    for i, system in series:
        tokens = system["vision_tokens"]["per_layer"]
        path = svg.path([(x(layer + end), y(n)) for layer, n in enumerate(tokens) for end in (0, 1)])
        number = i % svg.SERIES
        if system is candidate:
            closed = f"{path} L{x(layers):.1f} {y(0):.1f} L{x(0):.1f} {y(0):.1f} Z"
            body += f'<path class="area c{number}" d="{closed}"/>'
        dash = "" if system is candidate else svg.DASHES[number]
        body += f'<path class="line c{number}" stroke-dasharray="{dash}" d="{path}"/>'
    means = ", ".join(f"{s['name']} {s['vision_tokens']['mean']:.1f}" for _, s in series)
    return svg.svg("tokens", "Vision tokens per decoder layer", f"On average: {means}.", bottom + 42, body)


def accuracy_against_flops(results: dict[str, Any]) -> str:
    """One point a system: decoder FLOPs across, accuracy up, with its interval."""
    series = series_of(results, controls=True)
    scores = [system["accuracy"]["overall"] for _, system in series]
    low, high, ticks = svg.percent_axis([100 * s["low"] for s in scores], [100 * s["high"] for s in scores])
    most = max(system["flops"]["mean"] for _, system in series)
    unit, letter = prefix(most)
    top, left, right, height = ROW * len(series) + 14, 42, 14, 210
    bottom = top + height
    x = svg.scale(0, most * 1.06, left, WIDTH - right)
    y = svg.scale(low, high, bottom, top)

    def label(system: dict[str, Any]) -> str:
        score = percent(system["accuracy"]["overall"]["value"])
        return f"{score}% at {system['flops']['mean'] / unit:.2f} {letter}, {shares(system, digits=0)}"

    body = svg.legend(series, label)
    for tick in ticks:
        body += svg.horizontal(left, WIDTH - right, y(tick), f"{tick:g}%")
    for tick in svg.nice_ticks(0, most / unit, 5):
        body += svg.text(x(tick * unit), bottom + 16, f"{tick:g}", anchor="middle", muted=True)
    axis = f"decoder {letter}FLOPs a prompt"
    body += svg.text((left + WIDTH - right) / 2, bottom + 34, axis, anchor="middle")
    for (i, system), score in zip(series, scores, strict=True):
        at = x(system["flops"]["mean"])
        body += svg.bar(at, y(100 * score["low"]), at, y(100 * score["high"]), i)
        hint = f"{system['name']}: {label(system)}"
        body += svg.mark(at, y(100 * score["value"]), i, open_=system.get("control", False), hint=hint)
    points = "; ".join(f"{s['name']}: {label(s)}" for _, s in series)
    return svg.svg("flops", "Accuracy against decoder FLOPs", f"{points}.", bottom + 42, body)


def accuracy_by_type(results: dict[str, Any]) -> str:
    """A row a question type (or task), a dot with its interval a system."""
    series = series_of(results, controls=False)
    types = [ALL, *results["data"]["types"]]
    scores = [[_by_type(system, name) for _, system in series] for name in types]
    flat = [score for row in scores for score in row]
    low, high, ticks = svg.percent_axis([100 * s["low"] for s in flat], [100 * s["high"] for s in flat])
    top, left, right = ROW * len(series) + 10, 108, 14
    step = 14 * len(series) + 12
    bottom = top + max(step, 40) * len(types)
    x = svg.scale(low, high, left, WIDTH - right)
    body = svg.legend(series, lambda s: "")
    for tick in ticks:
        body += f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{bottom}"/>'
        body += svg.text(x(tick), bottom + 16, f"{tick:g}%", anchor="middle", muted=True)
    for row, name in enumerate(types):
        start = top + row * max(step, 40)
        body += f'<line class="grid" x1="0" x2="{WIDTH - right}" y1="{start}" y2="{start}"/>'
        count = results["data"]["questions"] if name == ALL else results["data"]["types"][name]
        words = name if len(name) < 17 else name[:15] + "…"
        body += svg.text(0, start + 22, words, bold=name == ALL)
        body += svg.text(0, start + 36, f"n = {count:,}", muted=True)
        for place, ((i, system), score) in enumerate(zip(series, scores[row], strict=True)):
            at = start + 13 + 14 * place
            body += svg.bar(x(100 * score["low"]), at, x(100 * score["high"]), at, i)
            ends = f"[{percent(score['low'])} to {percent(score['high'])}]"
            hint = f"{system['name']}, {name}: {percent(score['value'])}% {ends}"
            body += svg.mark(x(100 * score["value"]), at, i, hint=hint)
    text = "Accuracy with 95% intervals; the same numbers stand in the table."
    return svg.svg("types", "Accuracy by question type", text, bottom + 24, body)


def prefill_against(results: dict[str, Any], sweep: str) -> str:
    """Decoder prefill against batch size (a question's share) or text length, with quartiles; 0 is on the axis."""
    points: Sequence[dict[str, Any]] = results["sweeps"][sweep]
    key, label = ("batch", "questions a batch") if sweep == "batch" else ("text_tokens", "text tokens")
    what = "ms a question, decoder prefill" if sweep == "batch" else "ms, decoder prefill of one prompt"
    factors = [1000 / (point["batch"] if sweep == "batch" else 1) for point in points]
    return _against(results, f"sweep-{sweep}", "prefill", points, key, factors, label, what, "ms")


def throughput(results: dict[str, Any]) -> str:
    """Answers a second against batch size, with quartiles; 0 is on the axis."""
    points: Sequence[dict[str, Any]] = results["sweeps"]["batch"]
    label, what = "questions a batch", "answers a second, decoder alone"
    return _against(
        results, "throughput", "per_second", points, "batch", [1.0] * len(points), label, what, "a second"
    )


def _against(
    results: dict[str, Any],
    name: str,
    quantity: str,
    points: Sequence[dict[str, Any]],
    key: str,
    factors: Sequence[float],
    label: str,
    what: str,
    unit: str,
) -> str:
    """A line a system through the medians of `quantity` times a point's factor, bars from quartile to quartile."""
    keys = list(results["systems"])
    series = [(i, s) for i, s in series_of(results, controls=False) if keys[i] in points[0]["systems"]]
    most = max(
        p["systems"][keys[i]][quantity]["q75"] * f
        for p, f in zip(points, factors, strict=True)
        for i, _ in series
    )
    top, left, right, height = ROW * len(series) + 34, 42, 20, 170
    bottom = top + height
    ticks = svg.nice_ticks(0, most, 4, outside=True)
    y = svg.scale(0, ticks[-1], bottom, top)
    x = svg.scale(0, max(1, len(points) - 1), left + 24, WIDTH - right - 24)
    body = svg.legend(series, lambda s: "") + svg.text(0, top - 14, what, muted=True)
    for tick in ticks:
        body += svg.horizontal(left, WIDTH - right, y(tick), f"{tick:g}")
    for place, point in enumerate(points):
        body += svg.text(x(place), bottom + 16, f"{point[key]}", anchor="middle", muted=True)
    body += svg.text((left + WIDTH - right) / 2, bottom + 34, label, anchor="middle")
    for i, system in series:
        spreads = [point["systems"][keys[i]][quantity] for point in points]
        at = [(x(n), y(s["median"] * factors[n])) for n, s in enumerate(spreads)]
        number = i % svg.SERIES
        dash = "" if keys[i] == results["roles"]["candidate"] else svg.DASHES[number]
        body += f'<path class="line c{number}" stroke-dasharray="{dash}" d="{svg.path(at)}"/>'
        for n, spread in enumerate(spreads):
            low, high = (y(spread[q] * factors[n]) for q in ("q25", "q75"))
            hint = f"{system['name']}, {points[n][key]} {label}: {spread['median'] * factors[n]:.3g} {unit}"
            body += svg.bar(at[n][0], low, at[n][0], high, i) + svg.mark(*at[n], i, hint=hint)
    return svg.svg(name, f"{what} against {label}", "Medians; bars: quartiles.", bottom + 42, body)


def _by_type(system: dict, name: str) -> dict:
    return system["accuracy"]["overall"] if name == ALL else system["accuracy"]["types"][name]
