"""The model card that is written into every output folder."""

from pathlib import Path

from tersely.report.rows import Report, format_value, text_rows


def model_card(report: Report, licence: str | None) -> str:
    """Markdown with the hub's front matter: what was done, what it saved, what it cost, how to open it."""
    name, hub = named(report.model)
    front = ["---", "library_name: transformers", "tags:", "- tersely", "- compressed"]
    if hub:
        front.append(f"base_model: {hub}")
    if licence:
        front.append(f"license: {licence}")
    methods = ", ".join(f"`{step['name']}`" for step in report.steps)
    lines = [
        *front,
        "---",
        "",
        f"# {name}, compressed",
        "",
        f"Compressed with tersely {report.versions['tersely']} ({methods}). {report.coverage}.",
        "",
        "```python",
        "import tersely  # once, so that transformers knows the format",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this folder")',
        "```",
        "",
        "| | now | before | ratio |",
        "|---|--:|--:|--:|",
    ]
    for row in report.rows:
        ratio = "–" if row.ratio is None else f"{row.ratio:.3f}"
        lines.append(
            f"| {row.name} | {format_value(row.value, row.unit)} | {format_value(row.before, row.unit)} | {ratio} |"
        )
    lines += ["", *_quality(report), *_steps(report), *_cautions(report)]
    lines.append("Every setting is in `recipe.toml`, every site in `plan.json` and `report.json`.")
    return "\n".join(lines) + "\n"


def named(model: str) -> tuple[str, str | None]:
    """What to call a model, and its name on the hub, if it has one: a local folder is nobody else's business."""
    folder = Path(model)
    return (folder.resolve().name, None) if folder.is_dir() else (model, model)


def _quality(report: Report) -> list[str]:
    texts = text_rows(report.evaluation)
    if not texts:
        return ["Quality was not measured during compression: run `tersely eval` on this folder.", ""]
    lines = [
        "| text | windows × length | perplexity | dense | KL (nats/token) | top-1 agreement |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for text in texts:
        lines.append(
            f"| {text['text']} | {text['windows']} × {text['length']} | {text['perplexity']:.3f} | "
            f"{text['dense_perplexity']:.3f} | {text['kl']:.4f} | {text['top1']:.4f} |"
        )
    return [*lines, ""]


def _steps(report: Report) -> list[str]:
    """What each of several steps did."""
    if len(report.steps) < 2:
        return []
    texts = [text["text"] for text in text_rows(report.evaluation)]
    lines = [
        "| after step | weights on disk |" + "".join(f" perplexity, {text} |" for text in texts),
        "|---|--:|" + "--:|" * len(texts),
    ]
    for step in report.steps:
        figures = "".join(f" {text['perplexity']:.3f} |" for text in text_rows(step.get("evaluation")))
        lines.append(f"| {step['verb']} `{step['name']}` | {format_value(step['bytes'], 'bytes')} |{figures}")
    return [*lines, ""]


def _cautions(report: Report) -> list[str]:
    lines = [f"- Degraded: `{site}` was left dense ({reason})" for site, reason in report.degraded.items()]
    lines += [f"- {warning}" for warning in report.warnings]
    return ["Take note:", "", *lines, ""] if lines else []
