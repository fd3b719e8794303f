"""Scoring: stored features become numbers with intervals, in the order of the rows, whoever computed the features."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swd.evaluation.candidates import Candidate, GivenPictures
from swd.evaluation.feature_files import FeatureFiles, extract_missing, key_for, picture_features, prompt_features
from swd.evaluation.plan import Pictures, Plan, key_of
from swd.io.files import file_hash, finite, write_json
from swd.metrics.base import Drawn, Extractor, PictureMetric, Reference, Score, TextExtractor
from swd.metrics.bootstrap import ConfidenceInterval, Resamples, Statistic, interval, mean_of
from swd.metrics.external import External
from swd.metrics.features import read_statistics
from swd.modules.model_folders import read_json
from swd.types import UserError

REFERENCE, PROMPTS = "_reference", "_prompts"
"""Folders of features beside those of models, whose names cannot begin so."""


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are drawn.

    Attributes:
        draws: resamples of the prompts; 1,000 as in Efron and Tibshirani, section 13.3.
        level: share of repetitions with other prompts that an interval holds.
        seed: of the resamples.
    """

    draws: int = 1000
    level: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class Real:
    """Real pictures that drawn ones are compared with, as the user named them.

    Attributes:
        pictures: a folder of them.
        statistics: an `.npz` file with `mu` and `sigma` of features of pictures that are not at hand.
    """

    pictures: GivenPictures | None = None
    statistics: Path | None = None

    def gaussians(self, metric: PictureMetric) -> Reference:
        """The statistics of the file, taken for those of a metric's network.

        Raises:
            UserError: if it holds none, or of another width.
        """
        assert self.statistics is not None
        return Reference(gaussians={e.name: read_statistics(self.statistics, e.width) for e in metric.extractors})


@dataclass(frozen=True)
class Work:
    """Features that one extractor computes of one set of rows.

    Attributes:
        name: a model's, `_reference` or `_prompts`.
        store: where they go.
        compute: features of a range of rows.
    """

    name: str
    store: FeatureFiles
    compute: Callable[[range], Tensor]


@dataclass(frozen=True)
class Scoring:
    """Which metrics are computed of the pictures of a plan.

    Attributes:
        plan: whose pictures.
        metrics: by the name of their column.
        real: what they are compared with, for those that need it.
        bootstrap: how intervals are drawn.
        settings: options of each metric as plain values, which its scores depend on.
    """

    plan: Plan
    metrics: Mapping[str, PictureMetric]
    real: Real | None
    bootstrap: Bootstrap
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def extractors(self) -> dict[str, Extractor]:
        """Every network that is needed, once, by its name."""
        return {extractor.name: extractor for metric in self.metrics.values() for extractor in metric.extractors}

    @cached_property
    def weights(self) -> dict[str, str]:
        """Hash of the weights of each network; reads all of them once.

        Raises:
            UserError: if two metrics name the same network with different weights.
        """
        found: dict[str, str] = {}
        for name, metric in self.metrics.items():
            for extractor in metric.extractors:
                weights = extractor.weights_id()
                if found.setdefault(extractor.name, weights) != weights:
                    raise UserError(f"metrics: {name} has other weights of {extractor.name} than a metric before it")
        return found

    def check(self) -> None:
        """Raise UserError, before anything is drawn, for what cannot be scored."""
        for name, metric in self.metrics.items():
            if metric.needs_reference and self.real is None:
                raise UserError(
                    f"metrics: {name} compares with real pictures; give reference=FOLDER or FILE.npz, or shapes "
                    "with the embedded model"
                )
            metric.check(self._promised(metric))
            metric.check_prompts(self.prompts)
        assert self.weights.keys() == self.extractors.keys()
        if len(set(self.prompts)) < 2:
            raise UserError(f"n={len(set(self.prompts))}: intervals need at least 2 different prompts")

    def _promised(self, metric: PictureMetric) -> Reference | None:
        """A reference of the right shapes, before its features are computed."""
        if self.real is None or not metric.needs_reference:
            return None
        if self.real.pictures is None:
            return self.real.gaussians(metric)
        count = len(self.real.pictures.files)
        return Reference({e.name: torch.empty(count, e.width, device="meta") for e in metric.extractors})

    @property
    def prompts(self) -> list[str]:
        """The prompt of each row."""
        return [prompt for prompt, _ in self.plan.requests.rows for _ in range(self.plan.requests.copies)]

    # Features

    def store(self, extractor: Extractor, name: str, rows: int, source: str) -> FeatureFiles:
        """Where features are: of a model's pictures, of `_reference`, or of `_prompts`.

        Args:
            extractor: whose features.
            name: the folder.
            rows: their number.
            source: hash of the pictures or prompts.
        """
        folder = self.plan.folder / "features" / name / extractor.name
        key = key_for(extractor.name, self.weights[extractor.name], source)
        return FeatureFiles(folder, rows, self.plan.chunk_size, key, self.plan.share)

    def work(self, extractor: Extractor) -> list[Work]:
        """Everything that an extractor has to read: all models' pictures, the reference, the prompts."""
        plan, found = self.plan, []
        readers = [m for m in self.metrics.values() if any(e.name == extractor.name for e in m.extractors)]
        read = {candidate.name: plan.pictures(candidate) for candidate in plan.candidates}
        if self.real and self.real.pictures and any(metric.needs_reference for metric in readers):
            read[REFERENCE] = Pictures(self.real.pictures.files, key_of(self.real.pictures.settings()))
        for name, pictures in read.items():
            store = self.store(extractor, name, len(pictures.files), pictures.key)
            found.append(Work(name, store, picture_features(extractor, pictures, plan.batch_size)))
        if isinstance(extractor, TextExtractor) and any(metric.needs_prompts for metric in readers):
            store = self.store(extractor, PROMPTS, len(plan.requests), plan.rows_hash)
            found.append(Work(PROMPTS, store, prompt_features(extractor, self.prompts, plan.batch_size)))
        return found

    def stored(self, extractor: Extractor, name: str) -> Tensor:
        """Complete features `[N, D]` from the folder of that name."""
        return next(work.store for work in self.work(extractor) if work.name == name).load()

    def extract_share(self) -> None:
        """Compute what is missing of this process's share of all features; one network is loaded at a time."""
        for extractor in self.extractors.values():
            for work in self.work(extractor):
                unit = "prompt" if work.name == PROMPTS else "picture"
                extract_missing(work.store, work.compute, f"reading {work.name.strip('_')} with {extractor.name}", unit)
            extractor.unload()

    @property
    def is_complete(self) -> bool:
        """Whether the features of all processes are there."""
        return all(work.store.is_complete for e in self.extractors.values() for work in self.work(e))

    # Numbers

    def key(self, name: str) -> str:
        """A hash of everything that the scores of a metric depend on."""
        metric = self.metrics[name]
        stores = [work.store.key for extractor in metric.extractors for work in self.work(extractor)]
        return key_of(
            {
                "metric": metric.name,
                "settings": self.settings.get(name),
                "features": stores,
                "pictures": [self.plan.pictures(candidate).key for candidate in self.plan.candidates],
                "outside": self._outside(metric),
                "models": [candidate.name for candidate in self.plan.candidates],
                "statistics": file_hash(self.real.statistics) if self.real and self.real.statistics else None,
                "rows": self.plan.rows_hash,
                "bootstrap": asdict(self.bootstrap),
            }
        )

    def _outside(self, metric: PictureMetric) -> list[str]:
        """Hashes of the scores that another project made of the pictures, as far as they are there."""
        if not isinstance(metric, External):
            return []
        folders = (self.plan.folder / "pictures" / candidate.name for candidate in self.plan.candidates)
        files = (folder / f"{metric.outside.scorer}.json" for folder in folders)
        return [file_hash(file) for file in files if file.is_file()]

    def scores(self) -> dict[str, dict[str, Any]]:
        """Numbers of every metric, computed where they are not stored: see `score`."""
        found = {}
        for name in self.metrics:
            file, key = self.plan.folder / "scores" / f"{name}.json", self.key(name)
            stored = read_json(file) if file.is_file() else {}
            if stored.get("key") != key:
                scored = self.score(name)
                stored = {"key": self.key(name), **scored}  # scores from outside are there now
                write_json(file, stored)
            found[name] = stored
        return found

    def score(self, name: str) -> dict[str, Any]:
        """`models`: by model, value, interval and further values; `pairs`: differences to the first model."""
        metric = self.metrics[name]
        reference = self.reference(metric)
        statistics: dict[str, Resampled] = {}
        models = {}
        for candidate in self.plan.candidates:
            drawn = self.drawn(metric, candidate)
            score = metric.score(drawn, reference)
            first, *others = score.values
            statistics[candidate.name] = Resampled.of(score, self.prompts, self.bootstrap)
            models[candidate.name] = (
                statistics[candidate.name].interval()
                | {"better": "higher" if metric.higher_is_better else "lower"}
                | {key.removeprefix(f"{first}_"): finite(score.values[key]) for key in others}
            )
        base, *rest = statistics
        return {"models": models, "pairs": [statistics[base].compared(statistics[b], base, b, name) for b in rest]}

    def drawn(self, metric: PictureMetric, candidate: Candidate) -> Drawn:
        """The stored features of a model's pictures."""
        texts = [e for e in metric.extractors if isinstance(e, TextExtractor)] if metric.needs_prompts else []
        features = {e.name: self.stored(e, candidate.name) for e in metric.extractors}
        if isinstance(metric, External):
            features[metric.outside.name] = metric.outside(self.plan.folder / "pictures" / candidate.name)
        return Drawn(
            features,
            self.prompts,
            {e.name: self.stored(e, PROMPTS) for e in texts},
        )

    def reference(self, metric: PictureMetric) -> Reference | None:
        """The stored features of the real pictures."""
        if self.real is None or not metric.needs_reference:
            return None
        if self.real.pictures is None:
            return self.real.gaussians(metric)
        return Reference({e.name: self.stored(e, REFERENCE) for e in metric.extractors})


@dataclass(frozen=True)
class Resampled:
    """A metric's value for one model, and its values in all resamples of the prompts; those are shared by all models.

    Attributes:
        value: the metric's.
        statistic: mean of the score's parts; None where it has none, and so no interval.
        resamples: which they are.
        level: of the interval.
        bounds: what the value can be at all, where the interval ends.
    """

    value: float
    statistic: Statistic | None
    resamples: Resamples
    level: float
    bounds: tuple[float, float] = (-math.inf, math.inf)

    @classmethod
    def of(cls, score: Score, clusters: Sequence[Hashable], bootstrap: Bootstrap) -> Resampled:
        """From a score and the prompt of each picture."""
        value = next(iter(score.values.values()))
        parts: Tensor | None = score.parts
        if parts is not None and score.per == "prompt":
            clusters = range(len(parts))
        resamples = Resamples(clusters, bootstrap.draws, bootstrap.seed)
        return cls(value, None if parts is None else mean_of(parts), resamples, bootstrap.level, score.bounds)

    def interval(self) -> dict[str, Any]:
        """Value, low and high; null where there is no interval."""
        if self.statistic is None:
            return {"value": finite(self.value), "low": None, "high": None}
        found = interval(self.statistic, self.resamples, self.level)
        least, most = self.bounds
        cut = replace(found, low=max(found.low, least), high=min(found.high, most))
        return {"value": finite(self.value)} | _ends(cut)

    def compared(self, other: Resampled, a: str, b: str, metric: str) -> dict[str, Any]:
        """The difference of `other` (called b) to this one (called a), with its interval."""
        names = {"a": a, "b": b, "metric": metric, "difference": finite(other.value - self.value)}
        first, second = self.statistic, other.statistic
        if first is None or second is None:
            return names | {"low": None, "high": None}
        difference = interval(lambda counts: second(counts) - first(counts), self.resamples, self.level)
        return names | _ends(difference)


def _ends(found: ConfidenceInterval) -> dict[str, float | None]:
    return {"low": finite(found.low), "high": finite(found.high)}
