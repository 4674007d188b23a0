"""Models of ours in transformers: importing this registers them with its Auto classes.

- `config`: `config.json` as transformers wants it.
- `model`: the network under transformers' interface; nothing is computed here that is not computed elsewhere.
- `cache`: the recurrent state as the object that `generate` passes from step to step.
- `padding`: padded batches as the packed ones of the network, and back.
- `loading`: what `from_pretrained` finds out first.
- `steps`: steps through states, in the compiled kernels where they can.
- `saving`: folders that transformers and the server load.
"""

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from dijiang_model.checkpoints.config_json import MODEL_TYPE
from dijiang_model.hf.config import DiJiangConfig
from dijiang_model.hf.model import DiJiangLM

AutoConfig.register(MODEL_TYPE, DiJiangConfig, exist_ok=True)
AutoModelForCausalLM.register(DiJiangConfig, DiJiangLM, exist_ok=True)
AutoTokenizer.register(DiJiangConfig, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
