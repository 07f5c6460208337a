"""The shape of the code, measured: sizes, names, docstrings, and what an import drags in.

Import directions are import-linter's business (`.importlinter`); here is what it cannot see. Runs
without torch and MPI. An exception to a budget is listed below by name, with its reason.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "mpipipe").rglob("*.py"))
UNIT_TESTS = sorted((ROOT / "tests" / "unit").rglob("*.py"))

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 40  # signature and body, docstring not counted
MAX_CONSTRUCTOR_LINES = 25  # body only
MAX_NESTING = 4  # scopes (`async with`) count too
MAX_PARAMETERS = 8  # without self and cls

# "path" or "path:Class.function" → why it may be larger.
FILE_LINES_EXCEPTIONS: dict[str, str] = {}
FUNCTION_LINES_EXCEPTIONS: dict[str, str] = {
    "mpipipe/cli/main.py:_bench_experiment": "one line per option of the command line, twice",
    "mpipipe/cli/simulate.py:simulate": "one line per option of the command line, twice",
    "mpipipe/models/kernels/common_attention.py:_common_kernel": "a Triton kernel is one program",
    "mpipipe/models/kernels/decode_attention.py:_decode_kernel": "a Triton kernel is one program",
    "mpipipe/models/kernels/prefill_attention.py:_prefill_kernel": "a Triton kernel is one program",
    "mpipipe/models/kernels/rotary.py:_rotate_kernel": "a Triton kernel is one program",
}
NESTING_EXCEPTIONS: dict[str, str] = {}
PARAMETERS_EXCEPTIONS: dict[str, str] = {
    "mpipipe/cli/main.py:_bench_experiment": "one per option of the command line, keyword-only",
    "mpipipe/cli/main.py:bench_throughput": "one per option of the command line, keyword-only",
    "mpipipe/cli/simulate.py:simulate": "one per option of the command line, keyword-only",
    "mpipipe/cli/main.py:plan": "one per option of the command line, keyword-only",
    "mpipipe/kv_cache/paged.py:PagedKVCache.allocate": "the shape of a cache, keyword-only",
    "mpipipe/models/kernels/decode_attention.py:paged_decode_attention": "four are keyword-only",
    "mpipipe/models/attention_bridge.py:_attention": "transformers' attention interface has them",
    "mpipipe/stage/worker.py:StageWorker.__init__": "wires a stage, keyword-only",
    "mpipipe/weights/loader.py:load_stage": "two lists of names and how each fits, keyword-only",
}
PRINT_EXCEPTIONS: dict[str, str] = {
    "mpipipe/runtime/ranks.py": "the last words of a rank that is about to abort the job",
}

# Words that say nothing, as a part of any name; and those that say nothing as the whole name.
EMPTY_WORDS = {"util", "utils", "manager", "handler", "helper", "helpers"}
EMPTY_NAMES = {"data", "info", "misc", "common", "core_utils"}

HEAVY = ("torch", "transformers", "mpi4py")
ACTS = {"open", "connect", "start", "mkdir", "read_text", "read_bytes", "write_text", "bind", "run"}
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
NESTING_NODES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try)


@dataclass(frozen=True)
class Function:
    """A function of the package and where it is."""

    name: str  # "path:Class.function"
    node: FunctionNode


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def functions_of(path: Path) -> list[Function]:
    def walk(node: ast.AST, prefix: str) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, FunctionNode):
                yield Function(f"{relative(path)}:{prefix}{child.name}", child)
                yield from walk(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, f"{prefix}{child.name}.")
            else:
                yield from walk(child, prefix)

    return list(walk(parse(path), ""))


FUNCTIONS = [function for path in MODULES for function in functions_of(path)]


def docstring_lines(node: FunctionNode) -> int:
    if ast.get_docstring(node, clean=False) is None:
        return 0
    first = node.body[0]
    return (first.end_lineno or first.lineno) - first.lineno + 1


def body_without_docstring(node: FunctionNode) -> list[ast.stmt]:
    return node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body


def nesting(statements: list[ast.stmt]) -> int:
    """Depth of compound statements; `elif` is as deep as its `if`; inner functions start anew."""
    depth = 0
    for statement in statements:
        if isinstance(statement, ast.Match):
            depth = max([depth, *(1 + nesting(case.body) for case in statement.cases)])
        elif isinstance(statement, NESTING_NODES):
            depth = max(depth, 1 + max(map(nesting, inner_blocks(statement))))
            if isinstance(statement, ast.If) and is_elif(statement):
                depth = max(depth, nesting(statement.orelse))
    return depth


def is_elif(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.If)
        and len(statement.orelse) == 1
        and isinstance(statement.orelse[0], ast.If)
    )


def inner_blocks(statement: ast.stmt) -> list[list[ast.stmt]]:
    blocks = [getattr(statement, "body", []), getattr(statement, "finalbody", [])]
    if not is_elif(statement):
        blocks.append(getattr(statement, "orelse", []))
    blocks.extend(handler.body for handler in getattr(statement, "handlers", []))
    return blocks


def top_level_names(tree: ast.Module) -> set[str]:
    """Names a module binds, those below `if TYPE_CHECKING:` and the like included."""
    names: set[str] = set()
    for statement in flat(tree.body):
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(statement.name)
            case ast.Import() | ast.ImportFrom():
                names.update(
                    (alias.asname or alias.name).split(".")[0] for alias in statement.names
                )
            case ast.Assign():
                for target in statement.targets:
                    names.update(node.id for node in ast.walk(target) if isinstance(node, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
            case _:
                pass
    return names


def flat(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in statements:
        yield statement
        if isinstance(statement, (ast.If, ast.Try)):
            for block in inner_blocks(statement):
                yield from flat(block)


def declared_all(tree: ast.Module) -> list[str] | None:
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "__all__" for target in statement.targets
        ):
            names = ast.literal_eval(statement.value)
            return [str(name) for name in names]
    return None


def words(name: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


@dataclass(frozen=True)
class Budget:
    """What is measured, how much is allowed, and who may have more."""

    limit: int
    sizes: dict[str, int]
    exceptions: dict[str, str]


def function_lines(node: FunctionNode) -> int:
    if is_kernel(node):  # its parameters take a line each
        return (node.end_lineno or 0) - body_without_docstring(node)[0].lineno + 1
    return (node.end_lineno or 0) - node.lineno + 1 - docstring_lines(node)


def is_kernel(node: FunctionNode) -> bool:
    """Whether the function is compiled for a GPU: `@triton.jit`, with options or without."""
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)


def num_parameters(node: FunctionNode) -> int:
    if is_kernel(node):  # pointers, strides and sizes one by one: they cannot be grouped
        return 0
    arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    return len([argument for argument in arguments if argument.arg not in {"self", "cls"}])


BUDGETS = {
    "file lines": Budget(
        MAX_FILE_LINES,
        {relative(path): len(path.read_text("utf-8").splitlines()) for path in MODULES},
        FILE_LINES_EXCEPTIONS,
    ),
    "function lines": Budget(
        MAX_FUNCTION_LINES,
        {function.name: function_lines(function.node) for function in FUNCTIONS},
        FUNCTION_LINES_EXCEPTIONS,
    ),
    "nesting": Budget(
        MAX_NESTING,
        {function.name: nesting(function.node.body) for function in FUNCTIONS},
        NESTING_EXCEPTIONS,
    ),
    "parameters": Budget(
        MAX_PARAMETERS,
        {function.name: num_parameters(function.node) for function in FUNCTIONS},
        PARAMETERS_EXCEPTIONS,
    ),
}


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUDGETS)
def test_sizes_are_within_the_budget(name: str) -> None:
    budget = BUDGETS[name]
    too_large = [
        f"{where} has {size} {name}, {budget.limit} allowed"
        for where, size in budget.sizes.items()
        if size > budget.limit and where not in budget.exceptions
    ]
    assert not too_large


@pytest.mark.parametrize("name", BUDGETS)
def test_exceptions_are_still_needed_and_have_a_reason(name: str) -> None:
    budget = BUDGETS[name]
    for where, reason in budget.exceptions.items():
        assert budget.sizes.get(where, 0) > budget.limit, f"{where} needs no exception"
        assert reason, where


def test_the_measures_measure() -> None:
    source = """
def f(self, a, /, b, *, c):
    '''Two
    lines.'''
    if a:
        pass
    elif b:
        with c:
            for d in c:
                pass
    try:
        pass
    except OSError:
        match a:
            case 1:
                while b:
                    if c:
                        pass
"""
    node = ast.parse(source).body[0]
    assert isinstance(node, FunctionNode)
    assert function_lines(node) == 15
    assert num_parameters(node) == 3
    assert nesting(node.body) == 4
    assert nesting(node.body[:2]) == 3


# ---- constructors --------------------------------------------------------------------------------


def constructor_faults(node: FunctionNode) -> list[str]:
    body = body_without_docstring(node)
    faults = []
    lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
    if lines > MAX_CONSTRUCTOR_LINES:
        faults.append(f"{lines} lines")
    faults.extend(
        f"line {statement.lineno}: {type(statement).__name__}"
        for statement in body
        if isinstance(statement, (ast.For, ast.While, ast.With, ast.Try))
    )
    for call in (part for part in ast.walk(node) if isinstance(part, ast.Call)):
        called = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        called = call.func.id if isinstance(call.func, ast.Name) else called
        if called in ACTS:
            faults.append(f"line {call.lineno}: calls {called}")
    return faults


def test_constructors_only_assign() -> None:
    faults = {
        function.name: found
        for function in FUNCTIONS
        if function.node.name == "__init__" and (found := constructor_faults(function.node))
    }
    assert not faults


# ---- names and docstrings ------------------------------------------------------------------------


def is_command(node: FunctionNode | ast.ClassDef) -> bool:
    """Whether a decorator such as `@app.command()` has handed the function over."""
    return any(
        isinstance(decorator, ast.Call)
        and isinstance(decorator.func, ast.Attribute)
        and decorator.func.attr in {"command", "callback"}
        for decorator in node.decorator_list
    )


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_module_says_what_it_is_and_what_it_offers(path: Path) -> None:
    tree = parse(path)
    assert ast.get_docstring(tree), "a module begins with a docstring"
    defined = {
        statement.name
        for statement in tree.body
        if isinstance(statement, (FunctionNode, ast.ClassDef))
        and not statement.name.startswith("_")
        and not is_command(statement)
    }
    offered = declared_all(tree)
    if offered is None:
        assert not defined, "a module that defines something public has __all__"
        return
    assert len(set(offered)) == len(offered), "__all__ names something twice"
    assert set(offered) <= top_level_names(tree), "__all__ names what is not there"
    assert defined <= set(offered), "public, but not in __all__: add it or give it an underscore"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_annotations_are_not_evaluated(path: Path) -> None:
    tree = parse(path)
    if path.name != "__main__.py" and any(
        isinstance(statement, (FunctionNode, ast.ClassDef)) for statement in tree.body
    ):
        assert any(
            isinstance(statement, ast.ImportFrom) and statement.module == "__future__"
            for statement in tree.body
        ), "from __future__ import annotations"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_names_say_something(path: Path) -> None:
    tree = parse(path)
    named = (FunctionNode, ast.ClassDef)
    names = [path.stem, *(node.name for node in ast.walk(tree) if isinstance(node, named))]
    outer = [path.stem, *(node.name for node in tree.body if isinstance(node, named))]
    assert not [name for name in names if words(name) & EMPTY_WORDS]
    assert not [name for name in outer if name.lower() in EMPTY_NAMES]


def test_only_the_command_line_prints() -> None:
    printing = [
        f"{relative(path)}:{node.lineno}"
        for path in MODULES
        if "cli" not in path.relative_to(ROOT).parts and relative(path) not in PRINT_EXCEPTIONS
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not printing


# ---- imports -------------------------------------------------------------------------------------


def heavy_modules_after(code: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after `code`."""
    report = f"\nimport sys; print('HEAVY', *(m for m in {HEAVY!r} if m in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code + report],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    "module", ["mpipipe", "mpipipe.cli.plan", "mpipipe.cli.logs_view", "mpipipe.cli.simulation_job"]
)
def test_importing_on_a_login_node_loads_nothing_heavy(module: str) -> None:
    assert heavy_modules_after(f"import {module}") == set()


def test_a_plan_for_other_gpus_loads_nothing_heavy() -> None:
    """So it takes a second on a login node: torch alone takes four."""
    code = (
        "from pathlib import Path\n"
        "from mpipipe.cli.plan import PlanRequest, plan_command\n"
        "request = PlanRequest(gpus='h100, 3 x t4', num_nodes=2)\n"
        "assert plan_command(Path('configs/shapes/llama3_8b'), [], request) == 0\n"
        "import sys; assert not {'numpy', 'rich', 'asyncio'} & set(sys.modules)"
    )
    assert heavy_modules_after(code) == set()


def test_the_help_text_loads_nothing_heavy() -> None:
    pytest.importorskip("typer")
    code = (
        "import sys; sys.argv = ['mpipipe', '--help']\n"
        "from mpipipe.cli.main import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code"
    )
    assert heavy_modules_after(code) == set()


@pytest.mark.parametrize("path", UNIT_TESTS, ids=relative)
def test_unit_tests_need_neither_torch_nor_mpi(path: Path) -> None:
    imported = {
        name.split(".")[0] for node in ast.walk(parse(path)) for name in imported_names(node)
    }
    assert not imported & set(HEAVY)


def imported_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
        return [node.module]
    return []
