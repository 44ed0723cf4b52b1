"""Engines that turn prompt tokens into completion tokens, and the lockstep that batches many questions.

The surface an engine has, and all that the agent and the trainer know of it:

    engine.encode(prompt)          -> prompt_ids, through the tokenizer's chat template
    engine.generate_batch(list)    -> a `Completion` for each `Request`, in order
    engine.load_weights(state)     new weights for the policy; everything cached from the old ones is dropped

One engine here: transformers, in process, on CPU, CUDA or MPS. Text is tokenised once, when it becomes a prompt;
sampled ids stay ids all the way into the loss.
"""

import asyncio
import hashlib
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()  # of loading and saving: our own bars show what takes time


class UserError(Exception):
    """Bad input. The scripts print its one line, which says what to do, and exit with code 2."""


class EngineError(RuntimeError):
    """The engine failed: a fault of the machine that stops the run, never an empty answer that gets judged."""


@dataclass(frozen=True)
class Request:
    prompt_ids: tuple[int, ...]
    max_tokens: int
    temperature: float  # 0 is greedy
    seed: int = 0  # of this request alone; not used when greedy


@dataclass
class Completion:
    prompt_ids: list[int]
    completion_ids: list[int]  # with the EOS token, unless the token limit came first
    logprobs: list[float]  # of each sampled token at the sampling temperature (at temperature 1 when greedy)
    text: str  # without special tokens
    finish_reason: str  # "stop" or "length"


def derive_seed(*key: Any) -> int:
    """A seed of 63 bits from run seed, step, question, sample, role and turn: no request shares its randomness."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def best_device(name: str = "auto") -> str:
    """cuda, mps or cpu, whichever the machine has, in this order; `UserError` for a device that it lacks."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, available in has.items() if available)
    if not has.get(name.split(":")[0]):
        raise UserError(f"no device {name} on this machine: use one of {', '.join(d for d in has if has[d])}")
    return name


def load_model(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(model, tokenizer) from a Hugging Face folder or hub name; `UserError` when it is none."""
    if Path(path).exists() or str(path).count("/") != 1:  # a local folder: say what is wrong with it before torch does
        config = Path(path) / "config.json"
        if not config.is_file():
            raise UserError(f"{path} is not a model folder: there is no config.json in it")
        if not any(Path(path).glob("*.safetensors")):
            raise UserError(f"{path} is not a whole model folder: there are no *.safetensors weights in it")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot load a model from {path}: {str(error).splitlines()[0]}") from error
    return model.to(device).eval(), tokenizer


class TransformersEngine:
    """Batched sampling with a KV cache. Holds its own copy of the weights, so a frozen module stays frozen."""

    def __init__(
        self,
        path: str | Path,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        prefill_tokens: int = 2048,
        cache_tokens: int = 65536,
    ):
        self.model, self.tokenizer = load_model(path, device, dtype)
        self.prefill_tokens = prefill_tokens  # of one pass over prompts, padding included
        self.cache_tokens = cache_tokens  # in the KV cache of requests that run together, padding included
        self.tokens_generated = 0
        eos = self.model.generation_config.eos_token_id
        eos = [eos] if isinstance(eos, int) else list(eos or [])
        self.eos_ids = sorted({*eos, self.tokenizer.eos_token_id} - {None})
        self.control_tokens = [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        message = [{"role": "user", "content": "{prompt}"}]
        self.chat = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)

    def encode(self, prompt: str) -> list[int]:
        """One user message in the chat template. Text never becomes a control token: it gets a space inside."""
        for token in self.control_tokens:
            prompt = prompt.replace(token, f"{token[0]} {token[1:]}")
        return self.tokenizer(self.chat.replace("{prompt}", prompt), add_special_tokens=False)["input_ids"]

    def load_weights(self, state_dict: dict[str, torch.Tensor]) -> None:
        self.model.load_state_dict(state_dict)

    def generate_batch(self, requests: list[Request]) -> list[Completion]:
        """Run everything that is pending. Greedy requests with the same prompt are computed once."""
        keys = [(r.prompt_ids, r.max_tokens) if r.temperature == 0 else i for i, r in enumerate(requests)]
        unique = list({key: request for key, request in zip(keys, requests)}.items())
        unique.sort(key=lambda item: len(item[1].prompt_ids) + item[1].max_tokens)  # neighbours are of similar length
        completions = {}
        for rows in runs([len(request.prompt_ids) + request.max_tokens for _, request in unique], self.cache_tokens):
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
        stopped = torch.zeros(len(requests), dtype=torch.bool, device=device)

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
            stopped[rows[at_eos]] = True
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
        return self._completions(requests, sampled.tolist(), logprobs.tolist(), counts.tolist(), stopped.tolist())

    def _read(self, prompts: list[tuple[int, ...]]) -> tuple[torch.Tensor, DynamicCache]:
        """Prompts, the shortest first -> the hidden state at the last token of each (U, H), and their cache.

        In passes over prompts of similar length, so that little is padding. Padded on the RIGHT: under a causal mask no
        token sees a pad, so there is no mask here.
        """
        device, width = self.model.device, len(prompts[-1])
        states, caches = [], []
        for rows in runs([len(prompt) for prompt in prompts], self.prefill_tokens):
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

    def _completions(self, requests, sampled, logprobs, counts, stopped) -> list[Completion]:
        completions = []
        ids = [row[:count] for row, count in zip(sampled, counts)]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for request, row, text, row_logprobs, stop in zip(requests, ids, texts, logprobs, stopped):
            reason = "stop" if stop else "length"
            completions.append(Completion(list(request.prompt_ids), row, row_logprobs[: len(row)], text, reason))
            self.tokens_generated += len(row)
        return completions


def runs(lengths: list[int], max_tokens: int) -> Iterator[slice]:
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


class Lockstep:
    """Runs many trajectories and batches their requests in a way that repeats: it waits until every live trajectory
    waits for text (tools in flight included), then runs requests, in the order of the trajectories. As long as one
    waits for the `first` engine, the others wait on: so the prompts for the other engines come together.
    """

    def __init__(self, first: Any = None) -> None:
        self.first, self.live = first, 0
        self.waiting: list[tuple[int, Any, Request, asyncio.Future]] = []

    async def generate(self, engine: Any, request: Request, order: int) -> Completion:
        """Called by trajectory number `order`, which has at most one request pending at a time."""
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
        batch = sorted(self.waiting, key=lambda item: item[0])
        if any(engine is self.first for _, engine, *_ in batch):
            batch = [item for item in batch if item[1] is self.first]
        self.waiting = [item for item in self.waiting if item[1] not in {engine for _, engine, *_ in batch}]
        for engine in dict.fromkeys(item[1] for item in batch):
            mine = [item for item in batch if item[1] is engine]
            try:
                completions = engine.generate_batch([item[2] for item in mine])
            except Exception as error:  # everyone who waits must hear of it, or the run would hang
                failure = EngineError(f"the engine failed: {type(error).__name__}: {error}")
                failure.__cause__ = error
                for *_, future in batch + self.waiting:
                    future.done() or future.set_exception(failure)
                return
            for (*_, future), completion in zip(mine, completions):
                future.set_result(completion)
