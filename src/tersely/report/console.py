"""Reports for a terminal."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from tersely.report.rows import Report, format_value, text_rows


def outcome_table(report: Report) -> Table:
    """All readings of the size; quality, if it was measured."""
    table = Table(title=report.coverage, title_justify="left", caption_justify="left")
    for column, justify in (("", "left"), ("now", "right"), ("before", "right"), ("ratio", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for row in report.rows:
        ratio = "–" if row.ratio is None else f"{row.ratio:.3f}"
        table.add_row(row.name, format_value(row.value, row.unit), format_value(row.before, row.unit), ratio)
    for step in report.steps if len(report.steps) > 1 else []:
        figures = ", ".join(f"perplexity {text['perplexity']:.3f}" for text in text_rows(step.get("evaluation")))
        after = f"after {step['verb']} {step['name']}" + (f": {figures}" if figures else "")
        table.add_row(after, format_value(step["bytes"], "bytes"), "", "")
    for text in report.evaluation["texts"] if report.evaluation else []:
        ratio = text["perplexity"] / text["dense_perplexity"]
        name = f"perplexity, {text['text']}"
        table.add_row(name, f"{text['perplexity']:.3f}", f"{text['dense_perplexity']:.3f}", f"{ratio:.3f}")
    if report.degraded:
        table.caption = f"degraded, left dense: {', '.join(report.degraded)}"
    return table


def evaluation_table(figures: dict[str, Any]) -> Table:
    """What `evaluate` measured; fields that were not measured do not appear."""
    table = Table(title=str(figures.get("model", "")), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    if "bytes" in figures:
        table.add_row("folder", format_value(figures["bytes"], "bytes"))
    table.add_row("parameters", format_value(figures["parameters"], "parameters"))
    for text in figures.get("texts", []):
        protocol = f"{text['windows']} windows of {text['length']}, stride {text['stride']}, {text['dtype']}"
        table.add_section()
        table.add_row(f"perplexity, {text['text']}", f"{text['perplexity']:.4f}")
        if "kl" in text:
            table.add_row("of the dense model", f"{text['dense_perplexity']:.4f}")
            table.add_row("KL to it, nats per token", f"{text['kl']:.5f}")
            table.add_row("same likeliest token", f"{text['top1']:.4f}")
        table.add_row(f"protocol: {protocol}, first token {text['first_token'] or 'none'}", f"{text['tokens']} tokens")
    if "speed" in figures:
        speed = figures["speed"]
        table.add_section()
        table.add_row("prefill, batch 1", f"{speed['prefill_tokens_per_second']:.0f} tokens/s")
        table.add_row("decode, batch 1", f"{speed['decode_tokens_per_second']:.0f} tokens/s")
        table.add_row("peak memory", format_value(speed["peak_bytes"], "bytes"))
    return table


def plain_table(title: str, headings: Sequence[str], lines: Sequence[Sequence[object]]) -> Table:
    """Lines under headings; columns of numbers stand to the right."""
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        numbers = all(isinstance(line[number], int | float | None) for line in lines)
        table.add_column(heading, justify="right" if numbers else "left", overflow="fold")
    for line in lines:
        table.add_row(*(_cell(value) for value in line))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
