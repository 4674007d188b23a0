"""Position tables through the fast path: any finite table, any way of feeding, any length."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dijiang_model import reference
from dijiang_model.families import build_model
from dijiang_model.kernel import position_factors, released_log_decay
from dijiang_model.model import DiJiangForCausalLM
from tests.dijiang_model.stepping import Stepper, assert_close_in_norm, assert_states_close, logits_of, random_text
from tests.tiny_models import TABLES, gpt_neox_config, random_tensors

ENTRIES = st.sampled_from([0.0, 1.0, -1.0, 0.5, -3.0, 1e-6, -1e6]) | st.floats(-2, 2, allow_subnormal=False)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    read=st.lists(ENTRIES, min_size=20, max_size=20),
    write=st.lists(ENTRIES, min_size=20, max_size=20),
    length=st.integers(1, 20),
    seed=st.integers(0, 2**16),
)
def test_factors_reproduce_the_definition_for_any_table(
    read: list[float], write: list[float], length: int, seed: int
) -> None:
    """26 tokens, so always some past the table; the rounding of a row is bounded by the sum of its terms' sizes."""
    tables = torch.tensor([read[:length], write[:length]], dtype=torch.float64)[:, None]
    log_decay = released_log_decay(1)
    random = torch.Generator().manual_seed(seed)
    phi_q, phi_k = torch.randn(2, 26, 1, 4, generator=random, dtype=torch.float64).softmax(-1)
    v = torch.randn(26, 1, 3, generator=random, dtype=torch.float64)
    entry = torch.arange(26).clamp(max=length)
    log_decays, writes, reads = (factor.T[entry] for factor in position_factors(tables[0], tables[1], log_decay))
    assert (log_decays <= 0).all()
    assert (writes.abs() <= 1).all()
    actual, _, _ = reference.recurrent(phi_q * reads[..., None], phi_k * writes[..., None], v, log_decays)

    def definition(v: Tensor, tables: Tensor) -> Tensor:
        return reference.position_table_parallel(
            phi_q, phi_k, v, read_table=tables[0], write_table=tables[1], log_decay=log_decay
        )

    size = definition(v.abs(), tables.abs())
    assert ((actual - definition(v, tables)).abs() <= 1e-12 * size + 1e-300).all()


def hard_tables(kind: str, tables: Tensor) -> Tensor:
    """[H, N] as trained, made awkward."""
    tables = tables.clone()
    if kind == "zeros":
        tables[:, 5:9] = 0
    elif kind == "leading zeros":
        tables[:, :7] = 0
    elif kind == "all zeros":
        tables[:] = 0
    elif kind == "sign changes":
        tables[:, 3::4] *= -1
    else:
        assert kind == "last entry zero"
        tables[:, -1] = 0
    return tables


KINDS = ("zeros", "leading zeros", "all zeros", "sign changes", "last entry zero")
CONFIG = gpt_neox_config(TABLES, TABLES)
TEXT = random_text(150)


@cache
def hard_model(kind: str, dtype: torch.dtype) -> tuple[DiJiangForCausalLM, Tensor]:
    """A model with such tables, and the naive logits of TEXT."""
    tensors = {
        name: hard_tables(kind, tensor) if name.endswith("_table") else tensor
        for name, tensor in random_tensors(CONFIG).items()
    }
    model = build_model(CONFIG, dtype=dtype)
    wanted = model.state_dict()
    model.load_state_dict({name: t.to(wanted[name].dtype) for name, t in tensors.items()}, assign=True)
    return model.prepare(), reference.forward(CONFIG, tensors, TEXT)[1]


@pytest.mark.parametrize("kind", KINDS)
def test_awkward_tables_are_exact_in_prefill_and_decode(kind: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model, expected = hard_model(kind, dtype)
        assert_close_in_norm(logits_of(model, TEXT), expected, tolerance=tolerance)
        stepper = Stepper(model).open(1, 2)
        decoded = torch.cat([stepper.step(decode={2: token})[2] for token in TEXT])
        assert_close_in_norm(decoded, expected, tolerance=tolerance)
        stepper.step({1: TEXT})
        assert_states_close(stepper.state(2), stepper.state(1), tolerance=tolerance)


def test_fp32_stays_exact_where_gamma_to_the_minus_m_overflows() -> None:
    """2,900 tokens with tables of 64 that end there, past position 2,794, in fp32 against fp64."""
    text = random_text(2900)
    tensors = random_tensors(CONFIG)
    results = []
    for dtype in (torch.float64, torch.float32):
        model = build_model(CONFIG, dtype=dtype)
        wanted = model.state_dict()
        model.load_state_dict({name: t.to(wanted[name].dtype) for name, t in tensors.items()}, assign=True)
        stepper = Stepper(model.prepare()).open(1)
        stepper.step({1: text[:2890]})
        results.append(torch.cat([stepper.step(decode={1: token})[1] for token in text[2890:]]))
    assert_close_in_norm(results[1], results[0], tolerance=1e-5)
