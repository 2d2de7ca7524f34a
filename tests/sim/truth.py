"""What really happened, as the oracle saw it: contents that were written, releases that were made."""

from __future__ import annotations

from dataclasses import dataclass, field

from refleet.common.messages import Release

from .contents import Content
from .kernel import kernel

#: who may not repeat or go back: (epoch, seq) of a release
Order = tuple[int, int]


class Violation(AssertionError):
    """An invariant does not hold."""

    def __init__(self, invariant: str, what: str):
        super().__init__(f"{invariant}: {what}")
        self.invariant, self.what = invariant, what


def need(holds: object, invariant: str, what: str) -> None:
    """Ends the run unless it `holds`, also where the production code catches what is raised here."""
    if not holds:
        kernel().failed = kernel().failed or Violation(invariant, what)
        raise kernel().failed


@dataclass
class Truth:
    """Everything that a checker may be asked to believe."""

    contents: dict[bytes, Content] = field(default_factory=dict)
    releases: dict[tuple[str, Order], Release] = field(default_factory=dict)  # by store and order; recorded or nearly
    names: dict[tuple[str, str], bytes] = field(default_factory=dict)  # (store, version id) -> fingerprint
    probes: dict[bytes, bytes] = field(default_factory=dict)  # fingerprint -> probe when it was first served

    def add(self, content: Content) -> None:
        self.contents[content.fingerprint] = content

    def made(self, release: Release) -> bool:
        return self.releases.get((release.publisher, release.order)) == release

    def content(self, fingerprint: bytes, invariant: str) -> Content:
        found = self.contents.get(fingerprint)
        need(found is not None, invariant, f"{fingerprint.hex()[:16]} is no state that the trainer ever wrote")
        assert found is not None
        return found
