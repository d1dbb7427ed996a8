"""``vidops`` and ``python -m vidops``: the report, and the commands segment and validate."""

from __future__ import annotations

import sys


def main(argv: list[str] | None = None) -> int:
    """No argument: what is ready on this machine and why the rest is not."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "validate":
        from vidops.validation import main as validate

        return validate(argv[1:])
    if argv and argv[0] == "segment":
        try:
            from vidops.segment import main as segment
        except ModuleNotFoundError as error:
            print(f"vidops segment: needs {error.name} (pip install 'vidops[demo]')", file=sys.stderr)
            return 2
        return segment(argv[1:])
    if argv:
        known = "segment, validate, or nothing for the report"
        print(f"vidops: unknown command {argv[0]!r}; expected {known}", file=sys.stderr)
        return 2
    from vidops._report import report

    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
