"""Ray Serve's request router for engines: to the replica that has the state or the prefix, else to one with room."""

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from server.fleet.exchange import Exchange
from server.fleet.homes import Homes, homes_here

WAITING, FREE = "waiting", "free"
"""What each replica tells of itself every second: requests that wait for a slot, free slots."""


def name_of(replica: RunningReplica) -> str:
    """Of a replica, as its engine has it in `X-Dijiang-Replica`."""
    return str(replica.replica_id.unique_id)


def ranked(candidates: list[RunningReplica], exchange: Exchange | None, homes: Homes) -> list[list[RunningReplica]]:
    """Replicas in groups, to be tried one group after the other; among a group Ray takes the shortest queue."""
    if exchange is None:
        return [candidates]
    if exchange.to is not None:
        return [[replica for replica in candidates if name_of(replica) == exchange.to]]
    fresh = [replica for replica in candidates if name_of(replica) not in exchange.avoid] or candidates
    roomy = [replica for replica in fresh if not _is_full(replica)] or fresh
    home = homes.of(exchange.keys)
    own = [replica for replica in roomy if name_of(replica) == home]
    others = [replica for replica in roomy if name_of(replica) != home]
    rest = [replica for replica in fresh if replica not in roomy]
    return [group for group in (own, others, rest) if group]


def _is_full(replica: RunningReplica) -> bool:
    told: dict[str, Any] = replica.routing_stats
    return bool(told.get(WAITING, 0) > 0 and told.get(FREE, 1) <= 0)


class EngineRouter(RequestRouter):  # type: ignore[misc]  # without types
    """See the module. Ray copies the class with its module, so that what it shares with others is kept elsewhere."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """See `RequestRouter.choose_replicas`."""
        exchange = None
        if pending_request is not None and pending_request.args and isinstance(pending_request.args[0], Exchange):
            exchange = pending_request.args[0]
        return ranked(candidate_replicas, exchange, homes_here())

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """See `RequestRouter.update_replicas`."""
        homes_here().running = frozenset(name_of(replica) for replica in replicas)
        super().update_replicas(replicas)
