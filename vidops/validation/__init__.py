"""Golden files through every backend: ``python -m vidops validate DIR``."""

from vidops.validation.case import Case, Check

__all__ = ["Case", "Check", "main"]


def main(argv: list[str]) -> int:
    """The command; loaded on demand because it pulls the models in."""
    from vidops.validation.command import main as run

    return run(argv)
