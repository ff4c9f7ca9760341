"""What the writers of the READMEs share: saved results, and how they are put into words and tables."""

import json
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def saved(name: str) -> dict:
    """What is in the JSON file of this name, such as benchmarks/step."""
    return json.loads((REPOSITORY / f"{name}.json").read_text())


def markdown(*rows: tuple[str, ...]) -> str:
    """A table, the head first."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ("---",) * len(rows[0]), *rows[1:]))


def minutes(seconds: float) -> str:
    return f"{seconds / 60:,.0f}"
