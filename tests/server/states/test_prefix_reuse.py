"""Prefix reuse over HTTP: exact counts, equal answers, nobody else's prefixes."""

from pathlib import Path

from tests.server.states.running import BOB, Running, cached, running
from tests.waiting import until

SYSTEM = ("system", "You are the keeper of a lighthouse and you answer every question in one short sentence.")


def fresh(text: str) -> str:
    """A prompt that no other test has."""
    return f"{text}: the quick brown fox jumps over the lazy dog while nobody is looking."


def test_the_same_prompt_again_is_cached_but_for_its_last_token(server: Running) -> None:
    prompt = fresh("same")
    first, again = server.complete(prompt), server.complete(prompt)
    assert (cached(first["usage"]), cached(again["usage"])) == (0, len(prompt) - 1)
    assert again["token_ids"] == first["token_ids"]
    assert again["usage"]["prompt_tokens"] == len(prompt)


def test_cached_and_uncached_answers_are_the_same(server: Running) -> None:
    prompt = fresh("uncached")
    answers = [server.complete(prompt, max_tokens=30, cache_prompt=use) for use in (True, True, False)]
    assert [cached(answer["usage"]) for answer in answers] == [0, len(prompt) - 1, 0]
    assert answers[0]["token_ids"] == answers[1]["token_ids"] == answers[2]["token_ids"]


def test_the_next_turn_of_a_chat_begins_where_the_answer_ended(server: Running) -> None:
    turn = server.complete(fresh("turn"))
    prompt = [*fresh("turn").encode(), *turn["token_ids"], *b" And?"]
    second = server.complete(prompt)
    assert cached(second["usage"]) == len(fresh("turn")) + len(turn["token_ids"]) - 1
    assert second["token_ids"] == server.complete(prompt, cache_prompt=False)["token_ids"]


def test_chats_with_the_same_system_prompt_share_it(server: Running) -> None:
    server.chat(SYSTEM, ("user", "Is it dark?"))
    other = server.chat(SYSTEM, ("user", "What do the ships say?"))
    assert cached(other["usage"]) == len("<system\n") + len(SYSTEM[1]) + len(">\n")


def test_streams_tell_what_was_cached_too(server: Running) -> None:
    prompt = fresh("stream")
    server.complete(prompt)
    options = {"include_usage": True}
    chunks = server.stream("/v1/completions", prompt=prompt, max_tokens=3, temperature=0, stream_options=options)
    assert cached(chunks[-1]["usage"]) == len(prompt) - 1


def test_prefixes_are_private_to_a_key_and_to_a_salt(server: Running) -> None:
    prompt = fresh("private")
    server.complete(prompt)
    assert cached(server.complete(prompt, key=BOB)["usage"]) == 0
    assert cached(server.complete(prompt, cache_salt="pepper")["usage"]) == 0
    assert cached(server.complete(prompt, cache_salt="pepper")["usage"]) == len(prompt) - 1
    assert cached(server.complete(prompt)["usage"]) == len(prompt) - 1


def test_cache_prompt_false_neither_reads_nor_writes(server: Running) -> None:
    prompt = fresh("not at all")
    server.complete(prompt, cache_prompt=False)
    assert cached(server.complete(prompt)["usage"]) == 0
    assert cached(server.complete(prompt, cache_prompt=False)["usage"]) == 0


def test_several_choices_count_their_prompt_once(server: Running) -> None:
    prompt = fresh("several")
    server.complete(prompt)
    body = {"prompt": [prompt, prompt], "n": 2, "max_tokens": 2, "temperature": 0}
    usage = server.post("/v1/completions", **body)["usage"]
    assert usage["prompt_tokens"] == 2 * len(prompt)
    assert cached(usage) == 2 * (len(prompt) - 1)


def test_the_metrics_tell_hits_and_tokens(server: Running) -> None:
    prompt = fresh("metrics")
    server.complete(prompt)
    hits, tokens = (server.gauge(f"dijiang_prefix_cache_{name}_total") for name in ("hits", "hit_tokens"))
    server.complete(prompt)
    assert server.gauge("dijiang_prefix_cache_hits_total") == hits + 1
    assert server.gauge("dijiang_prefix_cache_hit_tokens_total") == tokens + len(prompt) - 1


def test_a_server_without_the_cache_computes_everything(tiny: Path, tmp_path: Path) -> None:
    with running(tiny, tmp_path / "off", "--prefix-cache-memory", "0") as server:
        for _ in range(2):
            assert cached(server.complete(fresh("off"))["usage"]) == 0


def test_prefixes_that_left_memory_come_back_from_the_disk(tiny: Path, tmp_path: Path) -> None:
    options = ("--prefix-cache-memory", "30KiB", "--prefix-cache-disk", "10MiB")
    with running(tiny, tmp_path / "disk", *options) as server:
        prompts = [fresh(f"number {number}") for number in range(4)]  # no more states than may wait for the disk
        answers = [server.complete(prompt) for prompt in prompts]
        until(lambda: [*(tmp_path / "disk" / "prefixes").iterdir()])
        for prompt, answer in zip(prompts, answers, strict=True):
            again = server.complete(prompt)
            assert cached(again["usage"]) == len(prompt) - 1
            assert again["token_ids"] == answer["token_ids"]
