"""What a step costs follows from the sizes of model and batch, and is said in one sentence."""

from dataclasses import replace

from dijiang_model.conversion.training.costs import measured_speed, step_cost
from tests.dijiang_model.conversion.training.test_train import options
from tests.tiny_models import tiny_model


def test_time_memory_and_disk_grow_with_what_they_depend_on() -> None:
    model, base = tiny_model(), options()
    one = step_cost(model, base, num_trained=1000)
    two = step_cost(model, replace(base, batch_size=2 * base.batch_size), num_trained=1000)
    assert (two.tokens, two.flops, two.disk_bytes) == (2 * one.tokens, 2 * one.flops, one.disk_bytes)
    assert one.memory_bytes < two.memory_bytes < 2 * one.memory_bytes
    assert one.flops == 8 * model.num_parameters * one.tokens
    assert one.disk_bytes == 16_000


def test_the_sentence_names_all_three() -> None:
    model = tiny_model()
    text = step_cost(model, options(), num_trained=2**20).text(1e9)
    assert "tokens: about" in text
    assert " of memory" in text
    assert text.endswith("16.0 MiB on disk")
    assert step_cost(model, options(), num_trained=3).text(1e9).endswith("keeps 48 B on disk"), "not 0 MiB"
    assert measured_speed(model) > 0
