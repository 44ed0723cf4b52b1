"""Replies as models of many families write them, and what each parser reads in them: a table for each module."""

import time

import pytest

from agent import Plan, PlanError, parse_answer, parse_plan, parse_verdict
from judge import rule_judge
from sandbox import extract_code
from tools import TOOLS, Command, CommandError, ToolEnv, find_objects, parse_command, reply

# --- thinking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, said",
    [
        ("<think>\nHm.\n</think>\n\nParis", "Paris"),  # Qwen3
        ("<think>\n\n</think>\n\nParis", "Paris"),  # Qwen3 with thinking switched off
        ("Okay, so the user\n</think>\n\nParis", "Paris"),  # DeepSeek-R1: the template wrote the opening tag
        ("<think>a</think> b <think>c</think> Paris", "Paris"),
        ("<thinking>Hm.</thinking>\nParis", "Paris"),  # GPT-4o, when it is asked to think aloud
        ("<think>\nOkay, the answer is Paris", ""),  # cut at the token limit
        ("Paris <think> or not", "Paris"),
        ("I think > 3 < 4", "I think > 3 < 4"),
    ],
)
def test_reply(text, said):
    assert reply(text).strip() == said


# --- planner ----------------------------------------------------------------------------------------------------------

LINES = "Justification: because\nContext: Zilath\nSub-Goal: Find the mayor\nTool Name: Search"
JSON = '{"justification": "because", "context": "Zilath", "sub_goal": "Find the mayor", "tool_name": "Search"}'
PRETTY = JSON.replace('{"', '{\n  "').replace(', "', ',\n  "').replace("}", "\n}")

PLANS = {
    "GPT-4o: JSON": JSON,
    "GPT-4o: fenced JSON": f"```json\n{PRETTY}\n```",
    "Gemma: JSON after a sentence": f"Okay, here's the step:\n\n```json\n{JSON}\n```\n\nLet me know if this helps!",
    "Qwen2.5: nested JSON": f'{{"plan": {JSON}}}',
    "Qwen2.5: a list of one step": f'{{"steps": [{JSON}]}}',
    "Phi: keys as the prompt writes them": JSON.replace("sub_goal", "Sub-Goal").replace("tool_name", "Tool Name"),
    "Llama: other keys": JSON.replace("sub_goal", "subgoal").replace("tool_name", "tool"),
    "Mistral: camel case": JSON.replace("sub_goal", "subGoal").replace("tool_name", "toolName"),
    "SmolLM2: Python dict": JSON.replace('"', "'"),
    "Llama: JSON with a comma too many": JSON.replace("}", ",}"),
    "Qwen2.5: a bare line break in a JSON string": JSON.replace("Find the", "Find\nthe"),
    "Qwen2.5: JSON with one quote too many": PRETTY.replace("because", 'they say "look" here'),
    "Llama: JSON cut at the limit": PRETTY.removesuffix("\n}"),
    "Gemma: labels and values in quotes": '"Context": "Zilath",\n"Sub-Goal": "Find the mayor",\n"Tool Name": "Search"',
    "Gemma: headings": "## Context\nZilath\n\n## Sub-Goal\nFind the mayor\n\n## Tool Name\nSearch",
    "GPT-4o: numbered headings": "### 1. Context\nZilath\n### 2. Sub-Goal:\nFind the mayor\n### 3. Tool Name\n`Search`",
    "Llama: bold headings": "**Context**\n\nZilath\n\n**Sub-Goal**\n\nFind the mayor\n\n**Tool Name**\n\nSearch",
    "SmolLM2: the value below its label": "Context:\nZilath\n\nSub-Goal:\nFind the mayor\n\nTool Name:\nSearch",
    "Llama: a colon outside the bold": "**Context** : Zilath\n**Sub-Goal** : Find the mayor\n**Tool Name** : Search",
    "SmolLM2: a full stop after the label": "Context: Zilath\nSub-Goal. Find the mayor\nTool Name. Search",
    "Phi: dashes": "Context: Zilath\nSub-Goal - Find the mayor\nTool Name – Search",
    "Qwen2.5: a wide colon": LINES.replace(":", "："),
    "gpt-oss: another hyphen": LINES.replace("Sub-Goal", "Sub\u2011Goal"),
    "SmolLM2: equals signs": "context = Zilath\nsub_goal = Find the mayor\ntool_name = Search",
    "GPT-4o: pictures": "📝 **Context:** Zilath\n🎯 **Sub-Goal:** Find the mayor\n🔧 **Tool Name:** Search",
    "Qwen2.5: tags": "<context>Zilath</context>\n<sub_goal>Find the mayor</sub_goal>\n<tool_name>Search</tool_name>",
    "Gemma: a table": "| Context | Zilath |\n|---|---|\n| Sub-Goal | Find the mayor |\n| Tool Name | Search |",
    "Qwen3: thinking first": f"<think>\nSub-Goal: compute\nTool Name: Python_Coder\n</think>\n\n{LINES}",
    "DeepSeek-R1: the end of thinking": f'Maybe {{"tool": "Python_Coder"}}?\n</think>\n{LINES}',
    "SmolLM2: all in one line": LINES.replace("\n", ", "),
    "GPT-4o: tags in one line": "<context>Zilath</context><sub_goal>Find the mayor</sub_goal><tool>Search</tool>",
    "Gemma: bullets below labels": "**Context:**\n- Zilath\n\n**Sub-Goal:**\n- Find the mayor\n\n**Tool:**\n- Search",
    "Qwen2.5: a sentence for a tool": LINES.replace("Name: Search", "Name: I will use the `Search` tool."),
    "GPT-4o: an object for a tool": JSON.replace('"Search"', '{"name": "Search"}'),
    "Llama: prose that begins with a label's word": f"{LINES}\n\nContext matters here.\nTool choice is easy.",
}


@pytest.mark.parametrize("text", PLANS.values(), ids=PLANS.keys())
def test_plans(text):
    plan = parse_plan(text)
    assert (plan.sub_goal, plan.tool) == ("Find the mayor", "Search")
    assert plan.context.split("\n")[0] == "Zilath"


def test_plans_that_hold_more_than_text():
    listed = '{"context": ["Zilath", 3], "sub_goal": "Find the \\"mayor\\"", "tool_name": "Search"}'
    assert parse_plan(listed) == Plan("['Zilath', 3]", 'Find the "mayor"', "Search")
    inside = 'Context: {"tool": "hammer"}\nSub-Goal: Find the "mayor"\nTool Name: {"tool": "Search"}'
    assert parse_plan(inside) == Plan('{"tool": "hammer"}', 'Find the "mayor"', "Search")


@pytest.mark.parametrize(
    "text, problem",
    [
        ('{"sub_goal": "Find the mayor"}', "no Tool Name"),
        ('{"tool_name": "Search", "arguments": {"query": "mayor"}}', "no Sub-Goal"),
        ('{"sub_goal": "Find the mayor", "tool_name": null}', "no Tool Name"),
        ('{"sub_goal": ', "no Sub-Goal"),
        ("### Sub-Goal\n### Tool Name\nSearch", "no Sub-Goal"),
        ("Context is what we need, and the tool is Search.\nTool choice is easy.", "no Sub-Goal"),
        (f"<think>\nI will write:\n{LINES}", "no Sub-Goal"),
        ("{" * 9000, "no Sub-Goal"),
        ('{"a":' * 3000, "no Sub-Goal"),
        ("{'a': '}" * 1000, "no Sub-Goal"),
        ("Context " * 1000, "no Sub-Goal"),
    ],
)
def test_no_plan(text, problem):
    start = time.process_time()
    with pytest.raises(PlanError, match=problem):
        parse_plan(text)
    assert time.process_time() - start < 1


# --- executor ---------------------------------------------------------------------------------------------------------

CALL = '{"name": "Search", "arguments": {"query": "mayor of Zilath"}}'


async def Scale(env: ToolEnv, number: float, by: int = 2, names: list[str] | None = None) -> str:
    """Scales."""
    return str(number * by)


GOOD = 'Search(query="mayor of Zilath")'

COMMANDS = {
    "Qwen3: tool-call tags": f"<tool_call>\n{CALL}\n</tool_call>",
    "Qwen2.5-Coder: bare": CALL,
    "Qwen2.5-Coder: fenced": f"```json\n{CALL}\n```",
    "Qwen2.5: braces doubled, as its template shows them": f"<tool_call>\n{{{CALL}}}\n</tool_call>",
    "Qwen2.5: the closing tag is missing": f"<tool_call>\n{CALL}",
    "Llama 3.1: parameters": CALL.replace("arguments", "parameters"),
    "Llama 3.1: python tag": f'<|python_tag|>{{"type": "function", {CALL[1:]}',
    "GPT-4o: a function with JSON in a string": (
        '{"id": "call_1", "type": "function", "function": {"name": "Search", '
        '"arguments": "{\\"query\\": \\"mayor of Zilath\\"}"}}'
    ),
    "GPT-4o: a list of calls": f'{{"tool_calls": [{CALL}]}}',
    "Llama 3.1: its function tag": f"<function=Search>{CALL[29:-1]}</function>",
    "DeepSeek: the arguments in a fence": f"Search\n```json\n{CALL[29:-1]}\n```",
    "ReAct: an action and its input": f"Action: Search\nAction Input: {CALL[29:-1]}",
    "Qwen3: an object in the brackets": f"[Calling tool: Search({CALL[29:-1]})]",
    "SmolLM2: arguments beside the name": '{"tool": "Search", "query": "mayor of Zilath"}',
    "LangChain: action and action_input": CALL.replace("name", "action").replace("arguments", "action_input"),
    "Phi-4: functools": f"functools[{CALL}]",
    "Hermes: Python dict, arguments first": "{'arguments': {'query': 'mayor of Zilath'}, 'name': 'Search'}",
    "Gemma: tool and args": CALL.replace("name", "tool").replace("arguments", "args"),
    "Llama: function and parameters": CALL.replace("name", "function").replace("arguments", "parameters"),
    "SmolLM2: a string for arguments": '{"name": "Search", "arguments": "mayor of Zilath"}',
    "Llama 3.2: a list of calls": f"[{GOOD}]",
    "Gemma 3: tool_code": f"```tool_code\nprint({GOOD})\n```",
    "GPT-4o: typographic quotes": "Search(query=“mayor of Zilath”)",
    "Gemma: single typographic quotes": "Search(query=‘mayor of Zilath’)",
    "Phi: JSON in typographic quotes": CALL.replace('"', "“"),
    "Qwen2.5-Coder: a name": '```python\nquery = "mayor of Zilath"\nSearch(query=query)\n```',
    "Qwen2.5-Coder: a name some lines earlier": 'city: str = "mayor of Zilath"  # who?\n\nx = 3\nresult = Search(city)',
    "Llama: a name of joined strings": 'q = "mayor of " + "Zilath"\nprint(Search(query=q))',
    "Llama: joined strings": 'Search(query="mayor" + " of " + "Zilath")',
    "Phi: a name joined with a string": 'town = "Zilath"\nSearch(query="mayor of " + town)',
    "SmolLM2: the argument under another name": 'Search(search_query="mayor of Zilath")',
    "Llama 3.1: the same in JSON": CALL.replace("query", "q"),
    "Qwen3: a bad call in the thinking": f'<think>\nSearch("bad") or {CALL.replace("mayor", "bad")}</think>\n{GOOD}',
    "Qwen3: long thinking": f"<think>{'hm ' * 9000}</think>{GOOD}",
}


@pytest.mark.parametrize("text", COMMANDS.values(), ids=COMMANDS.keys())
def test_commands(text):
    assert str(parse_command(text)) == GOOD


def test_commands_keep_what_is_in_their_strings():
    query = "“old” town’s {mayor}` + `Search"
    assert parse_command(f'Search(query="{query}")').kwargs == {"query": query}
    assert parse_command(f'{{"name": "Search", "arguments": {{"query": "{query} \\u00e9\\n"}}}}').kwargs == {
        "query": query + " é\n"
    }
    tools = TOOLS | {"Scale": Scale}
    scale = '{"name": "Scale", "arguments": {"number": 1.5, "by": 4, "names": null}}'
    assert parse_command(scale, tools) == Command("Scale", {"number": 1.5, "by": 4, "names": None})


@pytest.mark.parametrize(
    "text, message",
    [
        (
            CALL.replace("Search", "Google"),
            "no tool call found; write one call of Base_Generator, Python_Coder, Search",
        ),
        ('{"query": "mayor of Zilath"}', "no tool call found"),
        ('{"name": "Search", "arguments": {}}', "missing a required argument: 'query'"),
        ('{"name": "Search", "arguments": {"query": 3}}', "query must be str, not int"),
        ('{"name": "Search", "arguments": {"query": "x", "k": 3}}', "unexpected keyword argument 'k'"),
        ('{"name": "Search", "arguments": {"query": {"type": "string"}}}', "query must be str, not dict"),
        ('{"name": "Search", "arguments": {"query": "\\ud800"}}', "Search"),
        ('{"name": "Search", "arguments": {"the query": "x"}}', "not a valid call"),
        ('{"name": "Scale", "arguments": {"number": NaN}}', "literal"),
        ('{"name": "Scale", "arguments": {"by": 3}}', "missing a required argument: 'number'"),
        ('{"name": "Search", "arguments": {"query": "mayor', "no tool call found"),
        ("Search(query=query)", "literal"),
        ("query = input()\nSearch(query=query)", "literal"),
        ('query = "x"\nquery = input()\nSearch(query=query)', "literal"),
        ('Search(query=query)\nquery = "x"', "literal"),
        ("query = 3\nSearch(query=query)", "query must be str, not int"),
        ('Search(query="x" + 3)', "literal"),
        ('Search(query="x" * 3)', "literal"),
        ('Search(query="x" + open("/etc/passwd").read())', "literal"),
        ("Search(query=“x)", "not a valid call"),
        ("Scale(factor=3, by=2)", "unexpected keyword argument|missing a required argument"),
        (f"<think>\n{GOOD}\n</think>\nI am not sure.", "no tool call found"),
        (f"<think>\n{GOOD}", "no tool call found"),
        ('a = "' + "x" * 3000 + '"\nSearch(query=' + "a+" * 2000 + "a)", "Search"),
        ("Search(query={" * 500, "Search"),
        ("{'a': Search(')})" * 400, "Search"),
        ('{"name":' * 900, "no tool call"),
    ],
)
def test_no_command(text, message):
    start = time.process_time()
    with pytest.raises(CommandError, match=message) as error:
        parse_command(text, TOOLS | {"Scale": Scale})
    assert len(str(error.value)) < 300 and time.process_time() - start < 2


def test_objects():
    assert list(find_objects('a {"b": {"c": [1]}} {d} {{"e": null}} {\'f\': True,} {1, 2}')) == [
        {"b": {"c": [1]}},
        {"c": [1]},
        {"e": None},
        {"f": True},
    ]


# --- coder ------------------------------------------------------------------------------------------------------------

FENCE_IN_STRING = 'text = """\n```\nquoted\n```\n"""\nprint(text.count("`"))'
FENCE_IN_DOCSTRING = 'def f():\n    """Doubles.\n\n    ```python\n    f(2)\n    ```\n    """\n\n\nprint(2)'

PROGRAMS = [
    ("Thought:\n```\nI add 2 and 3.\n```\nCode:\n```\nprint(2 + 3)\n```", "print(2 + 3)"),  # smolagents
    ("```\nx = 1\n```\n**Code:**\n\n```\nprint(2 + 3)\n```<end_code>", "print(2 + 3)"),
    ("```python\nprint(2 + 3)\n```\nThe output of this code:\n```\n5\n```", "print(2 + 3)"),
    ("```\nprint(2 + 3)\n```\nThis is the output of the code:\n```\n5\n```", "print(2 + 3)"),
    ("Thought: I add.\n<code>\nprint(2 + 3)\n</code>", "print(2 + 3)"),
    ("Thought: I add.\nCode:\nprint(2 + 3)", "print(2 + 3)"),
    ("Here is the program:\n\nprint(2 + 3)", "print(2 + 3)"),
    ("```python print(2 + 3)```", "print(2 + 3)"),
    ("<code>print(2 + 3)</code>", "print(2 + 3)"),
    ("```python\nprint(2 + 3)\n</code>", "print(2 + 3)"),  # Gemini and others mix the two
    ("<code>\n```python\nprint(2 + 3)\n```\n</code>", "print(2 + 3)"),
    ("```python\nprint('<code>x</code>')\n```", "print('<code>x</code>')"),
    ("print('<code>x</code>')\nprint('~~~')", "print('<code>x</code>')\nprint('~~~')"),
    (f"```python\n{FENCE_IN_STRING}\n```", FENCE_IN_STRING),  # Qwen2.5-Coder
    (f"```\n{FENCE_IN_STRING}\n```\nOutput:\n```\n6\n```", FENCE_IN_STRING),
    (f"```python\n{FENCE_IN_DOCSTRING}\n```\nIt prints 2.", FENCE_IN_DOCSTRING),
    (f"```python\n{FENCE_IN_STRING}", FENCE_IN_STRING),
    ("<think>\n```python\nprint(1)\n```\n</think>\n```python\nprint(2 + 3)\n```", "print(2 + 3)"),
    ("<think>\n```python\nprint(1)\n```\n", ""),
    ("```python\nprint(2 +\n```\nOutput:\n```\n5\n```", "print(2 +"),  # its error is the result
    ("~~~python\nprint(2 + 3)\n~~~", "print(2 + 3)"),
]


@pytest.mark.parametrize("text, program", PROGRAMS)
def test_programs(text, program):
    assert extract_code(text) == program


@pytest.mark.parametrize("text", ["```\n" * 2000, "```python\n" + "(" * 9000, "<code>" * 2000, "```py\n" + "-" * 9000])
def test_a_flood_is_read_at_once(text):
    start = time.process_time()
    extract_code(text)
    assert time.process_time() - start < 1


# --- verifier ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Conclusion: I recommend to STOP.",
        "Conclusion: We can STOP here.",
        "**Conclusion:** The team should stop, because nothing is missing.",
        "### Conclusion\nSTOP",
        "Conclusion: STOP. No further steps are needed.",
        "Conclusion: STOP, the mayor is known, and more steps would not help.",
        "Conclusion: It is safe to STOP now.",
        "Conclusion: STOP because no further steps are needed.",
        "Conclusion: All the information is available, so we can STOP.",
        "Conclusion: The results are sufficient. STOP",
        "Conclusion: We have enough information to STOP.",
        "Conclusion: \\boxed{STOP}",
        "<conclusion>STOP</conclusion>",
        "Explanation: The mayor is known.\n**Stop Signal: True**",  # AgentFlow's own prompt
        "Stop Signal: **True**",
        '{"analysis": "The mayor is known.", "stop_signal": true}',
        '```json\n{\n  "stop_signal": true,\n  "reason": "It would not help to go on."\n}\n```',
        '{"should_stop": true}',
        '{"stop": True}',
        '{"explanation": "known", "conclusion": "STOP"}',
        "The mayor is known.\nVerdict: STOP",  # as the memory writes it
        "The results hold the answer.\n\n**STOP**",
        "<think>Conclusion: CONTINUE?</think>\nConclusion: STOP",
    ],
)
def test_stop(text):
    assert parse_verdict(text) == "STOP"


@pytest.mark.parametrize(
    "text",
    [
        "Conclusion: STOP would be premature.",
        "Conclusion: It is too early to STOP.",
        "Conclusion: I do not recommend to STOP.",
        "Conclusion: We can't STOP yet.",
        "Conclusion: The team is not ready to STOP.",
        "Conclusion: Do NOT stop.",
        "Conclusion: STOP is not possible yet.",
        "Conclusion: STOP only if the mayor is known.",
        "Conclusion: STOP? No, the mayor is missing.",
        "Conclusion: Should we STOP or CONTINUE?",
        "Conclusion: I recommend to CONTINUE and not to STOP.",
        "Conclusion: If the mayor is known, STOP.",
        "Conclusion: We do not have enough information to STOP.",
        "Conclusion: The year is missing, so STOP makes no sense.",
        "Conclusion: Find the year, and then STOP.",
        "Conclusion: STOP, once the year is known.",
        "Conclusion: Stopping now is a mistake.",
        "Conclusion: STOP requires the year.",
        "Stop Signal: False",
        "**Stop Signal: False**",
        "Stop signal: unclear",
        '{"stop_signal": false, "reason": "STOP would be wrong"}',
        '{"stop": false}',
        '{"stop_signal": null}',
        '{"continue": true}',
        "Conclusion: STOP\nOn reflection, the year is missing.\n\nCONTINUE",
        "<think>Conclusion: STOP</think>\nThe year is missing.",
        "<think>\nThe mayor is known.\nConclusion: STOP",
    ],
)
def test_go_on(text):
    assert parse_verdict(text) == "CONTINUE"


# --- generator --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, answer",
    [
        ("The capital is \\boxed{Paris}.", "Paris"),  # Qwen2.5-Math
        ("$\\boxed{\\text{Paris}}$", "\\text{Paris}"),
        ("First \\boxed{Lyon}, no: \\(\\boxed{Paris}\\)", "Paris"),
        ("\\[ \\boxed{\\frac{\\sqrt{x^{2}}}{3}} \\]", "\\frac{\\sqrt{x^{2}}}{3}"),
        ("**Final Answer**\n\n\\[\n\\boxed{Paris}\n\\]", "Paris"),  # DeepSeek-R1
        ("Paris is its capital.\n\nFinal Answer: Paris", "Paris"),
        ("Known.\n**Answer:** Paris", "Paris"),
        ("Known.\n**Final Answer: Paris**", "Paris"),
        ("Known.\n\n### Final Answer\n\nParis", "Paris"),  # Gemma
        ("Known.\n**Answer:** **Paris**\n", "**Paris**"),
        ("The final answer is: Paris", "Paris"),
        ("Known.\n**Final Answer:**\n> Paris", "Paris"),
        ('{"answer": "Paris"}', ""),
        ("Answer: -5", "-5"),
        ("<answer>Paris</answer>\nFinal Answer: Lyon \\boxed{Lyon}", "Paris"),
        ("Final Answer: <answer>Paris</answer>", "Paris"),
        ("<answer></answer>\nFinal Answer: Paris", ""),
        ("<think>\\boxed{Lyon} <answer>Lyon</answer></think>\n<answer>Paris</answer>", "Paris"),
        ("<think>So <answer>Paris</answer>, \\boxed{Paris}.</think>\nIt is known.", ""),
        ("<think>Final Answer: Paris", ""),
        ("The capital is Paris.", ""),
        ("The answer is Paris", ""),
        ("**Paris**", ""),
        ("Final Answer: Paris\n\nOr is it Lyon? I cannot say.", ""),
        ("\\boxed{Paris", ""),
        ("Answer:", ""),
    ],
)
def test_answers(text, answer):
    assert parse_answer(text) == answer


@pytest.mark.parametrize("text", ["<answer>**Paris**</answer>", "<answer>\\boxed{Paris}</answer>", "Answer: *Paris*."])
def test_the_judge_unwraps_what_the_parser_leaves(text):
    assert rule_judge("What is the capital of France?", "Paris", parse_answer(text)) == 1.0


@pytest.mark.parametrize(
    "text", ["Final Answer: Paris or Lyon", "\\boxed{Paris, France}", "Answer: it is Paris, I think"]
)
def test_the_judge_compares_the_whole_answer_in_every_form(text):
    assert rule_judge("What is the capital of France?", "Paris", parse_answer(text)) == 0.0


@pytest.mark.parametrize("text", ["\\boxed{", "{", "Answer: ", "answer:\n", "**", "<answer>", "conclusion ", "\nSTOP "])
def test_what_repeats_is_read_at_once(text):
    start = time.process_time()
    parse_answer((text * 6000)[:6000])
    parse_verdict((text * 6000)[:6000])
    assert time.process_time() - start < 1
