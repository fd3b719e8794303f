"""Files of votes, and the win rate that they give.

Of several votes on one pair the mean counts, a tie half. The win rate is the mean over prompts of the mean over their
pairs, and its interval is Wilson's score interval for as many independent outcomes as there are prompts (Wilson 1927,
JASA 22). Means lie closer together than single outcomes, so the interval is rather too wide than too narrow.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

from swd.report.pairs import FORMAT, unscramble
from swd.types import UserError

CHOICES = ("left", "right", "tie")


@dataclass(frozen=True)
class Vote:
    """One vote: for A (1), for B (0), or a tie (0.5)."""

    pair: int
    criterion: str
    score: float


@dataclass(frozen=True)
class Ballot:
    """The votes of one person.

    Attributes:
        file: where they lie.
        study: hash of what was voted on.
        session: unlike that of any other person.
        names: of A and B.
        prompts: by pair; pairs without a prompt have their key.
        criteria: what was voted on.
        votes: at most one for each pair and criterion.
    """

    file: Path
    study: str
    session: str
    names: tuple[str, str]
    prompts: Sequence[str]
    criteria: Sequence[str]
    votes: Sequence[Vote]


@dataclass(frozen=True)
class WinRate:
    """How often A was preferred to B.

    Attributes:
        criterion: in what.
        votes: all of them.
        prompts, pairs: that have a vote.
        wins, ties, losses: pairs whose mean vote is for A, for neither, for B.
        rate: mean over prompts, in [0, 1].
        low, high: its interval.
        agreement: share of the pairs with several votes on which all are the same; None if there is none.
    """

    criterion: str
    votes: int
    prompts: int
    pairs: int
    wins: int
    ties: int
    losses: int
    rate: float
    low: float
    high: float
    agreement: float | None

    @property
    def settled(self) -> bool:
        """Whether the interval leaves out one half."""
        return not self.low <= 0.5 <= self.high


def read_ballot(file: Path) -> Ballot:
    """The votes of one file.

    Raises:
        UserError: if it is no file of votes, or a vote is for a pair or a criterion that the page did not have.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; give the votes.json that the page saved") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({error}); save the votes again") from None
    if not isinstance(found, dict) or "votes" not in found or "sealed" not in found:
        raise UserError(f"{file} holds no votes; give the votes.json that a page of swd compare saved")
    if found.get("format") != FORMAT:
        raise UserError(f"{file} has format {found.get('format')!r}, this program reads {FORMAT}; vote again")
    try:
        hidden = unscramble(found["sealed"], found["study"])
        a, b = map(str, hidden["names"])
        pairs = [(str(prompt) or str(key), bool(flipped)) for key, prompt, flipped in hidden["pairs"]]
        criteria = [str(criterion) for criterion in found["criteria"]]
        session = str(found["session"])
        votes = [(vote["pair"], vote["criterion"], vote["choice"]) for vote in found["votes"]]
    except (LookupError, TypeError, ValueError, AttributeError):
        raise UserError(f"{file} is damaged; save the votes again") from None
    flips = [flipped for _, flipped in pairs]
    counted = _votes(file, votes, criteria, flips)
    return Ballot(file, str(found["study"]), session, (a, b), [prompt for prompt, _ in pairs], criteria, counted)


def _votes(file: Path, votes: Sequence[tuple[Any, ...]], criteria: Sequence[str], flips: Sequence[bool]) -> list[Vote]:
    counted: dict[tuple[int, str], Vote] = {}
    for number, (pair, criterion, choice) in enumerate(votes, 1):
        where = f"{file}, vote {number}"
        if not isinstance(pair, int) or isinstance(pair, bool) or not 0 <= pair < len(flips):
            raise UserError(f"{where}: pair {pair!r} is unknown, the page had 0 to {len(flips) - 1}; save them again")
        if criterion not in criteria:
            raise UserError(f"{where}: criterion {criterion!r} is unknown, the page had {', '.join(criteria)}")
        if choice not in CHOICES:
            raise UserError(f"{where}: choice {choice!r} is none of {', '.join(CHOICES)}; save the votes again")
        if (pair, criterion) in counted:
            raise UserError(f"{where}: pair {pair} has a vote on {criterion} already; leave one of them")
        score = 0.5 if choice == "tie" else float((choice == "left") != flips[pair])
        counted[pair, criterion] = Vote(pair, criterion, score)
    return list(counted.values())


def check_together(ballots: Sequence[Ballot]) -> None:
    """Raise UserError unless all ballots are of one study, of different people, and hold a vote."""
    first = ballots[0]
    for i, ballot in enumerate(ballots):
        if ballot.names != first.names:
            raise UserError(
                f"{ballot.file} compares {' and '.join(ballot.names)}, {first.file} {' and '.join(first.names)}; "
                "count them apart"
            )
        if ballot.study != first.study:
            raise UserError(
                f"{ballot.file} is of other pictures, prompts or criteria than {first.file}; count them apart"
            )
        same = next((other for other in ballots[:i] if other.session == ballot.session), None)
        if same is not None:
            raise UserError(f"{ballot.file} and {same.file} are of one person; give the later one alone")
    if not any(ballot.votes for ballot in ballots):
        raise UserError(f"{first.file} holds no vote yet")


def win_rates(ballots: Sequence[Ballot], level: float = 0.95) -> list[WinRate]:
    """The win rate of A over B in each criterion that has votes.

    Args:
        ballots: of one study.
        level: share of such intervals that hold the true rate, in (0, 1).
    """
    prompts = ballots[0].prompts
    found = []
    for criterion in ballots[0].criteria:
        by_pair: dict[int, list[float]] = {}
        for ballot in ballots:
            for vote in ballot.votes:
                if vote.criterion == criterion:
                    by_pair.setdefault(vote.pair, []).append(vote.score)
        if by_pair:
            found.append(_win_rate(criterion, by_pair, prompts, level))
    return found


def _win_rate(criterion: str, by_pair: Mapping[int, list[float]], prompts: Sequence[str], level: float) -> WinRate:
    means = {pair: fmean(scores) for pair, scores in by_pair.items()}
    by_prompt: dict[str, list[float]] = {}
    for pair, mean in means.items():
        by_prompt.setdefault(prompts[pair], []).append(mean)
    rate = fmean(fmean(values) for values in by_prompt.values())
    low, high = wilson(rate, len(by_prompt), level)
    several = [scores for scores in by_pair.values() if len(scores) > 1]
    return WinRate(
        criterion=criterion,
        votes=sum(map(len, by_pair.values())),
        prompts=len(by_prompt),
        pairs=len(means),
        wins=sum(mean > 0.5 for mean in means.values()),
        ties=sum(mean == 0.5 for mean in means.values()),
        losses=sum(mean < 0.5 for mean in means.values()),
        rate=rate,
        low=low,
        high=high,
        agreement=fmean(len(set(scores)) == 1 for scores in several) if several else None,
    )


def wilson(rate: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval: `(p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)`.

    Args:
        rate: the share p, in [0, 1].
        count: the number n of outcomes.
        level: share of such intervals that hold the true rate, in (0, 1).
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = rate + z * z / (2 * count)
    half = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def as_dict(names: Sequence[str], rates: Sequence[WinRate], level: float, files: Sequence[Path]) -> dict[str, Any]:
    """The result as plain values for JSON."""
    criteria = {rate.criterion: asdict(rate) | {"settled": rate.settled} for rate in rates}
    return {"a": names[0], "b": names[1], "level": level, "files": [str(file) for file in files], "criteria": criteria}
