"""What `from_pretrained` needs to know before it loads: folder, device, dtype, and how answers are sampled."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import GenerationConfig

from dijiang_model.checkpoints.checkpoint import open_checkpoint
from dijiang_model.checkpoints.default_sampling import NEUTRAL, SAMPLING_FILE, read_default_sampling
from dijiang_model.hf.config import DiJiangConfig
from dijiang_model.model import DiJiangForCausalLM

_HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")
_WITHOUT_EFFECT = frozenset(
    {
        *("trust_remote_code", "low_cpu_mem_usage", "use_safetensors", "code_revision", "subfolder"),
        *("_from_auto", "_from_pipeline", "_commit_hash", "commit_hash", "weights_only", "gguf_file", "max_memory"),
        *("quantization_config", "offload_folder", "output_loading_info", "attn_implementation", "state_dict"),
    }
)
"""Options of `from_pretrained` that are taken where they ask for nothing, as None and False do."""
_HARMLESS = frozenset({"trust_remote_code", "low_cpu_mem_usage", "use_safetensors", "weights_only", "adapter_kwargs"})
"""Those that may ask for what is done anyway."""


def refuse_unknown(args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Raises ValueError for options of `from_pretrained` that ask for something that is not done."""
    unknown = sorted(name for name, value in options.items() if name not in _HUB and _asks(name, value))
    if args or unknown:
        names = ", ".join(unknown) or "positional arguments"
        raise ValueError(f"from_pretrained of a DiJiang model does not take {names}; `dijiang quantize` rounds weights")


def find_folder(name: str, options: Mapping[str, Any]) -> Path:
    """Returns a model's folder, of the Hugging Face hub's cache where it is a name there."""
    if Path(name).is_dir():
        return Path(name)
    return Path(snapshot_download(name, **{key: options[key] for key in _HUB if key in options}))


def find_device(device_map: Any) -> torch.device:
    """Returns the one device that a `device_map` names; raises ValueError for several."""
    if isinstance(device_map, dict):
        devices = set(device_map.values())
        if len(devices) != 1:
            raise ValueError(f"device_map names {len(devices)} devices; a model lies on one")
        (device_map,) = devices
    if device_map is None:
        return torch.device("cpu")
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device("cuda", device_map) if isinstance(device_map, int) else torch.device(device_map)


def find_dtype(wanted: torch.dtype | str | None, folder: Path) -> torch.dtype:
    """Returns the dtype of the weights; for `auto` and None that of most of the folder's."""
    if isinstance(wanted, torch.dtype):
        return wanted
    if wanted in (None, "auto"):
        infos = open_checkpoint(folder).tensors.infos().items()
        floating = [info.dtype for name, info in infos if info.dtype.is_floating_point and ".linear." not in name]
        return max(floating, key=floating.count, default=torch.float32)
    dtype: torch.dtype = getattr(torch, str(wanted))
    return dtype


def own_memory(network: DiJiangForCausalLM) -> None:
    """Gives parameters memory of their own, where they may be changed: files stay as they are."""
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()
        parameter.requires_grad_(True)
    for attention in network.attentions:
        attention.linear.prepare()


def read_generation_config(folder: Path, config: DiJiangConfig) -> GenerationConfig:
    """As the server samples where a request says nothing, and with every end of an answer that it knows."""
    if (folder / SAMPLING_FILE).is_file():
        generation = GenerationConfig.from_pretrained(folder)
        sampling = read_default_sampling(folder)
        if generation.do_sample is None and sampling != NEUTRAL:
            generation.do_sample = sampling.temperature > 0
    else:
        generation = GenerationConfig()
    generation.bos_token_id = config.bos_token_id
    generation.eos_token_id, generation.pad_token_id = config.eos_token_id, config.pad_token_id
    return generation


def _asks(name: str, value: Any) -> bool:
    """Whether an option asks for something that is not done."""
    return not (name in _HARMLESS or (name in _WITHOUT_EFFECT and value in (None, False, "", {}, "eager")))
