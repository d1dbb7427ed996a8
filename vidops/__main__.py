"""``vidops`` and ``python -m vidops``: the report, and the commands classify, segment, train-slots and validate."""

from __future__ import annotations

import sys


def main(argv: list[str] | None = None) -> int:
    """No argument: what is ready on this machine and why the rest is not."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "validate":
        from vidops.validation import main as validate

        return validate(argv[1:])
    if argv and argv[0] in ("classify", "segment", "train-slots"):
        try:
            if argv[0] == "classify":
                from vidops.classify import main as run
            elif argv[0] == "segment":
                from vidops.segment import main as run
            else:
                from vidops.train_slots import main as run
        except ModuleNotFoundError as error:
            print(f"vidops {argv[0]}: needs {error.name} (pip install 'vidops[demo]')", file=sys.stderr)
            return 2
        return run(argv[1:])
    if argv:
        known = "classify, segment, train-slots, validate, or nothing for the report"
        print(f"vidops: unknown command {argv[0]!r}; expected {known}", file=sys.stderr)
        return 2
    from vidops._report import report

    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
