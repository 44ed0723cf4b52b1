"""Memory, parsers (on what models really write), and solve(): scripted replies only where a test must force one."""

import asyncio

import pytest

import agent
from agent import AgentSystem, Memory, PlanError, Step, cut_middle, parse_answer, parse_plan, parse_verdict, solve
from llm import Completion
from sandbox import Sandbox
from tasks import load_corpus
from tools import TOOLS, ToolEnv, tool_metadata

PLAIN = "Justification: because\nContext: Zilath\nSub-Goal: Find the mayor\nTool Name: Search"


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        "**Justification:** because\n**Context:** Zilath\n**Sub-Goal:** Find the mayor\n**Tool Name:** Search",
        "1. Justification: because\n2. Context: Zilath\n3. Sub-Goal: Find the mayor\n4. Tool Name: Search",
        "1. **Justification**: so\n2. **Context**: Zilath\n3. **Sub-Goal**: Find the mayor\n4. **Tool Name**: `Search`",
        "```\n" + PLAIN + "\n```",
        "```text\n" + PLAIN + "\n```\nLet me know if you need anything else!",
        "Sure, here is the next step:\n\n" + PLAIN,
        PLAIN + "\n\nThis step will tell us who the mayor is.",
        PLAIN + " (it finds articles)",
        PLAIN + " Because it finds articles",
        PLAIN + ": it finds articles",
        "Tool Name: Python_Coder\n\nStep 2\n" + PLAIN.replace("Tool Name", "Tool"),  # in the memory's words
        "### Justification: because\n### Context: Zilath\n### Sub-Goal: Find the mayor\n### Tool Name: Search",
        "- Justification: because\n- Context: Zilath\n- Sub-Goal: Find the mayor\n- Tool Name: search",
        "JUSTIFICATION: because\nCONTEXT: Zilath\nSUB-GOAL: Find the mayor\nTOOL NAME: SEARCH",
        "Justification: because\nContext: Zilath\nSub Goal: Find the mayor\nTool: Search_Tool",
        "Justification: because\nContext: Zilath\nSubgoal: Find\nthe mayor\nTool_Name: Search.",
        "Tool Name: Python_Coder\nSub-Goal: wrong\n\nOn reflection:\n" + PLAIN,  # the last one counts
        "Justification: because\r\nContext: Zilath\r\nSub-Goal: Find the mayor\r\nTool Name: Search\r\n",
    ],
)
def test_parse_plan(text):
    plan = parse_plan(text)
    assert (plan.sub_goal, plan.tool) == ("Find the mayor", "Search")
    assert plan.context == "Zilath"


@pytest.mark.parametrize(
    "name", ["Python Coder", "python_coder", "**Python_Coder**", '"Python_Coder"', "Python_Coder_Tool"]
)
def test_parse_plan_tool_spellings(name):
    assert parse_plan(f"Sub-Goal: compute\nTool Name: {name}").tool == "Python_Coder"


def test_parse_plan_takes_the_longest_name_that_fits():
    tools = {"Search": None, "Search_News": None}
    assert parse_plan("Sub-Goal: look\nTool Name: Search News Now", tools).tool == "Search_News"
    assert parse_plan("Sub-Goal: look\nTool Name: Searching", tools).tool == "Searching"


def test_parse_plan_keeps_an_unknown_tool():
    assert parse_plan("Sub-Goal: compute\nTool Name: Calculator").tool == "Calculator"


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "Sub-Goal"),
        ("I think we should search.", "Sub-Goal"),
        ("Sub-Goal: Find the mayor", "Tool Name"),
        ("Sub-Goal:\nTool Name: Search", "Sub-Goal"),
        ("Sub-Goal: Find the mayor\nTool Name: ", "Tool Name"),
        ("Sub-Goal: Find the mayor\nTool Name: ???", "Tool Name"),
    ],
)
def test_parse_plan_says_what_is_missing(text, problem):
    with pytest.raises(PlanError, match=problem):
        parse_plan(text)


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("The results hold the answer.\nConclusion: STOP", "STOP"),
        ("**Conclusion:** STOP", "STOP"),
        ("Conclusion: **STOP**.", "STOP"),
        ("conclusion: stop", "STOP"),
        ("STOP", "STOP"),
        ("We should not stop yet.\nConclusion: CONTINUE", "CONTINUE"),
        ("Conclusion:\n**STOP**\nThe team may continue with the answer.", "STOP"),
        ("There is no reason to stop.", "CONTINUE"),  # no conclusion, perhaps cut at the limit
        ("We cannot stop yet.", "CONTINUE"),
        ("Conclusion: do not stop", "CONTINUE"),
        ("Conclusion: STOP cannot be said yet, CONTINUE", "CONTINUE"),
        ("Conclusion: STOP or CONTINUE", "CONTINUE"),
        ("Conclusion: CONTINUE\nWait.\nConclusion: STOP", "STOP"),
        ("Nonstop flights exist.", "CONTINUE"),
        ("", "CONTINUE"),
    ],
)
def test_parse_verdict(text, verdict):
    assert parse_verdict(text) == verdict


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<answer>Vroka</answer>", "Vroka"),
        ("The mayor is Vroka.\n<answer> Vroka </answer> Done.", "Vroka"),
        ("<answer>first</answer> no, <answer>second</answer>", "second"),
        ("<ANSWER>Vroka</ANSWER>", "Vroka"),
        ("<answer>Vroka", "Vroka"),
        ("Vroka", ""),
        ("<answer></answer>", ""),
        ("", ""),
    ],
)
def test_parse_answer(text, answer):
    assert parse_answer(text) == answer


def test_memory_only_grows():
    """Each prompt of a question is a prefix of the next: what a prefix cache lives from."""
    memory = Memory("q")
    renderings = [memory.render()]
    for n in range(3):
        memory.steps.append(Step(f"goal {n}", "Search", 'Search(query="x")', "r"))
        renderings.append(memory.render())
        memory.steps[-1].verdict = "CONTINUE"
        renderings.append(memory.render())
    assert renderings[0] == "" and all(b.startswith(a) and a != b for a, b in zip(renderings, renderings[1:]))
    assert "Step 3\nSub-Goal: goal 2\nTool: Search" in renderings[-1]


def test_long_results_are_cut_in_the_middle_with_a_mark():
    text = "a" * 500 + "b" * 500
    cut = cut_middle(text, 100)
    assert cut.startswith("a" * 50) and cut.endswith("b" * 50) and "[... 900 characters cut ...]" in cut
    assert cut_middle(text, 1000) == text
    assert cut_middle("abcdefgh", 5) == "abc [... 3 characters cut ...] gh"
    memory = Memory("q", steps=[Step("g", "Search", "c", text)], result_chars=100)
    assert "900 characters cut" in memory.render() and memory.steps[0].result == text
    rambling = Memory("q", steps=[Step("g", "Search", text, "Error: no call")], result_chars=100)
    assert "900 characters cut" in rambling.render()


class Script:
    """Replies by role, in order; keeps the prompts it saw."""

    def __init__(self, **replies):
        self.replies = {role: list(texts) for role, texts in replies.items()}
        self.prompts = []

    async def ask(self, role: str, prompt: str) -> str:
        self.prompts.append((role, prompt))
        return self.replies[role].pop(0)

    async def plan(self, prompt: str) -> Completion:
        return Completion([1, 2], [3, 4], [-0.5, -0.1], await self.ask("planner", prompt), "stop", (2, 2))


@pytest.fixture(scope="module")
def tools_env():
    return load_corpus(), Sandbox()


def run(script, question="Who is the mayor?", env=None, **options):
    return asyncio.run(solve(question, script.plan, ToolEnv(script.ask, *env, TOOLS), **options))


CONTINUE, STOP = "Conclusion: CONTINUE", "Conclusion: STOP"


def test_no_prompt_holds_what_a_frozen_module_has_thought(tools_env):
    class Thinker:
        def __init__(self):
            self.prompts = []

        def encode(self, prompt):
            return (prompt,)

        def generate_batch(self, requests):
            self.prompts += [request.prompt_ids[0] for request in requests]
            plan = PLAIN.replace("Search", "Base_Generator")
            said = {True: plan, False: '<think>Hm, hm.</think>Base_Generator(query="x")'}
            texts = [said["one step at a time" in request.prompt_ids[0]] for request in requests]
            return [Completion(["p"], ["c"], [0.0], text, "stop", (1, 1)) for text in texts]

    engine = Thinker()
    ((trajectory,),) = AgentSystem(engine, engine, *tools_env, max_turns=2).rollout(["Who?"], 1, (0,))
    assert trajectory.memory.steps[1].tool == "Base_Generator" and trajectory.memory.analysis.startswith("Base_")
    assert len(engine.prompts) > 8 and not any("Hm" in prompt for prompt in engine.prompts)


def test_solve_is_algorithm_1(tools_env):
    title, text = tools_env[0].search("Zilath")[0]
    script = Script(
        analyst=["look it up"],
        planner=[PLAIN, PLAIN.replace("Search", "Python_Coder")],
        executor=['Search(query="the mayor of Zilath")', "Python_Coder(query='6 times 7')"],
        coder=["```python\nprint(6 * 7)\n```"],
        verifier=[CONTINUE, STOP],
        generator=["<answer>42</answer>"],
    )
    trajectory = run(script, env=tools_env)
    assert [role for role, _ in script.prompts] == (
        ["analyst", "planner", "executor", "verifier", "planner", "executor", "coder", "verifier", "generator"]
    )
    assert trajectory.answer == "42" and len(trajectory.turns) == 2
    assert trajectory.turns[0].completion_ids == [3, 4] and trajectory.turns[0].logprobs == [-0.5, -0.1]
    first, second = trajectory.memory.steps
    assert first.result == f"{title}: {text}" and first.verdict == "CONTINUE" and not first.error
    assert second.result == "42" and second.command == 'Python_Coder(query="6 times 7")' and second.verdict == "STOP"
    for role, prompt in script.prompts:
        assert ("look it up" in prompt) == (role in ("planner", "verifier", "generator"))


def test_turn_budget_ends_the_loop(tools_env):
    script = Script(
        analyst=["a"],
        planner=[PLAIN] * 3,
        executor=['Search(query="x")'] * 3,
        verifier=[CONTINUE] * 3,
        generator=["<answer>?</answer>"],
    )
    assert len(run(script, env=tools_env, max_turns=3).turns) == 3


@pytest.mark.parametrize(
    "plan, command, error, said",
    [
        ("no labels at all", None, "format", "Sub-Goal"),
        (PLAIN.replace("Search", "Calculator"), None, "tool", "there is no tool Calculator"),
        (PLAIN, "I would search for it.", "command", "no tool call"),
        (PLAIN, "Search(query=open('/etc/passwd'))", "command", "literal"),
        (PLAIN, "__import__('os').system('true')", "command", "no tool call"),
        (PLAIN, 'Python_Coder(query="6 times 7")', "command", "write one call of Search"),
    ],
)
def test_mistakes_of_the_model_are_results(tools_env, plan, command, error, said):
    """They are written into the memory, the verifier sees them, and the turn is still a row to train on."""
    script = Script(
        analyst=["a"], planner=[plan], executor=[command], verifier=[CONTINUE], generator=["<answer>x</answer>"]
    )
    trajectory = run(script, env=tools_env, max_turns=1)
    step = trajectory.memory.steps[0]
    assert step.error == error and step.result.startswith("Error: ") and said in step.result
    assert len(trajectory.turns) == 1 and step.result in dict(script.prompts)["verifier"]


def test_a_failing_program_is_a_result(tools_env):
    script = Script(
        analyst=["a"], planner=[PLAIN.replace("Search", "Python_Coder")], executor=['Python_Coder(query="1/0")'],
        coder=["print(1 / 0)"], verifier=[CONTINUE], generator=["<answer>x</answer>"],
    )  # fmt: skip
    step = run(script, env=tools_env, max_turns=1).memory.steps[0]
    assert step.error == "run" and "ZeroDivisionError" in step.result


def test_a_fault_of_the_machine_is_not(tools_env):
    script = Script(analyst=["a"], planner=[PLAIN], executor=['Search(query="x")'])
    corpus = load_corpus()
    corpus.connection.close()
    with pytest.raises(Exception, match="closed database"):
        run(script, env=(corpus, tools_env[1]))


def test_memory_is_fresh_for_each_question(tools_env):
    """Question B after question A sees exactly the prompts that B alone sees."""

    def script():
        return Script(
            analyst=["a"],
            planner=[PLAIN],
            executor=['Search(query="Zilath")'],
            verifier=[STOP],
            generator=["<answer>x</answer>"],
        )

    alone, after = script(), script()
    run(alone, "question B", tools_env)
    run(script(), "question A", tools_env)
    run(after, "question B", tools_env)
    assert alone.prompts == after.prompts and not any("question A" in prompt for _, prompt in after.prompts)


def test_braces_in_texts_are_only_text(tools_env):
    script = Script(
        analyst=["{question}"], planner=[PLAIN.replace("Zilath", "{x}")], executor=['Search(query="{y}")'],
        verifier=[STOP],
        generator=["<answer>{z}</answer>"],
    )  # fmt: skip
    assert run(script, "What is {0}?", tools_env).answer == "{z}"


def test_what_is_shared_comes_first():
    """Instructions, tools, question, analysis, and the memory at the very end."""
    for prompt in (agent.PLANNER_PROMPT, agent.VERIFIER_PROMPT, agent.GENERATOR_PROMPT):
        assert prompt.endswith("{memory}") and prompt.index("{question}") < prompt.index("{analysis}")
    assert all(tool_metadata(tool) in agent.toolbox() for tool in TOOLS.values())
