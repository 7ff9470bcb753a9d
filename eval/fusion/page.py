"""Write `report.html`: one file with everything that a profile measured, which loads nothing from the network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from latefusion.eval.fusion import figures
from latefusion.eval.fusion.examples import View, examples
from latefusion.models.flops import prefill_share, shares_in_words


def write_report(
    folder: Path, profile: dict[str, Any], samples: Sequence[dict[str, Any]], shown: Sequence[Sequence[View]]
) -> None:
    """Draw every picture and write the page.

    Args:
        profile: what `profile.json` holds; samples: for the examples; shown: images of the first of them.
    """
    drawings = figures.draw(profile, folder)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share, digits=1: f"{100 * share:.{digits}f}"
    environment.filters["whole"] = lambda share: prefill_share(share, profile["outside"])
    page = environment.get_template("template.html").render(
        profile=profile,
        headline=headline(profile),
        stages=stages_in_words(profile),
        drawings={name: Markup(text) for name, text in drawings.items()},
        examples=examples(folder, profile, samples, shown),
    )
    (folder / "report.html").write_text(page)


def headline(profile: dict[str, Any]) -> str:
    chosen, confirmed = profile["chosen"], profile["confirmed"]
    schedule, layers = chosen["schedule"], profile["layers"]
    enter, leave = schedule["enter"], layers if schedule["exit"] is None else schedule["exit"]
    see = f"{enter} to {leave - 1} see" if leave - enter > 1 else f"layer {enter} alone sees"
    right = ""
    if profile["labelled"]:
        right = (
            f" {100 * confirmed['accuracy']:.1f}% of the answers are right, "
            f"{100 * confirmed['dense_accuracy']:.1f}% in the dense model."
        )
    return (
        f"Of {layers} decoder layers, {see} vision tokens, {_keeps(schedule)}: "
        f"{shares_in_words(chosen['flops'], profile['outside'], 0)}, untrained.{right}"
    )


def _keeps(schedule: dict[str, Any]) -> str:
    if not schedule["keep"]:
        return "all of them"
    first, *rest = schedule["keep"].items()
    return ", ".join(
        [f"{first[1]} of them from layer {first[0]} on", *(f"{k} from {layer}" for layer, k in rest)]
    )


def stages_in_words(profile: dict[str, Any]) -> str:
    """Whether the three stages of VisiPruner's paper appear, plainly."""
    a, b, layers = profile["ends"]["enter"], profile["ends"]["exit"], profile["layers"]
    bound = profile["goal"]["bound"]
    parts = [
        f"Shallow: hiding the image from the text in {_span(0, a)} stays within the bound of {bound:g} nats."
        if a
        else f"Shallow: there is no such stage; layer 0 alone already costs more than {bound:g} nats.",
        f"Deep: so does hiding it from layer {b} on."
        if b < layers
        else f"Deep: there is no such stage; the last layer still costs more than {bound:g} nats.",
    ]
    single = {int(row["layer"]): row["kl"] for row in profile["curves"]["single"]}
    peak = max(single, key=lambda layer: single[layer])
    inside = [layer for layer, kl in single.items() if kl > bound]
    parts.append(
        f"Middle: {_needed(inside)} (beyond the bound), layer {peak} most ({single[peak]:.3f} nats)."
    )
    schedule = profile["chosen"]["schedule"]
    enter, leave = schedule["enter"], layers if schedule["exit"] is None else schedule["exit"]
    if (enter, leave) != (a, b):
        parts.append(
            f"The schedule's band, {_span(enter, leave)}, is wider, as both ends hidden at once, or the entry, "
            "cost more."
            if enter <= a and leave >= b
            else f"The schedule's band is {_span(enter, leave)}."
        )
    verdict = "All three stages appear." if a and b < layers else "Not all three stages appear."
    return f"{verdict} {' '.join(parts)}"


def _needed(layers: Sequence[int]) -> str:
    if len(layers) < 2:
        return f"layer {layers[0]} alone is needed by itself" if layers else "no layer is needed by itself"
    return f"layers {', '.join(map(str, layers))} are each needed by themselves"


def _span(first: int, end: int) -> str:
    return f"layers {first} to {end - 1}" if end - first > 1 else f"layer {first}"
