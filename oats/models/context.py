"""How many tokens a model takes."""

from __future__ import annotations

from typing import Any


def context_limit(model: Any) -> int | None:
    """Tokens that a model of transformers takes at most, where its configuration says."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
