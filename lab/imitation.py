"""When does imitation collapse? Fine-tuning on a planner's successes, in several ways.

In the paper's Table 3, fine-tuning on the successes of GPT-4o halves the accuracy of the frozen planner. The paper does
not say how the traces were made. Each way below is a possible cause, with what we expected before we ran it; `peer` and
`ideal-peer` are the controls. Every trace is an honest success of its teacher: the judge has accepted its answer. What
a teacher has beyond the student's means stands in its class. No teacher is bound by the student's limit of 64 tokens.
`lab/paper.py` runs all ways, and docs/imitation.md has the results.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

import train
from agent import GENERATOR_PROMPT, VERIFIER_PROMPT, AgentSystem, Trajectory, Turn
from eval import evaluate
from flow_grpo import token_logprobs
from lab.paired import paired
from lab.pretrain import encoder
from lab.teacher import ANSWER, STOP, UNKNOWN, IdealPlanner, asked, expression, literals, render_plan
from llm import Completion, Request, TransformersEngine, load_model
from sandbox import Sandbox
from tasks import bundled_world, load_corpus, load_examples
from tinyworld.world import NAMES, Question, World, find
from tools import BASE_GENERATOR_PROMPT, UserError
from tree import split_rows

BACKBONE = "tinyworld/backbone"

# --- teachers ---------------------------------------------------------------------------------------------------------


class Peer(IdealPlanner):
    """Sees what the student sees, and takes the ideal step in three of four turns."""

    skill = 0.75

    def __init__(self, questions: list[Question], world: World):
        super().__init__(questions, world, self.skill)
        self.world = world

    def reply(self, prompt: str) -> str | None:
        """What a frozen module of this teacher says where the student's would not know. None: it is the student's."""
        return None


class IdealPeer(Peer):
    """Sees what the student sees, and always takes the ideal step."""

    skill = 1.0


class PrivilegedTool(IdealPeer):
    """Its Base_Generator knows the world, as a large model does. So it asks Base_Generator where Search is needed."""

    def _plan(self, prompt: str, seed: int) -> Completion:
        plan = super()._plan(prompt, seed)
        text = plan.text.replace("Tool Name: Search", "Tool Name: Base_Generator")
        return replace(plan, completion_ids=[text], text=text)

    def reply(self, prompt: str) -> str | None:
        before, after = literals(BASE_GENERATOR_PROMPT)[0], re.search(r" of (\w+)$", prompt)
        if not prompt.startswith(before) or not after or after[1] not in self.world.articles:
            return None
        return f"{after[1]}: {self.world.articles[after[1]]}"


class PrivilegedFacts(IdealPeer):
    """Knows the first facts of a chain, so it looks up only the last one. Its verifier and generator know them too."""

    def _plan(self, prompt: str, seed: int) -> Completion:
        question = self.teachers[asked(prompt)].question
        if not question.family.endswith("-hop"):
            return super()._plan(prompt, seed)
        last = question.facts[-1]
        step = find(last.relation, last.subject)
        text = render_plan(f"{expression(step)} is {UNKNOWN}", step)
        return Completion([prompt], [text], [0.0], text, "stop", usage=(0, 0))

    def reply(self, prompt: str) -> str | None:
        is_verifier = prompt.startswith(literals(VERIFIER_PROMPT)[0])
        if not is_verifier and not prompt.startswith(literals(GENERATOR_PROMPT)[0]):
            return None
        question = self.teachers[asked(prompt)].question
        last = question.facts[-1] if question.family.endswith("-hop") else None
        if not last or f"\nResult: {last.subject}: " not in prompt:
            return None
        return f"the {last.relation} of {last.subject} is {last.value}" + (
            STOP if is_verifier else ANSWER.format(last.value)
        )


class Bare(Peer):
    """Justifies nothing: its plans leave out the facts found so far."""

    def _plan(self, prompt: str, seed: int) -> Completion:
        return restyled(super()._plan(prompt, seed), "none.")


class Wordy(Peer):
    """Begins each justification with the same forty characters. The student's tokenizer spells them one by one."""

    def _plan(self, prompt: str, seed: int) -> Completion:
        plan = super()._plan(prompt, seed)
        return restyled(plan, r"Let us think step by step, as experts do: \1")


def restyled(plan: Completion, why: str) -> Completion:
    text = re.sub(r"^Justification: (.*)", rf"Justification: {why}", plan.text)
    return replace(plan, completion_ids=[text], text=text)


class Informed:
    """A frozen engine in front of which a teacher answers what the engine cannot know."""

    def __init__(self, engine: Any, teacher: Peer):
        self.engine, self.teacher = engine, teacher

    def encode(self, prompt: str) -> tuple[int, ...] | str:
        reply = self.teacher.reply(prompt)
        return self.engine.encode(prompt) if reply is None else reply

    def generate_batch(self, requests: list[Request]) -> list[Completion]:
        own = iter(self.engine.generate_batch([r for r in requests if not isinstance(r.prompt_ids, str)]))
        said = lambda text: Completion([], [], [], text, "stop", usage=(0, 0))  # noqa: E731
        return [said(r.prompt_ids) if isinstance(r.prompt_ids, str) else next(own) for r in requests]

    def forget(self) -> None:
        self.engine.forget()


# --- the ways, each with a hypothesis from before its run -------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    hypothesis: str
    teacher: Callable | None = Peer  # None: the student itself
    questions: int = 640  # of the train split, for traces
    epochs: int = 3
    rounds: int = 1


WAYS = {
    "peer": Way("No collapse: the student can do all that the teacher does."),
    "ideal-peer": Way("No collapse: as with peer, and better, as no trace has a wasted turn.", IdealPeer),
    "own-successes": Way(
        "No collapse: rejection sampling (expert iteration) rises, but more slowly than Flow-GRPO.",
        teacher=None, epochs=1, rounds=4,
    ),
    "privileged-tool": Way(
        "Collapse below the frozen planner: the student asks Base_Generator, which knows nothing here.", PrivilegedTool
    ),
    "privileged-facts": Way(
        "Collapse in two-hop and three-hop: the student invents the entities that its teacher knew.", PrivilegedFacts
    ),
    "bare-style": Way("A small loss: without the facts found so far, the next step is harder to find.", Bare),
    "wordy-style": Way("Collapse: plans outgrow the limit of 64 tokens, so their last lines are lost.", Wordy),
    "few-traces": Way(
        "A loss, but no collapse: the student learns 40 questions by heart in 30 epochs.", questions=40, epochs=30
    ),
}  # fmt: skip


def learn(name: str, seed: int, questions: int = 0, test_questions: int = 300) -> dict:
    """One way with one seed -> its record: figures before, after each round, and of the teacher. `questions` for
    traces; 0: as many as the way says."""
    way, world = WAYS[name], bundled_world()
    frozen = TransformersEngine(BACKBONE)
    system = AgentSystem(frozen, frozen, load_corpus(), Sandbox())
    test_set = load_examples("tinyworld", "test", test_questions)
    config = train.Config(model=BACKBONE)
    policy, tokenizer, optimizer = train.build_trainer(config, train.choose_precision(config, "cpu"))
    student, encode = TransformersEngine(BACKBONE), encoder(tokenizer)
    before, pairs = evaluate(system, test_set, (seed, "test"), "before")
    rewards = [trajectory.reward for _, trajectory in pairs]
    record = {"hypothesis": way.hypothesis, "before": before, "rounds": []}
    asked_for = load_examples("tinyworld", "train")
    count = max(1, min(questions or way.questions, way.questions) // way.rounds)
    for number in range(way.rounds):
        traced = asked_for[number * count : (number + 1) * count]
        if way.teacher:
            teacher = way.teacher(world.questions("train"), world)
            teaching = replace(system, planner=teacher, frozen=Informed(frozen, teacher))
        else:
            teaching = replace(system, planner=student)
        trials = 1 if way.teacher else 4
        taught, traces = evaluate(teaching, traced, (seed, "traces", number), "traces", trials)
        record.setdefault("teacher", taught)  # of a student that teaches itself: the frozen planner
        rows = [row for _, t in traces if t.reward == 1 for row in rows_of(t, encode if way.teacher else None)]
        if not rows:
            raise UserError(f"{name}, seed {seed}: no trace was a success, so there is nothing to imitate")
        fine_tune(policy, optimizer, rows, way.epochs, seed)
        student.load_weights(policy.state_dict().items())
        figures, pairs = evaluate(replace(system, planner=student), test_set, (seed, "test"), "test")
        trajectories = [trajectory for _, trajectory in pairs]
        figures |= {"kl": kl(trajectories), "invented": invented(trajectories, tokenizer)}
        difference = paired(rewards, [trajectory.reward for trajectory in trajectories])
        record["rounds"].append({"rows": len(rows), **figures, "paired": difference})
        record["wrong"] = [train.transcript(*pair) for pair in pairs if not pair[1].reward][:5]
    return record


def rows_of(trajectory: Trajectory, encode: Callable | None) -> list[Turn]:
    """Rows to imitate. A teacher writes texts, which become ids here; the student's turns are rows already. Where an
    ideal teacher says that nothing is left to do, it writes no plan, and there is nothing to imitate."""
    if encode is None:
        return trajectory.turns
    turns = zip(trajectory.turns, trajectory.memory.steps, strict=True)
    return [row_of(turn, encode) for turn, step in turns if step.error != "format"]


def row_of(turn: Turn, encode: Callable) -> Turn:
    """The training row of a teacher's turn, which holds texts in place of ids; `lab.pretrain.encoder` encodes."""
    ids, begin = encode(turn.prompt_ids[0], turn.completion_ids[0])
    return Turn(ids[:begin], ids[begin:], [0.0] * (len(ids) - begin))


def fine_tune(policy: Any, optimizer: torch.optim.Optimizer, rows: list[Turn], epochs: int, seed: int) -> None:
    """Cross-entropy of the completions, 64 rows per optimizer step; all else is as in train.py.

    The update is train.py's own. With advantages of 1 and a ratio of 1, the gradient of its loss is the gradient of the
    cross-entropy.
    """
    rng = random.Random(f"sft {seed}")
    order = [row for _ in range(epochs) for row in rng.sample(rows, len(rows))]
    steps = [order[n : n + 64] for n in range(0, len(order), 64)]
    config = train.Config(steps=len(steps), updates_per_step=1, kl_coef=0.0, aggregation="token-mean")
    precision = train.choose_precision(config, "cpu")
    for number, turns in enumerate(steps, start=1):
        batches = train.make_batches([Trajectory("", turns, None, "")], torch.ones(1, 1), config, policy)
        train.update_policy(policy, policy, optimizer, batches, config, precision, number)


@torch.no_grad()
def kl(trajectories: list[Trajectory]) -> float:
    """KL(student, initial planner) per token, estimated on the student's own plans."""
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    model, total = load_model(BACKBONE)[0], 0.0
    for part in split_rows([[*turn.prompt_ids, *turn.completion_ids] for turn in turns], 8192, model):
        prompts, completions = [turns[i].prompt_ids for i in part], [turns[i].completion_ids for i in part]
        total -= token_logprobs(model, prompts, completions)[0].sum().item()
    return (total + sum(sum(turn.logprobs) for turn in turns)) / sum(len(turn.logprobs) for turn in turns)


def invented(trajectories: list[Trajectory], tokenizer: Any) -> float:
    """Share of the turns whose context names an entity that stands neither in the question nor in the memory."""
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    count = 0
    for turn in turns:
        plan, seen = tokenizer.decode(turn.completion_ids), tokenizer.decode(turn.prompt_ids)
        context = re.search(r"Context: (.*)", plan)
        names = set(re.findall(r"[A-Z][a-z]+", context[1] if context else "")) & set(NAMES)
        count += not names <= set(re.findall(r"[A-Z][a-z]+", seen))
    return count / len(turns)
