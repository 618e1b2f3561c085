"""Reads a set expression such as ``stage(4) - batch_norm()`` without evaluating any code."""

import ast
from collections.abc import Callable, Mapping
from typing import Any

from flaxtransfer.paths import suggest

__all__ = ["read"]


def read(text: str, functions: Mapping[str, Callable[..., Any]]) -> Any:
    """The value of an expression of these functions, their arguments, and ``& | - ~``.

    Args:
      text: the expression. Arguments are ints and strings, by position.
      functions: what the names in it mean. Their results are combined by their own operators.

    Returns:
      Whatever the functions and operators return.

    Raises:
      ValueError: anything else in the text, an unknown function, or a function that refuses its
        arguments; the text says which.

    >>> read("odd() | upto(4)", {"odd": lambda: {1, 3, 5}, "upto": lambda n: set(range(n + 1))})
    {0, 1, 2, 3, 4, 5}
    """

    def refuse(what: str) -> ValueError:
        return ValueError(f"{text!r}: {what}")

    def value(node: ast.expr) -> Any:
        match node:
            case ast.BinOp(left, ast.BitAnd(), right):
                return value(left) & value(right)
            case ast.BinOp(left, ast.BitOr(), right):
                return value(left) | value(right)
            case ast.BinOp(left, ast.Sub(), right):
                return value(left) - value(right)
            case ast.UnaryOp(ast.Invert(), operand):
                return ~value(operand)
            case ast.Call(ast.Name(name), arguments, []):
                return call(name, [argument(each) for each in arguments])
            case ast.Name(name):
                raise refuse(f"{name} must be called, as in {name}()" + suggest(name, functions))
        raise refuse(
            f"{ast.unparse(node)!r} is none of: a call of {', '.join(functions)}; & | - ~; brackets"
        )

    def argument(node: ast.expr) -> int | str:
        match node:
            case ast.Constant(bool()):  # An int to Python, and no argument of ours.
                pass
            case ast.Constant(int() | str() as constant):
                return constant
        raise refuse(f"arguments are ints and strings, not {ast.unparse(node)!r}")

    def call(name: str, arguments: list[int | str]) -> Any:
        if name not in functions:
            known = ", ".join(functions)
            raise refuse(f"no function is called {name!r}{suggest(name, functions)} (of {known})")
        try:
            return functions[name](*arguments)
        except (TypeError, ValueError) as error:
            raise refuse(str(error)) from error

    if not isinstance(text, str):
        raise ValueError(f"an expression is a string, not {text!r}")
    try:
        return value(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError as error:
        raise refuse(f"no expression ({error.msg})") from error
    except (RecursionError, MemoryError) as error:
        raise refuse("too deeply nested to be read") from error
