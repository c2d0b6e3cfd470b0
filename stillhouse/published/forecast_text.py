"""Formats a forecast from published sizes for a terminal: figures first, then every assumption with its source."""

from __future__ import annotations

from stillhouse.published import assumptions
from stillhouse.published.recipe_forecast import RecipeForecast
from storage.backends.disk import format_bytes


def format_recipe_forecast(forecast: RecipeForecast) -> str:
    """Formats the forecast. Its first line says that it is an estimate."""
    hardware = forecast.hardware
    lines = [f"an estimate from published sizes, on {hardware.count} x {hardware.name}; nothing was measured"]
    for cache in forecast.caches:
        lines.append(
            f"  {cache.name}: {cache.samples:,} samples, {_format_count(cache.tokens)} tokens, "
            f"{format_bytes(round(cache.total_bytes))}, {_format_hours(cache.hours)}"
        )
        lines += [f"    {family}: {format_bytes(round(size))}" for family, size in cache.family_bytes.items()]
    for stage in forecast.stages:
        lines.append(
            f"  stage {stage.name}: {stage.samples:,.0f} samples, {_format_count(stage.tokens)} tokens, "
            f"checkpoint {format_bytes(round(stage.checkpoint_bytes))}, {_format_hours(stage.hours)}"
        )
    total = f"in all: {format_bytes(round(forecast.total_bytes))}, {_format_hours(forecast.hours)}, "
    total += f"{forecast.gpu_hours:,.0f} GPU hours"
    if forecast.price is not None:
        total += f", {forecast.price:,.0f} at {forecast.price_per_gpu_hour:g} a GPU hour"
    return "\n".join([*lines, total, "it assumes:", *(f"  - {line}" for line in list_assumptions(forecast))])


def list_assumptions(forecast: RecipeForecast) -> list[str]:
    """Lists what the forecast rests on, and where each number is from."""
    hardware, lengths = forecast.hardware, forecast.lengths
    return [
        f"{hardware.tflops:g} TFLOP/s a GPU: dense bf16 peak, NVIDIA's data sheet ({hardware.source})",
        f"{assumptions.SCORING_UTILISATION:.0%} of it while scoring and {assumptions.TRAINING_UTILISATION:.0%} while "
        "training: assumed, not measured. Take the hours as a lower bound: LLaVA-MoD reports about 960 hours of A100s, "
        "three times this forecast of its largest recipe",
        f"{lengths.question} tokens of questions and {lengths.response} of answers a sample, {lengths.caption} of a "
        "caption: assumed (--question-tokens, --response-tokens and --caption-tokens change them)",
        "rows of the splits: data.published_rows, as the papers or the data sets' names have them",
        "an image in every sample, none shared: an upper bound for visual rows and relation matrices",
        "parameters and visual tokens: stillhouse/published/models.yaml, which names their sources; "
        "visual tokens that depend on an image's size are those of 640 x 480 pixels",
        "bytes of a row: measured on rows of a text model with 49,152 tokens (docs/storing.md, "
        "`python -m benchmarks.codec`); visual rows are taken to cost as much",
        "bytes of a relation matrix: the largest of the kinds in docs/storing.md, by the number of visual tokens",
        "2 FLOPs a parameter and token forward, 2 for gradients of activations, 2 for those of weights, 2 more with "
        "gradient checkpointing; attention over positions, data loading, evaluation and start-up are left out",
        "experts: 1.22 times the dense student's active and 1.67 times its total parameters (LLaVA-MoD, Qwen1.5-1.8B)",
        "images, logs, optimizer states and the models that are downloaded are not among the bytes",
    ]


def _format_count(number: float) -> str:
    return f"{number / 1e9:,.2f} billion" if number >= 1e9 else f"{number / 1e6:,.1f} million"


def _format_hours(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:,.1f} min"
