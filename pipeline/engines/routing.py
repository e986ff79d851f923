"""Which server of a party gets a request: pure, so that its rules can be read and tested alone."""

from collections import OrderedDict
from dataclasses import dataclass

# A prompt leaves the server whose prefix cache knows it only for one with so much less to do.
# Decoding is bound by memory: eight requests more, or a quarter more, make a turn of some hundred
# ids later by about as long as another server needs to read the context of a prompt again.
SPARE_REQUESTS = 8
SPARE_SHARE = 0.25

# Prompts whose server is remembered: many times what is ever in play, a few megabytes.
REMEMBERED = 32768


@dataclass(slots=True)
class _Server:
    """`load`: our requests in flight. `failures`: outages since it last answered."""

    load: int = 0
    failures: int = 0
    failed_at: float = 0.0
    rests_until: float = 0.0


class Router:
    """Chooses a server by its index: where a prompt was before, else where we ask for least.

    A server that failed rests, each time twice as long; then one request tries it, and the others
    come back once it has answered. Times are seconds of one monotonic clock.
    """

    def __init__(
        self,
        servers: int,
        rest_s: float = 1.0,
        longest_rest_s: float = 60.0,
        remembered: int = REMEMBERED,
    ) -> None:
        self._servers = [_Server() for _ in range(servers)]
        self._homes: OrderedDict[str, int] = OrderedDict()
        self._rest_s = rest_s
        self._longest_rest_s = longest_rest_s
        self._remembered = remembered

    def pick(self, prompt_id: str, now: float, avoid: int | None = None) -> int:
        """Return the server for a prompt's next request, and count it there until `finished`.

        `avoid`: the server that has just failed the request; taken only where no other is up.
        """
        chosen = self._choose(prompt_id, now, avoid)
        self._homes[prompt_id] = chosen
        self._homes.move_to_end(prompt_id)
        if len(self._homes) > self._remembered:
            self._homes.popitem(last=False)
        server = self._servers[chosen]
        server.load += 1
        if server.failures:
            server.rests_until = max(server.rests_until, now + self._rest(server))
        return chosen

    def finished(self, n: int) -> None:
        """Count a request out, however it ended."""
        self._servers[n].load -= 1

    def failed(self, n: int, now: float, asked_s: float = 0.0) -> bool:
        """Let a server rest, for `asked_s` at the least; return whether it answered until now.

        Requests that fail together count once.
        """
        server = self._servers[n]
        was_up = server.failures == 0
        if now >= server.rests_until or not server.failures:
            server.failures += 1
        server.failed_at = now
        server.rests_until = max(server.rests_until, now + max(self._rest(server), asked_s))
        return was_up

    def succeeded(self, n: int, sent_at: float) -> None:
        """Trust a server again, unless the request that it answered is older than its failure."""
        server = self._servers[n]
        if sent_at >= server.failed_at:
            server.failures, server.rests_until = 0, 0.0

    def has_another(self, n: int, now: float) -> bool:
        """Whether a server other than `n` takes requests now."""
        return any(m != n for m in self._up(now))

    def _choose(self, prompt_id: str, now: float, avoid: int | None) -> int:
        up = self._up(now)
        up = [n for n in up if n != avoid] or up
        if not up:
            return min(range(len(self._servers)), key=lambda n: self._servers[n].rests_until)
        least = min(up, key=lambda n: self._servers[n].load)
        home = self._homes.get(prompt_id)
        if home is None or home not in up:
            return least
        enough = self._servers[least].load * (1 + SPARE_SHARE) + SPARE_REQUESTS
        return home if self._servers[home].load <= enough else least

    def _up(self, now: float) -> list[int]:
        return [n for n, server in enumerate(self._servers) if server.rests_until <= now]

    def _rest(self, server: _Server) -> float:
        return min(self._longest_rest_s, self._rest_s * 2.0 ** min(server.failures - 1, 16))
