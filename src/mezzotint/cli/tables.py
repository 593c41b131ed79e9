"""Figures as tables of a terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from mezzotint.progress import results


def print_scores(scores: dict[str, Any]) -> None:
    """The figures of every set side by side, and what they were taken in."""
    sets: dict[str, dict[str, Any]] = scores["sets"]
    titles = {"guided": f"guided, {scores.get('guidance', 1):g}", "real": "real data"}
    table = Table(
        "",
        *(titles.get(name, name) for name in sets),
        caption=f"features: {scores['features']}; reference: {scores['reference']}, {scores['reference_images']} images"
        + ("; real data: its training images" if "real" in sets else ""),
    )
    rows = [row for figures in sets.values() for row in figures if row != "source"]
    for row in dict.fromkeys(rows):
        table.add_row(row, *(_figure(figures.get(row)) for figures in sets.values()))
    results.print(table)
    for split, what in (("train", "training"), ("test", "held-out")):
        if (found := scores.get(f"captions, {split}")) is not None:
            score = f"; CLIP score {found['CLIP score']:.2f}" if "CLIP score" in found else ""
            results.print(
                f"caption agreement, {found['captions']} {what} captions: {found['caption agreement']:.1%} "
                f"(nearer to its own image than to 9 random others; chance 10.0%){score}"
            )
    if "bits_per_dim" in scores:
        bits = f"{scores['bits_per_dim']:.3f} ± {scores['bits_per_dim_error']:.3f}"
        results.print(f"bits per dimension of held-out images: {bits}")


def _figure(value: float | int | list[float] | None) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " to ".join(map(_figure, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.2e}"


def duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:,.0f} seconds"
