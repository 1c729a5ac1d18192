"""``docs/fidelity.md`` against the code: every file, name and value that it gives is there, and no item is
left out.

Sources are parsed, nothing is imported.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "fidelity.md"
COLUMNS = ["item", "in the paper", "here", "where", "state"]
PAPERS = ("SAAT", "SAAH", "SFCL", "DRFGD", "DSARH")
STATE = re.compile(r"exact|(deviating|absent): \S.*")
PLACE = re.compile(
    r"(?P<file>[\w./-]+\.(?:py|yaml))(?::(?P<name>[\w.]+)(?:\((?P<option>\w+)\))?(?:=(?P<value>.+))?)?"
)


EQUATIONS: dict[str, set[int]] = {
    "SAAT": set(),  # named, not numbered
    "SAAH": set(range(5, 15)),
    "SFCL": {5, 6, 7, 11, 12},
    "DRFGD": {1, 2, 4, 5, 6, 11},
    "DSARH": {*range(5, 19), *range(22, 34)},
}
ITEMS: dict[str, set[str]] = {
    "SAAT": {
        *("Mainstay code", "Weights of the mainstay code", "Attack loss", "Targeted attack loss"),
        *("Iteration of the attack", "Start of the attack", "Slope of tanh", "Minimax objective"),
        *("L_adv", "L_qua", "L_ori", "lambda", "mu", "eps", "Attack in evaluation", "Attack in training"),
        *("Optimiser", "Bits", "Nets", "FLICKR-25K", "NUS-WIDE", "MS-COCO", "MAP", "t-MAP", "Target labels"),
        *(f"Table {number}" for number in ("II", "III", "IV", "V", "VI", "VII", "VIII")),
        *("Fig. 3", "Fig. 4", "Figure of lambda and mu"),
    },
    "SAAH": {
        *("rho, m_min, tau", "Block", "lambda_s, gamma", "T", "eps, step", "Optimiser", "Batch", "Start"),
        *("Gate's size", "Ablation gates", "Data sets", "MAP", "Table 1", "Table 5"),
        *("Table of transferred NAG", "Table of ablations", "Table of cost"),
        *("Figure of the spectral response", "Figure of retention and block", "Figure of convergence"),
    },
    "SFCL": {
        *(
            "Backbones",
            "Separation (SFRG)",
            "Masks at inference",
            "Fusion (RAFF)",
            "Hash layer",
            "Text encoder",
        ),
        *("I(s; f)", "Wrong labels l'", "L_quan", "Total loss", "Inner attack", "Warm-up"),
        *("lambda_c, lambda_a, lambda_s", "alpha", "Optimiser", "Data sets", "MAP", "Baselines"),
        *("Table 1", "Table of t-MAP", "Table 3", "Table of cost", "Table of other losses"),
        *("Figure of transfer between domains", "Figure of ablations", "Figure of hyper-parameters"),
    },
    "DRFGD": {
        *("Disentangler", "Generator", "Discriminator", "L_R", "L_Ali", "L_Rec", "L_Dis", "L_G"),
        *(
            "Attack on texts",
            "tau",
            "Attack in training",
            "lambda",
            "alpha, beta",
            "Optimiser",
            "Batch, epochs",
        ),
        *("Inference", "Targets", "Data sets", "MAP", "Attacks in evaluation", "Baselines", "Table 1"),
        *("Tables of MAP under attack", "Tables of t-MAP", "Table of ablations", "Figure of heat maps"),
    },
    "DSARH": {
        *("Algorithm 2", "Algorithm 3", "lambda", "alpha, beta", "eps, step", "Inner steps"),
        *("Optimiser, image-text", "Image net", "Text net", "Schedule, images", "c, gamma", "Data sets"),
        *(
            "MAP, nDCG, ACG",
            "Table I",
            "Table II",
            "Table of shallow methods",
            "Table IV",
            "Table V",
            "Table VI",
        ),
        *("Table of inner steps", "Fig. 6", "Figure of training data", "Figure of nDCG and ACG"),
    },
}


def numbers_of(item: str) -> set[int]:
    """Which equations a row is about: ``Eq. 8``, or ``Eq. 8-10, loss``."""
    match = re.match(r"Eq\. (\d+)(?:-(\d+))?", item)
    return set(range(int(match[1]), int(match[2] or match[1]) + 1)) if match else set()


def rows_of(page: str) -> dict[str, list[list[str]]]:
    """The cells of each paper's table."""
    found: dict[str, list[list[str]]] = {}
    for part in re.split(r"^## ", page, flags=re.M)[1:]:
        title, _, rest = part.partition("\n")
        lines = [line for line in rest.splitlines() if line.startswith("|")]
        found[title.strip()] = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return found


TABLES = rows_of(PAGE.read_text(encoding="utf-8"))
ROWS = [(paper, row) for paper in PAPERS for row in TABLES[paper][2:]]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def member(body: list[ast.stmt], name: str) -> ast.stmt | None:
    """What defines a name in a module or class."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign)
            else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node
    return None


def options(node: ast.stmt) -> dict[str, ast.expr | None]:
    """Parameters with their defaults, of a function, of a class's ``__init__`` or of a dataclass."""
    if isinstance(node, ast.ClassDef):
        made = member(node.body, "__init__")
        if made is None:
            fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
            return {part.target.id: part.value for part in fields if isinstance(part.target, ast.Name)}
        node = made
    assert isinstance(node, ast.FunctionDef)
    plain = [*node.args.posonlyargs, *node.args.args]
    defaults = [None] * (len(plain) - len(node.args.defaults)) + list(node.args.defaults)
    return dict(
        zip(
            [arg.arg for arg in (*plain, *node.args.kwonlyargs)],
            [*defaults, *node.args.kw_defaults],
            strict=True,
        )
    )


def fault(place: str) -> str:
    """What is wrong with a reference; "" where it holds."""
    match = PLACE.fullmatch(place)
    if match is None:
        return f"{place!r} is not path.py:Name, path.py:Name(option)=value or path.yaml:key=value"
    file, name, option, value = match.group("file", "name", "option", "value")
    path = ROOT / file if file.startswith(("recipes/", "benchmarks/")) else ROOT / "src" / "robusthash" / file
    if not path.is_file():
        return f"there is no file {path.relative_to(ROOT)}"
    if path.suffix == ".yaml":
        found: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        for key in (name or "").split("."):
            if name and (not isinstance(found, dict) or key not in found):
                return f"{file} has no {name}"
            found = found[key] if name else found
        return (
            ""
            if value is None or found == yaml.safe_load(value)
            else f"{file}: {name} is {found!r}, not {value}"
        )
    node: Any = parsed(path)
    for part in name.split(".") if name else ():
        node = member(node.body, part) if hasattr(node, "body") else None
        if node is None:
            return f"{file} defines no {name}"
    if option is None:
        return "" if value is None else differs(f"{file}:{name}", node.value, value)
    known = options(node)
    if option not in known:
        return f"{file}:{name} takes no {option}"
    return "" if value is None else differs(f"{file}:{name}({option})", known[option], value)


def differs(what: str, held: ast.expr | None, value: str) -> str:
    """ "" where the expression in the code is the one given, apart from quotes and spaces."""
    same = held is not None and ast.dump(held) == ast.dump(ast.parse(value, mode="eval").body)
    return "" if same else f"{what} is {ast.unparse(held) if held else 'without a default'}, not {value}"


@pytest.mark.parametrize("paper", PAPERS)
def test_every_item_of_a_paper_has_its_row(paper: str) -> None:
    header, _, *rows = TABLES[paper]
    assert header == COLUMNS
    named = [row[0] for row in rows]
    assert len(set(named)) == len(named)
    assert set(named) >= ITEMS[paper], f"missing: {sorted(ITEMS[paper] - set(named))}"
    assert set().union(*map(numbers_of, named)) == EQUATIONS[paper]


@pytest.mark.parametrize(
    ("paper", "row"), ROWS, ids=lambda value: value if isinstance(value, str) else value[0]
)
def test_a_row_has_a_known_state_and_names_what_exists(paper: str, row: list[str]) -> None:
    assert len(row) == len(COLUMNS), f"{paper}, {row[0]}: {len(row)} cells"
    _, printed, here, where, state = row
    assert STATE.fullmatch(state), f"state must be 'exact', 'deviating: why' or 'absent: why', got {state!r}"
    assert printed
    places = re.findall(r"`([^`]+)`", where)
    assert bool(places) == (not state.startswith("absent")), (
        f"{paper}, {row[0]}: {where!r} with state {state!r}"
    )
    assert here
    assert not (faults := [fault(place) for place in places if fault(place)]), f"{paper}, {row[0]}: {faults}"


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        ("attacks/guides.py:mainstay_code", ""),
        ("attacks/guides.py:Mainstay(weights)='code'", ""),
        ("defenses/outer_losses.py:SAATOuter(adversarial)=1.0", ""),
        ("defenses/adversarial_training.py:AdversarialTraining.step", ""),
        ("attacks/gone.py:mainstay_code", "no file"),
        ("attacks/guides.py:gone", "defines no gone"),
        ("defenses/adversarial_training.py:AdversarialTraining.gone", "defines no"),
        ("attacks/guides.py:Mainstay(gone)", "takes no gone"),
        ("defenses/outer_losses.py:SAATOuter(adversarial)=2.0", "is 1.0, not 2.0"),
        ("recipes/fashion-csq-saah-paper.yaml:training.epochs=100", ""),
        ("recipes/fashion-csq-saah-paper.yaml:training.epochs=99", "is 100, not 99"),
        ("recipes/fashion-csq-saah-paper.yaml:training.gone", "has no"),
        ("models/gates.py:HIDDEN_BLOCK=121", ""),
        ("models/gates.py:HIDDEN_BLOCK=122", "is 121, not 122"),
        ("models/hasher.py:build_hasher(bits)=3", "without a default"),
        ("benchmarks/defense_cost.py", ""),
        ("somewhere", "is not"),
    ],
)
def test_the_check_of_references_itself(place: str, wrong: str) -> None:
    assert fault(place) == "" if not wrong else wrong in fault(place)
