"""Which requests may be what kills servers, and how few of them may run together."""

from collections.abc import Set
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trd_megatron.engine.fleet import Server
    from trd_megatron.engine.shards import Item


class Suspicion:
    """A request that was in flight when a server was lost is a suspect. Servers die of other things too, so most are innocent.

    Suspects of n losses run in groups of most >> n at a server, beside requests that are none. A group that kills goes on in
    groups of half its size, until the suspect that kills is in flight alone: after log2(most) losses, or sooner.
    """

    def __init__(self, most: int) -> None:
        """most: requests in flight at one server."""
        self._most = most
        self._losses: dict[Item, int] = {}
        self._running: dict[Server, set[Item]] = {}

    def admits(self, item: "Item", server: "Server") -> bool:
        """Whether `item` may run at `server` beside the suspects that run there."""
        losses = self._losses.get(item)
        running = self._running.get(server)
        if losses is None or not running:
            return True
        return self._losses[next(iter(running))] == losses and len(running) < self._most >> losses

    def begins(self, item: "Item", server: "Server") -> None:
        if item in self._losses:
            self._running.setdefault(server, set()).add(item)

    def ends(self, item: "Item", server: "Server") -> None:
        if self._running:
            self._running.get(server, set()).discard(item)

    def lost(self, server: "Server", in_flight: "Set[Item]") -> "Item | None":
        """The server was lost with these in flight. Returns the suspect that was alone there: this loss counts against it."""
        running = self._running.pop(server, set()) & in_flight
        for item in in_flight:
            self._losses[item] = self._losses.get(item, 0) + 1
        return running.pop() if len(running) == 1 else None

    def __contains__(self, item: "Item") -> bool:
        return item in self._losses

    def acquit(self, item: "Item") -> None:
        """It was answered."""
        self._losses.pop(item, None)

    def convict(self) -> None:
        """The one that killed is given up: the others were only near it."""
        self._losses.clear()
        self._running.clear()
