"""The teacher writes in its own form: by its chat template, or going on from the user's text."""

import json
from pathlib import Path

import pytest
import torch

from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.conversion.training import self_distill
from dijiang_model.conversion.training.chat_prompt import load_chat_prompt
from dijiang_model.conversion.training.self_distill import _answers, _with_window
from dijiang_model.conversion.training.setup import OPENING_TOKENS, prepare_run
from dijiang_model.errors import ConversionError
from dijiang_model.ops.training.attention import SoftmaxAttention
from dijiang_model.segments import run_segments
from server.text.template import ChatMessage, ChatTemplate
from server.text.tokenizer import load_tokenizer
from tests.byte_tokenizer import CHAT_TEMPLATE
from tests.dijiang_model.conversion.training.test_train import STUDENT, options
from tests.dijiang_model.stepping import assert_close_in_norm, logits_of
from tests.tiny_models import HYBRID, llama_config, write_tiny_model

INSTRUCT = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"


NUM_ROWS, NUM_TOKENS = 4, 12


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_distill, "ROWS", NUM_ROWS)
    monkeypatch.setattr(self_distill, "ANSWER_TOKENS", NUM_TOKENS)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model", llama_config(HYBRID, HYBRID))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Line {n} of a text about {n % 7} things.\n" for n in range(400)))
    return path


def change_template(folder: Path, template: str | None) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["chat_template"]
    path.write_text(json.dumps(settings if template is None else settings | {"chat_template": template}))


def written(model: Path, text: Path, out: Path) -> str:
    prepare_run(model, [str(text)], out, options(), STUDENT, self_distill=20)
    return (out / "answers.txt").read_text()


def test_questions_are_put_in_the_form_of_the_models_template(model: Path, text: Path, tmp_path: Path) -> None:
    change_template(model, INSTRUCT)
    answers = written(model, text, tmp_path / "run")
    assert answers.startswith("<|im_start|>[INST] ")
    assert answers.count(" [/INST]") >= NUM_ROWS
    assert written(model, text, tmp_path / "again") == answers


def test_a_template_of_its_own_file_comes_first(model: Path) -> None:
    (model / "chat_template.jinja").write_text(INSTRUCT)
    prompt = load_chat_prompt(model)
    assert prompt is not None
    assert prompt("Why?") == "<|im_start|>[INST] Why? [/INST]"


def test_without_a_template_the_teacher_goes_on_from_the_text(model: Path, text: Path, tmp_path: Path) -> None:
    change_template(model, None)
    assert load_chat_prompt(model) is None
    answers = written(model, text, tmp_path / "run")
    whole = text.read_text()
    openings = {whole[start : start + OPENING_TOKENS] for start in range(0, len(whole), OPENING_TOKENS)}
    assert sum(answers.count(opening) for opening in openings) >= NUM_ROWS


@pytest.mark.parametrize("template", ["{% for", "{{ raise_exception('roles must alternate') }}"])
def test_a_template_that_cannot_ask_is_a_sentence(model: Path, template: str) -> None:
    change_template(model, template)
    with pytest.raises(ConversionError, match=r"chat template of model cannot (put a question|be used)"):
        load_chat_prompt(model)


def test_the_template_of_the_tests_is_chatml(model: Path) -> None:
    prompt = load_chat_prompt(model)
    assert CHAT_TEMPLATE
    assert prompt is not None
    assert prompt("Why?").endswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")


def test_answers_end_with_an_end_token_or_at_their_limit(model: Path) -> None:
    loaded = load_model(model)
    ends = set(range(0, 260, 5))
    prompts = [[5, 6, 7], [1], [9] * 20]
    answers = _answers(loaded, prompts, ends=ends, generator=torch.Generator().manual_seed(0))
    assert any(len(answer) < NUM_TOKENS for answer in answers)
    for answer in answers:
        assert not ends & set(answer[:-1])
        assert answer[-1] in ends or len(answer) == NUM_TOKENS


def test_the_teacher_sees_everything_that_it_wrote(model: Path) -> None:
    """Its window reaches over prompt and answer: what the linear part would say does not matter."""
    loaded, text = load_model(model), list(range(40))
    expected = loaded.logits(run_segments(loaded, torch.tensor([text]), SoftmaxAttention()))
    assert_close_in_norm(logits_of(_with_window(loaded, 40), text), expected, tolerance=1e-5)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}[{{ m['content'] }}]{% endfor %}",
            "[Why?]",
        ),
        ("{% for m in messages %}{% generation %}[{{ m['content'] }}]{% endgeneration %}{% endfor %}", "[Why?]"),
        ("{{ strftime_now('%Y') | length }}{{ messages[0] | tojson }}", '4{"role": "user", "content": "Why?"}'),
        ("{% if tools is not none %}tools{% endif %}{{ pad_token }}{{ messages[0].content }}", "<|endoftext|>Why?"),
    ],
    ids=["break", "generation", "strftime_now", "special tokens"],
)
def test_the_teacher_is_asked_as_the_server_asks(model: Path, source: str, expected: str) -> None:
    for template in (source, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": source}]):
        change_template(model, template)  # type: ignore[arg-type]
        prompt = load_chat_prompt(model)
        tokenizer = load_tokenizer(model)
        assert prompt is not None
        assert tokenizer is not None
        assert prompt("Why?") == expected
        assert ChatTemplate(tokenizer).render([ChatMessage("user", "Why?")]) == expected
