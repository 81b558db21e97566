"""The verification of a signature as the page on operating shows it to receivers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "operating" / "alerts.md"


def _documented() -> Callable[..., bool]:
    [program] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(program, names)  # noqa: S102 - our own page
    verified: Callable[..., bool] = names["verified"]
    return verified


verified = _documented()
