"""Labelled replies for `gruppo reward-model fit`: `python -m gruppo.worlds.labels labels.jsonl --rows 3000`.

The requests are those of the world `safety`, the replies of every kind, the labels the rules' verdict on each objective.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from gruppo.worlds.safety import HEADS, rows


def main() -> None:
    """Write the rows and say which command reads them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    asked.file.write_text("".join(json.dumps(row) + "\n" for row in rows(asked.rows, asked.seed)))
    print(f"{asked.rows} rows in {asked.file}; gruppo reward-model fit --data {asked.file} --heads {','.join(HEADS)} ...")


if __name__ == "__main__":
    main()
