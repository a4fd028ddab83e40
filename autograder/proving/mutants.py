"""Automatic mutants: a solution with one small thing changed, as a slip of the pen would. A good check rejects them all."""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

SWAPPED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
"""Operators, and what stands in their place."""

REMOVABLE = (ast.Expr, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Raise, ast.For, ast.With, ast.If, ast.Assert)


@dataclass(frozen=True)
class Mutant:
    """A changed solution.

    Attributes:
        change: what was changed, in one line: the old code, an arrow, the new.
        source: all of it.
    """

    change: str
    source: str


def mutants(source: str) -> Iterator[Mutant]:
    """Yield every mutant of a piece of source: one operator, number, condition, argument or statement changed in each.

    Docstrings, annotations and the messages of errors stay: no check looks at them.
    """
    tree = ast.parse(source)
    seen = {ast.unparse(tree)}
    for path in _places(tree):
        for new in _replacements(_at(tree, path)):
            changed = copy.deepcopy(tree)
            old = _at(changed, path)
            _put(changed, path, new)
            text = ast.unparse(ast.fix_missing_locations(changed))
            if text not in seen:
                seen.add(text)
                yield Mutant(f"{_line(old)}  ->  {_line(new)}", text)


Path = tuple[tuple[str, int | None], ...]
"""How to get from the root to a node: the names of fields, with the index where a field is a list."""


def _places(node: ast.AST, path: Path = ()) -> Iterator[Path]:
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "type_params", "decorator_list") or isinstance(node, ast.Raise):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.expr_context) or not isinstance(child, ast.AST):
                continue
            docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if not docstring:
                yield (*path, (name, index))
                yield from _places(child, (*path, (name, index)))


def _at(tree: ast.AST, path: Path) -> ast.AST:
    for name, index in path:
        tree = getattr(tree, name) if index is None else getattr(tree, name)[index]
    return tree


def _put(tree: ast.AST, path: Path, new: ast.AST) -> None:
    *before, (name, index) = path
    parent = _at(tree, tuple(before))
    if index is None:
        setattr(parent, name, new)
    else:
        getattr(parent, name)[index] = new


def _replacements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what may stand in a node's place."""
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in SWAPPED:
        yield _with(node, op=SWAPPED[type(node.op)]())
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult | ast.Sub | ast.Div):
        yield _with(node, left=node.right, right=node.left)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
        yield _with(node, ops=[SWAPPED[type(node.ops[0])](), *node.ops[1:]])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield ast.Constant(not node.value)
        elif isinstance(node.value, int | float):
            yield ast.Constant(node.value + 1)
        elif isinstance(node.value, str) and node.value:
            yield ast.Constant(node.value + "x")
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        yield _with(node, test=ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.Call):
        for number in range(len(node.keywords)):
            yield _with(node, keywords=[*node.keywords[:number], *node.keywords[number + 1 :]])
        if len(node.args) == 1 and isinstance(node.func, ast.Name | ast.Attribute) and not node.keywords:
            yield node.args[0]
    if isinstance(node, ast.Return) and node.value is not None:
        yield ast.Return(ast.Constant(None))
    if isinstance(node, REMOVABLE):
        yield ast.Pass()
    if isinstance(node, ast.Attribute) and node.attr == "T":
        yield node.value


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.deepcopy(node)
    for name, value in fields.items():
        setattr(changed, name, copy.deepcopy(value))
    return changed


def _line(node: ast.AST) -> str:
    return " ".join(ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).split())[:100]
