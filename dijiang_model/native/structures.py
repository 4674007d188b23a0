"""The structures that the compiled kernels read, as `src/` lays them out."""

import ctypes

Pointer = ctypes.c_void_p
Integer = ctypes.c_int64


class Matrix(ctypes.Structure):
    """A projection: fp32 or bf16 weights, int8 codes with a scale per output, or int4 codes with scales of groups."""

    _fields_ = (
        ("weight", Pointer),
        ("halves", Pointer),
        ("codes", Pointer),
        ("scales", Pointer),
        ("pairs", Pointer),
        ("group_scales", Pointer),
        ("group_minimums", Pointer),
        ("bias", Pointer),
        ("rows", Integer),
        ("columns", Integer),
        ("group_size", Integer),
    )


class Norm(ctypes.Structure):
    """Layer norm; RMS norm without a bias."""

    _fields_ = (("weight", Pointer), ("bias", Pointer), ("eps", ctypes.c_double))


class Attention(ctypes.Structure):
    """What stands between a layer's projections; see `src/attention.h`."""

    _fields_ = (
        ("basis", Pointer),
        ("nodes", Pointer),
        ("log_weights", Pointer),
        ("decay", Pointer),
        ("late", Pointer),
        ("table_write", Pointer),
        ("table_read", Pointer),
        ("mix_bias", Pointer),
        ("mix_weight", Pointer),
        ("late_cos", Pointer),
        ("late_sin", Pointer),
        ("far_up", Pointer),
        ("first_place", Pointer),
        ("windows", Pointer),
        ("log_decay", Pointer),
        ("frequencies", Pointer),
        ("age", ctypes.c_double),
        ("grid", ctypes.c_double),
        ("span", Integer),
        ("value_bits", Integer),
        ("far_rank", Integer),
        ("table_entries", Integer),
        ("num_features", Integer),
        ("window", Integer),
        ("sinks", Integer),
        ("is_softmax", Integer),
        ("has_denominator", Integer),
        ("exact_numbers", Integer),
        ("linear_numbers", Integer),
        ("state_offset", Integer),
        ("normaliser_offset", Integer),
        ("keys_offset", Integer),
        ("values_offset", Integer),
        ("key_scales_offset", Integer),
        ("value_scales_offset", Integer),
        ("positions_offset", Integer),
        ("scores_offset", Integer),
        ("recent_offset", Integer),
    )


class Heads(ctypes.Structure):
    """Head counts, and where each head lies in the projected row."""

    _fields_ = (
        ("num_heads", Integer),
        ("num_groups", Integer),
        ("head_size", Integer),
        ("rotary_half", Integer),
        ("query_start", Integer),
        ("query_step", Integer),
        ("key_start", Integer),
        ("key_step", Integer),
        ("value_start", Integer),
        ("value_step", Integer),
        ("score_start", Integer),
        ("num_scores", Integer),
    )


class Layer(ctypes.Structure):
    """One block of the network."""

    _fields_ = (
        ("input_norm", Norm),
        ("mlp_norm", Norm),
        ("query", Matrix),
        ("key", Matrix),
        ("value", Matrix),
        ("gate", Matrix),
        ("group_norm", Norm),
        ("output", Matrix),
        ("mlp_gate", Matrix),
        ("mlp_up", Matrix),
        ("mlp_down", Matrix),
        ("attention", Attention),
        ("far_down", Matrix),
        ("priority", Matrix),
        ("query_norm", Norm),
        ("key_norm", Norm),
        ("attention_output_norm", Norm),
        ("mlp_output_norm", Norm),
        ("is_local", Integer),
        ("norms_all_heads", Integer),
    )


class Network(ctypes.Structure):
    """The whole network."""

    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        ("num_layers", Integer),
        ("final_norm", Norm),
        ("head", Matrix),
        ("heads", Heads),
        ("frequencies", Pointer),
        ("local_frequencies", Pointer),
        ("hidden_size", Integer),
        ("inner_size", Integer),
        ("last_sink_position", Integer),
        ("activation", Integer),
        ("is_parallel", Integer),
    )


class DrawRules(ctypes.Structure):
    """How one row's token is drawn; `temperature` 0: it is not."""

    _fields_ = (
        ("uniform", ctypes.c_double),
        ("temperature", ctypes.c_float),
        ("min_p", ctypes.c_float),
        ("top_k", Integer),
        ("top_p", ctypes.c_double),
    )
