"""What a resident trainer holds between questions: base and texts, loaded once, and the adapter of the run.

The run's server chooses adapter, rates and steps; the site chooses its own model folder and its own files. An
adapter is put into a base for good, so a run with another one has the base loaded again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fl_client.assembly import Texts, assemble
from fl_client.base import Base
from fl_client.discreet import described_for_server
from fl_client.questions import Answer, Question, Scalar, lone_config, of_lone_site, with_less_time
from fl_client.serve import answer
from fl_client.settings import SiteSettings
from fl_client.site import OnStep, Site
from vblora.errors import ConfigError, DataError, raise_faults

__all__ = ["Budget", "Resident"]

WITHOUT_LOADING = ("local", "personal", "hazards", "wire")  # settings that a loaded site can take on

log = logging.getLogger("fedvb.trainer")


@dataclass(frozen=True)
class Budget:
    """What a site gives to a round at most, whatever the run asks; then it sends what it has.

    0 sets no limit.

    Attributes:
        seconds: of training.
        steps: local steps.
    """

    seconds: float = 0.0
    steps: int = 0

    def __post_init__(self) -> None:
        raise_faults("trainer", self._faults())

    def _faults(self) -> Iterator[str]:
        if not 0 <= self.seconds < float("inf"):
            yield f"--train-seconds is {self.seconds}, expected 0 (no limit) or more"
        if self.steps < 0:
            yield f"--max-steps is {self.steps}, expected 0 (no limit) or more"

    def question(self, asked: Question) -> Question:
        """A question to train with no more seconds than are given."""
        given = [value for value in (self.seconds, float(asked.config.get("seconds", 0))) if value]
        if asked.kind != "train" or not given:
            return asked
        return replace(asked, config={**asked.config, "seconds": min(given)})

    def settings(self, asked: SiteSettings) -> SiteSettings:
        """Settings with no more local steps than are given."""
        if not self.steps or asked.local.steps <= self.steps:
            return asked
        return replace(asked, local=replace(asked.local, steps=self.steps))


class Resident:
    """The site of one machine. Not for several threads at once.

    Args:
        own: options that the site sets, by their names in a run config; they win over a run's.
        state: folder of what must outlive a message.
        budget: of a round.

    Attributes:
        bases_loaded: how often a base was loaded.
        device: of the base; None before one is loaded.
    """

    def __init__(self, own: Mapping[str, Scalar], state: Path, budget: Budget | None = None) -> None:
        self.own = dict(own)
        self._budget = budget or Budget()
        self.bases_loaded = 0
        self.device: torch.device | None = None
        self._state = state
        self._settings: SiteSettings | None = None  # that base and texts were loaded with
        self._parts: tuple[Texts, Base] | None = None
        self._site: Site | None = None

    def load(self, run: Mapping[str, Scalar]) -> None:
        """Load base and texts as a run of these options will need them; the others at their defaults.

        Raises:
            FedVBError: the site's model or data cannot be used.
        """
        self._open(self._settings_for(run))

    def answer(self, question: Question, run: Mapping[str, Scalar], on_step: OnStep | None = None) -> Answer:
        """Answer a question of a run.

        Args:
            question: for the one client of the site.
            run: the run config.
            on_step: told the local steps, or the batches of an evaluation.

        Raises:
            FedVBError: the run does not fit the site, or its message is damaged.
        """
        came = time.monotonic()
        site = self._site_for(self._settings_for(run))
        asked = with_less_time(of_lone_site(question), time.monotonic() - came)
        asked = self._budget.question(asked)
        found = next(answer(site, [asked], on_step, on_step))
        return replace(found, text=described_for_server(found.text)) if asked.kind == "describe" else found

    def _settings_for(self, run: Mapping[str, Scalar]) -> SiteSettings:
        for name in ("labels", "task"):
            ours, theirs = self.own.get(name), run.get(name)
            if ours and theirs not in (None, "", "auto") and _names(ours) != _names(theirs):
                raise ConfigError(
                    f"{name}: this site was started with {ours!r:.80}, the run says {theirs!r:.80}; "
                    "agree on one"
                )
        settings = SiteSettings.from_run_config(lone_config(run, self.own))
        return self._budget.settings(replace(settings, state=str(self._state / "memory")))

    def _site_for(self, settings: SiteSettings) -> Site:
        site = self._site
        if site is not None and settings == site.settings:
            return site
        if site is not None and settings == replace(
            site.settings,
            **{name: getattr(settings, name) for name in WITHOUT_LOADING},
        ):
            self._site = replace(site, settings=settings)
            return self._site
        texts, base = self._open(settings)
        self._parts = None  # whatever comes of it: a base with an adapter in it is not to be used for another
        self._site = assemble(settings, texts, base)
        blueprint = self._site.blueprint
        log.info(
            "adapter %s %s: %d rows in %d layers, %d numbers",
            *(blueprint.spec.kind, blueprint.fingerprint.hex()[:12], blueprint.rows),
            *(len(blueprint.linears), blueprint.stored_parameters),
        )
        return self._site

    def _open(self, settings: SiteSettings) -> tuple[Texts, Base]:
        if self._parts is None or not _same_parts(settings, self._settings):
            self._site = self._parts = None  # make room first
            started = time.monotonic()
            from fl_client.opening import load_parts  # needs the data libraries

            self._parts = load_parts(settings)
            self._settings = settings
            self.bases_loaded += 1
            texts, base = self._parts
            self.device = next(base.model.parameters()).device
            log.info(
                "base %s on %s, load %d, %.1f s",
                *(settings.model, self.device, self.bases_loaded, time.monotonic() - started),
            )
            log.info("data %s: %s", settings.data.data, _survey(texts, settings.data.max_length))
        return self._parts


def _names(given: Scalar | None) -> set[str]:
    """Names by comma; their order does not matter."""
    return {name.strip() for name in str(given).split(",")}


def _same_parts(one: SiteSettings, other: SiteSettings | None) -> bool:
    """Whether two settings ask for the same base and the same texts."""
    names = (*WITHOUT_LOADING, "adapter", "cohort", "start")
    return other is not None and one == replace(other, **{name: getattr(one, name) for name in names})


def _survey(texts: Texts, max_length: int) -> str:
    """What a site's texts are, on one line.

    Raises:
        DataError: there is nothing to train on.
    """
    lengths = texts.train.lengths
    if not len(lengths):
        raise DataError("data: no text to train on")
    told = [f"{len(lengths):,} {texts.train.unit}, {len(texts.test):,} held out"]
    if texts.labels:
        counts = np.bincount(texts.train.targets, minlength=len(texts.labels))
        named = [f"{name} {count:,}" for name, count in zip(texts.labels, counts, strict=True)]
        told.append(f"{len(texts.labels)} labels ({', '.join(named[:8])}{', ...' if len(named) > 8 else ''})")
        if absent := int((counts == 0).sum()):
            told.append(f"{absent} labels without a text here")
    cut = int((lengths >= max_length).sum()) if texts.train.begins is None else 0
    longest = f"longest {int(lengths.max())} tokens"
    told.append(longest + (f", {cut:,} texts at --max-length {max_length}" if cut else ""))
    return "; ".join(told)
