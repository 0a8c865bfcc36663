"""The rule by which an audit says that an adapter leaks, and how much it could have seen.

Identity: an encoder is trusted when its mean percentile rank on people it never saw lies above every control of the same path,
whole intervals compared: pictures of a generator without the audited weights against such pictures of each control, and its own
estimate against each control's estimate. It must read more than norms and spectra, and flag at most 5 % of adapters that show
nobody. The best trusted encoder then judges a file by how far its answer lies from the mean (the probe's encoder: times its
likeness to adapters of subjects), against the answers for adapters that show nobody.

Images: more pictures are told from others than the false positives allow, or what is read from the weights lies nearer to the
training pictures than to other pictures of the same subject.

What a header says in plain words is no measurement of the weights: it is told beside the verdict and does not make it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from safeweights.core.intervals import wilson
from safeweights.leakage.membership import Copies, Membership

Verdict = Literal["leaks identity", "leaks images", "not shown"]
FALSE_ALARMS = 0.05
ONE_SIDED = 0.025
"""The level of an exact test, the same as a 95 % interval's lower end."""
CONFOUNDS = frozenset({"spectrum"})
"""Encoders that see how much was learnt, not what: they are measured, and never judge who it is."""


@dataclass(frozen=True)
class Trust:
    """What is known about an encoder from adapters of people it never saw."""

    encoder: str
    rank: float
    """Mean percentile rank of the generator's pictures."""
    interval: tuple[float, float]
    n: int
    gallery: int
    controls: Mapping[str, float]
    """Upper bound of each control's interval, measured on the generator's pictures too."""
    threshold: float
    """Length of an answer, from the mean, above which a file is said to show somebody."""
    flagged_nulls: tuple[int, int]
    """(flagged, n) among adapters that show nobody, each by a threshold it had no part in."""
    flagged: tuple[int, int]
    """(flagged, n) among the test people's adapters: the power."""
    direct_rank: float | None = None
    """Mean percentile rank of the encoder's own estimate."""
    direct_interval: tuple[float, float] | None = None
    direct_controls: Mapping[str, float] | None = None
    """Upper bound of each control's interval, measured on estimates; None in files of before the paths were told apart."""
    null_kinds: Mapping[str, tuple[int, int]] | None = None
    """``flagged_nulls`` by what the null adapters were trained on."""

    @property
    def passed(self) -> bool:
        """Whether the encoder may judge at all."""
        return not self.doubt

    @property
    def doubt(self) -> str:
        """Why the encoder may not judge, in one sentence; "" where it may."""
        if self.encoder in CONFOUNDS:
            return f"{self.encoder} sees norms and singular values only, which tell how much was learnt and not who it is"
        if self.direct_controls is None or self.direct_interval is None:
            return (
                f"{self.encoder} was measured by an older version, against controls of another path than its pictures; "
                "train the encoders again with 'safeweights leakage train'"
            )
        for path, low, controls in (
            ("pictures through the generator", self.interval[0], self.controls),
            ("own estimate", self.direct_interval[0], self.direct_controls),
        ):
            name, high = max({"chance": 0.5, **controls}.items(), key=lambda item: item[1])
            if not low > high:
                return f"{self.encoder}: its {path} rank at {low:.3f} or more, and the control '{name}' reaches {high:.3f}"
        flagged, n = self.flagged_nulls
        if not n:
            return f"{self.encoder} was never asked about adapters that show nobody, so its false alarms are not known"
        if flagged / n > FALSE_ALARMS:
            return f"{self.encoder} flags {flagged} of {n} adapters that show nobody; at most {FALSE_ALARMS:.0%} may be"
        return ""

    @property
    def power(self) -> str:
        """What a "not shown" of this encoder is worth, in words."""
        flagged, n = self.flagged
        low, high = wilson(flagged, n) if n else (0.0, 1.0)
        nulls, count = self.flagged_nulls
        return (
            f"{self.encoder} flags {flagged} of {n} adapters of people it never saw (95 % interval {low:.2f} to {high:.2f}) and "
            f"{nulls} of {count} that show nobody; mean percentile rank {self.rank:.2f} ({self.interval[0]:.2f} to "
            f"{self.interval[1]:.2f}) for {self.n} adapters among {self.gallery} people"
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trust:
        """The inverse of ``dataclasses.asdict``, as read from a file, also from one of an older version.

        Raises KeyError or TypeError for anything else.
        """
        values = {entry.name: data[entry.name] for entry in fields(cls) if entry.name in data}
        for key in ("interval", "flagged_nulls", "flagged", "direct_interval"):
            if values.get(key) is not None:
                values[key] = tuple(values[key])
        if values.get("null_kinds") is not None:
            values["null_kinds"] = {kind: tuple(counts) for kind, counts in values["null_kinds"].items()}
        return cls(**values)


@dataclass(frozen=True)
class Finding:
    """The answer to one question about one or more files."""

    verdict: Verdict
    why: str
    power: str


def judges(trusts: Sequence[Trust], asked: Collection[str]) -> list[Trust]:
    """Those that may judge among the encoders asked, the first of whom does.

    Which encoder judges is settled by the test people, before the file is looked at: several would add their false alarms.
    """
    passed = (trust for trust in trusts if trust.passed and trust.encoder in asked)
    return sorted(passed, key=lambda trust: -trust.interval[0])


def decide(
    trusts: Sequence[Trust],
    lengths: Mapping[str, Sequence[float]],
    *,
    membership: Membership | None = None,
    copies: Copies | None = None,
    missing: str = "",
) -> Finding:
    """``lengths`` are the audited files' answer lengths by encoder.

    ``missing`` says why no encoder judged. Identity goes before images: who leaks a person leaks more than a picture's presence.
    """
    passed = judges(trusts, lengths)
    power = _power(trusts, lengths, passed, missing)
    if membership is not None:
        power += f"; membership over {membership.members} pictures against {membership.others} others"
        if not membership.fair:
            power += (
                f"; membership says nothing: the base model alone tells the two sets apart (AUC {membership.base_auc:.2f}), "
                "give --non-members of the same kind"
            )
    for trust in passed[:1]:
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
    if membership is not None and membership.fair:
        low, _ = wilson(membership.hits, membership.members)
        if low > membership.floor and membership.p <= ONE_SIDED:
            return Finding(
                "leaks images",
                f"{membership.hits} of {membership.members} training pictures are told from others at "
                f"{membership.fpr:.1%} false positives (AUC {membership.auc:.2f})",
                power,
            )
        if copies is not None and copies.score > 0 and copies.p <= ONE_SIDED:
            return Finding(
                "leaks images",
                f"what is read from the weights lies nearer to the training pictures than to {copies.others} others of the same "
                f"kind (copy score {copies.score:.3f}, p {copies.p:.3f} over exchanged labels)",
                power,
            )
    return Finding("not shown", "nothing that was tried on the weights tells who or what it was trained on, at this power", power)


def _power(trusts: Sequence[Trust], lengths: Mapping[str, Sequence[float]], passed: Sequence[Trust], missing: str) -> str:
    """What was able to see a leak, or why nothing was."""
    if not passed:
        doubts = [trust.doubt for trust in trusts if trust.encoder in lengths and trust.encoder not in CONFOUNDS]
        seen = next((f" (on {trust.n} adapters among {trust.gallery} people)" for trust in trusts), "")
        return missing or (f"no encoder may judge{seen}: {'; '.join(doubts)}" if doubts else "no encoder judged the weights")
    files = len(lengths[passed[0].encoder])
    extra = f"; with {files} files false alarms add up, to {1 - (1 - FALSE_ALARMS) ** files:.0%} at most" if files > 1 else ""
    return passed[0].power + extra
