"""Accuracies of a base by question type: pooled over sets, and as a table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from scipy.stats import binomtest

Outcomes = dict[str, list[bool]]


def summary(outcomes: Outcomes, types: Sequence[str], *, digits: int) -> dict[str, dict[str, float]]:
    """Accuracy in percent by type and over all, with its 95% interval (Wilson, questions taken as independent)."""
    table = {}
    for kind in (*types, "all"):
        rights = [r for values in outcomes.values() for r in values] if kind == "all" else outcomes[kind]
        interval = binomtest(sum(rights), len(rights)).proportion_ci(method="wilson")
        table[kind] = {
            "questions": len(rights),
            "accuracy": round(100 * sum(rights) / len(rights), digits),
            "low": round(100 * float(interval.low), digits),
            "high": round(100 * float(interval.high), digits),
        }
    return table


def pooled(measured: Iterable[Outcomes]) -> Outcomes:
    """The outcomes of several measurements together."""
    together: Outcomes = defaultdict(list)
    for outcomes in measured:
        for kind, rights in outcomes.items():
            together[kind] += rights
    return together
