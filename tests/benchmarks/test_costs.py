"""What the floors are made of."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.costs import Costs, attention_operations, num_projected, state_bytes, step_costs, weight_bytes
from benchmarks.load import percentiles_ms
from benchmarks.machine import Machine
from dijiang_model.checkpoints.quantized import quantize_
from dijiang_model.quantization.config import INT8
from dijiang_model.state import StateBuffer
from tests.tiny_models import HYBRID, gpt_neox_config, llama_config, tiny_model


def test_the_operations_of_projections_and_head_are_what_torch_counts() -> None:
    model = tiny_model(gpt_neox_config())
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    with FlopCounterMode(display=False) as counter:
        for linear in linears:
            linear(torch.zeros(3, linear.in_features))
    own = step_costs(model, num_rows=3).operations - 3 * attention_operations(model.config)
    assert own == counter.get_total_flops()


def test_the_operations_of_attention_are_counted_head_by_head() -> None:
    config = llama_config(HYBRID)
    features, d, near = 16, 16, 5 + 2
    queries, keys = 4 * 2 * d * features, 2 * 2 * d * features
    update, read = 2 * 3 * features * d, 4 * 2 * features * d
    assert attention_operations(config) == queries + keys + update + read + 4 * 2 * 2 * near * d


def test_a_step_reads_the_weights_once_and_moves_every_state() -> None:
    model = tiny_model()
    one, nine = (step_costs(model, num_rows=rows) for rows in (1, 9))
    assert nine.num_bytes - one.num_bytes == 8 * state_bytes(model)
    assert nine.operations == 9 * one.operations
    state = StateBuffer(model.state_spec, 1)
    assert model.state_spec.bytes_per_slot < state_bytes(model) < 2 * state.storage.numel()


def test_rounded_weights_move_fewer_bytes_for_the_same_operations() -> None:
    plain, rounded = tiny_model(), quantize_(tiny_model(), INT8)
    assert num_projected(rounded) == num_projected(plain)
    assert weight_bytes(rounded) < weight_bytes(plain) / 2
    assert step_costs(rounded, num_rows=1).operations == step_costs(plain, num_rows=1).operations


def test_the_floor_is_the_longer_of_moving_and_multiplying() -> None:
    machine = Machine("a", 1, read_gb_s=10.0, load_average=0.0, matrix_gflop_s=100.0)
    assert Costs(num_bytes=10**8, operations=10**9).floor_ms(machine) == pytest.approx(10.0)
    assert Costs(num_bytes=10**7, operations=10**9).floor_ms(machine) == pytest.approx(10.0)
    assert Costs(num_bytes=10**7, operations=10**8).floor_ms(machine) == pytest.approx(1.0)


def test_percentiles_are_in_order_and_of_few_values_still_true() -> None:
    assert percentiles_ms([]) == {}
    assert percentiles_ms([0.002]) == {"p50": 2.0, "p90": 2.0, "p99": 2.0}
    assert percentiles_ms([index / 1000 for index in range(101)]) == pytest.approx({"p50": 50, "p90": 90, "p99": 99})
