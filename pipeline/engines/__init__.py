"""Who speaks: each module wraps one way of getting ids out of a model.

A new engine is a file and a line here. Each value is `module:function`; the function takes
(model, tokenizer, EngineOptions) and returns an Engine. See `base.py` for the seam.
"""

ENGINES = {
    "hf": "pipeline.engines.hf:open_engine",
    "vllm": "pipeline.engines.vllm:open_engine",
    "trl": "pipeline.engines.trl:open_engine",
    "openai": "pipeline.engines.openai:open_engine",
    "scripted": "pipeline.engines.scripted:open_engine",
}

IN_PROCESS = {"hf", "scripted"}
"""Engines that live in the stage's own process; the others are servers, and start side by side."""

SPEAK_TEXT = {"openai"}
"""Engines that need no tokenizer: they send messages, and get text back."""
