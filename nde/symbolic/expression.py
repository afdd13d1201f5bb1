r"""Formulas outside the search: text, sympy, and vector fields that solve, train and save.

An `Expression` keeps its tokens as text and its constants as an array, so that it is compiled as the
formula it is; the array is what `nde.fit` trains. As text it is Python with `**` left out: `x / (1.0 + x)`,
`sin(q)`, `square(x)`, every constant with the digits that give the same number back.

A saved field is its text: `Field.parse(str(expression), ...)` gives the same numbers. Arrays alone are
saved by `equinox.tree_serialise_leaves`, into a field of the same formulas.
"""

import ast
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from nde.symbolic.operators import OPERATORS, finite
from nde.symbolic.tape import CONSTANT, FIRST_VARIABLE, PAD, Language

__all__ = ["Expression", "Field"]

NUMBER = "#"  # the token of a constant


class Expression(eqx.Module):
    """A formula. Made by `Expression.parse`, or by a search.

    Args:
        constants: Its constants in the order of the text, shape (constants,).
        tokens: Postfix; a variable or an operator by name, a constant as "#".
        variables: The names that a call gives values to, in order.
    """

    constants: Float[Array, " constants"]
    tokens: tuple[str, ...] = eqx.field(static=True)
    variables: tuple[str, ...] = eqx.field(static=True)

    @staticmethod
    def parse(text: str, variables: Sequence[str]) -> "Expression":
        """The formula in a text such as "x / (1.0 + x)".

        Args:
            text: Of the operators of `nde.symbolic.OPERATORS`, variables and numbers.
            variables: The names it may use.

        Raises:
            ValueError: for anything else in it.
        """
        tokens, constants = [], []
        try:
            _read(ast.parse(text, mode="eval").body, tuple(variables), tokens, constants)
        except SyntaxError as error:
            raise ValueError(f"`text` is {text!r}, which is no formula: {error.msg}.") from error
        return Expression(jnp.asarray(constants, dtype=float), tuple(tokens), tuple(variables))

    def __call__(self, *values: Float[Array, "..."]) -> Float[Array, "..."]:
        """The value, of the shape of the `values`, one array per variable; NaN where it is undefined."""
        known, numbers = (
            dict(zip(self.variables, values, strict=True)),
            iter(range(len(self.tokens))),
        )
        like = jnp.asarray(values[0]) if values else jnp.zeros((), self.constants.dtype)

        def leaf(token):
            if token == NUMBER:
                return jnp.broadcast_to(
                    self.constants[next(numbers)].astype(like.dtype), like.shape
                )
            return jnp.asarray(known[token])

        return self._folded(leaf, lambda name, *x: finite(OPERATORS[name].function(*x)))

    def __str__(self) -> str:
        numbers = iter(np.asarray(self.constants).tolist())
        leaf = lambda token: repr(next(numbers)) if token == NUMBER else token
        text = self._folded(leaf, _written)
        return text[1:-1] if text.startswith("(") and _is_closed(text) else text

    @property
    def complexity(self) -> int:
        """The number of tokens."""
        return len(self.tokens)

    def sympy(self, digits: int | None = None) -> Any:
        """The formula as a sympy expression (extra `symbolic`), unsimplified where sympy lets it.

        Args:
            digits: Significant digits of the constants; None for all.
        """
        try:
            import sympy
        except ImportError as error:
            raise ImportError("`sympy` needs sympy: python -m pip install sympy.") from error
        meaning = {
            "+": lambda a, b: a + b,
            "-": lambda a, b: a - b,
            "*": lambda a, b: a * b,
            "/": lambda a, b: a / b,
            "neg": lambda a: -a,
            "abs": sympy.Abs,
            "square": lambda a: a**2,
            "cube": lambda a: a**3,
        }
        numbers = iter(np.asarray(self.constants).tolist())
        symbols = {name: sympy.Symbol(name, real=True) for name in self.variables}
        number = lambda x: sympy.Float(x if digits is None else float(f"{x:.{digits}g}"))
        leaf = lambda token: number(next(numbers)) if token == NUMBER else symbols[token]
        apply = lambda name, *x: meaning.get(name, getattr(sympy, name, None))(*x)
        return self._folded(leaf, apply)

    def _folded(self, leaf: Callable, apply: Callable) -> Any:
        """The value of the tape, with any meaning of leaves and operators."""
        stack = []
        for token in self.tokens:
            arity = OPERATORS[token].arity if token in OPERATORS else 0
            arguments = [stack.pop() for _ in range(arity)][::-1]
            stack.append(apply(token, *arguments) if arity else leaf(token))
        return stack.pop()


class Field(eqx.Module):
    """Formulas as a vector field, `field(t, y, args) -> dy`.

    For `nde.NeuralODE`, or in the place of the network of an `nde.HybridODE`.

    Args:
        expressions: One per entry of the output.
        time: Whether the last variable is the time.
    """

    expressions: tuple[Expression, ...]
    time: bool = eqx.field(default=False, static=True)

    @staticmethod
    def parse(texts: Sequence[str], variables: Sequence[str], *, time: bool = False) -> "Field":
        """A field from texts, one per entry of the output, as in `Expression.parse`."""
        return Field(tuple(Expression.parse(text, variables) for text in texts), time)

    def __call__(
        self, t: Float[Array, ""], y: Float[Array, " channels"], args: PyTree[Any] = None
    ) -> Float[Array, " out"]:
        """The values at time `t` and state `y`, whose entries are the variables."""
        del args
        values = [*y, jnp.asarray(t, y.dtype)] if self.time else list(y)
        wanted = len(self.expressions[0].variables)
        if len(values) != wanted:
            raise ValueError(
                f"`y0` has {len(values) - self.time} entries; the formulas have the variables "
                f"{self.expressions[0].variables}."
            )
        return jnp.stack([expression(*values) for expression in self.expressions])

    def __str__(self) -> str:
        return "\n".join(map(str, self.expressions))


def from_tape(language: Language, codes: np.ndarray, constants: np.ndarray) -> Expression:
    """The formula of a tape."""
    names = ["", NUMBER, *language.variables, *language.operators]
    codes, constants = np.asarray(codes), np.asarray(constants)
    tokens = tuple(names[code] for code in codes if code != PAD)
    return Expression(jnp.asarray(constants[codes == CONSTANT]), tokens, language.variables)


def to_tape(language: Language, expression: Expression) -> tuple[np.ndarray, np.ndarray]:
    """Codes and constants of a formula.

    Raises:
        ValueError: if it is longer than a tape, or has what the language lacks.
    """
    if expression.complexity > language.length:
        raise ValueError(
            f"`{expression}` has {expression.complexity} tokens but a tape has {language.length}; raise "
            "`length`."
        )
    names = {NUMBER: CONSTANT}
    for code, name in enumerate((*language.variables, *language.operators), FIRST_VARIABLE):
        names[name] = code
    unknown = [token for token in expression.tokens if token not in names]
    if unknown:
        raise ValueError(f"`{expression}` has {unknown}, which the language has not.")
    codes = np.full(language.length, PAD, np.int32)
    codes[: expression.complexity] = [names[token] for token in expression.tokens]
    constants = np.zeros(language.length, expression.constants.dtype)
    constants[codes == CONSTANT] = expression.constants
    return codes, constants


_BINARY = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


def _read(node: ast.expr, variables: tuple[str, ...], tokens: list[str], constants: list) -> None:
    """Append the tokens of a syntax tree."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        tokens.append(NUMBER)
        constants.append(float(node.value))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        if isinstance(node.operand, ast.Constant):
            _read(ast.Constant(-node.operand.value), variables, tokens, constants)
        else:
            _read(node.operand, variables, tokens, constants)
            tokens.append("neg")
    elif isinstance(node, ast.Name) and node.id in variables:
        tokens.append(node.id)
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        _read(node.left, variables, tokens, constants)
        _read(node.right, variables, tokens, constants)
        tokens.append(_BINARY[type(node.op)])
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 1:
        name = node.func.id
        if name not in OPERATORS or OPERATORS[name].arity != 1:
            raise ValueError(f"`text` has {name}(...); the functions are {_functions()}.")
        _read(node.args[0], variables, tokens, constants)
        tokens.append(name)
    else:
        raise ValueError(
            f"`text` has {ast.unparse(node)!r}; a formula has numbers, the variables {variables}, "
            f"+ - * / and {_functions()}."
        )


def _functions() -> str:
    return ", ".join(name for name, operator in OPERATORS.items() if operator.arity == 1)


def _written(name: str, *arguments: str) -> str:
    if len(arguments) == 1:
        inner = arguments[0]
        return f"{name}{inner}" if _is_closed(inner) else f"{name}({inner})"
    return f"({arguments[0]} {name} {arguments[1]})"


def _is_closed(text: str) -> bool:
    """Whether one pair of parentheses holds all of the text."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return letter == ")" and at == len(text) - 1 and text[0] == "("
    return False
