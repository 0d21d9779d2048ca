"""Try a reader's function, and print one line that helps."""

import operator

import torch

SEED = 4  # of torch's random numbers, before each call of the reader's function


def try_out(name, function, cases, same=operator.eq) -> bool:
    """True if the function gives what is expected in every case; prints one line.

    `cases` is a list of (arguments, expected). If the function raises, it says so.
    """
    for arguments, expected in cases:
        torch.manual_seed(SEED)
        tensors = [one for one in arguments if isinstance(one, torch.Tensor)]
        before = [tensor.clone() for tensor in tensors]
        try:
            yours = function(*arguments)
            if not all(map(torch.equal, tensors, before)):
                fault = "changes the tensor that it is given; return a new one"
            elif yours is None or yours is ...:
                fault = "returns nothing; write its body above"
            elif _agree(same, yours, expected):
                continue
            else:
                place = _where(yours, expected)
                fault = f"gives yours {_short(yours, place)}, "
                fault += f"expected {_short(expected, place)}"
                kinds = [getattr(one, "dtype", None) for one in (yours, expected)]
                if None not in kinds and len(set(kinds)) > 1:
                    fault += f" (yours is {kinds[0]}, expected {kinds[1]})"
        except Exception as error:  # a reader's function may raise anything
            fault = f"raises {type(error).__name__}: {error}"
        call = f"{function.__name__}({', '.join(map(_short, arguments))})"
        print(f"{name}: not yet: {call} {fault}")
        return False
    print(f"{name}: right, in {len(cases)} of {len(cases)} cases")
    return True


def _agree(same, yours, expected) -> bool:
    try:
        return bool(same(yours, expected))
    except Exception:  # of another type than what can be compared
        return False


def _where(yours, expected) -> int:
    """The first place in flat order where two tensors of a shape differ, or else 0."""
    both = isinstance(yours, torch.Tensor) and isinstance(expected, torch.Tensor)
    if not both or yours.shape != expected.shape:
        return 0
    return int((yours != expected).flatten().int().argmax())


def _short(value, start=0) -> str:
    if isinstance(value, torch.Tensor) and value.numel() > 4:
        shown = value.flatten()[start : start + 4].tolist()
        before = "..., " if start else ""
        numbers = ", ".join(f"{number:.4g}" for number in shown)
        return f"tensor of {tuple(value.shape)}: [{before}{numbers}, ...]"
    if isinstance(value, tuple):
        return f"({', '.join(map(_short, value))})"
    if callable(value):
        return getattr(value, "__name__", "a function")  # repr holds an address
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:100]} ... {text[-50:]}"


def near(yours, expected) -> bool:
    """True where two tensors, or two tuples of them, agree to fp32's precision."""
    if isinstance(expected, tuple):
        return len(yours) == len(expected) and all(map(near, yours, expected))
    yours = torch.as_tensor(yours)
    return yours.shape == expected.shape and torch.allclose(
        yours.float(), expected, rtol=1e-4, atol=1e-6
    )
