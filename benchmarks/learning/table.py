"""A table of cells and seeds that is filled bit by bit: what is there is never done again, whenever it was killed.

The file is whole at every moment (written beside, then renamed). Rows count only for the settings that they were made with:
a file of other settings is refused, not mixed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from whitetuner.errors import UserError

Cells = Mapping[str, Mapping[str, Any]]


class Table:
    """path: of the file; cells: name -> what is changed; settings: equal for all; seeds: of each cell."""

    def __init__(self, path: Path, cells: Cells, settings: Mapping[str, Any], seeds: Sequence[int]) -> None:
        self.path, self.cells, self.seeds = path, cells, list(seeds)
        self.document: dict[str, Any] = {"settings": dict(settings), "cells": {}, "before": {}, "rows": []}
        if path.exists():
            earlier = json.loads(path.read_text(encoding="utf-8"))
            plain = json.loads(json.dumps({"settings": settings, "cells": cells}))
            known = {name: earlier["cells"][name] for name in plain["cells"] if name in earlier["cells"]}
            if earlier["settings"] != plain["settings"] or any(
                known[name] != plain["cells"][name] for name in known
            ):
                raise UserError(
                    "{path} holds rows of other settings: {settings}",
                    mend="repeat those settings, or write elsewhere with --result",
                    path=path,
                    settings=json.dumps(earlier["settings"]),
                )
            self.document = earlier
        made = {row["cell"] for row in self.document["rows"]}
        # What was made where another checkout lay beside stays.
        others = {name: values for name, values in self.document["cells"].items() if name in made - {*cells}}
        self.document["cells"] = {name: dict(values) for name, values in cells.items()} | others
        self.document["seeds"] = sorted({*self.document.get("seeds", []), *self.seeds})

    def row(self, cell: str, seed: int) -> dict[str, Any] | None:
        return next((r for r in self.document["rows"] if r["cell"] == cell and r["seed"] == seed), None)

    def missing(self, only: Sequence[str] | None = None) -> Iterator[tuple[str, int]]:
        """One seed of every cell, then the next: a suite that is killed has compared all that it could."""
        for seed in self.seeds:
            for cell in self.cells if only is None else only:
                if self.row(cell, seed) is None:
                    yield cell, seed

    def fill(
        self,
        make: Callable[[str, int], Mapping[str, Any]],
        stop: Callable[[], bool],
        only: Sequence[str] | None = None,
    ) -> None:
        """Makes what is missing, until stop() says so. What make refuses is a row too: {"failed": why}."""
        self.write()
        for cell, seed in list(self.missing(only)):
            if stop():
                return
            try:
                values = make(cell, seed)
            except UserError as error:
                values = {"failed": error.what}
            self.document["rows"].append({"cell": cell, "seed": seed, **values})
            self.write()
            print(cell, seed, json.dumps(values), flush=True)

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".json.part")
        beside.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self.path)


def spread(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[float, float]:
    """(mean, sample standard deviation; 0 for a single row)."""
    values = [float(row[key]) for row in rows]
    return fmean(values), stdev(values) if len(values) > 1 else 0.0
