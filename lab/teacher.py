"""A teacher that knows the facts plays all modules through the real `agent.solve()`: what a model is taught with.

The prompts are the agent's own, to the letter. As executor, verifier, generator and tools' model the teacher is
perfect. As a planner it is clumsy on purpose. Its steps are well-formed, and it notes what is still missing. But it
prefers the wrong tool, sticks to the tool it used last, and picks its goals from anything in view. Planning, and only
planning, is then left for Flow-GRPO to teach.
"""

import random
import re
import string
from collections.abc import Coroutine, Iterator
from typing import Any

import agent
import tools
from llm import Completion, Request
from tasks import Corpus, bundled_world
from tinyworld import world as w
from tinyworld.world import HARD_FAMILIES, HARD_TURNS, NAMES, OPERATIONS, Question, World, ideal_plan

TEST_WORLD = 0  # its facts never occur in a teacher's world

# --- the teacher ------------------------------------------------------------------------------------------------------

ANALYSES = {
    "lookup": "One fact has to be looked up.",
    "two-hop": "Two facts have to be looked up, one after the other.",
    "three-hop": "Three facts have to be looked up, one after the other.",
    "difference": "Two numbers have to be looked up, then subtracted.",
    "earlier": "Two years have to be looked up, then compared.",
    "arithmetic": "A number has to be computed.",
    "four-hop": "Four facts have to be looked up, one after the other.",
    "five-hop": "Five facts have to be looked up, one after the other.",
    "distractor": "Three facts about one of two names have to be looked up, one after the other.",
    "joined": "Two numbers have to be looked up in two steps each, then subtracted.",
}
PLAN = "Justification: {why}.\nContext: {context}\nSub-Goal: {sub_goal}\nTool Name: {tool}"
UNKNOWN = "unknown"
STOP, CONTINUE = ".\nConclusion: STOP", ".\nConclusion: CONTINUE"
ANSWER = ".\n<answer>{}</answer>"
CODE = "```python\nprint({})\n```"
NO_TOOL = "Calculator"  # a tool that does not exist: the rarest of the planner's habits
RELATIONS = [*w.ENTITY_RELATIONS, *w.NUMBER_RELATIONS]
TERM = r"(\d+) ([-+*<]) (\d+)"

TOOL_HABITS = {  # what a clumsy planner reaches for, by kind of goal
    "find": {"Base_Generator": 0.58, "Search": 0.24, "Python_Coder": 0.16, NO_TOOL: 0.02},
    "compute": {"Base_Generator": 0.8, "Search": 0.05, "Python_Coder": 0.13, NO_TOOL: 0.02},
    "compute from results": {"Base_Generator": 0.51, "Search": 0.05, "Python_Coder": 0.42, NO_TOOL: 0.02},
}
STICKY = 0.7  # chance to use the tool of the last step again, when it suits the habit
# Chance that a clumsy goal is the right one; else it is picked at random from what is in view. It is higher if a random
# plan would never succeed: a family in which no rollout succeeds gives Flow-GRPO nothing to compare.
INSIGHT = {
    "lookup": 0.2, "two-hop": 0.4, "three-hop": 0.65, "difference": 0.85, "earlier": 0.85, "arithmetic": 0.5,
    "four-hop": 0.7, "five-hop": 0.85, "distractor": 0.6, "joined": 0.9,
}  # fmt: skip


class Teacher:
    """Plays every module for one question. A pure function of the prompt, the question's facts and the dice."""

    def __init__(self, question: Question, world: World, rng: random.Random, skill: float):
        self.question, self.world, self.rng = question, world, rng
        self.skill = skill  # chance that the step which is really run is the ideal one
        self.rows: list[tuple[str, str, str]] = []  # (role, prompt, completion)

    async def plan(self, prompt: str) -> Completion:
        """The row to learn is always clumsy. The step that runs may be ideal, so that good states are seen too."""
        self.rows.append(("planner", prompt, self.clumsy_plan(prompt)))
        text = self.mixed_plan(prompt, self.skill)
        return Completion([], [], [], text, "stop", usage=(0, 0))

    async def ask(self, role: str, prompt: str) -> str:
        text = getattr(self, role)(prompt)
        self.rows.append((role, prompt, text))
        return text

    # What the memory already holds, and what an ideal planner would do next.

    def findings(self, prompt: str) -> tuple[str, w.Step | None]:
        """(the line of facts that planner, verifier and generator write, up to the first unknown one; the step that
        would find that one, None if nothing is missing)."""
        facts = []
        for step in ideal_plan(self.question):
            if not self.is_done(step, prompt):
                return ", ".join([*facts, f"{expression(step)} is {UNKNOWN}"]), step
            facts.append(f"{expression(step)} is {self.value(step)}")
        return ", ".join(facts), None

    def is_done(self, step: w.Step, prompt: str) -> bool:
        if step.tool == "Search":
            return f"\nResult: {step.context}: {self.world.articles[step.context]}" in prompt
        return f'\nTool: Python_Coder\nCommand: Python_Coder(query="{expression(step)}")' in prompt

    def value(self, step: w.Step) -> str:
        if step.tool == "Search":
            return self.world.facts[step.context][step.sub_goal.removeprefix("Find the ")].value
        return calculate(*re.fullmatch(TERM, expression(step)).groups())

    # The frozen modules, perfect.

    def analyst(self, prompt: str) -> str:
        return ANALYSES[self.question.family]

    def executor(self, prompt: str) -> str:
        tool = prompt.split("Tool:\n")[1].split("(")[0]
        context, sub_goal = prompt.rsplit("\nContext: ")[1].split("\nSub-Goal: ")
        return f'{tool}(query="{expression(w.Step(context, sub_goal, tool))}")'

    def coder(self, prompt: str) -> str:
        query = prompt.removeprefix(literals(tools.PYTHON_CODER_PROMPT)[0])
        return CODE.format(query if re.fullmatch(TERM, query) else '"unknown"')

    def base(self, prompt: str) -> str:
        return "I do not know."

    def verifier(self, prompt: str) -> str:
        findings, missing = self.findings(prompt)
        return findings + (CONTINUE if missing else STOP)

    def generator(self, prompt: str) -> str:
        findings, missing = self.findings(prompt)
        return findings + ANSWER.format(UNKNOWN if missing else self.question.answer)

    # The clumsy planner. It sees what is missing, and does not know what to do about it.

    def mixed_plan(self, prompt: str, skill: float) -> str:
        """The ideal next step with the chance `skill`, else a clumsy one."""
        why, missing = self.findings(prompt)
        use_ideal = missing is not None and self.rng.random() < skill
        return render_plan(why, missing) if use_ideal else self.clumsy_plan(prompt)

    def clumsy_plan(self, prompt: str) -> str:
        why, missing = self.findings(prompt)
        goal = missing if self.rng.random() < INSIGHT[self.question.family] else None
        goal = goal or self.random_goal(prompt)
        kind = "find" if goal.sub_goal.startswith("Find") else "compute"
        last = re.findall(r"\nTool: (\w+)\nCommand", prompt)
        habits = TOOL_HABITS["compute from results" if kind == "compute" and "Search" in last else kind]
        if last and kind == "find":
            habits = {tool: share * (1 - STICKY) + STICKY * (tool == last[-1]) for tool, share in habits.items()}
        tool = self.rng.choices(list(habits), list(habits.values()))[0]
        return render_plan(why, goal._replace(tool=tool))

    def random_goal(self, prompt: str) -> w.Step:
        """A goal from anything in view: an entity with a relation of the question, or two numbers with an operation."""
        asked = self.question.question
        relations = [r for r in RELATIONS if f"the {r}" in asked]
        if not relations:  # arithmetic
            return w.compute(*re.findall(r"\d+", asked), self.rng.choice(list(OPERATIONS)))
        view = prompt.split("\nQuestion: ")[1]
        numbers = re.findall(r" (\d{3,})\b", "".join(re.findall(r"Result: .*", view)))
        compute_chance = 0.3 if self.question.family in ("difference", "earlier", "joined") else 0.03
        if len(numbers) > 1 and self.rng.random() < compute_chance:
            return w.compute(*self.rng.sample(numbers, 2), self.rng.choice(list(OPERATIONS)))
        entities = sorted(set(re.findall(r"[A-Z][a-z]+", view)) & set(NAMES))
        return w.find(self.rng.choice(relations), self.rng.choice(entities))


def render_plan(why: str, step: w.Step) -> str:
    return PLAN.format(why=why, context=step.context, sub_goal=step.sub_goal, tool=step.tool)


def expression(step: w.Step) -> str:
    """The query a perfect executor makes of a context and a sub-goal."""
    if step.sub_goal.startswith("Find "):
        return f"{step.sub_goal.removeprefix('Find ')} of {step.context}"
    operation = next(op for op, text in OPERATIONS.items() if text == step.sub_goal)
    left, right = step.context.split(", ")
    return f"{left} {operation} {right}"


def calculate(left: str, operation: str, right: str) -> str:
    """What Python prints for a term."""
    one, two = int(left), int(right)
    return str({"+": one + two, "-": one - two, "*": one * two, "<": one < two}[operation])


def literals(template: str) -> list[str]:
    """The fixed text of a format string."""
    return [text for text, *_ in string.Formatter().parse(template) if text]


class TeacherSandbox:
    """Takes the sandbox's place while transcripts are made: the teacher's programs only print one term."""

    async def run(self, code: str) -> str:
        match = re.search(TERM, code)
        return calculate(*match.groups()) if match else "unknown"


def transcript(
    question: Question, world: World, corpus: Corpus, rng: random.Random, skill: float
) -> tuple[Teacher, agent.Trajectory]:
    """Run the real loop with a teacher in all roles."""
    teacher = Teacher(question, world, rng, skill)
    env = tools.ToolEnv(teacher.ask, corpus, TeacherSandbox(), tools.TOOLS)
    max_turns = HARD_TURNS if question.family in HARD_FAMILIES else 4
    return teacher, drive(agent.solve(question.question, teacher.plan, env, max_turns))


def drive(coroutine: Coroutine) -> Any:
    """The result of a coroutine that never really waits, without the cost of an event loop."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise RuntimeError("a teacher never waits")


# --- transcripts ------------------------------------------------------------------------------------------------------

SKILLS = (0.0, 0.5, 0.8, 0.95, 1.0)  # transcripts come from clumsy planners, ideal ones, and some in between
FAMILY_SHARES = {"lookup": 2, "two-hop": 3, "three-hop": 4, "difference": 3, "earlier": 3, "arithmetic": 3}
HARD_SHARES = {"four-hop": 2, "five-hop": 3, "distractor": 2, "joined": 2}  # their transcripts are twice as long
# Share of each role's rows that is kept, and share of the generator's rows without an answer: many are much the same.
KEEP = dict(analyst=0.05, base=0.05, executor=0.3, coder=0.6, planner=0.4, verifier=0.4, generator=1.0)
KEEP_UNKNOWN = 0.3


def teachers(rng: random.Random, seed: int, shares: dict[str, int] = FAMILY_SHARES) -> Iterator[Teacher]:
    """Endless teachers, each with the rows of one question: a new world every 100 questions, and no fact of the test
    world. `shares` has the weights of the families."""
    avoid = bundled_world().all_facts()
    for world_seed in range(1_000_000 * (seed + 1), 1_000_000 * (seed + 2)):
        world = World(world_seed, avoid)
        corpus = Corpus.from_articles(world.articles.items())
        for _ in range(100):
            question = world.sample_question(rng.choices(list(shares), list(shares.values()))[0], rng)
            yield transcript(question, world, corpus, rng, rng.choice(SKILLS))[0]


def row_stream(seed: int) -> Iterator[tuple[str, str, str]]:
    """Endless rows (role, prompt, completion), in the mix of `KEEP`."""
    rng = random.Random(f"pretrain {seed}")
    for teacher in teachers(rng, seed, FAMILY_SHARES | HARD_SHARES):
        for role, prompt, completion in teacher.rows:
            no_answer = completion.endswith(ANSWER.format(UNKNOWN))
            if rng.random() < KEEP[role] * (KEEP_UNKNOWN if no_answer else 1):
                yield role, prompt, completion


# --- a planner for comparisons ----------------------------------------------------------------------------------------


def asked(prompt: str) -> str:
    """The question of a module's prompt."""
    return prompt.split("\nQuestion: ")[1].split("\n")[0]


class IdealPlanner:
    """An engine that answers planner prompts with the ideal next step, in a share `skill` of the turns. In the others
    it plans as clumsily as the backbone was taught to. It knows no tokens: texts take the place of ids."""

    def __init__(self, questions: list[Question], world: World, skill: float = 1.0):
        self.teachers = {q.question: Teacher(q, world, random.Random(0), skill) for q in questions}

    def encode(self, prompt: str) -> tuple[str]:
        return (prompt,)

    def generate_batch(self, requests: list[Request]) -> list[Completion]:
        return [self._plan(request.prompt_ids[0], request.seed) for request in requests]

    def _plan(self, prompt: str, seed: int) -> Completion:
        teacher = self.teachers[asked(prompt)]
        teacher.rng = random.Random(seed)
        why, missing = teacher.findings(prompt)
        lost = missing is None and teacher.skill < 1  # all is known, and the verifier still goes on
        if teacher.rng.random() >= teacher.skill or lost:
            text = teacher.clumsy_plan(prompt)
        else:
            text = render_plan(why, missing) if missing else "The plan is complete."
        return Completion([prompt], [text], [0.0], text, "stop", usage=(0, 0))
