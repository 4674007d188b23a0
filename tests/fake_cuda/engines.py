"""Engines on the device without memory: every shape, kind of weights, of states and of request."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.gpu.models import WEIGHTS, config_of
from dijiang_model.batch import PackedBatch
from dijiang_model.checkpoints.quantized import install
from dijiang_model.config import ModelConfig
from dijiang_model.families import build_model
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.quantization.config import Quantization
from dijiang_model.serving.network import FrozenModel, freeze
from dijiang_model.state import StateBuffer
from server.engine.engine import Engine
from server.engine.fast_steps import graph_sampling
from server.engine.fast_steps.graphs import DecodeGraphs
from server.engine.grammars.grammar import HEADER
from server.engine.loading import build_engine
from server.engine.types.logprobs import LogprobOptions
from server.engine.types.requests import EngineConfig, GenerationRequest, GrammarSpec
from server.engine.types.state import StateOptions
from tests.fake_cuda.machine import Machine
from tests.server.engine.some_requests import make_request, mixed_requests
from tests.tiny_models import (
    CONSTANT,
    HYBRID,
    NO_LINEAR,
    PURE,
    anchored,
    gemma3_config,
    gpt_neox_config,
    llama_config,
    olmo2_config,
    opt_config,
    qwen2_config,
    qwen3_config,
)

CUDA = torch.device("cuda", 0)
NUM_LAYERS = 2
"""Layers of a model are alike: what one launches, all do."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What an engine serves.

    Attributes:
        config: of its network.
        weights: of `benchmarks.gpu.models.WEIGHTS`.
        dtype: of weights that are not quantized.
        states: dtype that states are kept in.
    """

    config: ModelConfig
    weights: str = "plain"
    dtype: torch.dtype = torch.bfloat16
    states: torch.dtype = torch.float32


def shape(name: str, attention: str, num_layers: int = NUM_LAYERS) -> ModelConfig:
    """One of the benchmarks' shapes with so many layers."""
    config = config_of(name, attention)
    return replace(config, layers=config.layers[:num_layers])


UNROTATED = replace(HYBRID, features=replace(HYBRID.features, rotated=False))
FAMILIES: Mapping[str, ModelConfig] = {
    "gemma3_text": gemma3_config(),
    "gpt_neox": replace(gpt_neox_config(HYBRID, PURE), num_heads=4, num_kv_heads=4),
    "gpt_neox, released": replace(gpt_neox_config(), num_heads=4, num_kv_heads=4),
    "llama": llama_config(HYBRID, PURE),
    "mistral": replace(llama_config(HYBRID, PURE), family="mistral"),
    "olmo2": replace(olmo2_config(HYBRID, PURE), num_heads=4, num_kv_heads=4),
    "opt": replace(opt_config(HYBRID, PURE), num_heads=4, num_kv_heads=4, hidden_size=64),
    "opt, norms behind": replace(
        opt_config(HYBRID, PURE, pre_norm=False, embedding_size=8), num_heads=4, num_kv_heads=4, hidden_size=64
    ),
    "phi3": replace(llama_config(HYBRID, PURE), family="phi3"),
    "qwen2": qwen2_config(HYBRID, PURE),
    "qwen3": qwen3_config(HYBRID, PURE),
}
"""Tiny networks of every family that two ranks can share."""
OWN_MODULES = ("gemma3_text", "gpt_neox", "llama", "olmo2", "opt", "opt, norms behind", "qwen3")
"""Those that are not LLaMA under another name, and can be trained."""
KINDS: Mapping[str, Kind] = {
    "SmolLM2, hybrid": Kind(shape("smollm2-135m", "hybrid")),
    "SmolLM2, pure, fp32": Kind(shape("smollm2-135m", "pure"), dtype=torch.float32),
    "SmolLM2, int8 weights and states": Kind(shape("smollm2-135m", "hybrid"), weights="int8", states=torch.int8),
    "SmolLM2, int4": Kind(shape("smollm2-135m", "hybrid"), weights="int4", states=torch.bfloat16),
    "LLaMA-2-7B, int4 with minimums": Kind(shape("llama-2-7b", "hybrid"), weights="int4-minimums"),
    "Pythia-2.8B, released": Kind(shape("pythia-2.8b", "released"), dtype=torch.float16),
    **{f"family {name}": Kind(config) for name, config in FAMILIES.items()},
    "unrotated features": Kind(llama_config(UNROTATED)),
    "anchors of 4 bits": Kind(llama_config(anchored(2, value_bits=4), anchored(2, base=CONSTANT, value_bits=4))),
    "anchors": Kind(llama_config(anchored(2), anchored(2, base=NO_LINEAR), PURE), states=torch.int8),
    "a constant feature": Kind(llama_config(CONSTANT)),
    "a window alone": Kind(llama_config(NO_LINEAR), weights="int4"),
}


def network_of(kind: Kind, machine: Machine) -> FrozenModel:
    """A model of that kind on the device."""
    with machine.loading():
        model = on_device(build_model(kind.config, dtype=kind.dtype), WEIGHTS[kind.weights])
        return freeze(model.keep_states_in(kind.states))


def on_device(model: DiJiangForCausalLM, quantization: Quantization | None = None) -> DiJiangForCausalLM:
    """A network of `meta` moved to the device; what its numbers are does not matter."""
    if quantization is not None:
        install(model, quantization)
    tensors = {name: torch.empty_like(tensor, device="cuda") for name, tensor in model.state_dict().items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.prepare()


def engine_of(network: FrozenModel, machine: Machine, folder: Path, **changes: object) -> Engine:
    """An engine with captured steps, state files and all tiers of its cache."""
    config = EngineConfig(
        model_path=str(folder),
        device="cuda",
        weights_dtype="bfloat16",
        num_threads=1,
        state_memory_bytes=64 * network.state_spec.bytes_per_slot,
        max_num_slots=3,
        max_step_tokens=48,
        max_waiting=100,
        states_folder=str(folder),
        prefix_cache_device_bytes=2 * network.state_spec.bytes_per_slot,
        prefix_cache_host_bytes=2 * network.state_spec.bytes_per_slot,
        prefix_cache_disk_bytes=8 * network.state_spec.bytes_per_slot,
        prefix_cache_folder=str(folder / "prefixes"),
        prefix_cache_min_tokens=8,
        prefix_cache_spacing=16,
    )
    with machine.loading():
        return build_engine(network, replace(config, **changes))  # type: ignore[arg-type]


def all_requests() -> list[GenerationRequest]:
    """Sampling options alone and mixed, log-probabilities, rules that depend on the last token, several answers."""
    plain = {
        "greedy": {},
        "drawn": {"temperature": 0.8},
        "filtered": {"temperature": 0.8, "top_p": 0.9, "top_k": 20},
        "top_k": {"temperature": 0.8, "top_k": 5},
        "min_p": {"temperature": 1.0, "min_p": 0.1},
        "typical": {"temperature": 1.0, "typical_p": 0.5},
        "bad words": {"temperature": 1.0, "bad_words": ((7, 8), (9,))},
        "allowed": {"allowed_token_ids": (0, 3, 5)},
        "minimum": {"min_tokens": 4, "ignore_eos": False},
        "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    }
    requests = [make_request(name, 5 + 3 * at, **options) for at, (name, options) in enumerate(plain.items())]
    scored = make_request("scored", 20)
    return [
        *requests,
        *mixed_requests(4),
        replace(scored, logprobs=LogprobOptions(num_output=3, num_prompt=2)),
        replace(scored, request_id="scored, drawn", logprobs=LogprobOptions(num_output=0)),
    ]


def run(engine: Engine, requests: Iterable[GenerationRequest]) -> Counter[str]:
    """How many requests ended, and how many tokens of their prompts were in the cache."""
    found: Counter[str] = Counter()
    for request in requests:
        assert engine.add(request) is None
    while engine.has_work:
        for event in engine.step():
            assert event.error is None, event.error
            found["ends"] += event.finish_reason is not None
            found["cached tokens"] += event.num_cached_tokens
    return found


def run_states(engine: Engine) -> Counter[str]:
    """Prompts that begin alike go through the tiers of the cache; conversations are saved and gone on from."""
    kept = StateOptions(cache_namespace="tests")
    long = replace(make_request("long", 40), states=kept)
    again = [replace(long, request_id=f"again {number}") for number in range(3)]
    others = [replace(make_request(f"other {number}", 40, seed=number), states=kept) for number in range(4)]
    saved, loaded = StateOptions(save_to="a.safetensors"), StateOptions(load_from="a.safetensors")
    found = run(engine, [long]) + run(engine, again) + run(engine, others) + run(engine, again)
    found += run(engine, [replace(long, request_id="saved", states=saved)])
    return found + run(engine, [replace(make_request("loaded", 3), states=loaded)])


def run_grammars(engine: Engine) -> Counter[str]:
    """Rows with a grammar beside rows without one; the device says token 0, which the grammar permits."""
    zeros = GrammarSpec(HEADER + r"start: /\x00*/")
    requests = [replace(make_request(f"grammar {at}", 5 + at), grammar=zeros) for at in range(2)]
    drawn = replace(make_request("drawn grammar", 9, temperature=1.0), grammar=zeros)
    return run(engine, [*requests, drawn, make_request("free", 6), make_request("free, drawn", 6, temperature=0.7)])


def step_launches(kind: Kind, num_layers: int, machine: Machine, *, lengths: tuple[int, ...]) -> Counter[str]:
    """What one step with so many tokens of each sequence launches, in a model of so many layers; a token each: decode
    rows."""
    config = kind.config
    deep = replace(config, layers=config.layers[:1] * num_layers)
    network = network_of(replace(kind, config=deep), machine)
    state = StateBuffer(network.state_spec, 4, CUDA, cleared=True)
    tokens, slots = torch.arange(sum(lengths), device=CUDA), torch.arange(len(lengths), device=CUDA)
    num_decode = len(lengths) if max(lengths) == 1 else 0
    batch = PackedBatch(tokens, tokens, slots + 1, lengths, num_decode, slots)
    with torch.inference_mode():
        with machine.loading():
            network(batch, state)  # makes what is made once
        before = Counter(machine.launches)
        network(batch, state)
    return machine.launches - before


def sampling_launches(kind: graph_sampling.Kind, machine: Machine) -> int:
    """What choosing the tokens of a captured step launches, from its logits on."""
    logits = torch.empty((3, 260), device=CUDA)
    words = torch.empty((DecodeGraphs.NUM_WORDS, 3), dtype=torch.int64, device=CUDA)
    before = machine.launches.total()
    with torch.inference_mode(), machine.capturing():
        graph_sampling.choose(logits, words, kind=kind)
    return machine.launches.total() - before
