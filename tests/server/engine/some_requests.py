"""Requests of many kinds. Imports nothing that a bare machine with a GPU lacks."""

import torch

from server.engine.types.requests import GenerationRequest, SamplingParams


def make_request(name: str, length: int, *, seed: int = 0, **sampling: object) -> GenerationRequest:
    generator = torch.Generator().manual_seed(1_000 * length + seed)
    prompt = tuple(torch.randint(0, 256, (length,), generator=generator).tolist())
    params = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, "seed": seed, **sampling}
    return GenerationRequest(name, prompt, SamplingParams(**params))  # type: ignore[arg-type]


def mixed_requests(num: int) -> list[GenerationRequest]:
    """Every second one greedy; the others each with another mix of parameters."""
    requests = []
    for number in range(num):
        sampling: dict[str, object] = {}
        if number % 2:
            sampling = {
                "temperature": (0.5, 1.0, 1.5)[number % 3],
                "top_k": (0, 5, 40)[number % 3],
                "top_p": (1.0, 0.9)[number // 2 % 2],
                "min_p": (0.0, 0.0, 0.02)[number % 3],
                "repetition_penalty": (1.0, 1.2)[number // 4 % 2],
                "logit_bias": ((number, 2.0),),
            }
        requests.append(make_request(f"r{number}", 1 + (7 * number) % 45, seed=number, **sampling))
    return requests
