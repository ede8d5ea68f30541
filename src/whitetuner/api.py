"""The Python entrance: a Config and a Trainer with the verbs people know, a thin face over recipe.Session.

from whitetuner import Config, Trainer
with Trainer("config.toml") as trainer:
    trainer.train()
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from whitetuner import recipe
from whitetuner.config.load import Loaded, load_config
from whitetuner.config.schema import Config
from whitetuner.runs import events

__all__ = ["Config", "Trainer"]


class Trainer:
    """One run. config: a file, a mapping of (dotted) config values, or a Config.

    Between `load_models` and `close` the run owns its folder; `with Trainer(...)` closes by itself.
    """

    def __init__(self, config: Config | Path | str | Mapping[str, Any], *, resume: str | None = None) -> None:
        if isinstance(config, Config):
            self.loaded = Loaded(config)
        elif isinstance(config, Mapping):
            self.loaded = load_config(None, base=config)
        else:
            self.loaded = load_config(Path(config))
        self.resume = resume
        self.session: recipe.Session | None = None
        self.result: recipe.Result | None = None
        self._losses: list[float] = []
        self._stack = ExitStack()

    @property
    def config(self) -> Config:
        return self.loaded.config

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._ready().step

    def load_models(self) -> None:
        """Encodes the pictures, loads the denoiser, attaches the adapter and restores the checkpoint asked for."""
        session = recipe.Session.open(self.loaded, resume=self.resume, listeners=(self._hear,))
        self.session = self._stack.enter_context(session)
        self.session.prepare()

    def train_step(self) -> float:
        """One optimizer step (saving, previews and validation as due); returns its loss."""
        session = self._ready()
        session.advance(session.step + 1)
        return self._losses[-1]

    def train(self) -> recipe.Result:
        """All steps that are left, then the final files."""
        self.result = (
            recipe.run(self.loaded, resume=self.resume) if self.session is None else self.session.run()
        )
        return self.result

    def save_checkpoint(self) -> Path:
        """Writes a checkpoint of now and returns its folder."""
        return self._ready().save()

    def load_checkpoint(self, path: Path | str = "latest") -> None:
        """Goes on from a checkpoint of this run ("latest", "best" or its folder); before or instead of `load_models`."""
        self.close()
        self.resume = str(path)
        self.load_models()

    def close(self) -> None:
        """Gives the run's folder back."""
        self._stack.close()
        self.session = None

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ready(self) -> recipe.Session:
        if self.session is None:
            self.load_models()
        assert self.session is not None
        return self.session

    def _hear(self, event: events.Event) -> None:
        if isinstance(event, events.StepDone):
            self._losses.append(event.loss)
