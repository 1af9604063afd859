"""Which transformers has the engine."""

from __future__ import annotations

import pytest
import transformers

OLD = tuple(int(x) for x in transformers.__version__.split(".")[:2]) < (5, 23)
needs_engine = pytest.mark.skipif(OLD, reason="serving is refused before transformers 5.23")
