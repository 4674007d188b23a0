"""Evaluation: the teacher is HF's model, ranges add up, equal bytes are equal, reports say what was measured."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer import Typer
from typer.testing import CliRunner

from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.conversion.calibration.contexts import Context, Recalled
from dijiang_model.conversion.convert import convert
from dijiang_model.conversion.evaluation import recall
from dijiang_model.conversion.evaluation import run as evaluate_run
from dijiang_model.conversion.evaluation.cli import evaluate_command
from dijiang_model.conversion.evaluation.evaluate import (
    Score,
    Variant,
    equal_window,
    gap_closed,
    score,
    variants,
)
from dijiang_model.conversion.evaluation.long_texts import long_score
from dijiang_model.conversion.evaluation.recall import FIRST_TURN, fact_chats, far_recall, recall_probe
from dijiang_model.conversion.evaluation.report import (
    LONG_RANGES,
    RANGES,
    Evaluation,
    json_line,
    markdown,
    write_report,
)
from dijiang_model.conversion.evaluation.run import evaluate, load_subjects
from dijiang_model.conversion.evaluation.teacher import load_teacher
from dijiang_model.conversion.evaluation.wanted import Measurements
from dijiang_model.conversion.training.chat_prompt import plain_chat
from dijiang_model.conversion.training.cli import train_command
from dijiang_model.conversion.training.text_windows import load_tokenizer
from dijiang_model.errors import ConversionError
from dijiang_model.ops.training.attention import HybridAttention, SoftmaxAttention, WindowAttention
from dijiang_model.segments import run_segments
from tests.byte_tokenizer import write_byte_tokenizer
from tests.dijiang_model.teachers import gpt_neox_teacher, llama_teacher, save_teacher
from tests.tiny_models import HYBRID, PURE, llama_config, tiny_model, write_tiny_model

WIDER = replace(HYBRID, window=9)
TEXT = "".join(f"Sentence {n} says that {n} and {n + 1} are neighbours.\n" for n in range(300))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "held-out.txt"
    path.write_text(TEXT)
    return path


def tokens(length: int) -> torch.Tensor:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", [llama_teacher, gpt_neox_teacher], ids=["llama", "gpt_neox"])
def test_the_unconverted_path_gives_the_logits_of_hf(make: object, tmp_path: Path) -> None:
    teacher = make()  # type: ignore[operator]
    teacher.save_pretrained(tmp_path / "hf")
    ours, ids = load_teacher(tmp_path / "hf"), tokens(100)
    with torch.no_grad():
        expected = teacher(ids[None]).logits[0]
        found = ours.logits(run_segments(ours, ids[None], SoftmaxAttention()))
    # fp32 on both sides, sums in another order.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_converted_model_still_holds_its_teacher(tmp_path: Path) -> None:
    llama_teacher().save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "hybrid", window=5, sinks=2)
    of_source, of_conversion = load_teacher(tmp_path / "hf"), load_teacher(tmp_path / "hybrid")
    ids = tokens(60)[None]
    found = [model.logits(run_segments(model, ids, SoftmaxAttention())) for model in (of_source, of_conversion)]
    assert torch.equal(found[0], found[1])


def test_scores_are_means_by_position() -> None:
    model = tiny_model(llama_config(HYBRID, HYBRID))
    window = tokens(300)
    found = score(Variant("x", model, HybridAttention(), None), [window, window])
    with torch.no_grad():
        logits = model.logits(run_segments(model, window[None], HybridAttention()))[:-1]
    losses = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none").double()
    assert found.counts.tolist() == [2 * 63, 2 * 192, 2 * 44, 0, 0]
    expected = [losses[:63].mean(), losses[63:255].mean(), losses[255:].mean()]
    for mean, wanted in zip(found.means[:3], expected, strict=True):
        assert mean == pytest.approx(float(wanted), rel=1e-6)
    assert found.means[3:] == [None, None]
    assert found.far == found.means[2]


def test_the_window_of_equal_bytes_takes_the_models_bytes() -> None:
    model = tiny_model(llama_config(HYBRID, HYBRID))
    window = equal_window(model, sinks=2)
    token_bytes = 2 * 2 * 16 * 4 * 2
    assert (window + 2) * token_bytes <= model.state_spec.bytes_per_slot < (window + 3) * token_bytes


def test_ablations_switch_parts_off() -> None:
    model = tiny_model(llama_config(HYBRID, HYBRID))
    compared = {variant.name: variant for variant in variants(model, model)}
    assert list(compared) == [
        "teacher", "window 13+2, no training", "ours", "ours, linear part off", "ours, window off",
    ]  # fmt: skip
    assert compared["ours, linear part off"].op == WindowAttention()
    assert compared["ours, window off"].op == HybridAttention(window=1)


def test_the_gap_is_measured_between_window_and_teacher() -> None:
    def flat(mean: float) -> Score:
        counts = torch.tensor([1.0, 1, 2, 0, 0], dtype=torch.float64)
        return Score(counts * mean, counts)

    scores = {"teacher": flat(3.0), "window": flat(3.4), "ours": flat(3.3)}
    assert gap_closed(scores, list(scores)) == pytest.approx(0.25)
    assert gap_closed(scores, ["window", "teacher", "ours"]) is None


def test_facts_are_asked_for_by_distance_as_far_as_the_range_goes(tmp_path: Path) -> None:
    model = tiny_model(llama_config(HYBRID, HYBRID))
    write_byte_tokenizer(tmp_path)
    tokenizer, filler = load_tokenizer(tmp_path), torch.tensor(list(TEXT.encode()))
    chats = fact_chats(tokenizer, filler, render=plain_chat, num=2, longest=8192)
    lengths = (2048, 2048, 4096, 8192)
    assert [len(chat.token_ids) <= length for chat, length in zip(chats, lengths, strict=True)] == [True] * 4
    variant = Variant("x", model, HybridAttention(), None)
    results = recall_probe([variant], chats)
    assert sum(result.num for result in results) == sum(len(chat.recalled) for chat in chats)
    assert [result.low for result in results] == sorted({result.low for result in results})
    assert all(0 <= result.right["x"] <= 1 and math.isfinite(result.loss["x"]) for result in results)
    assert results[0].shared == {"x": 1.0 if results[0].right["x"] > 0 else None}
    assert fact_chats(tokenizer, filler, render=plain_chat, num=2, longest=64) == []
    assert recall_probe([variant], []) == []


def test_facts_of_the_first_turn_lie_far_behind_other_turns(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    tokenizer, filler = load_tokenizer(tmp_path), torch.tensor(list(TEXT.encode() * 3))
    form = replace(FIRST_TURN[0], length=6000)  # a byte is a token here
    chats = fact_chats(tokenizer, filler, render=plain_chat, num=1, longest=8192, forms=[form])
    assert [len(chat.recalled) for chat in chats] == [3]
    assert max(fact.told[1] for fact in chats[0].recalled) < min(fact.answered[0] for fact in chats[0].recalled) - 200


def test_answers_right_where_the_first_variant_is_are_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = tuple(Recalled((10 + i, 11 + i), (600 + i, 601 + i)) for i in range(4))
    chat = Context(tokens(700), facts)

    def likeliest(variant: Variant, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = {"first": [599, 600], "second": [600, 601, 602]}[variant.name]
        hits = torch.zeros(699, dtype=torch.bool)
        hits[rows] = True
        return torch.arange(699.0), hits

    monkeypatch.setattr(recall, "token_scores", likeliest)
    both = [Variant(name, tiny_model(), HybridAttention(), None) for name in ("first", "second")]
    (result,) = recall_probe(both, [chat])
    assert result.right == {"first": 0.5, "second": 0.75}
    assert result.shared == {"first": 1.0, "second": 0.5}


def test_an_answer_is_right_where_every_token_is_likeliest(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Context(tokens(700), (Recalled((10, 12), (600, 602)), Recalled((20, 21), (610, 611))))
    is_greedy = torch.zeros(699, dtype=torch.bool)
    is_greedy[[599, 609]] = True  # of the first answer's two tokens one, of the second answer its only one
    monkeypatch.setattr(recall, "token_scores", lambda variant, ids: (torch.arange(699.0), is_greedy))
    variant = Variant("x", tiny_model(), HybridAttention(), None)
    (result,) = recall_probe([variant], [chat])
    assert (result.distance, result.num, result.right) == ("500-1,000", 2, {"x": 0.5})
    assert result.loss["x"] == pytest.approx((599.5 + 609) / 2)
    better = replace(result, right={"x": 0.5, "teacher": 1.0})
    assert far_recall([better, replace(better, low=64)], "x", "teacher") == 0.5


def test_a_calibrated_model_is_measured_with_states_of_other_sizes(tmp_path: Path, text: Path) -> None:
    save_teacher(llama_teacher(), tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "model", state_bytes=40_000, calibration_text=[text])
    wanted = Measurements(num_windows=1, length=400, budgets=(20_000, 80_000))
    evaluation = evaluate(
        load_subjects(tmp_path / "model", tmp_path / "hf"),
        [text],
        load_tokenizer(tmp_path / "model"),
        wanted,
        console=Console(quiet=True),
    )
    assert [name for name in evaluation.scores if name.startswith("ours")] == [
        "ours", "ours, anchors off", "ours, 0.01907 MiB", "ours, 0.07629 MiB",
    ]  # fmt: skip
    sizes = [point.state_bytes for point in evaluation.by_size]
    assert sizes == sorted(sizes)
    assert [size <= budget for size, budget in zip(sizes, (20_000, 40_000, 80_000), strict=True)] == [True] * 3
    assert "### Quality by the bytes of a state" in markdown(evaluation, plots=[])
    plain = convert(tmp_path / "hf", tmp_path / "plain").out
    with pytest.raises(ConversionError, match="converted with --state-bytes"):
        evaluate(
            load_subjects(plain, tmp_path / "hf"), [text], load_tokenizer(plain), wanted, console=Console(quiet=True)
        )


def test_a_dijiang_checkpoint_of_the_authors_is_no_teacher() -> None:
    with pytest.raises(ConversionError, match="not the softmax model"):
        load_teacher(Path(__file__).parents[3] / "golden" / "aligned")


def test_reports_hold_every_number(tmp_path: Path, text: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", llama_config(HYBRID, HYBRID))
    control = write_tiny_model(tmp_path / "control", llama_config(WIDER, WIDER), seed=1)
    evaluation = evaluate(
        load_subjects(folder, folder, control=control),
        [text],
        load_tokenizer(folder),
        Measurements(num_windows=2, length=600, num_facts=1),
        console=Console(quiet=True),
    )
    write_report(evaluation, tmp_path / "report")
    plots = ["nll.png"]
    drawn = [name for name in plots if (tmp_path / "report" / name).exists()]
    assert drawn in (plots, [])
    report = (tmp_path / "report" / "report.md").read_text()
    assert report == markdown(evaluation, plots=drawn)
    assert (tmp_path / "report" / "tables.md").read_text().strip() in report
    for name, found in evaluation.scores.items():
        assert f"| {name} | {found.means[0]:.3f} |" in report
    line = json.loads(json_line(evaluation))
    assert line["scores"]["ours"]["by_position"].keys() == set(RANGES)
    assert line["state_bytes"]["ours"] == load_model(folder).state_spec.bytes_per_slot
    assert line["state_bytes"]["window 9+2, trained alike"] == 2 * 11 * 2 * 2 * 16 * 4
    assert line["num_windows"] == 2
    assert "The control (window 9+2, trained alike;" in report


@pytest.mark.parametrize(
    ("gap", "words"), [(0.31, "closes **31 %**"), (-0.2, "closes **nothing**: it is behind"), (None, "there is none")]
)
def test_a_report_says_in_words_what_was_reached(gap: float | None, words: str) -> None:
    score_of = Score(torch.ones(5), torch.ones(5))
    evaluation = Evaluation(
        model="m", teacher="t", title="DiJiang", tokens_trained=1, training="", text=["x"], window_tokens=9,
        num_windows=1, scores={"ours": score_of}, state_bytes={"ours": 5}, gap_closed=gap, recall=[],
    )  # fmt: skip
    assert words in markdown(evaluation, plots=[])


def test_convert_train_and_evaluate_from_the_command_line(tmp_path: Path, text: Path) -> None:
    llama_teacher().save_pretrained(tmp_path / "hf")
    write_byte_tokenizer(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "hybrid", window=5, sinks=2)
    app = Typer()
    app.command("train")(train_command)
    app.command("evaluate")(evaluate_command)
    run = CliRunner().invoke(app, ["train", str(tmp_path / "hybrid"), "--data", str(text), "--tokens", "20000",
                                   "--sequence-length", "1000", "--out", str(tmp_path / "run"),
                                   "--windows", "auto", "--lora-rank", "2", "--far-rank", "2"])  # fmt: skip
    assert run.exit_code == 0, run.output
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path / "hybrid"), "--teacher", str(tmp_path / "hf"),
                                      "--adapter", str(tmp_path / "run" / "adapter.safetensors"), "--text", str(text),
                                      "--windows", "2", "--length", "600", "--facts", "0",
                                      "--out", str(tmp_path / "report")])  # fmt: skip
    assert result.exit_code == 0, result.output
    line = json.loads((tmp_path / "report" / "report.json").read_text())
    assert line["tokens_trained"] == 20000
    assert set(line["scores"]) >= {"teacher", "ours", "ours, linear part off", "ours, window off"}


def test_long_texts_are_read_where_they_are_asked_for(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny_model(tmp_path / "model", llama_config(HYBRID, HYBRID))
    subjects = load_subjects(folder, folder)
    monkeypatch.setattr(evaluate_run, "LONG_TOKENS", 2500)
    monkeypatch.setattr(evaluate_run, "long_score", partial(long_score, edges=(100, 200, 400, 2500)))
    wanted = Measurements(num_windows=1, length=600, num_long=2)
    evaluation = evaluate(subjects, [text], load_tokenizer(folder), wanted, console=Console(quiet=True))
    assert evaluation.num_long == 2
    report = markdown(evaluation, plots=[])
    assert f"| {' | '.join([*LONG_RANGES, f'{LONG_RANGES[-1]}, fresh'])} |" in report
    ours = evaluation.long_scores["ours"]
    assert ours.fresh is not None
    assert f"| ours | {' | '.join(f'{mean:.3f}' for mean in [*ours.means, ours.fresh])} |" in report
    monkeypatch.setattr(evaluate_run, "LONG_TOKENS", 10**6)
    with pytest.raises(ConversionError, match="no file of text has 1,000,000 tokens"):
        evaluate(subjects, [text], load_tokenizer(folder), wanted, console=Console(quiet=True))


def test_a_control_that_was_trained_without_the_linear_part_is_compared(tmp_path: Path, text: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", llama_config(HYBRID, HYBRID))
    app = Typer()
    app.command()(train_command)
    command = [str(folder), "--data", str(text), "--tokens", "512", "--sequence-length", "128", "--stage", "2"]
    command += ["--no-linear", "--windows", "13", "--far-rank", "0", "--lora-rank", "2", "--out", str(tmp_path / "run")]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0, run.output
    adapter = tmp_path / "run" / "adapter.safetensors"
    subjects = load_subjects(folder, folder, control=adapter)
    evaluation = evaluate(
        subjects, [text], load_tokenizer(folder), Measurements(num_windows=1, length=400), console=Console(quiet=True)
    )
    name = "window 13+2, trained alike"
    assert list(evaluation.scores)[-1] == name
    # Of equal bytes: what the model's linear part takes, the control's window has.
    assert list(evaluation.scores)[1] == "window 13+2, no training"
    assert evaluation.scores[name].means != evaluation.scores["window 13+2, no training"].means
    assert "512 tokens, stages 2" in markdown(evaluation, plots=[])
    pure = write_tiny_model(tmp_path / "pure", llama_config(PURE, PURE))
    with pytest.raises(ConversionError, match="a layer without a window"):
        variants(load_model(folder), load_model(folder), control=load_model(pure))


def test_a_missing_model_is_one_line_on_the_command_line(tmp_path: Path, text: Path) -> None:
    app = Typer()
    app.command()(evaluate_command)
    arguments = [str(tmp_path / "none"), "--teacher", str(tmp_path), "--text", str(text), "--out", str(tmp_path / "o")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert not (tmp_path / "o").exists()
