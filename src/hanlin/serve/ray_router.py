"""`AffinityRouter`: the rule of `affinity.choose_replica` as Ray Serve's way to route requests.

Ray Serve imports it by name into the process that holds the handle, the front's; nothing else may import this file, for
it needs Ray. https://docs.ray.io/en/latest/serve/advanced-guides/custom-request-router.html
"""

from random import Random
from typing import Any

from hanlin.core.errors import require
from hanlin.serve.affinity import choose_replica
from hanlin.serve.fleet import Ask

RequestRouter: Any = require("ray.serve.request_router", "ray").RequestRouter


class AffinityRouter(RequestRouter):
    """loads: replica's name -> requests of this front that it has under way."""

    queue_len_response_deadline_s = 2.0  # a replica that computes on every core answers late and is not ill

    def initialize_state(self, **_: Any) -> None:
        self.loads: dict[str, int] = {}
        self.draw = Random()

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """The one replica, then all others, should it be gone."""
        named = {one.replica_id.unique_id: one for one in candidate_replicas}
        if not named or pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        ask: Ask = pending_request.args[0]
        if ask.replica in named:
            chosen = ask.replica
        else:
            chosen = choose_replica(ask.key, {name: self.loads.get(name, 0) for name in named}, self.draw)
        return [[named[chosen]], [one for name, one in named.items() if name != chosen]]

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        self.loads[replica_id.unique_id] = self.loads.get(replica_id.unique_id, 0) + 1

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        left = self.loads.pop(replica_id.unique_id, 0) - 1
        if left > 0:
            self.loads[replica_id.unique_id] = left
