"""The prefix cache: exact, private to a namespace, bounded by its budgets, least recently used first."""

from concurrent.futures import Future

from hypothesis import given
from hypothesis import strategies as st

from server.engine.state.prefix_cache import MAX_WRITES, PrefixCache

SNAPSHOT_BYTES = 100


def cache(*, host: int = 10_000, device: int = 0) -> PrefixCache:
    return PrefixCache(
        snapshot_bytes=SNAPSHOT_BYTES,
        host_bytes=host,
        device_bytes=device,
        to_host=lambda snapshot: f"host {snapshot}",
    )


def test_the_longest_prefix_is_found() -> None:
    prefixes = cache()
    for length in (1, 3, 5):
        prefixes.put("a", range(length), length)
    for prompt_length, found in ((1, 1), (2, 1), (3, 3), (4, 3), (9, 5)):
        hit = prefixes.find("a", range(prompt_length), at_most=prompt_length)
        assert hit is not None
        assert (hit.num_tokens, hit.snapshot) == (found, f"host {found}")


def test_at_most_leaves_tokens_to_feed() -> None:
    prefixes = cache()
    prefixes.put("a", range(5), "whole")
    assert prefixes.find("a", range(5), at_most=4) is None
    prefixes.put("a", range(4), "all but one")
    hit = prefixes.find("a", range(5), at_most=4)
    assert hit is not None
    assert hit.num_tokens == 4


def test_a_prefix_with_one_other_token_is_none() -> None:
    prefixes = cache()
    prefixes.put("a", [1, 2, 3], "abc")
    assert prefixes.find("a", [1, 2, 4, 5], at_most=3) is None
    assert prefixes.find("a", [2, 2, 3, 5], at_most=3) is None


def test_namespaces_do_not_see_each_other() -> None:
    prefixes = cache()
    prefixes.put("a", [1, 2], "theirs")
    assert prefixes.find("b", [1, 2, 3], at_most=2) is None
    assert not prefixes.has("b", [1, 2])
    assert prefixes.has("a", [1, 2])


def test_the_least_recently_used_goes_first() -> None:
    prefixes = cache(host=3 * (SNAPSHOT_BYTES + 4))
    for token in (1, 2, 3):
        prefixes.put("a", [token], token)
    assert prefixes.find("a", [1, 9], at_most=1) is not None
    prefixes.put("a", [4], 4)
    assert [prefixes.has("a", [token]) for token in (1, 2, 3, 4)] == [True, False, True, True]
    assert prefixes.stats.num_evictions == 1


def test_what_leaves_the_device_moves_to_the_host() -> None:
    prefixes = cache(device=SNAPSHOT_BYTES + 4)
    prefixes.put("a", [1], "one")
    prefixes.put("a", [2], "two")
    first, second = prefixes.find("a", [1, 9], at_most=1), prefixes.find("a", [2, 9], at_most=1)
    assert first is not None
    assert second is not None
    assert (first.snapshot, second.snapshot) == ("host one", "two")


def test_an_entry_larger_than_the_budget_is_not_kept() -> None:
    prefixes = cache(host=SNAPSHOT_BYTES)
    prefixes.put("a", [1], "one")
    assert prefixes.stats.num_entries == 0
    assert prefixes.stats.num_bytes == 0


def test_putting_twice_replaces() -> None:
    prefixes = cache()
    prefixes.put("a", [1], "old")
    prefixes.put("a", [1], "new")
    hit = prefixes.find("a", [1, 2], at_most=1)
    assert hit is not None
    assert hit.snapshot == "host new"
    assert prefixes.stats.num_entries == 1


def test_discarding_forgets_every_prefix_of_a_prompt_and_nothing_else() -> None:
    prefixes = cache()
    prefixes.put("a", [1], "kept by nobody")
    prefixes.put("a", [1, 2], "nor this")
    prefixes.put("a", [1, 3], "another branch")
    prefixes.discard("a", [1, 2, 5])
    assert [prefixes.has("a", tokens) for tokens in ([1], [1, 2], [1, 3])] == [False, False, True]


def test_the_numbers_count_hits_lookups_and_tokens() -> None:
    prefixes = cache()
    prefixes.put("a", range(7), "seven")
    prefixes.find("a", range(9), at_most=8)
    prefixes.find("a", [5], at_most=0)
    stats = prefixes.stats
    assert (stats.num_lookups, stats.num_hits, stats.num_cached_tokens) == (2, 1, 7)
    prefixes.clear()
    assert prefixes.stats.num_bytes == 0


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@given(stored=st.lists(TOKENS, max_size=12), prompt=TOKENS, budget=st.integers(0, 2000))
def test_a_hit_is_always_the_longest_stored_prefix_that_was_kept(
    stored: list[list[int]], prompt: list[int], budget: int
) -> None:
    prefixes = cache(host=budget)
    for tokens in stored:
        prefixes.put("a", tokens, tuple(tokens))
    assert prefixes.stats.num_bytes <= budget
    kept = [tokens for tokens in stored if prefixes.has("a", tokens)]
    matching = [len(tokens) for tokens in kept if tokens == prompt[: len(tokens)]]
    hit = prefixes.find("a", prompt, at_most=len(prompt))
    assert (hit.num_tokens if hit is not None else None) == max(matching, default=None)
    if hit is not None:
        assert hit.snapshot == f"host {tuple(prompt[: hit.num_tokens])}"


class FakeDisk:
    """Files in a dictionary; writes end when the test says so."""

    def __init__(self) -> None:
        self.files: dict[int, object] = {}
        self.writes: list[tuple[int, object, Future[bytes]]] = []
        self.broken = False

    def write(self, number: int, snapshot: object) -> Future[bytes]:
        future: Future[bytes] = Future()
        self.writes.append((number, snapshot, future))
        return future

    def read(self, number: int, digest: bytes) -> Future[object]:
        future: Future[object] = Future()
        if self.broken or number not in self.files:
            future.set_exception(OSError("gone"))
        else:
            future.set_result(self.files[number])
        return future

    def remove(self, number: int) -> None:
        self.files.pop(number, None)

    def settle(self) -> None:
        for number, snapshot, future in self.writes:
            self.files[number] = snapshot
            future.set_result(b"digest")
        self.writes = []


def on_disk(disk: FakeDisk, *, disk_bytes: int = 10_000) -> PrefixCache:
    """A cache with one entry in memory, [2], and one on the disk, [1]."""
    prefixes = PrefixCache(
        snapshot_bytes=SNAPSHOT_BYTES, host_bytes=SNAPSHOT_BYTES + 4, disk_bytes=disk_bytes, disk=disk
    )
    prefixes.put("a", [1], "one")
    prefixes.put("a", [2], "two")
    return prefixes


def test_what_leaves_memory_goes_to_the_disk_and_comes_back() -> None:
    disk = FakeDisk()
    prefixes = on_disk(disk)
    assert prefixes.fetch("a", [1, 9], at_most=1) is None, "it is still in memory"
    disk.settle()
    assert prefixes.find("a", [1, 9], at_most=1) is None
    fetch = prefixes.fetch("a", [1, 9], at_most=1)
    assert fetch is not None
    prefixes.fetched(fetch)
    hit = prefixes.find("a", [1, 9], at_most=1)
    assert hit is not None
    assert hit.snapshot == "one"
    disk.settle()
    assert prefixes.fetch("a", [2, 9], at_most=1) is not None, "the other one has made room"


def test_entries_on_their_way_to_the_disk_are_found() -> None:
    prefixes = on_disk(FakeDisk())
    hit = prefixes.find("a", [1, 9], at_most=1)
    assert hit is not None
    assert hit.snapshot == "one"


def test_a_file_that_cannot_be_read_is_a_miss_for_ever() -> None:
    disk = FakeDisk()
    prefixes = on_disk(disk)
    disk.settle()
    disk.broken = True
    fetch = prefixes.fetch("a", [1, 9], at_most=1)
    assert fetch is not None
    prefixes.fetched(fetch)
    assert not prefixes.has("a", [1])
    assert prefixes.stats.num_entries == 1


def test_a_write_that_fails_loses_only_its_entry() -> None:
    disk = FakeDisk()
    prefixes = on_disk(disk)
    disk.writes.pop()[2].set_exception(OSError("no space"))
    assert prefixes.find("a", [1, 9], at_most=1) is None
    assert prefixes.stats.num_entries == 1


def test_two_requests_may_fetch_one_entry() -> None:
    disk = FakeDisk()
    prefixes = on_disk(disk)
    disk.settle()
    fetches = [prefixes.fetch("a", [1, 9], at_most=1) for _ in range(2)]
    for fetch in fetches:
        assert fetch is not None
        prefixes.fetched(fetch)
    assert prefixes.stats.num_entries == 2


def test_the_disk_has_a_budget_too() -> None:
    disk = FakeDisk()
    prefixes = on_disk(disk, disk_bytes=SNAPSHOT_BYTES + 4)
    disk.settle()
    prefixes.put("a", [3], "three")
    disk.settle()
    assert [prefixes.has("a", [token]) for token in (1, 2, 3)] == [False, True, True]
    assert len(disk.files) == 1
    assert prefixes.stats.num_evictions == 1


def test_a_disk_that_is_too_slow_is_not_waited_for() -> None:
    disk = FakeDisk()
    prefixes = on_disk(disk)
    for token in range(10, 40):
        prefixes.put("a", [token], token)
    assert len(disk.writes) == MAX_WRITES
    assert prefixes.stats.num_entries == MAX_WRITES + 1


def test_an_entry_that_is_replaced_on_its_way_to_the_disk_leaves_nothing_there() -> None:
    disk = FakeDisk()
    prefixes = on_disk(disk)
    prefixes.put("a", [1], "new")
    disk.settle()
    hit = prefixes.find("a", [1, 9], at_most=1)
    assert hit is not None
    assert hit.snapshot == "new"
