"""The engine on the bundled backbone: exact log-probs, seeds, EOS, batching that changes nothing, lockstep."""

import asyncio
import contextlib
import json
import shutil
from dataclasses import replace
from itertools import islice

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import llm
import tree
from flow_grpo import token_logprobs
from lab import pretrain
from lab.pretrain import ASSISTANT, BACKBONE, EOS, USER
from llm import (
    EngineError,
    Lockstep,
    Request,
    TransformersEngine,
    derive_seed,
    load_model,
    sample,
)
from tools import UserError


@pytest.fixture(scope="module")
def engine():
    return TransformersEngine(BACKBONE)


@pytest.fixture(scope="module")
def rows():
    """(role, prompt, completion) of all roles, of very different lengths."""
    return list(islice(pretrain.row_stream(seed=123), 60))


def requests_of(engine, rows, temperature=1.0, max_tokens=24):
    return [
        Request(tuple(engine.encode(prompt)), max_tokens, temperature, seed=i) for i, (_, prompt, _) in enumerate(rows)
    ]


# --- tokenizer --------------------------------------------------------------------------------------------------------


def test_each_prompt_still_compresses(engine):
    """The fixed text of every prompt is one token. When this fails, a prompt was edited."""
    for text in pretrain.prompt_texts():
        ids = engine.tokenizer(text)["input_ids"]
        assert len(ids) == 1, (
            f"the prompt text {text[:60]!r}... takes {len(ids)} tokens, not 1: a prompt was edited after the backbone "
            "was trained; run `python -m lab.pretrain --words`, or train it again"
        )


def test_tokenizer_equals_its_file_and_round_trips(engine, rows):
    raw = Tokenizer.from_file(str(BACKBONE / "tokenizer.json"))
    odd = ["naïve 東京 🙂 \x00\t\r\n", "  spaces  ", "Zilathian Zilath's", "{json: [1, 2]}", "don't 12345"]
    for text in [USER + prompt + ASSISTANT + completion + EOS for _, prompt, completion in rows] + odd:
        ids = engine.tokenizer(text)["input_ids"]
        assert ids == raw.encode(text).ids
        assert engine.tokenizer.decode(ids) == text


def test_text_cannot_write_control_tokens(engine):
    """A tool result that contains the text of a control token stays text."""
    ids = engine.encode(f"a {EOS} b {ASSISTANT} c")
    control = {i for i, token in engine.tokenizer.added_tokens_decoder.items() if token.special}
    assert [i in control for i in ids] == [True, *[False] * (len(ids) - 2), True]


def test_a_prompt_past_the_last_position_is_refused(engine):
    fits = Request((1,) * (4096 - 8), 8, 0.0)
    engine.check_length(fits)
    with pytest.raises(UserError, match="need 4097 of the model's 4096 positions: lower --result_chars"):
        engine.generate_batch([replace(fits, max_tokens=9)])


@pytest.mark.parametrize(
    "template, reason", [(None, "chat_template is not set"), ("{{", "unexpected"), ("hi", "leaves")]
)
def test_a_model_without_a_chat_template_that_works(engine, tmp_path, template, reason):
    engine.model.save_pretrained(tmp_path)
    tokenizer = load_model(BACKBONE)[1]
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"needs a chat template that works: .*{reason}"):
        TransformersEngine(tmp_path)


GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|user|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)


def model_folder(folder, template, change=lambda tokenizer, model: None):
    """The backbone with another chat template, and whatever else `change` does to it."""
    model, tokenizer = load_model(BACKBONE)
    tokenizer.chat_template = template
    change(tokenizer, model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_bos_that_the_template_writes_comes_once(tmp_path):
    """As for Gemma: its template writes BOS and refuses a system message, and its tokenizer would add BOS as well."""

    def add_bos(tokenizer, model):
        bos = "<|endoftext|>"
        tokenizer.bos_token = bos
        parts = dict(single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))])
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(**parts)

    engine = TransformersEngine(model_folder(tmp_path, GEMMA, add_bos))
    bos = engine.tokenizer.bos_token_id
    assert engine.tokenizer("a")["input_ids"][0] == bos
    ids = engine.encode("a")
    assert ids.count(bos) == 1 and ids[0] == bos


@pytest.mark.parametrize("thinking", [True, False])
def test_thinking_can_be_switched_off(tmp_path, thinking):
    engine = TransformersEngine(model_folder(tmp_path, QWEN3), thinking=thinking)
    assert engine.tokenizer.decode(engine.encode("a")).endswith("</think>\n\n") != thinking


def test_several_eos_tokens_and_no_pad(tmp_path, rows):
    """Any of the config's EOS tokens ends a text; the tokens of a model's thinking stay in the row."""

    def change(tokenizer, model):
        model.generation_config.eos_token_id = [comma, tokenizer.eos_token_id]
        tokenizer.pad_token = model.config.pad_token_id = model.generation_config.pad_token_id = None

    plain = TransformersEngine(BACKBONE)
    comma = plain.tokenizer.convert_tokens_to_ids(", ")
    engine = TransformersEngine(model_folder(tmp_path, plain.tokenizer.chat_template, change))
    assert engine.tokenizer.pad_token is None and {comma, plain.tokenizer.eos_token_id} == set(engine.eos_ids)
    requests = requests_of(engine, rows, temperature=0.0, max_tokens=64)
    ended = 0
    for one, whole in zip(engine.generate_batch(requests), plain.generate_batch(requests)):
        ids = whole.completion_ids
        expected = ids[: ids.index(comma) + 1] if comma in ids else ids
        assert one.completion_ids == expected and one.finish_reason == "stop"
        ended += comma in ids
    assert ended > 3


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_equal_the_trainers(engine, rows, temperature):
    completions = engine.generate_batch(requests_of(engine, rows, temperature))
    prompts, sampled = [c.prompt_ids for c in completions], [c.completion_ids for c in completions]
    logprobs, mask, _ = token_logprobs(engine.model, prompts, sampled, temperature)
    for i, completion in enumerate(completions):
        assert mask[i].sum() == len(completion.logprobs) == len(completion.completion_ids)
        assert (logprobs[i][mask[i]] - torch.tensor(completion.logprobs)).abs().max() < 1e-4


def test_greedy_equals_generate(engine, rows):
    """The library's own generate(), one prompt at a time, is the oracle."""
    for request, completion in list(
        zip(requests_of(engine, rows, 0.0), engine.generate_batch(requests_of(engine, rows, 0.0)))
    )[:20]:
        ids = torch.tensor([request.prompt_ids])
        out = engine.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=request.max_tokens
        )
        assert out[0, ids.shape[1] :].tolist() == completion.completion_ids


def test_the_batch_around_a_request_has_no_say(engine, rows):
    requests = requests_of(engine, rows)
    together = engine.generate_batch(requests)
    for i in (0, 7, 31, 59):
        alone = engine.generate_batch([requests[i]])[0]
        assert alone.completion_ids == together[i].completion_ids
        assert alone.logprobs == pytest.approx(together[i].logprobs, abs=1e-4)


def test_limits_and_sizes_of_passes_change_nothing(engine, rows):
    """Requests of one batch may stop at different lengths; small passes and a small cache only split the work."""
    requests = [replace(r, max_tokens=3 + 7 * i % 40) for i, r in enumerate(requests_of(engine, rows))]
    small = TransformersEngine(BACKBONE, batch_tokens=400)
    for request, one, two in zip(requests, engine.generate_batch(requests), small.generate_batch(requests)):
        assert one.completion_ids == two.completion_ids and one.finish_reason == two.finish_reason
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)
        assert len(one.completion_ids) <= request.max_tokens


def test_seeds(engine, rows):
    requests = requests_of(engine, rows)
    first, second = engine.generate_batch(requests), engine.generate_batch(requests)
    assert [c.completion_ids for c in first] == [c.completion_ids for c in second]
    others = [Request(r.prompt_ids, r.max_tokens, r.temperature, r.seed + 1000) for r in requests]
    assert [c.completion_ids for c in engine.generate_batch(others)] != [c.completion_ids for c in first]
    keys = [(0, 1, p, g, t, "planner") for p in range(8) for g in range(8) for t in range(4)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)


def test_eos_is_included_and_a_cut_row_is_flagged(engine, rows):
    eos = engine.tokenizer.eos_token_id
    for completion in engine.generate_batch(requests_of(engine, rows, max_tokens=64)):
        if completion.finish_reason == "stop":
            assert completion.completion_ids[-1] == eos and EOS not in completion.text
    planner = [row for row in rows if row[0] == "planner"]
    for completion in engine.generate_batch(requests_of(engine, planner, max_tokens=3)):
        assert completion.finish_reason == "length" and len(completion.completion_ids) == 3
        assert eos not in completion.completion_ids


def test_equal_prompts_share_their_pass(engine, rows, monkeypatch):
    passes, forward = [], engine.model.model.forward
    monkeypatch.setattr(
        engine.model.model, "forward", lambda **inputs: passes.append(inputs["input_ids"].shape) or forward(**inputs)
    )
    prompt_ids = engine.encode(rows[0][1])
    engine.forget()
    together = engine.generate_batch([Request(prompt_ids, 8, 1.0, seed=n) for n in range(4)])
    assert passes[0] == (1, len(prompt_ids)) and passes[1] == (4, 1)
    for n, completion in enumerate(together):
        alone = engine.generate_batch([Request(prompt_ids, 8, 1.0, seed=n)])[0]
        assert completion.completion_ids == alone.completion_ids


def test_prompts_that_begin_alike_share_what_they_begin_with(engine, rows, monkeypatch):
    """As many tokens are read as the prompts have different beginnings, with and without trees the same is written."""
    prompt_ids = engine.encode(rows[0][1])
    longer = [prompt_ids, *(prompt_ids[:-1] + (n, prompt_ids[-1]) for n in range(300, 304))]
    requests = [Request(ids, 8, 1.0, seed=n) for n, ids in enumerate(longer)]
    passes, forward = [], engine.model.model.forward
    engine.forget()
    with monkeypatch.context() as patch:
        patch.setattr(
            engine.model.model,
            "forward",
            lambda **inputs: passes.append(inputs["input_ids"].shape) or forward(**inputs),
        )
        shared = engine.generate_batch(requests)
    assert passes[0] == (1, len(prompt_ids) + 8)
    plain = TransformersEngine(BACKBONE)
    plain.model.set_attn_implementation("sdpa")
    for one, other in zip(shared, plain.generate_batch(requests)):
        assert one.completion_ids == other.completion_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.parametrize(("block", "at_once"), [(128, 4), (2, 4)])  # the second: new nodes in several blocks
def test_what_a_rollout_has_read_is_not_read_again(block, at_once, engine, rows, monkeypatch):
    """A prompt that goes on from an earlier one costs its new tokens, and the same is written."""
    monkeypatch.setattr(tree, "BLOCK", block)
    monkeypatch.setattr(tree, "AT_ONCE", {"cpu": at_once})
    first = engine.encode(rows[0][1])
    turns = [[Request(first, 8, 1.0, seed=1), Request(first, 8, 1.0, seed=2)]]
    turns += [[Request(first + (300, 301, n), 8, 1.0, seed=n) for n in (302, 303)], turns[0][:1]]
    expected = []
    for requests in turns:
        engine.forget()
        expected.append(engine.generate_batch(requests))
    read, sizes = engine._read, []
    monkeypatch.setattr(engine, "_read", lambda prompts: sizes.append(len((result := read(prompts))[2])) or result)
    for limit in (engine.batch_tokens, len(first) + 12):  # in the second, there is no room to keep what was read
        monkeypatch.setattr(engine, "batch_tokens", limit)
        engine.forget()
        for requests, fresh in zip(turns, expected):
            for one, other in zip(engine.generate_batch(requests), fresh):
                assert one.completion_ids == other.completion_ids
                assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert sizes[:3] == [len(first), 3 + 1, 1]


def test_a_failed_rollout_leaves_nothing_read(engine, rows):
    """What is read changes the blocks of the next pass, and so its rounding."""
    lockstep = Lockstep(engine)

    async def fails():
        await lockstep.generate(engine, Request(engine.encode(rows[0][1]), 2, 1.0), 0)
        assert engine.read[0]
        raise EngineError("broken")

    with pytest.raises(EngineError):
        asyncio.run(lockstep.gather([fails()]))
    assert not engine.read[0]


def test_sample_draws_from_the_policy():
    """Frequencies over many uniforms equal the softmax at the temperature; impossible tokens never come."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -torch.inf]])
    n = 20000
    tokens, logprobs = sample(logits.expand(n, 4), torch.full((n,), 0.7), (torch.arange(n).double() + 0.5) / n)
    expected = torch.softmax(logits[0] / 0.7, dim=-1)
    assert torch.allclose(torch.bincount(tokens, minlength=4) / n, expected, atol=1e-3)
    assert torch.allclose(logprobs.exp(), expected[tokens], atol=1e-6)
    tokens, _ = sample(logits.expand(2, 4), torch.ones(2), torch.tensor([0.0, 1 - 2**-24], dtype=torch.float64))
    assert tokens.tolist() == [0, 2]


def test_new_weights_change_the_samples_and_only_this_engine(rows):
    engine, other = TransformersEngine(BACKBONE), TransformersEngine(BACKBONE)
    requests = requests_of(engine, rows, 0.0)
    before = [c.completion_ids for c in engine.generate_batch(requests)]
    noise = torch.Generator().manual_seed(0)
    state = {k: v + 0.3 * v.std() * torch.randn(v.shape, generator=noise) for k, v in engine.model.state_dict().items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]  # tied
    engine.load_weights(state.items())
    assert [c.completion_ids for c in engine.generate_batch(requests)] != before
    assert [c.completion_ids for c in other.generate_batch(requests)] == before


# --- lockstep ---------------------------------------------------------------------------------------------------------


class CountingEngine:
    def __init__(self):
        self.batches = []

    def generate_batch(self, requests):
        self.batches.append([r.seed for r in requests])
        return [r.seed for r in requests]


def test_lockstep_waits_for_all_and_orders_by_trajectory():
    engine = CountingEngine()
    lockstep = Lockstep(engine)

    async def trajectory(order):
        for turn in range(1 + order % 3):
            await asyncio.sleep(0.01 * (3 - order % 4) if order % 4 < 3 else 0)  # a tool in flight
            await lockstep.generate(engine, Request((1,), 1, 0.0, seed=10 * order + turn), order)
        return order

    assert asyncio.run(lockstep.gather(trajectory(i) for i in range(6))) == list(range(6))
    assert engine.batches == [[0, 10, 20, 30, 40, 50], [11, 21, 41, 51], [22, 52]]


def test_lockstep_brings_requests_for_the_second_engine_together():
    first, second = CountingEngine(), CountingEngine()
    lockstep = Lockstep(first, second)

    async def trajectory(order):  # trajectory n asks the first engine n times before it asks the second
        for turn in range(order):
            await lockstep.generate(first, Request((1,), 1, 0.0, seed=10 * order + turn), order)
        await lockstep.generate(second, Request((1,), 1, 0.0, seed=order), order)

    asyncio.run(lockstep.gather(trajectory(i) for i in range(4)))
    assert first.batches == [[10, 20, 30], [21, 31], [32]] and second.batches == [[0, 1, 2, 3]]


def test_a_dead_engine_stops_the_run():
    class Dead:
        def generate_batch(self, requests):
            raise RuntimeError("out of memory")

    dead = Dead()
    lockstep = Lockstep(dead)

    async def trajectory(order):
        await lockstep.generate(dead, Request((1,), 1, 0.0), order)

    with pytest.raises(RuntimeError, match="out of memory"):
        asyncio.run(asyncio.wait_for(lockstep.gather(trajectory(i) for i in range(4)), 5))


def test_an_error_cancels_the_others():
    """A trajectory that is waiting for its tool ends too, with its clean-up."""
    ended = []

    async def trajectory(order):
        if order == 0:
            raise ValueError("a fault of the machine")
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(order)

    with pytest.raises(ValueError, match="a fault"):
        asyncio.run(Lockstep().gather(trajectory(i) for i in range(4)))
    assert sorted(ended) == [1, 2, 3]


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(UserError, match="cannot load a model from .*nowhere"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text((BACKBONE / "config.json").read_text())
    with pytest.raises(UserError, match="cannot load .*no file named model.safetensors"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["logits_scaling", "logit_scale", "final_logit_softcapping"])
def test_a_model_that_changes_its_logits(tmp_path, name):
    """Granite, Cohere and Gemma 2: sampler and trainer would agree on another policy than the model's."""
    shutil.copytree(BACKBONE, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for value, refused in ((1.0, False), (30.0, True)):
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(UserError, match=f"its {name} changes") if refused else contextlib.nullcontext():
            load_model(tmp_path / "model")


def test_devices():
    assert llm.best_device("cuda") == "cuda" and llm.best_device() in ("cuda", "mps", "cpu")
