"""Metrics of pictures that come in batches, on one process or several: torchmetrics modules, for use in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.utilities.data import dim_zero_cat

from swd.metrics.base import Drawn, Extractor, PictureMetric, Reference, TextExtractor
from swd.metrics.fid import reference_gaussian


class StreamedMetrics(Metric):
    """Several metrics of one set of pictures; each extractor runs once per picture, and features are gathered.

    The result depends on the set of pictures alone, not on their batches, their order, or the processes that drew them:
    pictures are put in order by their index, and of those that come more than once (a sampler pads the last batch) one
    counts. Every process must call `compute`, and gets the same numbers. A process may have no picture at all.

    Args:
        metrics: what to compute.
        prompts: of all pictures, in order of their index; empty if no metric needs them.
        reference: real pictures, if a metric needs them.
        others: arguments of `torchmetrics.Metric`.
    """

    full_state_update = False

    def __init__(
        self,
        metrics: Sequence[PictureMetric],
        prompts: Sequence[str] = (),
        reference: Reference | None = None,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        self.metrics = tuple(metrics)
        self.prompts = tuple(prompts)
        self.reference = reference
        self.extractors = {each.name: each for metric in metrics for each in metric.extractors}
        self.empty = {"index": torch.empty(0, dtype=torch.long)}
        for i, extractor in enumerate(self.extractors.values()):
            self.empty[f"pictures_{i}"] = torch.empty(0, extractor.width)
            if prompts and isinstance(extractor, TextExtractor):
                self.empty[f"prompts_{i}"] = torch.empty(0, extractor.width)
        for name in self.empty:
            self.add_state(name, [], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forget all pictures."""
        super().reset()
        # A state without any tensor would be gathered with another number of dimensions than the other processes'.
        for name, rows in self.empty.items():
            self._append(name, rows)

    def update(self, pictures: Tensor, index: Tensor) -> None:
        """Add a batch.

        Args:
            pictures: uint8 `[B, 3, H, W]`; the networks run on its device.
            index: whole numbers `[B]`, each picture's place in the whole set.
        """
        self._append("index", index)
        for i, extractor in enumerate(self.extractors.values()):
            self._append(f"pictures_{i}", extractor(pictures))
            if f"prompts_{i}" in self.empty:
                assert isinstance(extractor, TextExtractor)
                prompts = [self.prompts[place] for place in index.tolist()]
                self._append(f"prompts_{i}", extractor.prompt_features(prompts, pictures.device))

    def compute(self) -> dict[str, Tensor]:
        """Every metric's values by name, as float64 scalars."""
        drawn = self.drawn()
        reference = None if self.reference is None else self.reference.to(self.device)
        values: dict[str, float] = {}
        for metric in self.metrics:
            values |= metric.score(drawn, reference).values
        return {name: torch.tensor(value, dtype=torch.float64, device=self.device) for name, value in values.items()}

    def drawn(self) -> Drawn:
        """The features that are there, in order of the pictures; in `compute`, those of all processes."""
        index, order = self._rows("index"), self._order()
        place = index[order].tolist()
        names = list(self.extractors)
        return Drawn(
            {name: self._rows(f"pictures_{i}")[order] for i, name in enumerate(names)},
            [self.prompts[each] for each in place] if self.prompts else (),
            {name: self._rows(f"prompts_{i}")[order] for i, name in enumerate(names) if f"prompts_{i}" in self.empty},
        )

    def _order(self) -> Tensor:
        """Rows in order of the pictures' index, the first of each."""
        order = torch.argsort(self._rows("index"), stable=True)
        index = self._rows("index")[order]
        first = torch.ones_like(index, dtype=torch.bool)
        first[1:] = index[1:] != index[:-1]
        return order[first]

    def _append(self, name: str, rows: Tensor) -> None:
        getattr(self, name).append(rows.to(self.device))

    def _rows(self, name: str) -> Tensor:
        return dim_zero_cat(getattr(self, name))


def frechet_metric(extractor: Extractor, reference: Reference) -> FrechetInceptionDistance:
    """torchmetrics' FID with an extractor of ours and a reference that is known; give it drawn pictures, `real=False`.

    It gathers sums of features, D x D numbers a process, instead of the features: for sets too large for
    `StreamedMetrics`. It has neither floor nor extrapolated value, and counts a picture as often as it comes.

    Args:
        extractor: whose features are compared.
        reference: features or statistics of real pictures.
    """
    known = reference_gaussian(reference, extractor)
    # Every process has them, so their sums are added up; with this many pictures, the division of the covariance by the
    # number less one is off by a millionth of a millionth for it, and the power of two loses no digits.
    count = 2**40
    metric = FrechetInceptionDistance(feature=extractor, reset_real_features=False)
    metric.real_features_sum = count * known.mu
    metric.real_features_cov_sum = (count - 1) * known.sigma + count * known.mu.outer(known.mu)
    metric.real_features_num_samples = torch.tensor(count)
    return metric
