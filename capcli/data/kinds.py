"""What depends on the kind of a task."""

from __future__ import annotations

NO_LABEL = -100  # of a token, which the loss leaves out
