"""A fictional encyclopedia and questions about it: the bundled task.

`World(seed)` is pure: the same seed gives the same 300 articles and the same questions on every machine. Which entity
bears which name changes with the seed, so a model that was trained in other worlds knows the language of this one and
none of its facts: what is left to learn is how to look things up.

    world = World(seed=0)
    world.articles["Zilath"]    # 'Zilath is a person: the birthplace of Zilath is Pruzek, the birth year of ...'
    world.questions("train")    # 4,000 `Question`s; "dev" 200, "test" 500, disjoint as questions

Six families need different plans: lookup (one search), two-hop, three-hop, difference and earlier (two searches, then
Python), arithmetic (Python alone). Four harder ones need up to five good turns: four-hop, five-hop, distractor (three
searches, with a name in the question that leads astray), and joined (two chains of two searches, then Python).
"""

import random
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

# fmt: off
NAMES = """
Stestor Pisor Vibel Mudia Rolmyn Fulim Grikel Kegos Dirov Kronda Tasor Theva Titar Suros Lolmar Driren Derov
Hulis Tosel Mekel Gurno Pradyn Griga Drolath Drokyn Junor Hisos Rulmen Kralmur Nistim Munos Fistel Dezur Milma
Dunar Hulmel Rimyn Higath Griren Prekel Trinen Rendim Thornis Prirnos Dumos Gilmath Nasor Stisun Bralor Thistek
Bamar Setar Rarnos Brotar Juzar Vrekel Sarkov Lolur Mogim Truria Brirnos Trulmov Zabov Koben Thuvar Brenath
Girnel Hakyn Gomis Prera Desten Druzor Bustyn Dosyn Vrirkov Drarnor Dogos Gristor Brendar Lavun Thelmyn Jirov
Stasor Tharun Dosto Stimun Ponel Vibek Tostur Hindor Vruryn Purkel Hodek Gerkor Vrarim Petyn Grornim Zurnia
Fitun Fesen Zilath Trizen Nirek Ligis Halmov Birkia Pandos Sornath Dozyn Drelim Fusek Zundos Falmar Misim Kigel
Genor Trulmar Brazim Javia Rolis Galov Trivek Mundar Gedur Thezar Zondis Grirnov Drastar Drudos Belmo Nesur
Burnar Monur Dondun Nundur Brumun Bazyn Rirnun Momov Sedor Truto Grovar Marna Prorar Jarnov Girnia Pulmen Demath
Sonur Nornel Gevur Vrenim Ristath Grirkis Nidim Jetun Punda Pimis Staba Histen Ralur Heren Botia Prolel Trazor
Jenath Grastis Vrozia Zirnyn Bobur Lalek Dilmia Duzor Drokia Vrikyn Falen Buven Geken Trizos Vroka Lilmel Ramun
Bogun Venos Rorkyn Brizur Devun Mimath Zarun Nustar Kozath Nonyn Dondor Brendo Relma Vrulia Troror Krogar Krebo
Kalos Dandov Jukor Gemek Jubos Ninia Thondur Mernov Bragur Kosun Loror Vusor Grubar Morna Renen Borov Vritov
Brornos Sondar Trimia Bosen Jestun Girel Nibar Jatis Turkar Ginath Rulun Melmur Brerar Kigek Trilia Bruvia Duzel
Kulmur Farnov Direl Stisar Brulmen Metar Stizek Kosel Disor Fostel Vrugar Negen Drovis Stovov Tidath Todun Tekur
Zegur Jilek Jibun Brono Triko Munel Kriror Nazor Jernun Trisath Telath Krimur Lastun Thubia Krevia Zikel Mornim
Thityn Branim Sturnos Vimia Sukath Pruzek Dinos Koven Brirkar Bolmyn Brabim Kunen Garkia Darar Tesim Vrudun
Linyn Pedek Jindim Prarnim Sedov Stuvia Vradia Febia Begos Rodath Figur Praven Helmun Prakel Tratur Zokia Pomor
Trutim Saben Pramov Piden Trukov Varkath Mumos Horath Drandek Nerna Denur Trugek Gramek Prarek Gilmor Jinia
Zirek Digel Zunis Tenek Firnath Rirar Mityn Goben Tulov Kritos Nistur Vroza Groto Druzun Stendim Disel Tenar
Herim Zitur Vrastel Dakath Godek Berur Trandis Bivun Stiden Thubar Kristar Resek Druno Konyn Selmis Velov Brubis
Lulis Jozar Fakath Kustyn Trandos Detel Thuno Thikar Pondun Pizis Kilmis Jornor Trandek Hamath Kulur Jegos Vivar
Bamor Pokim Gelar Triten Nabyn Hernen Troren Lirko Tukun Horia Grogis Krurkun Pemun Drilmov Tornov Rorkur Zestor
Jilmov Pelar Mornel Thurkek Trernun Krulmia
""".split()
# fmt: on

KINDS = {"country": 20, "city": 90, "person": 110, "company": 80}  # entities of each kind, 300 articles in all

# An article is one template; each {relation} in it is a fact. A value is another entity or a number. Articles name
# their relations as questions do ("the mayor of X"), so that a tiny model can look a value up without knowing synonyms.
ARTICLES = {
    "country": "{name} is a country: the capital of {name} is {capital}, the president of {name} is {president}, "
    "the area of {name} is {area}.",
    "city": "{name} is a city: the country of {name} is {country}, the mayor of {name} is {mayor}, "
    "the founding year of {name} is {founding year}, the population of {name} is {population}.",
    "person": "{name} is a person: the birthplace of {name} is {birthplace}, the birth year of {name} is {birth year}, "
    "the employer of {name} is {employer}.",
    "company": "{name} is a company: the headquarters of {name} is {headquarters}, the founder of {name} is {founder}, "
    "the founding year of {name} is {founding year}, "
    "the number of employees of {name} is {number of employees}.",
}
ENTITY_RELATIONS = {  # relation: (kind of its subject, kind of its value)
    "capital": ("country", "city"),
    "president": ("country", "person"),
    "country": ("city", "country"),
    "mayor": ("city", "person"),
    "birthplace": ("person", "city"),
    "employer": ("person", "company"),
    "headquarters": ("company", "city"),
    "founder": ("company", "person"),
}
NUMBER_RELATIONS = {  # relation: (kinds of its subject, smallest value, largest value)
    "area": (("country",), 100, 9999),
    "population": (("city",), 1000, 9999),
    "founding year": (("city", "company"), 1100, 1999),
    "birth year": (("person",), 1900, 1999),
    "number of employees": (("company",), 100, 9999),
}
EARLIER = {  # how such a question begins; then it names each fact in full, as all others do
    "founding year": "Which was founded earlier, going by ",
    "birth year": "Who was born earlier, going by ",
}
OPERATIONS = {
    "+": "Add the numbers",
    "-": "Subtract the numbers",
    "*": "Multiply the numbers",
    "<": "Compare the numbers",
}

FAMILIES = ("lookup", "two-hop", "three-hop", "difference", "earlier", "arithmetic")
HARD_FAMILIES, HARD_TURNS = ("four-hop", "five-hop", "distractor", "joined"), 7  # and their turn budget
HOPS = {"lookup": 1, "two-hop": 2, "three-hop": 3, "four-hop": 4, "five-hop": 5, "distractor": 3}  # length of a chain
SPLITS = {"train": 4000, "dev": 200, "test": 500}


class Fact(NamedTuple):
    subject: str
    relation: str
    value: str


class Step(NamedTuple):
    """What an ideal planner writes in one turn."""

    context: str
    sub_goal: str
    tool: str


@dataclass(frozen=True)
class Question:
    """`facts` prove the answer; they are for tests and analysis and never reach a prompt."""

    question: str
    answer: str
    family: str
    facts: tuple[Fact, ...] = ()


def find(relation: str, subject: str) -> Step:
    return Step(context=subject, sub_goal=f"Find the {relation}", tool="Search")


def compute(left: str, right: str, operation: str) -> Step:
    return Step(context=f"{left}, {right}", sub_goal=OPERATIONS[operation], tool="Python_Coder")


def ideal_plan(question: Question) -> list[Step]:
    """The shortest plan that puts everything the answer needs into the memory: one step a turn."""
    steps = [find(fact.relation, fact.subject) for fact in question.facts]
    if question.family in ("difference", "earlier", "joined"):
        ends = question.facts[len(question.facts) // 2 - 1], question.facts[-1]  # the last facts of two chains
        steps.append(compute(ends[0].value, ends[1].value, "<" if question.family == "earlier" else "-"))
    if question.family == "arithmetic":
        left, operation, right = question.question.removeprefix("What is ").removesuffix("?").split()
        steps.append(compute(left, right, operation))
    return steps


class World:
    """300 articles and the facts in them. `avoid` names facts that must not occur here (see lab/teacher.py)."""

    def __init__(self, seed: int = 0, avoid: frozenset[Fact] = frozenset()):
        self.seed = seed
        rng = random.Random(f"world {seed}")
        names = iter(rng.sample(NAMES, sum(KINDS.values())))
        self.entities = {kind: [next(names) for _ in range(count)] for kind, count in KINDS.items()}
        self.facts: dict[str, dict[str, Fact]] = {}  # subject -> relation -> fact

        capitals = dict(zip(self.entities["country"], self._capitals(rng, avoid)))
        home = {city: country for country, city in capitals.items()}  # a capital lies in its own country

        def draw(subject: str, relation: str) -> Fact:
            if relation == "capital":
                return Fact(subject, relation, capitals[subject])
            if relation == "country" and subject in home:
                return Fact(subject, relation, home[subject])
            while True:
                if relation in ENTITY_RELATIONS:
                    value = rng.choice(self.entities[ENTITY_RELATIONS[relation][1]])
                else:
                    value = str(rng.randint(*NUMBER_RELATIONS[relation][1:]))
                if (fact := Fact(subject, relation, value)) not in avoid:
                    return fact

        for kind, entities in self.entities.items():
            for subject in entities:
                self.facts[subject] = {relation: draw(subject, relation) for relation in relations_of(kind)}
        self.articles = {
            subject: ARTICLES[kind].format(name=subject, **{f.relation: f.value for f in self.facts[subject].values()})
            for kind, entities in self.entities.items()
            for subject in entities
        }

    def _capitals(self, rng: random.Random, avoid: frozenset[Fact]) -> list[str]:
        """A city for each country, in order; drawn again while a fact about one of them is to be avoided."""
        while True:
            cities = rng.sample(self.entities["city"], KINDS["country"])
            pairs = list(zip(self.entities["country"], cities))
            if not avoid & {f for a, b in pairs for f in (Fact(a, "capital", b), Fact(b, "country", a))}:
                return cities

    def all_facts(self) -> frozenset[Fact]:
        return frozenset(fact for facts in self.facts.values() for fact in facts.values())

    def sample_question(self, family: str, rng: random.Random) -> Question:
        """One question of a family, drawn from this world."""
        if family == "arithmetic":
            left, operation, right = rng.randint(11, 999), rng.choice("+-*"), rng.randint(11, 99)
            value = {"+": left + right, "-": left - right, "*": left * right}[operation]
            return Question(f"What is {left} {operation} {right}?", str(value), family)
        if family in ("difference", "earlier"):
            relation = rng.choice(list(EARLIER if family == "earlier" else NUMBER_RELATIONS))
            one, two = rng.sample([f[relation] for f in self.facts.values() if relation in f], 2)
            if one.value == two.value:
                return self.sample_question(family, rng)
            if family == "difference":
                one, two = sorted((one, two), key=lambda fact: -int(fact.value))
                start, answer = "What is the difference between ", str(int(one.value) - int(two.value))
            else:
                start, answer = EARLIER[relation], min(one, two, key=lambda fact: int(fact.value)).subject
            text = f"{start}the {relation} of {one.subject} and the {relation} of {two.subject}?"
            return Question(text, answer, family, (one, two))
        if family == "joined":
            return self._joined(rng)
        facts = self._chain(HOPS[family], rng)
        is_person = ENTITY_RELATIONS.get(facts[-1].relation, ("", ""))[1] == "person"
        text = f"{'Who' if is_person else 'What'} is {path_of(facts)}"
        if family == "distractor":
            others = [e for e in self.same_kind(facts[0].subject) if self.follow(e, facts) != facts[-1].value]
            text += f" rather than of {rng.choice(others)}"
        return Question(f"{text}?", facts[-1].value, family, facts)

    def _chain(self, hops: int, rng: random.Random) -> tuple[Fact, ...]:
        """Follow `hops` facts from a random entity. A chain that meets an entity twice has a shortcut, and a long one
        that has a relation twice is hard to read: draw again."""
        while True:
            subject = rng.choice(list(self.facts))
            facts, seen = [], {subject}
            while len(facts) < hops and subject in self.facts:
                facts.append(rng.choice(list(self.facts[subject].values())))
                subject = facts[-1].value
                seen.add(subject)
            if len(facts) == hops and len(seen) == hops + 1:
                if hops < 4 or len({fact.relation for fact in facts}) == hops:
                    return tuple(facts)

    def _joined(self, rng: random.Random) -> Question:
        """The difference between two entities' values of one relation. The question names neither: each is one search
        away from a name in it."""
        while True:
            one, two = self._chain(2, rng), self._chain(2, rng)
            same = one[-1].relation == two[-1].relation and one[-1].relation in NUMBER_RELATIONS
            names = {fact.subject for fact in one + two}
            if same and len(names) == 4 and one[-1].value != two[-1].value:
                one, two = sorted((one, two), key=lambda chain: -int(chain[-1].value))
                answer = str(int(one[-1].value) - int(two[-1].value))
                text = f"What is the difference between {path_of(one)} and {path_of(two)}?"
                return Question(text, answer, "joined", one + two)

    def same_kind(self, entity: str) -> list[str]:
        """The other entities of its kind."""
        return [other for kind in self.entities.values() if entity in kind for other in kind if other != entity]

    def follow(self, entity: str, facts: tuple[Fact, ...]) -> str:
        """Where the relations of a chain lead from another entity of the same kind."""
        for fact in facts:
            entity = self.facts[entity][fact.relation].value
        return entity

    def questions(self, split: str, families: tuple[str, ...] = FAMILIES) -> list[Question]:
        """The fixed questions of a split, families in equal shares (the first ones get the remainder). Fewer families
        than six get no larger shares: a world has only about a thousand questions of the family lookup."""
        return list(_splits(self, families)[split])


def path_of(facts: tuple[Fact, ...]) -> str:
    """A chain of facts as a question names its end: the population of the country of Zilath."""
    return " of ".join([*(f"the {fact.relation}" for fact in reversed(facts)), facts[0].subject])


def relations_of(kind: str) -> list[str]:
    """The relations an article of this kind states."""
    return [r for r, (subject, _) in ENTITY_RELATIONS.items() if subject == kind] + [
        r for r, (subjects, _, _) in NUMBER_RELATIONS.items() if kind in subjects
    ]


@cache
def _splits(world: World, families: tuple[str, ...]) -> dict[str, list[Question]]:
    """Draw distinct questions of each family, deal them out to the splits, and shuffle each split."""
    rng = random.Random(f"questions {world.seed}")
    splits: dict[str, list[Question]] = {split: [] for split in SPLITS}
    parts = max(len(families), len(FAMILIES))
    for index, family in enumerate(families):
        shares = {s: size // parts + (index < size % parts) for s, size in SPLITS.items()}
        pool: dict[str, Question] = {}
        while len(pool) < sum(shares.values()):
            question = world.sample_question(family, rng)
            pool.setdefault(question.question, question)
        drawn = iter(pool.values())
        for split, share in shares.items():
            splits[split] += [next(drawn) for _ in range(share)]
    for questions in splits.values():
        rng.shuffle(questions)
    return splits
