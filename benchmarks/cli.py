"""`dijiang bench`: the commands are imported when they are called or completed, so that `--help` is quick."""

from server.cli import lazy_app

COMMANDS = {
    "answers": "What a client gets that sends a question and nothing of sampling.",
    "decode": "Decode steps beside HF transformers and llama.cpp, and against the memory they must move.",
    "prefill": "The reading of prompts beside HF transformers, one by one and in ragged batches.",
    "distance": "Likelihood far into a text, beside the same tokens read from nearby.",
    "neighbour": "What one client notices of another that does its worst.",
    "serve": "The service over a real socket: throughput and latencies by the number of clients.",
    "soak": "Mixed load and kills: nothing may be lost, wrong, or left over at the end.",
    "streams": "A thousand streams at once: none may fail, none may be silent for long.",
    "train": "Training steps of both stages: tokens per second and peak memory.",
}

ROOMS = {"neighbour": "resilience.", "soak": "resilience.", "streams": "resilience."}
"""Of commands that do not lie in `benchmarks` itself."""

app = lazy_app(
    {name: (f"benchmarks.{ROOMS.get(name, '')}{name}.{name}_command", purpose) for name, purpose in COMMANDS.items()},
    help="Measure this machine: each command ends with one line of JSON.",
    no_args_is_help=True,
    add_completion=False,
)
