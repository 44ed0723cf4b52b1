"""Engines that turn prompt tokens into completion tokens, and the lockstep that batches many questions.

The surface an engine has, and all that the agent and the trainer know of it:

    engine.encode(prompt)           -> prompt_ids, through the tokenizer's chat template
    engine.generate_batch(list)     -> a `Completion` for each `Request`, in order; or, where it batches by itself,
    await engine.generate(request)  -> a `Completion`; requests run together as they come
    engine.load_weights(state)      new weights for the policy; everything cached from the old ones is dropped
    engine.sleep()                  gives memory back to the trainer, until the next `load_weights`

    TransformersEngine   in this process, on CPU, CUDA or MPS; repeats bit for bit on a CPU
    VLLMEngine           in this process, for a GPU; continuous batching, so no trajectory waits for another
    HTTPEngine           any server with the OpenAI API; its weights are not ours to change

Text is tokenised once, when it becomes a prompt; sampled ids stay ids all the way into the loss.
"""

import asyncio
import copy
import functools
import hashlib
import itertools
import json
import os
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig
from transformers.utils import logging as transformers_logging
from urllib3.exceptions import HTTPError

transformers_logging.disable_progress_bar()  # of loading and saving: our own bars show what takes time


class UserError(Exception):
    """Bad input. The scripts print its one line, which says what to do, and exit with code 2."""


class EngineError(RuntimeError):
    """The engine failed: a fault of the machine that stops the run, never an empty answer that gets judged."""


@dataclass(frozen=True)
class Request:
    prompt_ids: tuple[int, ...] | str  # as `encode` gave them; a server of chat completions is given the text itself
    max_tokens: int
    temperature: float  # 0 is greedy
    seed: int = 0  # of this request alone; not used when greedy


@dataclass
class Completion:
    prompt_ids: list[int]
    completion_ids: list[int]  # with the EOS token, unless the token limit came first; empty behind chat completions
    logprobs: list[float]  # of each sampled token at the sampling temperature (at temperature 1 when greedy)
    text: str  # without special tokens
    finish_reason: str  # "stop" or "length"
    usage: tuple[int, int] | None = None  # tokens read and written as a server counts them, where there are no ids

    def tokens(self) -> tuple[int, int]:
        """Read and written, as if nothing were cached."""
        return self.usage or (len(self.prompt_ids), len(self.completion_ids))


def derive_seed(*key: Any) -> int:
    """A seed of 63 bits from run seed, step, question, sample, role and turn: no request shares its randomness."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def no_netrc(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """The `auth` of calls with a key of ours: without one, requests replaces its header by what ~/.netrc has."""
    return request


def best_device(name: str = "auto") -> str:
    """cuda, mps or cpu, whichever the machine has, in this order; `UserError` for a device that it lacks."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, available in has.items() if available)
    if not has.get(name):
        there = ", ".join(device for device in has if has[device])
        raise UserError(f"no device {name} here: use one of {there}; CUDA_VISIBLE_DEVICES chooses among GPUs")
    return name


def load_model(
    path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> tuple[Any, Any]:
    """(model, tokenizer) from a Hugging Face folder, a hub name, or the folder of a LoRA adapter, which is merged into
    its base; `UserError` when it is none of them."""
    if base := adapter_base(path):
        model, tokenizer = load_model(base, device, dtype, attention)
        return import_peft().PeftModel.from_pretrained(model, path).merge_and_unload().eval(), tokenizer
    check_folder(path, "config.json", "*.safetensors")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"cannot load a model from {path}: {str(error).splitlines()[0]}") from error
    return model.to(device).eval(), tokenizer


def import_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UserError("LoRA needs the package peft: pip install -r requirements-gpu.txt") from None
    return peft


def add_adapter(model: Any, rank: int, seed: int = 0) -> None:
    """Freeze the model and put a LoRA adapter, in float32, on all its linear layers; it begins as zero."""
    settings = import_peft().LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    torch.manual_seed(seed)
    model.add_adapter(settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # updates are far smaller than a bfloat16 weight can follow


def plain_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights by their plain names, a LoRA adapter added to its base; the model itself stays as it is."""
    state = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if ".lora_" not in k}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            weight = state[f"{name}.weight"]
            state[f"{name}.weight"] = (weight.float() + module.get_delta_weight("default")).to(weight.dtype)
    return state


def check_folder(path: str | Path, *files: str) -> None:
    """Say what is wrong with a local folder before a library looks elsewhere. Hub names (owner/name) may pass."""
    for file in files if Path(path).exists() or str(path).count("/") != 1 else ():
        if not any(Path(path).glob(file)):
            raise UserError(f"{path} is not a whole model folder: there is no {file} in it")


def adapter_config(path: str | Path) -> dict[str, Any]:
    """The settings of a LoRA adapter's folder; {} for any other folder."""
    config = Path(path) / "adapter_config.json"
    return json.loads(config.read_text()) if config.is_file() else {}


def adapter_base(path: str | Path) -> str:
    """The model that a LoRA adapter's folder belongs to; empty for any other folder."""
    return adapter_config(path).get("base_model_name_or_path", "")


class Engine:
    """What the engines share: the tokenizer, through which a prompt becomes ids, once."""

    def __init__(self, tokenizer: Any, generation_config: Any):
        self.tokenizer = tokenizer
        self.tokens_generated = 0
        eos = generation_config.eos_token_id
        eos = [eos] if isinstance(eos, int) else list(eos or [])
        self.eos_ids = sorted({*eos, tokenizer.eos_token_id} - {None})
        self.control_tokens = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        message = [{"role": "user", "content": "{prompt}"}]
        self.chat = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        self.encode = functools.lru_cache(4096)(self.encode)  # the rollouts of a group begin with the same prompts

    def encode(self, prompt: str) -> tuple[int, ...]:
        """One user message in the chat template. Text never becomes a control token: it gets a space inside."""
        for token in self.control_tokens:
            prompt = prompt.replace(token, f"{token[0]} {token[1:]}")
        return tuple(self.tokenizer(self.chat.replace("{prompt}", prompt), add_special_tokens=False)["input_ids"])

    def decode(self, completion_ids: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def sleep(self) -> None:
        """Give memory back to the trainer, where the engine can; the next `load_weights` takes it again."""


# --- transformers, in this process ------------------------------------------------------------------------------------


class TransformersEngine(Engine):
    """Batched sampling with a KV cache. Holds its own copy of the weights, so a frozen module stays frozen."""

    def __init__(
        self,
        path: str | Path,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        prefill_tokens: int = 2048,
        cache_tokens: int = 65536,
    ):
        self.model, tokenizer = load_model(path, device, dtype)
        super().__init__(tokenizer, self.model.generation_config)
        self.prefill_tokens = prefill_tokens  # of one pass over prompts, padding included
        self.cache_tokens = cache_tokens  # in the KV cache of requests that run together, padding included

    def load_weights(self, state_dict: dict[str, torch.Tensor]) -> None:
        self.model.load_state_dict(state_dict)

    def generate_batch(self, requests: list[Request]) -> list[Completion]:
        """Run everything that is pending. Greedy requests with the same prompt are computed once."""
        keys = [(r.prompt_ids, r.max_tokens) if r.temperature == 0 else i for i, r in enumerate(requests)]
        unique = list({key: request for key, request in zip(keys, requests)}.items())
        unique.sort(key=lambda item: len(item[1].prompt_ids) + item[1].max_tokens)  # neighbours are of similar length
        completions = {}
        for rows in slices_that_fit([len(r.prompt_ids) + r.max_tokens for _, r in unique], self.cache_tokens):
            batch_keys, batch = zip(*unique[rows])
            completions |= zip(batch_keys, self._generate(batch))
        return [completions[key] for key in keys]

    @torch.inference_mode()
    def _generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Requests that run together, a token each at a time. Prompts of different length leave gaps in the cache: new
        tokens are appended behind the longest prompt, at their true positions, and the mask hides the gaps.
        """
        device = self.model.device
        lengths = torch.tensor([len(r.prompt_ids) for r in requests], device=device)  # (B,)
        width, max_tokens = int(lengths.max()), max(r.max_tokens for r in requests)
        prompts = {prompt: i for i, prompt in enumerate(sorted(dict.fromkeys(r.prompt_ids for r in requests), key=len))}
        of_row = torch.tensor([prompts[r.prompt_ids] for r in requests], device=device)  # (B,)
        uniforms = self._uniforms(requests, max_tokens)  # (B, max_tokens)
        temperatures = torch.tensor([r.temperature for r in requests], device=device)  # (B,)
        limits = torch.tensor([r.max_tokens for r in requests], device=device)
        eos = torch.tensor(self.eos_ids, device=device)

        sampled = torch.zeros(len(requests), max_tokens, dtype=torch.long, device=device)
        logprobs = torch.zeros(len(requests), max_tokens, device=device)
        counts = limits.clone()  # completion tokens of each row; lowered when EOS comes before the limit

        hidden, cache = self._read(list(prompts))
        hidden = hidden[of_row]  # (B, H)
        rows = torch.arange(len(requests), device=device)  # in the batch ...
        if not torch.equal(of_row, rows):
            cache.batch_select_indices(of_row)  # samples of one prompt share its pass, then go their own ways
        mask = torch.arange(width, device=device) < lengths[:, None]  # (B, S): real tokens
        running = torch.ones(len(requests), dtype=torch.bool, device=device)  # ... and not finished
        for t in range(max_tokens):
            logits = self.model.lm_head(hidden).float()  # (R, V), R rows in the batch
            tokens, token_logprobs = sample(logits, temperatures[rows], uniforms[rows, t])
            sampled[rows, t], logprobs[rows, t] = tokens, token_logprobs
            at_eos = running & torch.isin(tokens, eos)
            counts[rows[at_eos]] = t + 1
            running &= ~at_eos & (limits[rows] > t + 1)
            if not running.any():
                break
            if running.sum() < 0.8 * len(rows):  # finished rows leave the batch, some at once: it copies the cache
                keep = running.nonzero()[:, 0]
                rows, mask, tokens, running = rows[keep], mask[keep], tokens[keep], running[keep]
                cache.batch_select_indices(keep)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            hidden = self.model.model(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=(lengths[rows] + t)[:, None],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, 0]
        ids = [row[:count] for row, count in zip(sampled.tolist(), counts.tolist())]
        self.tokens_generated += sum(map(len, ids))
        reasons = ["length" if set(self.eos_ids).isdisjoint(row) else "stop" for row in ids]
        parts = zip(requests, ids, logprobs.tolist(), self.decode(ids), reasons)
        return [Completion(list(r.prompt_ids), row, logs[: len(row)], text, why) for r, row, logs, text, why in parts]

    def _read(self, prompts: list[tuple[int, ...]]) -> tuple[torch.Tensor, DynamicCache]:
        """Prompts, the shortest first -> the hidden state at the last token of each (U, H), and their cache.

        In passes over prompts of similar length, so that little is padding. Padded on the RIGHT: under a causal mask no
        token sees a pad, so there is no mask here.
        """
        device, width = self.model.device, len(prompts[-1])
        states, caches = [], []
        for rows in slices_that_fit([len(prompt) for prompt in prompts], self.prefill_tokens):
            longest = len(prompts[rows][-1])
            ids = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts[rows]], device=device)  # (R, S)
            last = torch.tensor([len(p) - 1 for p in prompts[rows]], device=device)
            cache = DynamicCache(config=self.model.config)
            hidden = self.model.model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
            states.append(hidden[torch.arange(len(ids), device=device), last])  # no other position needs logits
            room = (0, 0, 0, width - longest)
            caches.append([[torch.nn.functional.pad(x, room) for x in (y.keys, y.values)] for y in cache.layers])
        layers = [[torch.cat(parts) for parts in zip(*of_layer)] for of_layer in zip(*caches)]  # keys, values
        return torch.cat(states), DynamicCache(layers, config=self.model.config)

    def _uniforms(self, requests: Sequence[Request], max_tokens: int) -> torch.Tensor:
        """(B, max_tokens) numbers in [0, 1), each row from its request's own seed: the batch around it has no say."""
        generator, uniforms = torch.Generator(), torch.zeros(len(requests), max_tokens)
        for row, request in zip(uniforms, requests):
            if request.temperature > 0:
                row.uniform_(generator=generator.manual_seed(request.seed))
        # A vocabulary of 150k sums up to 1 within 1e-16 in float64, which MPS lacks.
        return uniforms.to(self.model.device, torch.float32 if self.model.device.type == "mps" else torch.float64)


def slices_that_fit(lengths: list[int], max_tokens: int) -> Iterator[slice]:
    """Cut rows, the shortest first, into slices with rows * longest <= max_tokens, or of one row that is longer."""
    start = 0
    for i in range(1, len(lengths) + 1):
        if i == len(lengths) or lengths[i] * (i + 1 - start) > max_tokens:
            yield slice(start, i)
            start = i


def sample(
    logits: torch.Tensor, temperatures: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, V), (R,), (R,) -> token ids (R,) and their log-probs (R,): the policy itself, no top-k, top-p or penalty.

    One uniform number picks a token by the inverse of the cumulative distribution; temperature 0 takes the largest.
    """
    greedy = temperatures == 0
    all_logprobs = torch.log_softmax(logits / torch.where(greedy, 1.0, temperatures)[:, None], dim=-1)
    cdf = all_logprobs.to(uniforms.dtype).exp().cumsum(dim=-1)
    drawn = torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    tokens = torch.where(greedy, logits.argmax(dim=-1), drawn)
    return tokens, all_logprobs.gather(1, tokens[:, None])[:, 0]


# --- vLLM, in this process --------------------------------------------------------------------------------------------


def import_vllm(device: str) -> Any:
    """The vllm module, set up to run in this process; `UserError` where it is missing or made for another device."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are handed over in memory, not through a socket
    defaults = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    defaults["TRITON_F32_DEFAULT"] = "ieee"  # its attention would round float32 to tf32, which the trainer does not
    for name, value in (defaults | {"OMP_NUM_THREADS": str(torch.get_num_threads())}).items():
        os.environ.setdefault(name, value)  # all before the import: vLLM reads them then, and once
    try:
        import vllm
        from vllm.platforms import current_platform
    except ImportError as error:
        advice = "run `make gpu` or pip install -r requirements-gpu.txt, or use --engine transformers"
        raise UserError(f"--engine vllm needs the package vllm ({error}): {advice}") from None
    if current_platform.device_type != device:
        made_for = current_platform.device_type or "a GPU, and there is none here"
        raise UserError(f"this build of vllm is made for {made_for}, not for {device}: use --engine transformers")
    return vllm


class VLLMEngine(Engine):
    """Requests enter as they come and are decoded together, whatever trajectory, turn or module they belong to. Nobody
    waits for the slowest. The price: sums are made in the order of arrival, so a run repeats only nearly.

    `memory_share` of the GPU is taken for weights and KV cache. With a `lora_rank` it serves two models at once: the
    base weights (`without_adapter()`) and the base with the last adapter that was loaded.
    """

    def __init__(
        self,
        path: str | Path,
        device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
        memory_share: float = 0.4,
        lora_rank: int = 0,
        can_sleep: bool = False,
    ):
        vllm, base = import_vllm(device), adapter_base(path)
        lora_rank = adapter_config(path).get("r", lora_rank)
        if device == "cpu":
            options = dict(enforce_eager=True)
        else:  # no piecewise CUDA graphs: an engine that starts clears those of every engine in the process
            options = dict(gpu_memory_utilization=memory_share, enable_sleep_mode=can_sleep, max_num_seqs=512)
            options |= dict(compilation_config={"cudagraph_mode": "FULL_DECODE_ONLY"})
        if lora_rank:
            if device != "cpu" and dtype == torch.float32:
                raise UserError("the LoRA kernels of vLLM take no float32: use --dtype mixed or bfloat16")
            rank = 1 << (max(8, lora_rank) - 1).bit_length()  # the next power of two: vLLM takes no others
            # Beside rows with an adapter, a row without one reads slot -1, the last, on a CPU: it must stay empty.
            options |= dict(enable_lora=True, max_lora_rank=rank, max_loras=2 if device == "cpu" else 1)
        try:
            self.llm = vllm.LLM(
                model=str(base or path), dtype=str(dtype).removeprefix("torch."), **options,
                generation_config="vllm",  # not the sampling habits that come with the model: no top-k, no penalty
                logprobs_mode="processed_logprobs",  # of the distribution that is sampled: after the temperature
            )  # fmt: skip
            generation_config = GenerationConfig.from_pretrained(base or path)
        except (OSError, ValueError, RuntimeError, AssertionError) as error:
            raise UserError(f"vLLM cannot serve {path}: {self._advice(error, base or path, memory_share)}") from error
        super().__init__(self.llm.get_tokenizer(), generation_config)
        self.vllm, self.engine = vllm, self.llm.llm_engine
        self.lora_rank, self.lora_request = lora_rank, None
        self.can_sleep, self.asleep = can_sleep and device != "cpu", False
        self.seeded = device != "cpu"  # the CPU sampler of vLLM fails on requests with a seed of their own
        self.numbers = itertools.count()
        self.waiting: dict[str, list[asyncio.Future]] = {}  # by request id; several wait for the same greedy request
        self.greedy: dict[tuple, str] = {}  # (prompt_ids, max_tokens, adapter) -> id of the request under way
        if base:
            self.load_adapter(path)

    def without_adapter(self) -> "VLLMEngine":
        """The same engine, as a server of the base weights: the frozen modules beside a LoRA planner."""
        frozen = copy.copy(self)
        frozen.lora_request = None
        return frozen

    async def generate(self, request: Request) -> Completion:
        future = asyncio.get_running_loop().create_future()
        key = (request.prompt_ids, request.max_tokens, self.lora_request is None)
        number = self.greedy.get(key) if request.temperature == 0 else None
        if number in self.waiting:
            self.waiting[number].append(future)
            return await future
        number = str(next(self.numbers))
        if request.temperature == 0:
            self.greedy[key] = number
        params = self.vllm.SamplingParams(
            max_tokens=request.max_tokens, temperature=request.temperature, logprobs=0, flat_logprobs=True,
            seed=request.seed if self.seeded and request.temperature else None,
            stop_token_ids=self.eos_ids, detokenize=False,
        )  # fmt: skip
        prompt = self.vllm.TokensPrompt(prompt_token_ids=list(request.prompt_ids))
        self.engine.add_request(number, prompt, params, lora_request=self.lora_request)
        self.waiting[number] = [future]
        if len(self.waiting) == 1:
            self.stepping = asyncio.ensure_future(self._step_while_somebody_waits())
        return await future

    async def _step_while_somebody_waits(self) -> None:
        try:
            while self.waiting:
                await asyncio.sleep(0)  # who has just got a text can add the next request before the next token
                for output in self.engine.step():
                    if output.finished:
                        completion = self._completion(output)
                        for future in self.waiting.pop(output.request_id):
                            future.done() or future.set_result(completion)
        except Exception as error:  # everyone who waits must hear of it, or the run would hang
            failure = EngineError(f"vLLM failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            for future in itertools.chain.from_iterable(self.waiting.values()):
                future.done() or future.set_exception(failure)
        finally:  # also when the rollouts were cancelled
            self.engine.abort_request(list(self.waiting))
            self.waiting.clear()
            self.greedy.clear()

    def _completion(self, output: Any) -> Completion:
        sampled = output.outputs[0]
        if sampled.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"a request ended by {sampled.finish_reason!r}")
        ids, logprobs = list(sampled.token_ids), list(sampled.logprobs.logprobs)
        if len(ids) != len(logprobs):
            raise RuntimeError(f"{len(logprobs)} log-probs for {len(ids)} tokens")
        self.tokens_generated += len(ids)
        return Completion(list(output.prompt_token_ids), ids, logprobs, self.decode([ids])[0], sampled.finish_reason)

    def load_weights(self, state_dict: dict[str, torch.Tensor]) -> None:
        self._wake(["weights"])
        weights = ((name, tensor.detach()) for name, tensor in state_dict.items())
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self._wake(["kv_cache"])  # only now: old and new weights are in memory until here
        self.asleep = False
        self._forget()

    def load_adapter(self, folder: str | Path) -> None:
        """Serve the base with the LoRA adapter of this folder; `UserError` where it belongs to another base."""
        from vllm.lora.request import LoRARequest

        self._wake(["weights", "kv_cache"])
        self.asleep = False
        try:
            self.engine.add_lora(LoRARequest("planner", 1, str(folder), load_inplace=self.lora_request is not None))
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{folder} is no adapter of this model: {str(error).splitlines()[0]}") from error
        self.lora_request = LoRARequest("planner", 1, str(folder))
        self._forget()

    def _forget(self) -> None:
        """Drop what was computed with the old weights. vLLM refuses, without an error, while a request is running."""
        if not self.llm.reset_prefix_cache():
            raise EngineError("vLLM did not drop its prefix cache after a change of weights: requests are running")

    def sleep(self) -> None:
        if self.can_sleep and not self.asleep:
            # Level 2 forgets the weights, as all of them come anew; under an adapter the base must outlive the sleep.
            self.llm.sleep(level=1 if self.lora_rank else 2)
            self.asleep = True

    def _wake(self, tags: list[str]) -> None:
        if self.asleep:
            torch.cuda.empty_cache()  # what the trainer has freed and still holds
            self.llm.wake_up(tags=tags)

    @staticmethod
    def _advice(error: Exception, path: str | Path, memory_share: float) -> str:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        weights = sum(file.stat().st_size for file in Path(path).glob("*.safetensors")) / 2**30
        if "memory" not in reason.lower() or not torch.cuda.is_available():
            return reason
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        return (
            f"{reason} Its weights take about {weights:.1f} GiB and --engine_memory gives it {memory_share:g} of "
            f"{total:.0f} GiB, KV cache included: raise --engine_memory, or take a smaller model or --lora_rank"
        )


# --- any server with the OpenAI API -----------------------------------------------------------------------------------


# No connection, silence, half an answer, one that is not JSON or has another shape.
FAULTS = (requests.RequestException, HTTPError, ValueError, KeyError, IndexError, TypeError, AttributeError)


class HTTPEngine:
    """A model behind a server: frozen modules and judges through chat completions, or, given a tokenizer's folder, a
    planner that is only sampled, through completions from token ids to token ids with log-probs (as vLLM serves them).

    `address` is the server's base URL, such as http://localhost:8000/v1, with #NAME where it has several models. The
    key is read from OPENAI_API_KEY. A fault of the server is tried again, then it is an `EngineError`, never an empty
    text.
    """

    def __init__(
        self,
        address: str,
        tokenizer: str = "",
        concurrency: int = 64,
        timeout_s: float = 300.0,
        retries: int = 5,
        backoff_s: float = 1.0,
    ):
        self.url, _, self.model = address.partition("#")
        self.url = self.url.rstrip("/")
        self.timeout_s, self.retries, self.backoff_s = timeout_s, retries, backoff_s
        self.tokens_generated = 0
        self.tokens = None
        if tokenizer:
            source = adapter_base(tokenizer) or tokenizer
            check_folder(source, "tokenizer.json")
            try:
                self.tokens = Engine(AutoTokenizer.from_pretrained(source), GenerationConfig.from_pretrained(source))
            except (OSError, ValueError) as error:
                raise UserError(f"no tokenizer in {tokenizer}: {str(error).splitlines()[0]}") from error
        self.threads = ThreadPoolExecutor(concurrency, thread_name_prefix="http-engine")  # and so many requests at once
        self.session = requests.Session()
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=concurrency))
        if key := os.environ.get("OPENAI_API_KEY"):
            self.session.headers["Authorization"] = f"Bearer {key}"
            self.session.auth = no_netrc
        self.gave_up = threading.Event()  # the run ends, so nobody needs to try again
        try:
            names = [entry["id"] for entry in self._call("GET", "/models", None, lambda body: body["data"])]
        except EngineError as error:
            raise UserError(str(error)) from None
        if self.model not in names and (self.model or len(names) != 1):
            raise UserError(f"{self.url} serves {', '.join(names) or 'nothing'}: name one, as in {self.url}#NAME")
        self.model = self.model or names[0]

    def encode(self, prompt: str) -> tuple[int, ...] | str:
        return self.tokens.encode(prompt) if self.tokens else prompt

    def sleep(self) -> None:
        """Its memory is not ours."""

    def load_weights(self, state_dict: dict[str, torch.Tensor]) -> None:
        raise UserError("the weights behind a server cannot be trained: use --engine transformers or vllm")

    async def generate(self, request: Request) -> Completion:
        call = self._complete_ids if self.tokens else self._complete_chat
        try:
            return await asyncio.get_running_loop().run_in_executor(self.threads, call, request)
        except asyncio.CancelledError:
            self.gave_up.set()  # the run ends: its threads must not try again for minutes
            raise

    def _sampling(self, request: Request) -> dict[str, Any]:
        seed = {"seed": request.seed, "top_p": 1.0} if request.temperature else {}
        return {"model": self.model, "max_tokens": request.max_tokens, "temperature": request.temperature, **seed}

    def _complete_chat(self, request: Request) -> Completion:
        body = self._sampling(request) | {"messages": [{"role": "user", "content": request.prompt_ids}]}

        def read(answer: dict) -> Completion:
            choice = answer["choices"][0]
            text, reason = choice["message"]["content"], choice["finish_reason"]
            usage = answer.get("usage") or {}
            tokens = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
            if not isinstance(text, str) or not (text or tokens[1]) or reason not in ("stop", "length"):
                raise ValueError(f"no text, finish_reason {reason!r}")
            self.tokens_generated += tokens[1]
            return Completion([], [], [], text, reason, tokens)

        return self._call("POST", "/chat/completions", body, read)

    def _complete_ids(self, request: Request) -> Completion:
        prompt_ids = list(request.prompt_ids)
        body = self._sampling(request) | {
            "prompt": prompt_ids, "logprobs": 0, "return_token_ids": True, "stop_token_ids": self.tokens.eos_ids,
            "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,  # the policy itself, whatever the server's defaults
        }  # fmt: skip

        def read(answer: dict) -> Completion:
            choice = answer["choices"][0]
            if choice.get("token_ids") is None or not (choice.get("logprobs") or {}).get("token_logprobs"):
                advice = "serve the planner with vLLM, or leave out its tokenizer to talk in text"
                raise EngineError(f"{self.url} returns no token ids or no log-probs: {advice}")
            ids, logprobs, reason = choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"]
            if choice.get("prompt_token_ids", prompt_ids) != prompt_ids or not len(ids) == len(logprobs) > 0:
                raise ValueError("the ids and log-probs do not belong to the prompt")
            if reason not in ("stop", "length"):
                raise ValueError(f"finish_reason {reason!r}")
            self.tokens_generated += len(ids)
            return Completion(prompt_ids, ids, logprobs, self.tokens.decode([ids])[0], reason)

        return self._call("POST", "/completions", body, read)

    def _call(self, method: str, path: str, body: dict | None, read: Callable[[Any], Any]) -> Any:
        """read(answer), tried again after a fault of the server: no connection, silence, 429, 5xx, a damaged answer."""
        for attempt in range(self.retries + 1):
            wait = self.backoff_s * 2**attempt * random.uniform(0.5, 1.5)  # a crowd must not come back all at once
            try:
                status, headers, data = self._exchange(method, self.url + path, body)
                if status == 200:
                    return read(json.loads(data))
                problem = f"HTTP {status} {data[:200].decode(errors='replace').strip()!r}"
                if status in (401, 403):
                    raise EngineError(f"{self.url} refuses the key in OPENAI_API_KEY, or there is none (HTTP {status})")
                if status not in (408, 409, 425, 429) and status < 500:
                    raise EngineError(f"{self.url}{path} refuses the request: {problem}")
                if headers.get("Retry-After", "").isdigit():
                    wait = min(60.0, float(headers["Retry-After"]))
            except FAULTS as error:
                problem = f"{type(error).__name__}: {error}"
            if self.gave_up.is_set() or attempt < self.retries and self.gave_up.wait(wait):
                break
        self.gave_up.set()
        raise EngineError(f"{self.url}{path} failed {attempt + 1} times, the last time with {problem[:300]}")

    def _exchange(self, method: str, url: str, body: dict | None) -> tuple[int, Any, bytes]:
        """Status, headers and data. The time limit is for the whole answer: a server may also trickle for ever."""
        deadline, data = time.monotonic() + self.timeout_s, bytearray()
        limits = (min(10.0, self.timeout_s), self.timeout_s)
        with self.session.request(
            method, url, json=body, timeout=limits, stream=True, allow_redirects=False
        ) as response:
            while chunk := response.raw.read1(65536, decode_content=True):  # what is there; iter_content waits for more
                data += chunk
                if time.monotonic() > deadline:
                    raise requests.Timeout(f"no whole answer in {self.timeout_s:g} s")
                if len(data) > 2**24:
                    raise requests.RequestException("the answer is longer than 16 MB")
            return response.status_code, response.headers, bytes(data)


def open_engine(
    kind: str, model: str, device: str, dtype: torch.dtype = torch.float32, tokenizer: str = "", **vllm_options: Any
) -> Any:
    """The engine of this kind: transformers, vllm or http; a model that is a URL is served by http whatever the kind.
    `tokenizer` is for http, `vllm_options` are for vllm: memory_share, lora_rank, can_sleep."""
    is_url = model.startswith(("http://", "https://"))
    if kind == "http" and not is_url:
        raise UserError(f"the http engine takes a URL as its model, such as http://localhost:8000/v1#NAME, not {model}")
    if is_url:
        return HTTPEngine(model, tokenizer)
    if kind == "vllm":
        return VLLMEngine(model, device, dtype, **vllm_options)
    if kind == "transformers":
        return TransformersEngine(model, device, dtype)
    raise UserError(f"no engine {kind}: use transformers, vllm or http")


# --- many trajectories, one engine that takes batches -----------------------------------------------------------------


class Lockstep:
    """Runs many trajectories and batches their requests in a way that repeats: it waits until every live trajectory
    waits for text (tools in flight included), then runs requests, in the order of the trajectories. As long as one
    waits for the `first` engine, the others wait on: so the prompts for the other engines come together.

    An engine with a `generate` of its own batches by itself: for the others, its text is one more tool in flight.
    """

    def __init__(self, first: Any = None) -> None:
        self.first, self.live = first, 0
        self.waiting: list[tuple[int, Any, Request, asyncio.Future]] = []

    async def generate(self, engine: Any, request: Request, order: int) -> Completion:
        """Called by trajectory number `order`, which has at most one request pending at a time."""
        if hasattr(engine, "generate"):
            return await engine.generate(request)
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((order, engine, request, future))
        self._run_if_all_wait()
        return await future

    async def gather(self, trajectories: Iterable[Coroutine]) -> list:
        """Await all; the first error stops the run and is raised."""
        trajectories = list(trajectories)
        self.live = len(trajectories)
        tasks = [asyncio.ensure_future(self._follow(trajectory)) for trajectory in trajectories]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            self.waiting.clear()

    async def _follow(self, trajectory: Coroutine) -> Any:
        result = await trajectory
        self.live -= 1
        self._run_if_all_wait()
        return result

    def _run_if_all_wait(self) -> None:
        if len(self.waiting) < self.live or not self.waiting:
            return
        engines = [engine for _, engine, *_ in self.waiting]
        engine = self.first if self.first in engines else engines[0]
        batch = sorted((item for item in self.waiting if item[1] is engine), key=lambda item: item[0])
        self.waiting = [item for item in self.waiting if item[1] is not engine]
        try:
            completions = engine.generate_batch([item[2] for item in batch])
        except Exception as error:  # everyone who waits must hear of it, or the run would hang
            failure = EngineError(f"the engine failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            for *_, future in batch + self.waiting:
                future.done() or future.set_exception(failure)
            return
        for (*_, future), completion in zip(batch, completions):
            future.set_result(completion)
