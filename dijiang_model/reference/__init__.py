"""Ground truth for everything else: naive forms, one sequence at a time, explicit loops, fp64 by choice.

Written from the paper and the released format (see `dijiang_model/README.md`, which also has the
glossary of letters), not from the fast code: nothing here is imported by it and nothing of it is
imported here. Slow on purpose; for tests and small shapes only.

    features    the frequency-domain feature maps, bases from their cosine formulas
    linear      linear attention with decay: parallel, chunked, recurrent; read-outs; position tables
    hybrid      the exact window with a joint denominator: parallel and recurrent
    anchors     places kept by a learned priority beside the window: parallel, recurrent, chunked
    network     whole GPT-NeoX, LLaMA and OPT forward passes on top of those
"""

from dijiang_model.reference.features import dct_matrix, feature_map
from dijiang_model.reference.hybrid import HybridState, hybrid_parallel, hybrid_recurrent
from dijiang_model.reference.linear import (
    LinearState,
    chunked,
    group_norm_gate,
    parallel,
    position_table_factors,
    position_table_parallel,
    recurrent,
)
from dijiang_model.reference.network import forward, greedy

__all__ = [
    "HybridState",
    "LinearState",
    "chunked",
    "dct_matrix",
    "feature_map",
    "forward",
    "greedy",
    "group_norm_gate",
    "hybrid_parallel",
    "hybrid_recurrent",
    "parallel",
    "position_table_factors",
    "position_table_parallel",
    "recurrent",
]
