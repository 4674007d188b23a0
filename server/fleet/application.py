"""The application for Ray Serve: `import_path: server.fleet.application:build`, with the tables of a config as args."""

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from server.fleet.config import FleetConfig, settings_of
from server.fleet.front import Front
from server.fleet.replica import SAVE_S, EngineReplica

LAST_S = 20.0
"""What Ray waits longer for a replica that stops than its drain and the saving of its states may take."""


def build(args: Mapping[str, Any]) -> Application:
    """Fronts and engines, of the tables `fleet` and `serve`."""
    config = FleetConfig(**args)
    fleet, settings = config.fleet, settings_of(config.serve)
    engines = serve.deployment(
        EngineReplica,
        name="Engine",
        max_ongoing_requests=fleet.max_ongoing,
        ray_actor_options={"num_cpus": fleet.cpus, "num_gpus": fleet.gpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=fleet.min_replicas,
            initial_replicas=fleet.min_replicas,
            max_replicas=fleet.max_replicas,
            upscale_delay_s=fleet.upscale_delay_s,
            downscale_delay_s=fleet.downscale_delay_s,
            metrics_interval_s=1.0,
            look_back_period_s=2.0,
            policy=AutoscalingPolicy(
                policy_function="server.fleet.scaling:SlotPolicy",
                policy_kwargs={"target_load": fleet.target_load},
            ),
        ),
        request_router_config=RequestRouterConfig(
            request_router_class="server.fleet.router:EngineRouter",
            request_routing_stats_period_s=1.0,
            request_routing_stats_timeout_s=5.0,
        ),
        health_check_period_s=fleet.health_check_s,
        health_check_timeout_s=max(30.0, 5 * fleet.health_check_s),
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.drain_timeout_s + SAVE_S + LAST_S,
    ).bind(dict(config.serve))
    return serve.deployment(
        Front,
        name="Front",
        num_replicas=fleet.fronts,
        max_ongoing_requests=100_000,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=settings.drain_timeout_s + SAVE_S + LAST_S,
    ).bind(engines)
