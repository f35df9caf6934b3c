"""Failures of torch.compile, explained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cache_tools.errors import RecipeError


@contextmanager
def explain_compiler_failure(what: str, where: str) -> Iterator[None]:
    """Inside, a failure of torch's compiler becomes an error that says what a user can do about it.

    Args:
        what: what is compiled, with its verb: `the student and its loss cannot be compiled`.
        where: names, device, and the option that asks for it.

    Raises:
        RecipeError: it cannot be compiled here.
    """
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        raise RecipeError(
            what,
            where=where,
            found=(str(error).splitlines() or [type(error).__name__])[0][:200],
            next_step="use --compile off; if an earlier compilation was killed, delete what it left first "
            "(TORCHINDUCTOR_CACHE_DIR, by default torchinductor_USER among the temporary files)",
        ) from error
