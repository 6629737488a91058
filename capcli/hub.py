"""Where scripts find the built-in model: `BUILTIN_FOLDER`, a small BERT in Hugging Face layout."""

from capcli.sources.hub import BUILTIN_FOLDER

__all__ = ["BUILTIN_FOLDER"]
