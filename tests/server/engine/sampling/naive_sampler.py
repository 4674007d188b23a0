"""One row at a time, in plain Python floats: what the batched sampler must agree with."""

import math

from server.engine.sampling.randomness import uniform
from server.engine.types.requests import SamplingParams


def naive_adjust(
    logits: list[float],
    sampling: SamplingParams,
    *,
    prompt: tuple[int, ...],
    output: list[int],
    eos_token_ids: tuple[int, ...],
) -> list[float]:
    """Bias, then penalties, then suppression before `min_tokens` and of bad words, then what alone is allowed."""
    scores = list(logits)
    for token, bias in sampling.logit_bias:
        scores[token] += bias
    for token in set(prompt) | set(output):
        penalty = sampling.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token in set(output):
        scores[token] -= sampling.presence_penalty + sampling.frequency_penalty * output.count(token)
    if len(output) < sampling.min_tokens:
        for token in (*eos_token_ids, *sampling.stop_token_ids):
            scores[token] = -math.inf
    for word in sampling.bad_words:
        if len(word) == 1 or tuple(output[1 - len(word) :]) == word[:-1]:
            scores[word[-1]] = -math.inf
    if sampling.allowed_token_ids:
        scores = [score if token in sampling.allowed_token_ids else -math.inf for token, score in enumerate(scores)]
    return scores


def naive_probabilities(scores: list[float], sampling: SamplingParams) -> list[float]:
    """Temperature (> 0), then min-p, top-k, top-p and typical-p, each over what the one before left."""
    best = max(scores)
    weights = [math.exp((score - best) / sampling.temperature) for score in scores]
    weights = [weight if weight >= sampling.min_p else 0.0 for weight in weights]
    if 0 < sampling.top_k < len(weights):
        kth = sorted(weights, reverse=True)[sampling.top_k - 1]
        weights = [weight if weight >= kth else 0.0 for weight in weights]
    if sampling.top_p < 1:
        total, before, floor = sum(weights), 0.0, 0.0
        for weight in sorted(weights, reverse=True):
            if before < sampling.top_p * total:
                floor = weight
            before += weight
        weights = [weight if weight >= floor else 0.0 for weight in weights]
    total = sum(weights)
    probabilities = [weight / total for weight in weights]
    return typical(probabilities, sampling.typical_p) if sampling.typical_p < 1 else probabilities


def typical(probabilities: list[float], typical_p: float) -> list[float]:
    """The tokens nearest to the entropy, until they reach the mass; those as near as the last one too."""
    entropy = -sum(probability * math.log(probability) for probability in probabilities if probability > 0)
    distances = [abs(-math.log(p) - entropy) if p > 0 else math.inf for p in probabilities]
    reached, edge = 0.0, 0.0
    for distance, probability in sorted(zip(distances, probabilities, strict=True)):
        if reached < typical_p:
            edge = distance
        reached += probability
    kept = [
        probability if distance <= edge * (1 + 1e-6) else 0.0
        for distance, probability in zip(distances, probabilities, strict=True)
    ]
    return [probability / sum(kept) for probability in kept]


def naive_sample(scores: list[float], sampling: SamplingParams, output_index: int) -> int:
    """The most likely token, or the inverse CDF of the row's one uniform number, in vocabulary order."""
    if sampling.temperature == 0:
        return scores.index(max(scores))
    point, reached = uniform(sampling.seed, output_index), 0.0
    probabilities = naive_probabilities(scores, sampling)
    for token, probability in enumerate(probabilities):
        reached += probability
        if reached > point:
            return token
    return max(token for token, probability in enumerate(probabilities) if probability > 0)


def distance_to_edge(scores: list[float], sampling: SamplingParams, output_index: int) -> float:
    """How far the uniform number is from where another token would be drawn: below this, rounding decides."""
    if sampling.temperature == 0:
        first, second = sorted(scores, reverse=True)[:2]
        return first - second
    point, reached = uniform(sampling.seed, output_index), 0.0
    distances = []
    for probability in naive_probabilities(scores, sampling):
        reached += probability
        distances.append(abs(reached - point))
    return min(distances)
