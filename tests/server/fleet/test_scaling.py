"""How many engines there are to be: what the policy answers, and what Ray makes of it."""

from types import SimpleNamespace
from typing import Any

import pytest

from server.fleet.scaling import BUSY, SLOTS, SlotPolicy

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own


def context_of(told: list[tuple[float, float]], *, present: int, waiting: float = 0.0, **more: Any) -> Any:
    """What Ray gives to a policy; where Ray is not installed, what the policy reads of it.

    Args:
        told: slots and busy ones, of each engine that has told them.
        present: engines that are there.
        waiting: requests at the front.
        more: other fields.
    """
    metrics = {
        SLOTS: {n: slots for n, (slots, _) in enumerate(told)},
        BUSY: {n: busy for n, (_, busy) in enumerate(told)},
    }
    fields = {
        "current_num_replicas": present,
        "target_num_replicas": present,
        "total_queued_requests": lambda: waiting,
        "aggregated_metrics": lambda: metrics if told else {},
        **more,
    }
    try:
        from ray.serve.config import AutoscalingContext
    except ImportError:
        called = {name: field() if callable(field) else field for name, field in fields.items()}
        return SimpleNamespace(**called)
    rest = dict.fromkeys(("deployment_id", "app_name", "raw_metrics", "last_scale_up_time", "last_scale_down_time"))
    given = {"deployment_name": "Engine", "running_replicas": [], "total_num_requests": 0.0, "policy_state": {}}
    limits = {"capacity_adjusted_min_replicas": 1, "capacity_adjusted_max_replicas": 99}
    return AutoscalingContext(**{**rest, **given, **limits, "current_time": 0.0, "config": None, **fields})


def wanted(told: list[tuple[float, float]], *, load: float = 0.5, **more: Any) -> int:
    return SlotPolicy(target_load=load)(context_of(told, **more))[0]


def test_there_are_as_many_engines_as_the_busy_slots_want() -> None:
    assert wanted([(8, 0), (8, 0)], present=2) == 1
    assert wanted([(8, 5), (8, 3)], present=2) == 2
    assert wanted([(8, 8), (8, 1)], present=2) == 3
    assert wanted([(8, 60), (8, 40)], present=2, load=1.0) == 13, "busy are those that wait, too"


def test_requests_at_the_front_are_busy_slots_that_no_engine_has_told() -> None:
    assert wanted([(4, 4)], present=1, load=1.0) == 1
    assert wanted([(4, 4)], present=1, load=1.0, waiting=1) == 2


@pytest.mark.parametrize("present", [1, 3])
@pytest.mark.parametrize("told", [[], [(0, 0)]])
def test_while_nothing_is_told_the_number_stays(present: int, told: list[tuple[float, float]]) -> None:
    assert wanted(told, present=present) == present
    assert wanted(told, present=present, waiting=50) == present


def test_nothing_is_known_of_an_engine_that_has_not_told_so_that_it_may_be_as_busy_as_it_likes() -> None:
    assert wanted([(4, 0)], present=2) == 2
    assert wanted([(4, 0), (4, 0)], present=2) == 1
    assert wanted([(4, 12)], present=2) == 6


def followed(told: list[tuple[float, float]], *, present: int, seconds: int, **fleet: Any) -> int:
    """The number that Ray follows after as many seconds of the same load, with the configuration of a deployment."""
    from ray.serve.autoscaling_policy import _apply_autoscaling_config

    from server.fleet.application import build

    serve = {"states": False, "model": "unused"}
    engine = build({"fleet": fleet, "serve": serve})._bound_deployment.init_args[0]._bound_deployment
    scaling = engine._deployment_config.autoscaling_config
    policy = scaling.policy.get_policy()(**scaling.policy.policy_kwargs)
    ask, target = _apply_autoscaling_config(policy), present
    state: dict[str, Any] = {}
    for _ in range(seconds * 10):
        target, state = ask(context_of(told, present=present, config=scaling, policy_state=state))
        if target != present:
            break
    return int(target)


@pytest.mark.ray
def test_ray_follows_what_is_wanted_all_through_its_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr("ray.serve.autoscaling_policy.time", SimpleNamespace(time=lambda: next(clock) / 10))
    delays: dict[str, Any] = {"upscale_delay_s": 2, "downscale_delay_s": 5, "target_load": 0.7}
    assert followed([(4, 8)], present=1, seconds=1, **delays) == 1
    assert followed([(4, 8)], present=1, seconds=9, **delays) == 3
    assert followed([(4, 0), (4, 0)], present=2, seconds=4, **delays) == 2
    assert followed([(4, 0), (4, 0)], present=2, seconds=9, **delays) == 1
    assert followed([], present=2, seconds=9, **delays) == 2
