"""TensorBoard's first page: which curves stand together under "Custom Scalars"."""

from __future__ import annotations

from loglinear.config import ModelConfig

Chart = list[str | list[str]]


def layout(model: ModelConfig) -> dict[str, dict[str, Chart]]:
    """Charts by category; each is its kind and the patterns of its curves' names.

    Args:
        model: its log-linear layers have a chart each, a curve a level.
    """
    layers = sum(model.mixer_of(layer) == "log_linear" for layer in range(model.layers))
    pages = {
        "run": {
            "loss, nats per token": ["loss/train", "loss/held_out"],
            "tokens per second": ["throughput/tokens_per_second"],
            "model FLOP utilisation": ["throughput/mfu"],
            "gradient norm": ["optimizer/grad_norm"],
            "learning rate": ["optimizer/learning_rate"],
            "steps left out, and returns to a checkpoint": ["stability/.*"],
            "seconds of a step": ["step_seconds/.*"],
            "memory at the peak, GiB": ["memory/peak_GiB"],
        },
        "lambda by level": {f"layer {layer}": [f"lambda_mean/layer_{layer:02d}/.*"] for layer in range(layers)},
    }
    return {
        page: {title: ["Multiline", names] for title, names in charts.items()}
        for page, charts in pages.items()
        if charts and (page == "run" or model.log_linear.level_scale != "none")
    }
