"""Illegal calls: the same exception type as torch, words that tell what is wrong, and never a crash."""

import pathlib
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import illegal
import myconv
import myconv.functional

# torch warns that nested and quantized tensors are prototypes, and of its padded copy for an even kernel.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def library(functions, classes) -> dict:
    return {
        **{name: getattr(functions, name) for name in illegal.FUNCTIONS},
        **{name: getattr(classes, name) for name in illegal.CLASSES},
    }


TORCH = library(F, torch.nn)
MYCONV = library(myconv.functional, myconv)


def rows(table: list) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", table, ids=[row.id for row in table])


def refusal(row: tuple, what: str, call: Callable, error: type | tuple, words: list) -> None:
    """`call()` must raise an `error`, and its message must contain all words."""
    context = f"\n  {what}"
    try:
        result = call()
    except Exception as caught:
        exception = caught
    else:
        shape = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
        pytest.fail(f"{row.id}: accepted, {shape} came back.{context}", pytrace=False)
    message = f"{type(exception).__name__}: {exception}"
    # Exactly the type, not a subclass; with several types allowed, any of them.
    if type(exception) is not error and not (isinstance(error, tuple) and isinstance(exception, error)):
        pytest.fail(f"{row.id}: expected {error}, got\n  {message}{context}", pytrace=False)
    wanted = [word for some in words for word in (some if isinstance(some, tuple) else (some,))]
    patterns = [re.escape(word) if isinstance(word, str) else word for word in wanted]
    missing = [
        word if isinstance(word, str) else f"/{word.pattern}/"
        for word, pattern in zip(wanted, patterns)
        if not re.search(pattern, str(exception))
    ]
    if missing:
        lacks = "\n  ".join(missing)
        pytest.fail(f"{row.id}: the message\n  {message}\nlacks\n  {lacks}{context}", pytrace=False)


def evaluate(row: illegal.Row | illegal.Unsafe, names: dict) -> Callable:
    return lambda: eval(row.call, illegal.vocabulary(names))


@pytest.mark.skipif(
    not (2, 13) <= torch.__version__ < (2, 14),
    reason="the words are those of torch 2.13; other releases word some differently, and 2.11 aborts on one call",
)
@rows(illegal.CALLS)
def test_torch_refuses(row):
    refusal(row, f"torch: {row.call}", evaluate(row, TORCH), row.error, [row.words])


@rows(illegal.CALLS)
def test_myconv_refuses(row):
    refusal(row, f"myconv: {row.call}", evaluate(row, MYCONV), row.error, [row.words, row.ours])


@rows(illegal.TORCH_UNSAFE)
def test_myconv_refuses_what_torch_does_not(row):
    what = f"myconv: {row.call}   ({row.torch_does})"
    refusal(row, what, evaluate(row, MYCONV), row.error, [row.ours])


@rows(illegal.EXTENSIONS)
def test_myconv_refuses_extensions(row):
    refusal(row, f"myconv: {row.call}", evaluate(row, MYCONV), row.error, [row.ours])


@rows(illegal.ACCEPTED)
def test_myconv_accepts(row):
    """What torch refuses and myconv runs is this list and no more, and the documentation has all of it."""
    assert isinstance(evaluate(row, MYCONV)(), (torch.Tensor, torch.nn.Module))
    with pytest.raises(row.error):
        evaluate(row, TORCH)()
    page = (pathlib.Path(__file__).parent.parent / "docs" / "padding.md").read_text(encoding="utf-8")
    assert any(f"`{row.call}`" in page.replace("#", rank) for rank in "0123"), "docs/padding.md does not list it"


# ---- the operators


def call_operator(op: str, change: dict, device: str) -> object:
    arguments = {**illegal.LEGAL[op], **change}
    return getattr(torch.ops.myconv, op)(
        **{
            name: value.to(device) if isinstance(value, torch.Tensor) and device != "cpu" else value
            for name, value in arguments.items()
            if value is not illegal.MISSING
        }
    )


@pytest.mark.parametrize("device", list(illegal.OPERATORS))
@pytest.mark.parametrize("op", list(illegal.LEGAL))
def test_unchanged_operator_call_is_legal(op, device):
    """Otherwise the rows below would be refused for another reason than theirs."""
    call_operator(op, {}, device)


def _refuses(row: illegal.Operator, device: str) -> None:
    change = {
        name: f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else value
        for name, value in row.change.items()
    }
    what = f"torch.ops.myconv.{row.op}, on {device}, legal but for {change}; see LEGAL in tests/illegal.py"
    errors = (RuntimeError, ValueError)
    refusal(row, what, lambda: call_operator(row.op, row.change, device), errors, [row.ours])


@rows(illegal.OPERATORS["cpu"])
def test_operator_refuses(row):
    _refuses(row, "cpu")


@rows(illegal.OPERATORS["meta"])
def test_operator_refuses_meta(row):
    _refuses(row, "meta")


# ---- the tables themselves


def test_base_calls_are_legal():
    """Each row changes one thing of these; with autograd, since it runs other checks."""
    for functions in (TORCH, MYCONV):
        for rank in (1, 2, 3):
            for function, weight in ((f"conv{rank}d", f"w{rank}"), (f"conv_transpose{rank}d", f"v{rank}")):
                call = f"{function}(x{rank}, {weight}, t(6))"
                names = illegal.vocabulary(functions)
                assert eval(call, names).shape[1] == 6, call
                names[f"x{rank}"].requires_grad_()
                eval(call, names).sum().backward()


def test_tables_are_what_they_say():
    tables = (illegal.CALLS, illegal.TORCH_UNSAFE, illegal.ACCEPTED, illegal.EXTENSIONS, *illegal.OPERATORS.values())
    for table in tables:
        names = [row.id for row in table]
        assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})
        assert not [name for name in names if re.search(r"[#\s]", name)]
    assert len(illegal.CALLS) >= 220


def test_a_refused_call_leaves_nothing_behind():
    """A call that fails in the middle of checking must not change the tensors nor the calls that follow."""
    x, w, b = torch.randn(2, 4, 8, 8), torch.randn(6, 4, 3, 3), torch.randn(6)
    before = [value.clone() for value in (x, w, b)]
    expected = myconv.functional.conv2d(x, w, b, padding=1)
    for keywords in ({"stride": 0}, {"groups": 3}, {"padding": "full"}, {"dilation": 9}, {"padding": 2**62}):
        with pytest.raises(RuntimeError):
            myconv.functional.conv2d(x, w, b, **keywords)
        assert torch.equal(myconv.functional.conv2d(x, w, b, padding=1), expected), keywords
    for value, old in zip((x, w, b), before):
        assert torch.equal(value, old)
