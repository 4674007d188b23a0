"""What a step must at least do: bytes through memory, operations; and how long that takes at a machine's rates."""

from dataclasses import dataclass

from torch import Tensor, nn

from benchmarks.machine import Machine
from dijiang_model.config import ModelConfig
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.quantization.weight import QuantizedWeight

NEAR = ("near_keys", "near_values", "near_key_scales", "near_value_scales")


@dataclass(frozen=True, slots=True)
class Costs:
    """Of one step or prompt.

    Attributes:
        num_bytes: weights once, states in and out.
        operations: multiplications and additions, two for each weight and token.
    """

    num_bytes: int
    operations: int

    def floor_ms(self, machine: Machine) -> float:
        """The longer of the two at the machine's rates."""
        return max(self.num_bytes / machine.read_gb_s, self.operations / machine.matrix_gflop_s) / 1e6


def step_costs(model: DiJiangForCausalLM, *, num_rows: int, num_tokens: int = 1, num_logits: int = 1) -> Costs:
    """Of feeding `num_tokens` tokens to each of `num_rows` conversations.

    Args:
        num_logits: rows of logits for each conversation.
    """
    head = model.head
    num_head = head.rows * head.columns if isinstance(head, QuantizedWeight) else head.numel()
    per_token = 2 * num_projected(model) + attention_operations(model.config)
    return Costs(
        num_bytes=weight_bytes(model) + num_rows * state_bytes(model),
        operations=num_rows * (num_tokens * per_token + 2 * num_logits * num_head),
    )


def weight_bytes(model: DiJiangForCausalLM) -> int:
    """Weights that a step reads: all layers and the head, in the dtype in which they are kept."""
    layers = (tensor for block in model.blocks for tensor in block.state_dict().values())
    head = model.head
    of_head = head.num_bytes if isinstance(head, QuantizedWeight) else num_bytes(head)
    return sum(num_bytes(tensor) for tensor in layers) + of_head


def state_bytes(model: DiJiangForCausalLM) -> int:
    """Of one conversation and step: the linear state in and out, the near tokens in."""
    return sum(tensor.num_bytes * (1 if tensor.name.endswith(NEAR) else 2) for tensor in model.state_spec.tensors)


def num_projected(model: DiJiangForCausalLM) -> int:
    """Weights of the layers' projections, each of which takes part once a token."""
    modules = [module for block in model.blocks for module in block.modules()]
    rounded = sum(module.rows * module.columns for module in modules if isinstance(module, QuantizedWeight))
    return rounded + sum(module.weight.numel() for module in modules if isinstance(module, nn.Linear))


def attention_operations(config: ModelConfig) -> int:
    """Of a token in all layers: features of queries and key, the state's update and read-out, the window."""
    heads, groups, d = config.num_heads, config.num_kv_heads, config.head_size
    operations = 0
    for layer in config.layers:
        features = layer.features.num(d)
        operations += 2 * (heads + groups) * d * features + (3 * groups + 2 * heads) * features * d
        operations += 4 * heads * (layer.window + layer.sinks) * d
    return operations


def num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
