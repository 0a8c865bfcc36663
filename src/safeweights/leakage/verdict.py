"""The rule by which an audit says that an adapter leaks, and how much it could have seen.

Identity: an encoder is trusted when the interval of its mean percentile rank on people it never saw, through a generator without
the audited weights, lies above every control's, and it flags at most 5 % of adapters that show nobody. A trusted encoder then
judges a file by how far its answer lies from the mean, against the answers for adapters that show nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from safeweights.core.intervals import wilson
from safeweights.leakage.membership import Membership

Verdict = Literal["leaks identity", "leaks images", "not shown"]
FALSE_ALARMS = 0.05


@dataclass(frozen=True)
class Trust:
    """What is known about an encoder from adapters of people it never saw."""

    encoder: str
    rank: float
    interval: tuple[float, float]
    n: int
    gallery: int
    controls: Mapping[str, float]
    """Upper bound of each control's interval."""
    threshold: float
    """Length of an answer, from the mean, above which a file is said to show somebody; from nulls that are not counted below."""
    flagged_nulls: tuple[int, int]
    """(flagged, n) among further adapters that show nobody."""
    flagged: tuple[int, int]
    """(flagged, n) among the test people's adapters: the power."""

    @property
    def passed(self) -> bool:
        """Whether the encoder may judge at all."""
        flagged, n = self.flagged_nulls
        return self.interval[0] > max([0.5, *self.controls.values()]) and (not n or flagged / n <= FALSE_ALARMS)

    @property
    def power(self) -> str:
        """What a "not shown" of this encoder is worth, in words."""
        flagged, n = self.flagged
        low, high = wilson(flagged, n) if n else (0.0, 1.0)
        nulls, count = self.flagged_nulls
        return (
            f"{self.encoder} flags {flagged} of {n} adapters of people it never saw (95 % interval {low:.2f} to {high:.2f}) and "
            f"{nulls} of {count} that show nobody; mean percentile rank {self.rank:.2f} ({self.interval[0]:.2f} to "
            f"{self.interval[1]:.2f}) among {self.gallery} people"
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trust:
        """The inverse of ``dataclasses.asdict``, as read from a file."""
        values = dict(data)
        for key in ("interval", "flagged_nulls", "flagged"):
            values[key] = tuple(values[key])
        return cls(**values)


@dataclass(frozen=True)
class Finding:
    """The answer to one question about one or more files."""

    verdict: Verdict
    why: str
    power: str


def decide(
    trusts: Sequence[Trust],
    lengths: Mapping[str, Sequence[float]],
    *,
    membership: Membership | None = None,
    told: Sequence[str] = (),
    missing: str = "",
) -> Finding:
    """``lengths`` are the audited files' answer lengths by encoder; ``told`` what headers say of training data in plain words.

    ``missing`` says why no encoder judged. Identity goes before images: who leaks a person leaks more than a picture's presence.
    """
    passed = [trust for trust in trusts if trust.passed and trust.encoder in lengths]
    power = (
        "; ".join(trust.power for trust in passed)
        or missing
        or ("no encoder was above every control on people it never saw" if trusts else "no encoder judged the weights")
    )
    if membership is not None:
        power += f"; membership over {membership.members} pictures against {membership.others} others"
    if told:
        return Finding("leaks identity", f"the file's header tells it without any attack: {'; '.join(told)}", power)
    for trust in passed:
        over = [length for length in lengths[trust.encoder] if length > trust.threshold]
        if over:
            nulls, count = trust.flagged_nulls
            return Finding(
                "leaks identity",
                f"the {trust.encoder} encoder reads a subject from {len(over)} of {len(lengths[trust.encoder])} files' weights "
                f"(answer {max(over):.2f} from the mean; adapters that show nobody stay below {trust.threshold:.2f}, "
                f"{nulls} of {count} false alarms)",
                power,
            )
    if membership is not None:
        low, _ = wilson(membership.hits, membership.members)
        if not membership.fair:
            power += (
                f"; membership says nothing: the base model alone tells the two sets apart (AUC {membership.base_auc:.2f}), "
                "give --non-members of the same kind"
            )
        elif low > 0.01 and membership.auc_interval[0] > 0.5:
            return Finding(
                "leaks images",
                f"{membership.hits} of {membership.members} training pictures are told from others at "
                f"{membership.fpr:.1%} false positives (AUC {membership.auc:.2f})",
                power,
            )
    return Finding("not shown", "nothing that was tried tells who or what it was trained on, at this power", power)
