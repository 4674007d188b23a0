"""The variants' benchmark compares what it says: experiments that do nothing are the kernel itself, bytes are equal."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.experiments.variant_kernels import Experiment
from benchmarks.experiments.variants import BASE, VARIANTS, Variant, error_left, prepare
from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.config import FeatureConfig
from dijiang_model.conversion.training.calibrate import with_windows
from dijiang_model.conversion.training.student import with_features
from dijiang_model.families import build_model
from dijiang_model.ops.training.attention import RecordedAttention
from dijiang_model.segments import segments_layout
from tests.tiny_models import HYBRID, llama_config, tiny_model, write_tiny_model


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("name", ["", "diagonal", "initial state", "gate"])
def test_an_experiment_starts_as_the_kernel(name: str, rotated: bool) -> None:
    features = FeatureConfig(scale=16**-0.25, far_rank=2, rotated=rotated)
    layer = replace(HYBRID, features=features)
    model = tiny_model(llama_config(layer, layer))
    kernel = next(iter(model.attentions)).linear
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((60, heads, 16), generator=generator) for heads in (4, 2, 2))
    layout = segments_layout(model, 1, 60, offset=7)
    recorded = RecordedAttention.of(q, k, v, kernel=kernel, layout=layout)
    experiment = Experiment(kernel, name)
    with torch.no_grad():
        for extra, value in experiment.extra.items():
            if extra in ("initial_weight", "gate_bias"):
                value.fill_(-40.0)
        found = experiment.answer(recorded, layout)
        expected = recorded.answer(kernel=kernel, layout=layout)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_variants_take_equal_bytes_on_the_default_models_shape() -> None:
    # SmolLM2-135M: heads of 64 channels, 3 key-value heads.
    shape = replace(
        llama_config(HYBRID, HYBRID, num_heads=9, num_kv_heads=3), head_size=64, rotary_dims=64, hidden_size=576
    )
    sizes = {}
    for variant in VARIANTS:
        config = with_windows(with_features(shape, variant.features), [variant.window] * 2)
        config = replace(config, layers=tuple(replace(layer, sinks=4) for layer in config.layers))
        sizes[variant.name] = build_model(config).state_spec.bytes_per_slot
    linear = {size for name, size in sizes.items() if "alone" not in name}
    # The normaliser, one number for each feature, is what a window cannot pay for exactly.
    assert max(linear) - min(linear) <= 2 * 3 * 64 * 4
    window_alone = 2 * 3 * 96 * 64 * 4 * 2
    assert 0 <= min(linear) - window_alone <= 2 * 3 * 64 * 4


def test_every_variant_learns_something(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", llama_config(HYBRID, HYBRID))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {n} of a text about {n % 7} things.\n" for n in range(400)))
    setting = prepare(folder, [text], [text], [0, 1], num=2, length=256, epochs=3)
    alone = error_left(VARIANTS[0], setting)
    assert alone == {0: pytest.approx(1.0), 1: pytest.approx(1.0)}
    for experiment in ("", "diagonal", "initial state", "gate"):
        left = error_left(Variant("x", replace(BASE, far_rank=2), window=60, experiment=experiment), setting)
        assert all(0 < share < 1 for share in left.values()), experiment
    assert load_model(folder).config.layers[0].window == HYBRID.window
