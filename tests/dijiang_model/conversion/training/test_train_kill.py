"""Training that is really killed (SIGKILL, at moments that nobody chose) and resumed, or that the disk fails."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer import Typer
from typer.testing import CliRunner

from dijiang_model.conversion.training.adapters import ADAPTER_FILE, load_adapter
from dijiang_model.conversion.training.cli import train_command
from dijiang_model.conversion.training.log import LOG_FILE, read_log
from dijiang_model.conversion.training.setup import prepare_run
from dijiang_model.conversion.training.train import CHECKPOINT_FILE, train
from tests.dijiang_model.conversion.training.test_train import STUDENT, options
from tests.tiny_models import HYBRID, llama_config, write_tiny_model
from tests.waiting import PATIENCE_S

app = Typer()
app.command()(train_command)
NUM_STEPS = 80


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Line {n} of a text about {n % 7} things.\n" for n in range(400)))
    return path


def arguments(model: Path, text: Path, out: Path, *more: object) -> list[str]:
    options = ("--data", text, "--tokens", 128 * NUM_STEPS, "--sequence-length", 128, "--stage-one-share", 0.5)
    ranks = ("--lora-rank", 2, "--far-rank", 2)
    return [str(value) for value in (model, *options, *ranks, "--save-every", 0.2, "--out", out, *more)]


KILLED = """
import os, pathlib, signal, sys, threading, time
log, num_lines, delay_s = pathlib.Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
def kill():
    while not log.exists() or log.read_bytes().count(b"\\n") < num_lines:
        time.sleep(0.001)
    time.sleep(delay_s)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=kill, daemon=True).start()
sys.argv = ["dijiang", *sys.argv[4:]]
from server.cli import main
main()
"""
"""From within: on a loaded machine the run could end before another process comes to kill it."""


def killed_at_some_moment(command: list[str], out: Path, num_steps: int, delay_s: float) -> None:
    """Starts a run that is killed when so many more steps are logged, and a little later."""
    num_lines = len(read_log(out / LOG_FILE)) + num_steps
    line = [sys.executable, "-c", KILLED, str(out / LOG_FILE), str(num_lines), str(delay_s), "train", *command]
    done = subprocess.run(line, stderr=subprocess.DEVNULL, timeout=PATIENCE_S, check=False)
    assert done.returncode == -signal.SIGKILL, "the run ended before it was killed"


@pytest.mark.slow
def test_a_run_killed_twice_ends_with_the_weights_of_an_undisturbed_one(text: Path, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", llama_config(HYBRID, HYBRID))
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert CliRunner().invoke(app, arguments(model, text, undisturbed)).exit_code == 0
    moments = random.Random()
    killed_at_some_moment(arguments(model, text, killed), killed, moments.randint(1, 30), 0.3 * moments.random())
    again = arguments(model, text, killed, "--resume")
    killed_at_some_moment(again, killed, moments.randint(1, 20), 0.3 * moments.random())
    last = CliRunner().invoke(app, again)
    assert last.exit_code == 0, last.output
    expected, found = load_file(undisturbed / ADAPTER_FILE), load_file(killed / ADAPTER_FILE)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    logs = [[(line["step"], line["loss"]) for line in read_log(folder / LOG_FILE)] for folder in (undisturbed, killed)]
    assert logs[0] == logs[1]
    assert [step for step, _ in logs[0]] == list(range(1, NUM_STEPS + 1))


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.argv = ["dijiang", *sys.argv[2:]]
from server.cli import main
main()
"""
"""Files can grow to so many bytes only: what a full disk looks like to a program, without needing one."""


def limited(max_bytes: int, *command: object) -> tuple[int, str]:
    """Runs `dijiang` where no file may become larger."""
    line = [sys.executable, "-c", LIMITED, str(max_bytes), *map(str, command)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_training_with_a_sentence_and_keeps_the_last_checkpoint(
    text: Path, tmp_path: Path
) -> None:
    model = write_tiny_model(tmp_path / "model", llama_config(HYBRID, HYBRID))
    out = tmp_path / "run"
    # A checkpoint before the first step is smaller than later ones, which hold the optimiser's memory as well.
    first = tmp_path / "first"
    assert not train(prepare_run(model, [str(text)], first, options(), STUDENT), first, should_stop=lambda: True)
    room = (first / CHECKPOINT_FILE).stat().st_size + 2_000
    status, output = limited(room // 2, "train", *arguments(model, text, out))
    assert (status, "Traceback" in output) == (1, False), output
    assert "cannotbewritten" in "".join(output.split())
    assert [path.name for path in out.iterdir()] == [LOG_FILE]
    out = tmp_path / "another run"
    status, output = limited(room, "train", *arguments(model, text, out))
    assert (status, "Traceback" in output) == (1, False), output
    assert f"{CHECKPOINT_FILE}cannotbewritten" in "".join(output.split())  # the terminal's width cuts lines anywhere
    assert load_adapter(out / ADAPTER_FILE).info.tokens_trained == 0
    resumed = CliRunner().invoke(app, arguments(model, text, out, "--resume"))
    assert resumed.exit_code == 0, resumed.output
    assert load_adapter(out / ADAPTER_FILE).info.tokens_trained == 128 * NUM_STEPS
