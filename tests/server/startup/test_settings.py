"""Settings: flags and variables, and what is refused at start."""

import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest

from dijiang_model.checkpoints.default_sampling import DefaultSampling
from dijiang_model.errors import ConfigError
from server.engine.speculation.rules import DEFAULT_MAX_DRAFTS
from server.hardware import (
    CONTROL_GROUP_FILES,
    Device,
    HardwareError,
    default_state_bytes,
    default_threads,
    find_device,
    free_host_bytes,
    max_connections,
    raised_descriptor_limit,
)
from server.startup.assemble import (
    CPU_STEP_TOKENS,
    CUDA_STEP_TOKENS,
    MAX_AUTO_CACHE_BYTES,
    engine_config,
    recipe_of,
    service_options,
)
from server.startup.errors import StartError
from server.startup.keys import key_options
from server.startup.settings import Settings, SettingsError, flag_of, misplaced_key, read_settings, variable_of

CPU = Device("cpu", 8 << 30)
CUDA = Device("cuda:0", 80 << 30)


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(variable_of(name), raising=False)
    monkeypatch.delenv("DIJIANG_API_KEY", raising=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"dijiang": {"origin": {"recipe": "hybrid"}}}')
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    return tmp_path


def test_every_setting_is_described() -> None:
    assert all(field.description for field in Settings.model_fields.values())


def test_what_auto_means_is_told_with_the_numbers_of_the_code() -> None:
    told = {name: field.description or "" for name, field in Settings.model_fields.items()}
    assert f"auto: {DEFAULT_MAX_DRAFTS} where" in told["speculate"]
    assert f"auto: {CPU_STEP_TOKENS} on a CPU, {CUDA_STEP_TOKENS} on CUDA" in told["max_step_tokens"]
    assert MAX_AUTO_CACHE_BYTES == 1 << 30
    assert "at\nmost 1GiB" in told["prefix_cache_memory"]


def test_a_flag_wins_over_the_variable_and_the_variable_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings({}).port == 8000
    monkeypatch.setenv("DIJIANG_PORT", "9000")
    assert read_settings({}).port == 9000
    assert read_settings({"port": "0"}).port == 0


def test_sizes_lists_and_auto_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIJIANG_STATE_MEMORY", "2GiB")
    monkeypatch.setenv("DIJIANG_CORS_ORIGINS", "https://a.example, https://b.example")
    settings = read_settings({"max_body_bytes": "1MiB", "threads": "3", "max_step_tokens": "auto"})
    assert settings.state_memory == 2 << 30
    assert settings.max_body_bytes == 1 << 20
    assert settings.cors_origins == ("https://a.example", "https://b.example")
    assert (settings.threads, settings.max_step_tokens) == (3, "auto")


def test_unknown_variables_are_errors_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIJIANG_MAX_QUEU", "5")
    with pytest.raises(SettingsError, match="DIJIANG_MAX_QUEU is not a setting; did you mean DIJIANG_MAX_QUEUE"):
        read_settings({})


def test_the_clients_variables_are_no_mistakes_but_a_key_there_is_worth_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DIJIANG_BASE_URL", "http://x")
    assert not misplaced_key(read_settings({}))
    monkeypatch.setenv("DIJIANG_API_KEY", "k")
    assert misplaced_key(read_settings({}))
    assert not misplaced_key(read_settings({"api_keys": "k"}))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"port": "70000"}, "--port"),
        ({"port": "x"}, "--port"),
        ({"device": "gpu"}, "--device"),
        ({"dtype": "int3"}, "--dtype"),
        ({"threads": "0"}, "--threads"),
        ({"state_memory": "2 apples"}, "--state-memory"),
        ({"max_conversations": "0"}, "--max-conversations"),
        ({"tls_cert": "nowhere.pem"}, "tls_key are only of use together"),
        ({"tls_cert": "nowhere.pem", "tls_key": "nowhere.key"}, "nowhere.pem does not exist"),
        (
            {"max_conversations": "64", "max_step_tokens": "32"},
            "max_conversations is 64, but a step has only 32 tokens",
        ),
        ({"max_n": "200"}, "max_choices allows only 128"),
        ({"metrics_need_key": True}, "no effect without api_keys"),
        ({"keepalive_s": "0"}, "--keepalive-s"),
    ],
)
def test_what_cannot_take_effect_is_refused_in_a_sentence(flags: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings(flags)
    assert message in str(caught.value)
    assert str(caught.value).count("\n") < 3


def test_keys_are_not_shown_and_may_be_given_hashed(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# comment\n\nsk-two\n")
    digest = "ab" * 32
    settings = read_settings({"api_keys": f"sk-one,sha256:{digest}", "api_keys_file": str(keys)})
    assert "sk-one" not in repr(settings)
    assert len(key_options(settings)["key_hashes"]) == 3
    assert bytes.fromhex(digest) in key_options(settings)["key_hashes"]
    with pytest.raises(StartError, match="64 hexadecimal"):
        key_options(read_settings({"api_keys": "sha256:zz"}))
    keys.write_text("\n")
    with pytest.raises(StartError, match="holds no key"):
        key_options(read_settings({"api_keys_file": str(keys)}))


def test_auto_means_float32_on_a_cpu_and_bfloat16_on_cuda(model: Path) -> None:
    on_cpu = engine_config(read_settings({}), model, CPU)
    assert (on_cpu.device, on_cpu.weights_dtype, on_cpu.max_step_tokens) == ("cpu", "float32", 512)
    assert on_cpu.num_threads == default_threads() >= 1
    on_cuda = engine_config(read_settings({}), model, CUDA)
    assert (on_cuda.device, on_cuda.weights_dtype, on_cuda.max_step_tokens) == ("cuda:0", "bfloat16", 2048)
    assert on_cuda.state_memory_bytes > on_cpu.state_memory_bytes > 1 << 30


def test_given_values_reach_the_engine(model: Path) -> None:
    flags = {"dtype": "float16", "threads": "3", "state_memory": "1MiB", "max_conversations": "9", "max_queue": "7"}
    config = engine_config(read_settings(flags), model, CPU)
    assert (config.weights_dtype, config.num_threads, config.state_memory_bytes) == ("float16", 3, 1 << 20)
    assert (config.max_num_slots, config.max_waiting, config.model_path) == (9, 7, str(model))


def test_many_conversations_make_longer_steps_unless_set(model: Path) -> None:
    assert engine_config(read_settings({"max_conversations": "5000"}), model, CPU).max_step_tokens == 5000


def test_a_model_that_does_not_fit_is_refused_with_numbers(model: Path) -> None:
    with pytest.raises(HardwareError, match=r"GiB are free on cpu"):
        default_state_bytes(Device("cpu", 1500), model)
    assert engine_config(read_settings({"state_memory": "1MiB"}), model, Device("cpu", 0)).state_memory_bytes == 1 << 20


def test_the_served_name_defaults_to_the_folder(model: Path) -> None:
    assert service_options(read_settings({}), model, "folder").model_name == "folder"
    named = service_options(read_settings({"served_model_name": "org/x"}), model, "folder")
    assert named.model_name == "org/x"
    assert named.fingerprint.startswith("fp_")


def test_the_recipe_is_told(model: Path, tmp_path: Path) -> None:
    assert recipe_of(model) == "hybrid"
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox"}')
    assert recipe_of(tmp_path) == "released"


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rounded_weights_are_for_any_device_and_kept_as_they_are_stored(model: Path, tmp_path: Path, kind: str) -> None:
    for device in (CPU, CUDA):
        assert engine_config(read_settings({"dtype": kind}), model, device).weights_dtype == kind
    section = {"quantization": {"weights": kind}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dijiang", "dijiang": section}))
    for wanted in ("auto", kind):
        assert engine_config(read_settings({"dtype": wanted}), tmp_path, CPU).weights_dtype == kind
    with pytest.raises(HardwareError, match=f"are {kind}: dtype is auto or {kind} for them"):
        engine_config(read_settings({"dtype": "float32"}), tmp_path, CPU)


@pytest.mark.parametrize(("limit", "used"), CONTROL_GROUP_FILES, ids=["version 2", "version 1"])
def test_free_memory_is_what_the_container_leaves(tmp_path: Path, limit: str, used: str) -> None:
    for name, text in ((limit, "1000000\n"), (used, "400000\n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_host_bytes(tmp_path) == 600_000
    (tmp_path / limit).write_text("max\n")
    assert free_host_bytes(tmp_path) > 600_000


def test_a_container_has_no_more_threads_than_the_time_of_its_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(64)))
    assert default_threads(tmp_path) == 32, "no control groups"
    for quota, threads in (
        *(("max 100000", 32), ("400000 100000", 3), ("200000 100000", 2)),
        *(("150000 100000", 1), ("50000 100000", 1)),
    ):
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
        assert default_threads(tmp_path) == threads
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for quota, threads in (("-1", 32), ("300000", 2)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        assert default_threads(tmp_path) == threads


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.hardware.free_cuda_bytes", list)
    assert find_device("auto").name == "cpu"
    assert find_device("cpu").free_bytes == pytest.approx(free_host_bytes(), rel=0.5)
    with pytest.raises(HardwareError, match="0 CUDA devices"):
        find_device("cuda")
    monkeypatch.setattr("server.hardware.free_cuda_bytes", lambda: [5, 7])
    assert find_device("auto") == Device("cuda:0", 5)
    assert find_device("cuda:1") == Device("cuda:1", 7)
    with pytest.raises(HardwareError, match="2 CUDA devices"):
        find_device("cuda:2")


def test_each_rank_needs_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.hardware.free_cuda_bytes", lambda: [5, 7, 3])
    assert find_device("auto", num_ranks=2) == Device("cuda:0", 5)
    assert find_device("cuda:1", num_ranks=2) == Device("cuda:1", 3), "the memory of the fullest counts"
    with pytest.raises(HardwareError, match="needs 3 CUDA devices from cuda:1 on, but there are 3"):
        find_device("cuda:1", num_ranks=3)
    assert find_device("cpu", num_ranks=64).name == "cpu"


def test_ranks_bring_memory_on_cuda_and_share_it_on_a_cpu(model: Path) -> None:
    one, two = ({"tensor_parallel": str(ranks)} for ranks in (1, 2))
    assert engine_config(read_settings(two), model, CPU) == replace(
        engine_config(read_settings(one), model, CPU), tensor_parallel=2
    )
    budgets = [engine_config(read_settings(flags), model, CUDA).state_memory_bytes for flags in (one, two)]
    assert budgets[1] > 2 * budgets[0], "the weights are there once, not twice"


def test_flags_and_variables_are_named_alike() -> None:
    assert (flag_of("state_memory"), variable_of("state_memory")) == ("--state-memory", "DIJIANG_STATE_MEMORY")


def test_states_in_bfloat16_reach_the_engine_and_cannot_be_split(model: Path) -> None:
    assert engine_config(read_settings({}), model, CPU).state_dtype == "float32"
    assert engine_config(read_settings({"state_dtype": "bfloat16"}), model, CPU).state_dtype == "bfloat16"
    with pytest.raises(SettingsError, match="state_dtype bfloat16 cannot be split over 2 processes"):
        read_settings({"state_dtype": "bfloat16", "tensor_parallel": "2"})


def test_the_limit_of_open_files_is_raised_to_what_may_be_and_leaves_some_for_files() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[0] // 2, before[1]))
        limit = raised_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] in (limit, before[1])
        assert limit == before[1] or before[1] == resource.RLIM_INFINITY
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert [max_connections(limit) for limit in (0, 100, 1024)] == [0, 50, 768]


def test_queue_places_are_reserved_where_there_are_several_keys(model: Path) -> None:
    assert engine_config(read_settings({"api_keys": "one"}), model, CPU).reserved_waiting == 0
    assert engine_config(read_settings({"api_keys": "one,two"}), model, CPU).reserved_waiting == 128
    assert engine_config(read_settings({"reserved_queue": "7"}), model, CPU).reserved_waiting == 7


def test_sampling_is_the_models_own_unless_the_operator_says_otherwise(model: Path) -> None:
    (model / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20}')

    def sampling(value: str) -> DefaultSampling:
        return service_options(read_settings({"default_sampling": value}), model, "folder").sampling

    assert sampling("model") == DefaultSampling(temperature=0.6, top_k=20)
    assert sampling("neutral") == DefaultSampling()
    assert sampling("top_p=0.5, top_k=0") == DefaultSampling(temperature=0.6, top_p=0.5)
    for wrong in ("", "hot", "seed=1", "temperature=warm", "top_k=1.5", "temperature=3"):
        with pytest.raises(ConfigError, match="--default-sampling has"):
            sampling(wrong)


@pytest.mark.parametrize(
    ("short", "full"), [("bf16", "bfloat16"), ("fp32", "float32"), ("FP16", "float16"), ("int8", "int8")]
)
def test_number_formats_have_short_names(short: str, full: str) -> None:
    assert read_settings({"dtype": short}).dtype == full


def test_states_have_them_too() -> None:
    assert read_settings({"state_dtype": "bf16"}).state_dtype == "bfloat16"
