"""Questions and answers: the bundled world, a folder of JSONL files, or a benchmark file as its authors publish it.

A task is a list of `Example`s for each split and a corpus to search. To add one, add a function to `TASKS`. A folder
with train.jsonl, dev.jsonl and test.jsonl, a {"question": ..., "answer": ...} on each line, works with no code:

    python train.py --task my_folder --corpus my_corpus.db        # python tools.py index articles.jsonl my_corpus.db

One reader takes all shapes that benchmark files come in (`read_row`): `query` or `question`, one answer or several, a
list that was written as a string, options as a list, a dict or a text, and instructions for another harness at the end.

The paper's data are fetched and converted by name (`PREPARED` lists them), then found by that name:

    python tasks.py prepare bamboogle             # writes data/bamboogle/test.jsonl
    python eval.py --task bamboogle

Every source is pinned to a revision. Where its publisher's checksum is known it is here; otherwise that of the first
download is written to SHA256SUMS, beside the data, and later ones are checked against it. A download that was stopped
is continued. GAIA and GPQA are gated: accept their terms on their pages, and put a token of yours into HF_TOKEN.

The training mix is half NQ, half DeepMath-103K, as the paper says (its code takes all of both, 43 % to 57 %). Equal
questions are taken once; apart from that nothing is removed, as by the authors, so it is not known to be free of the
benchmarks' questions (DeepMath's publishers removed those of mathematics benchmarks from it).
"""

import argparse
import ast
import csv
import hashlib
import json
import os
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from tqdm import tqdm

from judge import RULES, game24_numbers, normalize
from llm import UserError, no_netrc
from tinyworld.world import World
from tools import Corpus

SPLITS = ("train", "dev", "test")
DATA = Path("data")  # prepared tasks, a folder each
# What the authors of AgentFlow append to their questions. Our generator has its own instructions.
INSTRUCTIONS = re.compile(
    r"\s*When ready, output the final answer enclosed in <answer> and </answer> tags\..*", re.DOTALL
)


@dataclass(frozen=True)
class Example:
    question: str  # with its choices, where it has some
    answer: str | list[str]  # several accepted answers are a list
    family: str = "all"  # a kind of question, for tables by family
    kind: str = "text"  # how answers are compared: a key of `judge.RULES`
    choices: tuple[str, ...] = ()


def tinyworld(split: str) -> list[Example]:
    return [Example(q.question, q.answer, q.family) for q in World(seed=0).questions(split)]


TASKS: dict[str, Callable[[str], list[Example]]] = {"tinyworld": tinyworld}


def load_examples(task: str, split: str) -> list[Example]:
    """The examples of a split. `task`: a name in `TASKS` or `PREPARED`, a folder with SPLIT.jsonl, or a file."""
    if task in TASKS:
        return TASKS[task](split)
    path = DATA / task if task in PREPARED else Path(task)
    splits = [name for name in SPLITS if (path / f"{name}.jsonl").is_file()]
    if task in PREPARED and not splits:
        raise UserError(f"{task} is not prepared: python tasks.py prepare {task}")
    if not path.exists():
        known = ", ".join([*TASKS, *PREPARED])
        raise UserError(f"no task {task}: use one of {known}, a folder of JSONL files, or a file")
    if path.is_dir() and split not in splits:
        raise UserError(f"{path / split}.jsonl is not there: {task} has {', '.join(splits) or 'no split'}")
    return read_file(path / f"{split}.jsonl" if path.is_dir() else path)


def read_file(path: Path) -> list[Example]:
    """The examples of a JSONL file, or of a JSON file that holds one list; `UserError` names file and row."""
    examples = []
    for place, row in read_rows(path):
        try:
            examples.append(read_row(row))
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
    if not examples:
        raise UserError(f"{path} holds no questions")
    return examples


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """("FILE:LINE", row) of a JSONL file; ("FILE, row N", row) of a JSON list, counted from 1."""
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8") from None
    if text.lstrip().startswith("[") and path.suffix == ".json":
        try:
            yield from ((f"{path}, row {n}", row) for n, row in enumerate(json.loads(text), start=1))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not JSON ({error.msg})") from None


def read_row(row: Any) -> Example:
    """One example from a row of any of the known shapes; `ValueError` says what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f'a row must be {{"question": ..., "answer": ...}}, not {type(row).__name__}')
    question, family = row.get("query", row.get("question")), row.get("family", "all")
    if not isinstance(question, str) or not (question := INSTRUCTIONS.sub("", question).strip()):
        raise ValueError("the question must be a text that is not empty")
    if not isinstance(family, str):
        raise ValueError("the family must be a text")
    choices, answers = read_choices(row), read_list(row.get("answer"))
    numeric = [isinstance(answer, int | float) and not isinstance(answer, bool) for answer in answers]
    answers = [str(answer) if number else answer for answer, number in zip(answers, numeric)]
    if not answers or not all(isinstance(answer, str) and normalize(answer) for answer in answers):
        raise ValueError("the answer must be a text or a number, or a list of such, none of them empty")
    is_game24 = isinstance(row.get("question"), list)
    guess = "choice" if choices else "game24" if is_game24 else "math" if all(numeric) else "text"
    kind = row.get("kind", guess)
    if kind not in RULES:
        raise ValueError(f"the kind must be one of {', '.join(RULES)}, not {kind!r}")
    if kind == "choice" and not choices:
        raise ValueError("a question of kind choice needs its options")
    if choices:
        answers = accepted_choice(answers, choices)
        lettered = list(zip(LETTERS, choices))
        if not all(re.search(rf"(?<!\w){letter}\W{{1,4}}{re.escape(choice)}", question) for letter, choice in lettered):
            question += "".join(f"\n{letter}) {choice}" for letter, choice in lettered)
    if kind == "game24" and is_game24:
        numbers = sorted(map(str, row["question"]))
        if not all(sorted(game24_numbers(answer)) == numbers for answer in answers):
            raise ValueError(f"an answer does not use the numbers {row['question']}")
    return Example(question, answers if len(answers) > 1 else answers[0], family, kind, choices)


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def read_list(value: Any) -> list:
    """A list as it is, a list of texts that was written as a string, or one value."""
    if isinstance(value, str) and re.fullmatch(r"\s*\[.*\]\s*", value, re.DOTALL):
        try:
            parts = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            parts = []  # a text that begins and ends with brackets
        if parts and all(isinstance(part, str) for part in parts):  # [0, 1] is an interval or a matrix
            value = parts
    return value if isinstance(value, list) else [value]


def read_choices(row: dict) -> tuple[str, ...]:
    """The options without their letters, from a list, a dict by letter, or a text with one on each line."""
    options = row.get("options", row.get("choices"))
    if options is None:
        return ()
    if isinstance(options, dict):
        options = [options[letter] for letter in sorted(options)]
    options = read_list(options)
    if len(options) == 1 and isinstance(options[0], str):
        options = [line for line in options[0].splitlines() if line.strip()]
    if not 2 <= len(options) <= len(LETTERS) or not all(isinstance(o, str) and o.strip() for o in options):
        raise ValueError(f"the options must be 2 to {len(LETTERS)} texts, none of them empty")
    marks = [rf"\s*\(?{letter}[).:]\s*" for letter in LETTERS]
    if all(re.match(mark, option) for mark, option in zip(marks, options)):
        options = [re.sub(f"^{mark}", "", option) for mark, option in zip(marks, options)]
    return tuple(option.strip() for option in options)


def accepted_choice(answers: list[str], choices: tuple[str, ...]) -> list[str]:
    """[letter, content] of the right choice, which the row names by either."""
    letters, named = LETTERS[: len(choices)], set()
    for answer in answers:
        letter = re.fullmatch(r"\(?([A-Z])[).:]?", answer.strip())
        if answer.strip() in choices:
            named.add(choices.index(answer.strip()))
        elif letter and letter[1] in letters:
            named.add(letters.index(letter[1]))
        else:
            raise ValueError(f"the answer {answer!r} is none of the options")
    if len(named) > 1:
        raise ValueError(f"the answers {answers} name different options: only one can be right")
    index = named.pop()
    return [letters[index], choices[index]]


def load_corpus(path: str = "") -> Corpus:
    """The corpus that Search looks into: a file made by `python tools.py index`, or the bundled world's articles."""
    if not path:
        return Corpus.from_articles(World(seed=0).articles.items())
    try:
        return Corpus.open(path)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from None


# --- python tasks.py prepare NAME -------------------------------------------------------------------------------------


HUB = "https://huggingface.co/datasets"
NQ = f"{HUB}/RUC-NLPIR/FlashRAG_datasets/resolve/87aab18c372ee7714a7288c7d660423c7ee96dde/nq"
GAIA = f"{HUB}/gaia-benchmark/GAIA/resolve/682dd723ee1e1697e00360edccf2366dc8418dd9"
DEEPMATH = f"{HUB}/trl-lib/DeepMath-103K/resolve/3a6c4e8d7dbf29647458c0c8365a07ad0650d827/data"
AUTHORS = "https://raw.githubusercontent.com/lupantech/AgentFlow/b94006436b8712ab8682846fb0d886a5f174f2d4/test"
PREPARED: dict[str, dict[str, str]] = {  # task -> {URL of a file: its published sha256, "" where that is not known}
    "mix": {
        f"{NQ}/train.jsonl": "572685d3f384d9c37479b1fb14232984c85ff13b58923c0c9442232bd5d5647b",
        # Question and answer of all 103,022 rows, 13 MB. zwhe99/DeepMath-103K has solutions too, 2.1 GB.
        f"{DEEPMATH}/train-00000-of-00001.parquet": "",
        f"{DEEPMATH}/test-00000-of-00001.parquet": "",
    },
    "gaia": {f"{GAIA}/2023/validation/metadata.parquet": ""},
    "gpqa": {f"{HUB}/Idavidrein/gpqa/resolve/633f5ee89ab8ad4522a9f850766b73f62147ffdd/gpqa_diamond.csv": ""},
} | {
    task: {f"{AUTHORS}/{task}/data/data.json": sha256}
    for task, sha256 in {
        "bamboogle": "647c37dda2f27341e3f28e5b2a9625f6abcff44639f26a08dcbe1667d831d5e2",
        "2wiki": "eb4b045ebf8e3441bb14a7420e5d84bafcaea58c776cfec75c3bb98ee1653122",
        "hotpotqa": "81f09495a18c6bc1cd1c48483babc6c59dfb9381e524850be53ffb62a9c28fd7",
        "musique": "195b9e75a45c58a5a0398c753a1d8fb7a8adf87b4bfde3f12d20ce22517e4759",
        "aime24": "9284356275e85963bc7508d41c42b73215faffc962abad02f248a650ca51feb2",
        "amc23": "",
        "gameof24": "ffb0c95018ba400931f2940a2dabae666f1ed6d0383beadd969f0447869a14ff",
        "medqa": "",
    }.items()
}
GATED = ("gaia", "gpqa")


def as_the_authors_ran_it(paths: list[Path]) -> dict[str, list[Example]]:
    """All of a short set (Bamboogle has 125 questions), the first 100 of a longer one."""
    examples = read_file(paths[0])
    return {"test": examples if len(examples) <= 127 else examples[:100]}


def gaia(paths: list[Path]) -> dict[str, list[Example]]:
    """The validation questions that come without a file: 127."""
    rows = read_parquet(paths[0], ["Question", "Final answer", "Level", "file_name"])
    rows = [(row["Question"], [row["Final answer"]], f"level {row['Level']}") for row in rows if not row["file_name"]]
    return {"test": [read_row(dict(question=q, answer=answer, family=level)) for q, answer, level in rows]}


def gpqa(paths: list[Path]) -> dict[str, list[Example]]:
    """The diamond set, 198 questions; the options of each in an order of its own."""
    examples = []
    with paths[0].open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file)):
            right = row["Correct Answer"].strip()
            options = [right, *(row[f"Incorrect Answer {n}"].strip() for n in (1, 2, 3))]
            random.Random(number).shuffle(options)
            family = row["High-level domain"]
            examples.append(read_row(dict(question=row["Question"], options=options, answer=right, family=family)))
    return {"test": examples}


def mix(paths: list[Path]) -> dict[str, list[Example]]:
    """As many questions of NQ as of DeepMath, shuffled; dev and test are held out of both, 500 questions each."""
    nq, *deepmath = paths
    searches = (
        dict(question=row["question"], answer=row["golden_answers"], family="search") for _, row in read_rows(nq)
    )
    problems = (
        # The solutions are in LaTeX between dollar signs; a list, since some look like one.
        dict(question=row["prompt"][0]["content"], answer=[row["solution"].strip("$")], family="math", kind="math")
        for path in deepmath
        for row in read_parquet(path, ["prompt", "solution"])
    )
    halves = [shuffled(usable("NQ", searches)), shuffled(usable("DeepMath", problems))]
    size = min(map(len, halves))
    held_out = min(250, size // 10)
    parts = {"dev": slice(held_out), "test": slice(held_out, 2 * held_out), "train": slice(2 * held_out, size)}
    return {split: shuffled([example for half in halves for example in half[part]]) for split, part in parts.items()}


def usable(name: str, rows: Iterable[dict]) -> list[Example]:
    """Equal questions once, and none without an answer to compare with; says how many rows that leaves out."""
    examples, rows = {}, list(rows)
    for row in tqdm(rows, desc=name, unit="row", leave=False):
        try:
            example = read_row(row)
        except ValueError:
            continue
        examples.setdefault(" ".join(example.question.casefold().split()), example)
    print(f"{name}: {len(examples)} questions; {len(rows) - len(examples)} rows repeat one or have no usable answer")
    return list(examples.values())


def shuffled(examples: list[Example]) -> list[Example]:
    return random.Random(0).sample(examples, len(examples))


def read_parquet(path: Path, columns: list[str]) -> list[dict]:
    import pyarrow.parquet  # here, as nothing else needs it

    return pyarrow.parquet.read_table(path, columns=columns).select(columns).to_pylist()


def prepare(name: str, to: Path = DATA, mirror: str = "") -> None:
    """Fetch the files of a task and write TO/NAME/SPLIT.jsonl. `mirror`: a server to ask instead of the publishers'."""
    if name not in PREPARED:
        raise UserError(f"no task {name} to prepare: use one of {', '.join(PREPARED)}")
    convert = {"mix": mix, "gaia": gaia, "gpqa": gpqa}.get(name, as_the_authors_ran_it)
    folder, downloads = to / name, to / name / "downloads"
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        paths = [fetch(url, sha256, downloads, name in GATED, mirror) for url, sha256 in PREPARED[name].items()]
        try:
            splits = convert(paths)
            if not all(splits.values()):
                raise ValueError("no questions")
        except (UserError, KeyError, TypeError, ValueError) as error:
            what = error if isinstance(error, UserError) else f"{downloads} is not {name} as expected, {error!r}"
            raise UserError(f"{what}; remove {downloads} to fetch it again") from error
        (downloads / "SHA256SUMS").write_text("".join(f"{checksum(path)}  {path.name}\n" for path in paths))
        for split, examples in splits.items():
            new = folder / f"{split}.jsonl.new"
            new.write_text("".join(json.dumps(plain_row(example)) + "\n" for example in examples))
            new.rename(folder / f"{split}.jsonl")
            print(f"{folder / split}.jsonl: {len(examples)} questions")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error}") from error


def plain_row(example: Example) -> dict:
    """The row that is read as this example."""
    row = asdict(example) | {"answer": [example.answer] if isinstance(example.answer, str) else example.answer}
    return row if example.choices else {name: value for name, value in row.items() if name != "choices"}


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch(url: str, sha256: str, folder: Path, gated: bool, mirror: str) -> Path:
    """The file at `url` in the folder: downloaded where it is not there yet, its checksum compared in any case."""
    path, sums = folder / Path(url).name, folder / "SHA256SUMS"
    arrived = path if path.exists() else path.with_name(path.name + ".part")
    if arrived != path:
        download(mirror.rstrip("/") + urlsplit(url).path if mirror else url, arrived, gated)
    lines = sums.read_text().splitlines() if sums.exists() else []
    recorded = {name: found for found, _, name in (line.partition("  ") for line in lines)}
    found, expected = checksum(arrived), sha256 or recorded.get(path.name)
    if expected and found != expected:
        arrived.unlink()
        raise UserError(
            f"{path} is damaged (sha256 {found}, not {expected}): removed, the same command fetches it again"
        )
    return arrived.rename(path)


def download(url: str, part: Path, gated: bool) -> None:
    """Fetch a file into `part`, from where an earlier try stopped."""
    done, token = part.stat().st_size if part.exists() else 0, os.environ.get("HF_TOKEN")
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    if gated and token:
        headers["Authorization"] = f"Bearer {token}"  # `requests` drops it when a redirect leads to another host
    try:
        with requests.get(url, headers=headers, auth=no_netrc, stream=True, timeout=30) as response:
            if response.status_code == 416 and done:  # nothing is left to send, or the partial file is not of this one
                part.unlink()
                return download(url, part, gated)
            if response.status_code in (401, 403) and gated:
                page = url.split("/resolve/")[0]
                what = "HF_TOKEN was refused" if token else "HF_TOKEN is not set"
                raise UserError(f"{page} is gated and {what}: accept its terms there, then set your token")
            if response.status_code not in (200, 206):
                raise UserError(f"{url}: the server says {response.status_code}")
            if not response.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
                done = 0  # it sends the whole file
            total = done + int(response.headers.get("Content-Length", 0)) or None
            bar = tqdm(desc=part.stem, initial=done, total=total, unit="B", unit_scale=True, leave=False)
            with bar, part.open("ab" if done else "wb") as file:
                for chunk in response.iter_content(1 << 16):
                    file.write(chunk)
                    bar.update(len(chunk))
    except requests.RequestException as error:
        raise UserError(f"{url}: stopped by {type(error).__name__}; the same command continues the download") from None


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch and convert the paper's data: " + ", ".join(PREPARED))
    parser.add_argument("command", choices=["prepare"])
    parser.add_argument("name", help="the task")
    parser.add_argument("--to", type=Path, default=DATA, help="folder for it (default: %(default)s)")
    parser.add_argument("--mirror", default="", help="URL of a server that has the same paths as the publishers'")
    arguments = parser.parse_args()
    try:
        prepare(arguments.name, arguments.to, arguments.mirror)
    except UserError as error:
        print(f"tasks.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
